"""Download, checks and stand-ins of TotalSegmentator's weights, against a server on this machine only."""

from __future__ import annotations

import hashlib
import io
import json
import os
import socket
import stat
import subprocess
import sys
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from helpers import ROOT

from nnslim.errors import ConfigError, DownloadError, HostError, OutputError
from nnslim.files import write_json
from nnslim.hosts.totalseg import fetch as fetch_module
from nnslim.hosts.totalseg import stand_in as standin
from nnslim.hosts.totalseg import task_weights as weights
from nnslim.hosts.totalseg.fetch import fetch, unpack_dataset

pytest.importorskip("totalsegmentator")
requests = pytest.importorskip("requests")

NAME = "Dataset297_TotalSegmentator_total_3mm_1559subj"
MODEL = "nnUNetTrainer_4000epochs_NoMirroring__nnUNetPlans__3d_fullres"
ZIP = f"/v2.0.0-weights/{NAME}.zip"
SCRIPT = ROOT / "scripts" / "00_setup_ts.py"
CONTENT = {
    f"{NAME}/{MODEL}/plans.json": b'{"plans_name": "nnUNetPlans"}',
    f"{NAME}/{MODEL}/fold_0/checkpoint_final.pth": bytes(range(256)) * 400,
}


def make_zip(entries: dict[str, bytes], links: dict[str, str] | None = None) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, body in entries.items():
            archive.writestr(zipfile.ZipInfo(name), body)
        for name, goal in (links or {}).items():
            info = zipfile.ZipInfo(name)
            info.create_system = 3
            info.external_attr = (stat.S_IFLNK | 0o777) << 16
            archive.writestr(info, goal)
    return buffer.getvalue()


class Handler(BaseHTTPRequestHandler):
    """Serves `server.bodies`; the attributes of the server say how badly."""

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        server, body = self.server, self.server.bodies.get(self.path)
        wanted, condition = self.headers.get("Range"), self.headers.get("If-Range")
        seen = {"path": self.path, "range": wanted, "if_range": condition, "sent": 0}
        server.log.append(seen)
        if server.failures:
            server.failures -= 1
            return self.reply(503, {}, b"")
        if body is None:
            return self.reply(404, {}, b"no such file")
        headers = {"ETag": server.etag} if server.etag else {}
        begin = 0
        if wanted and server.ranges and (not server.if_range or condition == server.etag):
            begin = int(wanted.removeprefix("bytes=").removesuffix("-"))
            if begin >= len(body):
                return self.reply(416, {**headers, "Content-Range": f"bytes */{len(body)}"}, b"")
            headers["Content-Range"] = f"bytes {begin}-{len(body) - 1}/{len(body)}"
        end = min(len(body), begin + server.cut) if server.cut else len(body)
        seen["sent"] = end - begin
        self.reply(206 if "Content-Range" in headers else 200, headers, body[begin:end], len(body) - begin)

    def reply(self, status, headers, body, length=None):
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(body) if length is None else length)}.items():
            self.send_header(key, value)
        self.end_headers()
        self.wfile.write(body)
        self.close_connection = True

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    made = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    made.bodies, made.log, made.etag = {ZIP: make_zip(CONTENT)}, [], '"one"'
    made.ranges, made.if_range, made.cut, made.failures = True, True, 0, 0
    made.url = f"http://127.0.0.1:{made.server_port}"
    thread = threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    yield made
    made.shutdown()
    made.server_close()


@pytest.fixture(autouse=True)
def away_from_home(monkeypatch, tmp_path):
    for name in ("NNSLIM_TS_URL", "TOTALSEG_WEIGHTS_PATH", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("TOTALSEG_HOME_DIR", str(tmp_path / "home"))
    monkeypatch.setattr(fetch_module.time, "sleep", lambda _: None)


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "weights"


@pytest.fixture
def closed_url():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return f"http://127.0.0.1:{port}"


def files_of(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def assert_in_place(folder: Path, target: Path) -> None:
    """The whole content and the record are there, and nothing else."""
    assert target == folder / NAME
    for name, body in CONTENT.items():
        assert (folder / name).read_bytes() == body
    assert files_of(folder) == {*CONTENT, f"{NAME}.nnslim.json"}
    assert {path.name for path in folder.iterdir()} == {NAME, f"{NAME}.nnslim.json"}


def leave_part(server, folder: Path, length: int = 40_000) -> int:
    """Make a download whose connection was cut after `length` bytes; return how many of them were kept."""
    server.cut = length
    with pytest.raises(DownloadError, match="could not fetch"):
        weights.download(297, folder, base_url=server.url, retries=0)
    server.cut = 0
    server.log.clear()
    kept = (folder / f"{NAME}.zip.part").read_bytes()
    # The HTTP client may drop the last, unfinished chunk.
    assert length - 20_000 < len(kept) <= length and kept == server.bodies[ZIP][: len(kept)]
    assert not (folder / NAME).exists()
    return len(kept)


# Where weights live and come from


def test_weights_folder_follows_totalsegmentator(monkeypatch, tmp_path):
    from totalsegmentator.config import get_weights_dir

    assert weights.weights_folder() == get_weights_dir() == tmp_path / "home/nnunet/results"
    monkeypatch.delenv("TOTALSEG_HOME_DIR")
    assert weights.weights_folder() == get_weights_dir()
    monkeypatch.setenv("TOTALSEG_WEIGHTS_PATH", str(tmp_path / "elsewhere"))
    assert weights.weights_folder() == get_weights_dir() == tmp_path / "elsewhere"


def test_task_source_reads_table_and_overrides(monkeypatch):
    assert weights.task_source(297) == (NAME, f"{weights.RELEASES}{ZIP}")
    monkeypatch.setenv("NNSLIM_TS_URL", "http://mirror/")
    assert weights.task_source(297)[1] == f"http://mirror{ZIP}"
    assert weights.task_source(297, base_url="http://other")[1] == f"http://other{ZIP}"


@pytest.mark.parametrize(
    "task, error, text", [(301, DownloadError, "licence"), (7, HostError, "no weights for task 7")]
)
def test_task_source_without_download_is_refused(task, error, text):
    with pytest.raises(error, match=text):
        weights.task_source(task)


def test_task_source_todo_or_missing_table_is_refused(monkeypatch):
    from totalsegmentator import map_tasks_config

    monkeypatch.setattr(map_tasks_config, "TASK_ID_WEIGHTS_CONFIGS", {1: {"foldername": "D", "version": "TODO"}})
    with pytest.raises(DownloadError, match="not published"):
        weights.task_source(1)
    monkeypatch.delattr(map_tasks_config, "TASK_ID_WEIGHTS_CONFIGS")
    with pytest.raises(HostError, match="pip install -U TotalSegmentator"):
        weights.task_source(297)


# Download


def test_download_unpacks_and_records(server, folder, caplog):
    steps = []
    target = weights.download(297, folder, base_url=server.url, progress=lambda *step: steps.append(step))
    assert_in_place(folder, target)
    body = server.bodies[ZIP]
    record = json.loads((folder / f"{NAME}.nnslim.json").read_text())
    assert record["sha256"] == hashlib.sha256(body).hexdigest() and record["size"] == len(body)
    assert record["checked"] == "length and CRC only" and "only length and zip CRCs" in caplog.text
    assert steps[-1] == (len(body), len(body))
    assert [entry["range"] for entry in server.log] == [None]


def test_download_right_checksum_is_accepted(server, folder, caplog):
    digest = hashlib.sha256(server.bodies[ZIP]).hexdigest()
    assert_in_place(folder, weights.download(297, folder, base_url=server.url, sha256=f"sha256:{digest.upper()}"))
    assert "only length" not in caplog.text


def test_download_wrong_checksum_leaves_nothing(server, folder):
    with pytest.raises(DownloadError, match=r"0{64} is expected \(given by the user\)"):
        weights.download(297, folder, base_url=server.url, sha256="0" * 64)
    assert list(folder.iterdir()) == []
    with pytest.raises(ConfigError, match="64 hexadecimal"):
        weights.download(297, folder, base_url=server.url, sha256="abc")


def test_download_differing_from_record_is_refused(server, folder):
    write_json(folder_made(folder) / f"{NAME}.nnslim.json", {"url": server.url + ZIP, "sha256": "1" * 64})
    with pytest.raises(DownloadError, match="recorded in"):
        weights.download(297, folder, base_url=server.url)
    assert not (folder / NAME).exists()


def folder_made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def test_download_resumes_cut_part(server, folder):
    kept = leave_part(server, folder)
    assert_in_place(folder, weights.download(297, folder, base_url=server.url))
    (entry,) = server.log
    assert entry["range"] == f"bytes={kept}-" and entry["if_range"] == '"one"'
    assert entry["sent"] == len(server.bodies[ZIP]) - kept


def test_download_cut_in_every_attempt_goes_on_each_time(server, folder):
    server.cut = 30_000
    assert_in_place(folder, weights.download(297, folder, base_url=server.url, retries=8))
    begins = [int((entry["range"] or "bytes=0-")[6:-1]) for entry in server.log]
    assert len(begins) >= 4 and begins[0] == 0 and begins == sorted(set(begins))


def test_download_after_server_errors_succeeds(server, folder):
    server.failures = 2
    assert_in_place(folder, weights.download(297, folder, base_url=server.url, retries=2))
    assert len(server.log) == 3


def test_download_complete_part_asks_for_nothing_more(server, folder):
    part = folder_made(folder) / f"{NAME}.zip.part"
    fetch(server.url + ZIP, part)
    server.log.clear()
    assert_in_place(folder, weights.download(297, folder, base_url=server.url))
    assert [entry["sent"] for entry in server.log] == [0]


def test_download_server_ignoring_range_starts_over(server, folder):
    kept = leave_part(server, folder)
    server.ranges = False
    assert_in_place(folder, weights.download(297, folder, base_url=server.url))
    assert [(entry["range"], entry["sent"]) for entry in server.log] == [(f"bytes={kept}-", len(server.bodies[ZIP]))]


@pytest.mark.parametrize("honours_if_range", [True, False])
def test_download_changed_file_is_not_joined(server, folder, honours_if_range):
    old = {name: bytes(len(body)) for name, body in CONTENT.items()}
    new, server.bodies[ZIP] = server.bodies[ZIP], make_zip(old)
    leave_part(server, folder)
    server.bodies[ZIP], server.etag, server.if_range = new, '"two"', honours_if_range
    assert_in_place(folder, weights.download(297, folder, base_url=server.url, retries=1))
    assert server.log[-1]["sent"] == len(new)


def test_download_without_validator_starts_over(server, folder):
    server.etag = None
    leave_part(server, folder)
    assert_in_place(folder, weights.download(297, folder, base_url=server.url))
    assert [entry["range"] for entry in server.log] == [None]


def test_download_truncated_body_is_an_error_and_kept_for_resuming(server, folder):
    server.cut = 20_000
    with pytest.raises(DownloadError, match=r"2 attempt.*The weights would be put at"):
        weights.download(297, folder, base_url=server.url, retries=1)
    assert {path.name for path in folder.iterdir()} == {f"{NAME}.zip.part", f"{NAME}.zip.part.json"}
    kept = (folder / f"{NAME}.zip.part").read_bytes()
    assert 20_000 < len(kept) <= 40_000 and kept == server.bodies[ZIP][: len(kept)]


def test_download_damaged_zip_leaves_nothing(server, folder):
    body = bytearray(server.bodies[ZIP])
    body[len(body) // 2] ^= 0xFF
    server.bodies[ZIP] = bytes(body)
    with pytest.raises(DownloadError, match="damaged"):
        weights.download(297, folder, base_url=server.url)
    assert list(folder.iterdir()) == []
    server.bodies[ZIP] = b"<html>please log in</html>"
    with pytest.raises(DownloadError, match="damaged"):
        weights.download(297, folder, base_url=server.url)
    assert list(folder.iterdir()) == []


def test_download_existing_folder_is_untouched_without_request(server, folder):
    (folder / NAME).mkdir(parents=True)
    (folder / NAME / "plans.json").write_text("mine")
    assert weights.download(297, folder, base_url=server.url) == folder / NAME
    assert server.log == [] and files_of(folder) == {f"{NAME}/plans.json"}
    (folder / NAME / "STAND_IN.txt").touch()
    with pytest.raises(DownloadError, match="untrained stand-in"):
        weights.download(297, folder, base_url=server.url)


def test_download_unreachable_names_address_and_target(folder, closed_url):
    with pytest.raises(DownloadError) as caught:
        weights.download(297, folder, base_url=closed_url, retries=0)
    text = str(caught.value)
    assert text.count(closed_url + ZIP) == 2 and "Connection refused" in text
    assert str(folder / NAME) in text and "--stand-in" in text and "\n" not in text


def test_download_absent_file_is_not_retried(server, folder):
    server.bodies.clear()
    with pytest.raises(DownloadError, match="404"):
        weights.download(297, folder, base_url=server.url)
    assert len(server.log) == 1 and list(folder.iterdir()) == []


def test_download_full_disk_is_an_output_error(server, folder, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 10}))
    with pytest.raises(OutputError, match="disk has 10 free"):
        weights.download(297, folder, base_url=server.url)
    assert not (folder / NAME).exists()
    full = Path("/dev/full")
    if full.exists():
        monkeypatch.setattr(fetch_module, "claim", lambda *_: None)  # a device can be neither locked nor cut
        (folder / "full.part").symlink_to(full)
        with pytest.raises(OutputError, match="disk is full"):
            fetch(server.url + ZIP, folder / "full.part")


# Archives from strangers


@pytest.mark.parametrize(
    "entries, links, text",
    [
        ({f"{NAME}/../../evil": b"x"}, {}, "leads out"),
        ({"../evil": b"x"}, {}, "leads out"),
        ({"/tmp/evil": b"x"}, {}, "leads out"),
        ({f"{NAME}\\..\\evil": b"x"}, {}, "character"),
        ({"Dataset999_other/plans.json": b"x"}, {}, "does not lie below"),
        ({NAME: b"x"}, {}, "does not lie below"),
        ({}, {f"{NAME}/link": "/etc/passwd"}, "link"),
    ],
)
def test_unpack_hostile_entry_is_refused(tmp_path, entries, links, text):
    inner = tmp_path / "a" / "b"
    inner.mkdir(parents=True)
    archive = tmp_path / "weights.zip"
    archive.write_bytes(make_zip({**CONTENT, **entries}, links))
    with pytest.raises(DownloadError, match=text):
        unpack_dataset(archive, inner / NAME)
    assert files_of(tmp_path) == {"weights.zip"} and list(inner.iterdir()) == []


def test_unpack_too_large_or_empty_is_refused(tmp_path):
    archive = tmp_path / "weights.zip"
    archive.write_bytes(make_zip(CONTENT))
    with pytest.raises(DownloadError, match="more than"):
        unpack_dataset(archive, tmp_path / NAME, max_bytes=1000)
    archive.write_bytes(make_zip({"__MACOSX/noise": b"x"}))
    with pytest.raises(DownloadError, match="holds no file"):
        unpack_dataset(archive, tmp_path / NAME)
    assert files_of(tmp_path) == {"weights.zip"}


# Checksums that GitHub publishes, statistics


def test_published_sha256_reads_the_digest(server):
    url, assets = f"{weights.RELEASES}{ZIP}", [{"name": "other.zip", "digest": "sha256:" + "b" * 64}]
    api = "/repos/wasserth/TotalSegmentator/releases/tags/v2.0.0-weights"
    server.bodies[api] = json.dumps({"assets": assets}).encode()
    assert weights.published_sha256(url, api=server.url) is None
    assets.append({"name": f"{NAME}.zip", "digest": "sha256:" + "a" * 64})
    server.bodies[api] = json.dumps({"assets": assets}).encode()
    assert weights.published_sha256(url, api=server.url) == "a" * 64
    server.bodies[api] = b"[]"
    assert weights.published_sha256(url, api=server.url) is None
    assert weights.published_sha256("http://mirror/x.zip", api=server.url) is None
    assert len(server.log) == 3


def test_disable_usage_statistics_keeps_other_keys(tmp_path):
    from totalsegmentator.config import increase_prediction_counter, setup_totalseg

    path = weights.disable_usage_statistics()
    assert path == tmp_path / "home/config.json"
    assert setup_totalseg()["send_usage_stats"] is False and increase_prediction_counter()["prediction_counter"] == 1
    path.write_text(json.dumps({"license_number": "aca_1", "send_usage_stats": True, "prediction_counter": 4}))
    weights.disable_usage_statistics()
    config = json.loads(path.read_text())
    assert (config["license_number"], config["prediction_counter"], config["send_usage_stats"]) == ("aca_1", 4, False)
    path.write_text("{torn")
    with pytest.raises(ConfigError, match="not a JSON object"):
        weights.disable_usage_statistics()
    assert path.read_text() == "{torn" and files_of(path.parent) == {"config.json"}


# Stand-ins


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    return folder, standin.write_stand_in(297, folder, base_features=4, patch_size=(32, 32, 32))


def test_stand_in_loads_in_stock_predictor(tiny):
    import torch
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    _, target = tiny
    predictor = nnUNetPredictor(device=torch.device("cpu"), perform_everything_on_device=False, use_mirroring=False)
    predictor.initialize_from_trained_model_folder(str(target / MODEL), (0,), "checkpoint_final.pth")
    assert predictor.trainer_name == "nnUNetTrainer_4000epochs_NoMirroring"
    assert predictor.allowed_mirroring_axes is None
    assert list(predictor.configuration_manager.patch_size) == [32, 32, 32]
    assert predictor.configuration_manager.network_arch_init_kwargs["features_per_stage"] == [4, 8, 16, 32, 40]
    assert predictor.label_manager.num_segmentation_heads == 118
    with torch.inference_mode():
        logits = predictor.network(torch.randn(1, 1, 32, 32, 32))
    assert logits.shape == (1, 118, 32, 32, 32) and logits.isfinite().all() and 0 < logits.std() < 100


def test_stand_in_says_what_it_is_and_is_not_downloaded_over(tiny, monkeypatch):
    from totalsegmentator import libs

    folder, target = tiny
    before = {name: (folder / name).stat().st_mtime_ns for name in files_of(folder)}
    assert set(before) == {
        f"{NAME}/STAND_IN.txt",
        *(f"{NAME}/{MODEL}/{name}" for name in ("plans.json", "dataset.json", "fold_0/checkpoint_final.pth")),
    }
    assert "never be used for diagnosis" in (target / "STAND_IN.txt").read_text()
    plans = json.loads((target / MODEL / "plans.json").read_text())
    assert plans["nnslim_stand_in"] is True and "UNet_class_name" in plans["configurations"]["3d_fullres"]
    assert standin.is_stand_in(target) and standin.is_stand_in(target / MODEL) and not standin.is_stand_in(folder)
    monkeypatch.setenv("TOTALSEG_WEIGHTS_PATH", str(folder))
    monkeypatch.setattr(libs, "download_url_and_unpack", lambda *_: pytest.fail("tried to download"))
    libs.download_pretrained_weights(297)
    with pytest.raises(OutputError, match="not overwritten"):
        standin.write_stand_in(297, folder, base_features=4)
    assert {name: (folder / name).stat().st_mtime_ns for name in files_of(folder)} == before


def test_stand_in_same_seed_same_bytes_and_global_generator_untouched(tiny, tmp_path):
    import torch

    _, first = tiny
    state = torch.get_rng_state()
    again = standin.write_stand_in(297, tmp_path / "again", base_features=4, patch_size=(32, 32, 32))
    other = standin.write_stand_in(297, tmp_path / "other", base_features=4, patch_size=(32, 32, 32), seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    load = [
        torch.load(path / MODEL / "fold_0/checkpoint_final.pth", weights_only=False)["network_weights"]
        for path in (first, again, other)
    ]
    assert {tensor.dtype for tensor in load[0].values()} == {torch.float16}
    assert all(torch.equal(load[0][key], load[1][key]) for key in load[0])
    assert not all(torch.equal(load[0][key], load[2][key]) for key in load[0])
    # One tensor has up to three names in nnU-Net's nets; the file must hold it once.
    unique = {tensor.data_ptr(): tensor.numel() for tensor in load[0].values()}
    size = (first / MODEL / "fold_0/checkpoint_final.pth").stat().st_size
    assert size < 2 * sum(unique.values()) + 100_000


@pytest.mark.parametrize("task, heads, parameters", [(291, 25, 31_194_809), (297, 118, 16_550_518)])
def test_stand_in_full_size_has_the_published_parameter_count(task, heads, parameters):
    layout = standin.LAYOUTS[task]
    assert len(standin.part_classes(task)) + 1 == heads
    plans = standin.stand_in_plans(layout, "any", 32, layout.patch)
    network = standin.build_stand_in(plans, heads, device="meta")
    unused = sum(tensor.numel() for tensor in network.decoder.seg_layers[:-1].parameters())
    assert sum(tensor.numel() for tensor in network.parameters()) - unused == parameters


def test_stand_in_classes_follow_the_parts():
    from totalsegmentator.map_to_binary import class_map, class_map_5_parts, map_taskid_to_partname_ct

    for task in (291, 292, 293, 294, 295):
        assert standin.part_classes(task) == class_map_5_parts[map_taskid_to_partname_ct[task]]
    assert standin.part_classes(297) == class_map["total"] and standin.LAYOUTS[298].spacing == 6.0


@pytest.mark.parametrize(
    "task, options, text",
    [
        (300, {}, "no stand-in for task 300"),
        (297, {"base_features": 0}, "base_features is 0"),
        (297, {"patch_size": (32, 32, 40)}, "multiples of 16"),
        (291, {"patch_size": (32, 32, 32)}, "at least one of them 64"),
    ],
)
def test_stand_in_impossible_request_is_refused(tmp_path, task, options, text):
    with pytest.raises(ConfigError, match=text):
        standin.write_stand_in(task, tmp_path, **options)
    assert list(tmp_path.iterdir()) == []


# The script


def run_script(*words: str, **env: str) -> subprocess.CompletedProcess:
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, str(SCRIPT), *words],
        env={**os.environ, "PYTHONPATH": path, **env},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_script_help_names_every_flag():
    done = run_script("--help")
    assert done.returncode == 0
    for flag in ("--tasks", "--folder", "--stand-in", "--base-features", "--sha256", "--offline-config", "--quiet"):
        assert flag in done.stdout


def test_script_stand_in_writes_folder_and_offline_config(tmp_path):
    done = run_script("--tasks", "297", "--stand-in", "--base-features", "4", "--offline-config", "-q")
    assert (done.returncode, done.stderr) == (0, "")
    target = tmp_path / "home/nnunet/results" / NAME
    assert standin.is_stand_in(target) and str(target) in done.stdout
    assert json.loads((tmp_path / "home/config.json").read_text())["send_usage_stats"] is False


def test_script_download_of_one_good_and_one_absent_task_exits_1(server, folder):
    done = run_script("--folder", str(folder), NNSLIM_TS_URL=server.url)
    assert done.returncode == 1 and "error: task 291" in done.stderr and "404" in done.stderr
    assert_in_place(folder, folder / NAME)
    assert "100" in done.stderr or "kB" in done.stderr


def test_script_unreachable_or_wrong_arguments_exit_2(folder, closed_url):
    done = run_script("--folder", str(folder), "--retries", "0", "-q", NNSLIM_TS_URL=closed_url)
    lines = done.stderr.splitlines()
    assert done.returncode == 2 and [line[:15] for line in lines] == ["error: task 297", "error: task 291"]
    assert closed_url + ZIP in lines[0] and str(folder / NAME) in lines[0]
    assert run_script("--sha256", "300=ab").returncode == 2
