"""nnU-Net folders in worker processes: same voxels as stock, and every fault named while the rest is done."""

from __future__ import annotations

import gzip
import json
import os
import re
import resource
import shutil
import struct
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK
import torch
from helpers import ROOT, load_stock, make_predictor

from nnslim.errors import ConfigError, InputError
from nnslim.evaluation.label_files import read_volume
from nnslim.hosts.nnunet.cases.prepared_images import Source, prepare_images
from nnslim.hosts.nnunet.cases.preprocess import list_cases, silent
from nnslim.hosts.nnunet.predict.directory import NNUNetJob, nnunet_cases, predict_folder
from nnslim.hosts.nnunet.predict.predict_settings import PredictSettings
from nnslim.prediction.case import Crew, crew_here
from nnslim.prediction.run_directory import FolderSettings
from nnslim.running import engine

STOCK = PredictSettings(backend="stock", threads=1)
TWO = FolderSettings("local", Crew(2, threads=1))


def voxels(path: Path) -> np.ndarray:
    return np.asarray(nib.load(path).dataobj)


def test_two_workers_equal_stock_nnunet_and_survive_the_rest(make_model, case_folder, tmp_path):
    """Both endings of a run in one, since each worker takes seconds to load torch: results, and a bad case."""
    model = make_model(folds=(0, 1))
    (case_folder / "broken_0000.nii.gz").write_bytes(b"this is no image")
    records = predict_folder(case_folder, tmp_path / "ours", model, None, STOCK, folder=TWO)
    assert [(r.name, r.status) for r in records] == [("a", "done"), ("b", "done"), ("broken", "failed"), ("c", "done")]
    assert {r.worker for r in records if r.status == "done"} and all(
        r.worker.split(":")[1] != str(os.getpid()) for r in records
    )
    assert records[2].error.startswith("broken_0000.nii.gz cannot be read")
    assert records[0].voxels == 18 * 20 * 17 and records[0].peak_mb > 100
    assert {"nnslim", "nnunetv2", "torch", "python"} <= records[0].versions.keys()
    (case_folder / "broken_0000.nii.gz").unlink()
    predictor = make_predictor()
    predictor.initialize_from_trained_model_folder(str(model), (0, 1))
    (tmp_path / "stock").mkdir()
    with silent():
        predictor.predict_from_files(
            str(case_folder),
            str(tmp_path / "stock"),
            num_processes_preprocessing=1,
            num_processes_segmentation_export=1,
        )
    for name in "abc":
        ours, stock = (voxels(tmp_path / kind / f"{name}.nii.gz") for kind in ("ours", "stock"))
        assert np.array_equal(ours, stock) and len(np.unique(ours)) > 1
    again = predict_folder(case_folder, tmp_path / "ours", model, None, STOCK)  # in this process: the same identity
    assert {r.status for r in again} == {"there"}


def test_overlap_gives_the_same_voxels_as_one_thing_at_a_time(make_model, case_folder, tmp_path):
    model = make_model()
    for name, overlap in (("with", True), ("without", False)):
        folder = FolderSettings(crew=Crew(threads=1, overlap=overlap))
        records = predict_folder(case_folder, tmp_path / name, model, None, STOCK, folder=folder)
        assert {r.status for r in records} == {"done"}
    for name in "abc":
        assert np.array_equal(*(voxels(tmp_path / kind / f"{name}.nii.gz") for kind in ("with", "without")))


def test_a_resumed_run_keeps_the_backend_that_it_began_with(make_model, case_folder, tmp_path, monkeypatch):
    """A measurement in between, by this or another process, would change the backend, and with it a voxel."""
    monkeypatch.setattr(engine, "_settled", {})
    model, out = make_model(), tmp_path / "out"
    first = predict_folder(case_folder, out, model, None, PredictSettings(threads=2))
    assert [r.run for r in first] == [{"backend": "eager", "precision": "f32", "threads": 2}] * 3
    before = {name: (out / f"{name}.nii.gz").read_bytes() for name in "abc"}
    for name in "ab":
        (out / f"{name}.nii.gz").unlink()
    monkeypatch.setattr(engine, "_settled", {})
    monkeypatch.setattr(engine, "remembered", lambda *given: "openvino")
    again = predict_folder(case_folder, out, model, None, PredictSettings(threads=2))
    assert [r.status for r in again] == ["done", "done", "there"] and [r.run["backend"] for r in again] == ["eager"] * 3
    assert {name: (out / f"{name}.nii.gz").read_bytes() for name in "abc"} == before
    (out / "a.nii.gz").unlink()
    asked = predict_folder(case_folder, out, model, None, PredictSettings(threads=2, backend="stock"))
    assert asked[0].run["backend"] == "stock", "what is asked for is done"
    steady = PredictSettings(deterministic=True)
    (out / "a.nii.gz").unlink()
    assert predict_folder(case_folder, tmp_path / "new", model, None, steady)[0].run["backend"] == "eager"
    pytest.importorskip("openvino")
    fresh = predict_folder(case_folder, tmp_path / "fresh", model, None, PredictSettings())
    assert fresh[0].run["backend"] == "openvino"


def test_deterministic_run_keeps_its_threads_and_refuses_budgets_of_time(make_model, case_folder, tmp_path):
    model, out, steady = make_model(), tmp_path / "out", PredictSettings(deterministic=True)
    predict_folder(case_folder, out, model, None, replace(steady, threads=1))
    before = (out / "a.nii.gz").read_bytes()
    (out / "a.nii.gz").unlink()
    again = predict_folder(case_folder, out, model, None, steady)
    assert again[0].run["threads"] == 1 and (out / "a.nii.gz").read_bytes() == before
    timed = {"methods": [{"method": "tucker", "milliseconds": 0.5}]}
    with pytest.raises(ConfigError, match="does not go with a budget of time, found one in tucker"):
        predict_folder(case_folder, tmp_path / "timed", model, timed, steady)


def test_identity_follows_weights_and_what_decides_voxels(make_model):
    model = make_model(folds=(0, 1))

    def identity(config=None, **settings) -> str:
        return NNUNetJob(model, config, PredictSettings(**settings)).stamp()[0]

    first = identity()
    assert identity(device="cuda", threads=3, backend="eager") == first
    slim = {"methods": [{"method": "tucker", "rank_factor": 0.5}]}
    others = [identity(mirroring=True), identity(step_size=0.8), identity(folds=["0"]), identity(slim)]
    path = model / "fold_1" / "checkpoint_final.pth"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    assert len({first, identity(), *others}) == 6


# --- faults: each names the file, what was found and what is expected -------------------------------------------------


def _patched(path: Path, offset: int, value: bytes) -> None:
    raw = bytearray(gzip.decompress(path.read_bytes()))
    raw[offset : offset + len(value)] = value
    path.write_bytes(gzip.compress(bytes(raw)))


def _image(path: Path, data: np.ndarray) -> None:
    nib.save(nib.Nifti1Image(data.astype(np.float32), np.eye(4)), path)


def test_faults_of_images_are_named_and_the_rest_is_done(make_model, tmp_path, caplog):
    images, rng = tmp_path / "Bilder ü 1", np.random.default_rng(0)
    images.mkdir()
    good = rng.standard_normal((16, 17, 18))
    for name in ("Fäll 1", "zero", "nan_spacing", "cut", "cut_plain", "two", "twin", "gap"):
        _image(images / f"{name}_0000.nii.gz", good)
    with_nan = good.copy()
    with_nan[3, 4, 5] = np.nan
    with_nan[3, 4, 6] = np.inf
    _image(images / "nan_0000.nii.gz", with_nan)
    _image(images / "4d_0000.nii.gz", np.stack([good, good], -1))
    _patched(images / "zero_0000.nii.gz", 80, struct.pack("<f", 0.0))
    _patched(images / "nan_spacing_0000.nii.gz", 84, struct.pack("<f", np.nan))
    cut = images / "cut_0000.nii.gz"
    cut.write_bytes(cut.read_bytes()[:4000])
    _image(images / "cut_plain_0000.nii", good)  # another ending of the same channel
    shutil.copy(images / "two_0000.nii.gz", images / "two_0001.nii.gz")
    shutil.move(images / "gap_0000.nii.gz", images / "gap_0003.nii.gz")
    _image(images / "foreign_0000.nii", good)
    shutil.move(images / "twin_0000.nii.gz", images / "twin_0000.nrrd")
    (images / "._a_0000.nii.gz").write_bytes(b"what other systems leave")
    records = predict_folder(images, tmp_path / "out ü", make_model(), None, STOCK)
    errors = {r.name: r.error for r in records if r.status == "failed"}
    assert {r.name for r in records if r.status == "done"} == {"Fäll 1", "gap", "zero", "nan_spacing", "nan"}
    told = "\n".join(caplog.messages)
    for said in (
        "zero_0000.nii.gz has a voxel spacing of 0 x 1 x 1 mm; it is taken as its reader takes it",
        "nan_spacing_0000.nii.gz has a voxel spacing of 1 x nan x 1 mm; it is taken",
        "nan_0000.nii.gz has 2 of 4,896 voxels that are NaN or infinite; it is taken",
    ):
        assert told.count(said) == 1
    assert errors == {
        "4d": "the model needs 1 channel(s) (MRI), found 2 in 1 file(s): 4d_0000.nii.gz",
        "cut": errors["cut"],
        "cut_plain": "cut_plain_0000.nii.gz and cut_plain_0000.nii are both channel 0000; remove one",
        "two": "the model needs 1 channel(s) (MRI), found 2 file(s): two_0000.nii.gz, two_0001.nii.gz",
        "foreign": "foreign_0000.nii cannot be taken: the model reads .nii.gz files; convert it",
        "twin": "twin_0000.nrrd cannot be taken: the model reads .nii.gz files; convert it",
    }
    assert errors["cut"].startswith("cut_0000.nii.gz cannot be read: ")
    assert len(np.unique(voxels(tmp_path / "out ü" / "Fäll 1.nii.gz"))) > 1
    written = sorted(path.name for path in (tmp_path / "out ü").iterdir())
    done = sorted(f"{name}.nii.gz" for name in ("Fäll 1", "gap", "zero", "nan_spacing", "nan"))
    assert written == sorted([*done, "manifest.jsonl"])


def test_name_that_is_no_utf8_fails_its_case_and_does_not_end_the_process(make_model, case_folder, tmp_path):
    (case_folder / "b_0000.nii.gz").rename(case_folder / os.fsdecode(b"b\xff_0000.nii.gz"))
    records = predict_folder(case_folder, tmp_path / "out", make_model(), None, STOCK)
    assert sorted(record.status for record in records) == ["done", "done", "failed"]
    assert next(record.error for record in records if record.error).endswith("is no text in utf-8; rename it")
    records = predict_folder(case_folder, tmp_path / os.fsdecode(b"\xff"), make_model(parent="other"), None, STOCK)
    assert {record.status for record in records} == {"failed"}


def test_channels_that_are_not_counted_from_zero_are_refused(make_model, case_folder):
    predictor = load_stock(_model_for(make_model, "SimpleITKIO", ".nii.gz", ("T1", "T2")))
    shutil.copy(case_folder / "a_0000.nii.gz", case_folder / "a_0002.nii.gz")
    from nnslim.hosts.nnunet.cases.preprocess import preprocess_case

    with pytest.raises(InputError, match=r"needs channels 0000, 0001 \(T1, T2\), found a_0000.nii.gz, a_0002.nii.gz"):
        preprocess_case(predictor, sorted(case_folder.glob("a_*")), None)


def test_listing_leaves_out_what_is_no_case_and_says_so(case_folder, caplog):
    (case_folder / "notes.txt").write_text("x")
    (case_folder / "plain.nii.gz").write_bytes(b"x")
    (case_folder / "deeper_0000.nii.gz").mkdir()
    found = list_cases(case_folder, ".nii.gz")
    assert list(found.cases) == ["a", "b", "c"] and not found.problems
    assert [path.name for path in found.left_out] == ["notes.txt", "plain.nii.gz"]
    assert [case.target for case in nnunet_cases(case_folder, ".nii.gz")] == ["a.nii.gz", "b.nii.gz", "c.nii.gz"]
    assert "2 files are not named <case>_0000.nii.gz and left out: notes.txt, plain.nii.gz" in caplog.text


def test_model_that_fails_on_one_case_only_fails_that_case(make_model, case_folder, tmp_path, monkeypatch):
    """Whatever nnU-Net raises."""
    model = make_model()
    predictor = type(make_predictor())
    original = predictor.predict_logits_from_preprocessed_data
    calls = []

    def predict_logits_from_preprocessed_data(self, data):
        calls.append(1)
        if len(calls) == 2:
            raise IndexError("somewhere in nnU-Net")
        return original(self, data)

    monkeypatch.setattr(predictor, "predict_logits_from_preprocessed_data", predict_logits_from_preprocessed_data)
    records = predict_folder(case_folder, tmp_path / "out", model, None, STOCK)
    assert [r.status for r in records].count("done") == 2
    assert [r.error for r in records if r.status == "failed"] == ["IndexError: somewhere in nnU-Net"]


def _predict_in_a_process(*arguments, limit: int | None = None, before: list[str] | None = None):
    def small_files() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    command = [
        sys.executable,
        "-W",
        "ignore",
        "-m",
        "nnslim.cli",
        "predict",
        "-q",
        "--threads",
        "1",
        *map(str, arguments),
    ]
    return subprocess.run(
        (before or []) + command,
        capture_output=True,
        text=True,
        timeout=1200,
        preexec_fn=small_files if limit else None,
        check=False,
    )


def _noise(folder: Path) -> None:
    """Images whose segmentations do not compress: some 10 kB each."""
    rng = np.random.default_rng(1)
    for name in "abc":
        _image(folder / f"{name}_0000.nii.gz", rng.standard_normal((40, 40, 40)))


def test_files_that_do_not_fit_fail_their_cases_and_nothing_torn_is_left(make_model, case_folder, tmp_path):
    """A limit on the size of files: lines of the manifest fit, segmentations do not, and ITK reports no error."""
    _noise(case_folder)
    out = tmp_path / "out"
    done = _predict_in_a_process("-i", case_folder, "-o", out, "-m", make_model(), "--workers", 1, limit=4000)
    assert done.returncode == 1 and "0 predicted, 0 there already, 3 failed" in done.stdout, done.stderr
    for name in "abc":
        assert f"nnslim: {name}: cannot write {out / name}.nii.gz: " in done.stderr
    assert "Traceback" not in done.stderr
    assert [path.name for path in out.iterdir()] == ["manifest.jsonl"]


def test_full_disk_is_named_and_leaves_nothing_torn(make_model, case_folder, tmp_path):
    """A disk of 20 kB, a file system of its own."""
    disk = tmp_path / "disk"
    disk.mkdir()
    small = [
        "unshare",
        "-rm",
        "bash",
        "-c",
        f'mount -t tmpfs -o size=20k none "{disk}" && "$@"; code=$?; ls -A "{disk}"; exit $code',
        "-",
    ]
    probe = subprocess.run([*small, "true"], capture_output=True, check=False)
    if probe.returncode:
        pytest.skip("this machine lets nobody mount a tmpfs of its own (unshare -rm)")
    _noise(case_folder)
    done = _predict_in_a_process("-i", case_folder, "-o", disk, "-m", make_model(), before=small)
    assert "Traceback" not in done.stderr
    assert "the disk is full" in done.stderr or "the disk is probably full" in done.stderr, done.stderr
    left = done.stdout.split()  # the second list is that of `ls`
    assert not [name for name in left if re.match(r"\.nnslim-[0-9a-f]{8}-", name)]
    assert done.returncode in (1, 2) and "manifest.jsonl" in left


def test_command_names_faults_of_its_options(make_model, case_folder, tmp_path, command):
    def fault(*arguments) -> str:
        return command("predict", "-q", "-i", case_folder, "-o", tmp_path / "out", *arguments, expect=2)[2]

    assert "give one of -m MODEL and --task TASK" in fault()
    assert "give one of -m MODEL and --task TASK" in fault("-m", "x", "--task", "total")
    for option in (("-f", "0"), ("--step-size", "0.7"), ("--disable_tta",), ("--trust-checkpoint",)):
        name = "--fold" if option[0] == "-f" else option[0]
        assert f"{name} goes with -m; TotalSegmentator decides it" in fault("--task", "total", *option)
    assert "--ml goes with --task" in fault("-m", "x", "--ml")
    assert "--roi goes with --task" in fault("-m", "x", "--roi", "liver")
    assert "--parts goes with --engine slurm" in fault("-m", "x", "--parts", "2")
    assert "--ray-address goes with --engine ray" in fault("-m", "x", "--ray-address", "auto")
    assert "inside a Slurm job" in fault("-m", make_model(), "--engine", "slurm")
    assert not (tmp_path / "out").exists()


def test_printed_sbatch_script_predicts_the_folder_share_by_share(
    make_model, case_folder, tmp_path, monkeypatch, command
):
    """The script that --print-sbatch gives, run by bash with the variables that Slurm would set."""
    model, out = make_model(), tmp_path / "my out"
    monkeypatch.chdir(tmp_path)
    options = ("-m", model, "--threads", 1, "--parts", 2, "--print-sbatch")
    script = tmp_path / "job.sh"
    script.write_text(command("predict", "-q", "-i", "images", "-o", "my out", *options, expect=0)[1])
    done = []
    for task in ("0", "1"):
        path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
        environment = {**os.environ, "PYTHONPATH": path, "SLURM_ARRAY_TASK_ID": task, "SLURM_ARRAY_TASK_COUNT": "2"}
        ran = subprocess.run(
            ["bash", str(script)], capture_output=True, text=True, timeout=1200, env=environment, check=False
        )
        assert ran.returncode == 0, ran.stderr
        done.append(int(ran.stdout.split()[0]))
    assert sorted(done) == [1, 2]
    assert sorted(path.name for path in out.iterdir()) == ["a.nii.gz", "b.nii.gz", "c.nii.gz", "manifest.jsonl"]


def test_crew_divides_the_cores_and_stays_in_this_process_by_default(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(9)), raising=False)
    assert crew_here("cpu", None, None) == ("here", Crew(1))
    assert crew_here("cpu", 2, None) == ("local", Crew(2, 4))
    assert crew_here("cpu", 1, None) == ("local", Crew(1))
    assert crew_here("cpu", 4, 3, overlap=False) == ("local", Crew(4, 3, overlap=False))


# --- what the model's own reader reads --------------------------------------------------------------------------------


def _model_for(make_model, reader: str, ending: str, channels: tuple[str, ...] = ("MRI",), kind: str = "plain") -> Path:
    """Return a model folder for a reader of nnU-Net, with so many input channels."""
    model = make_model(kind)
    plans, dataset = (json.loads((model / name).read_text()) for name in ("plans.json", "dataset.json"))
    plans["image_reader_writer"], dataset["file_ending"] = reader, ending
    dataset["channel_names"] = dict(map(str, pair) for pair in enumerate(channels))
    properties = plans["foreground_intensity_properties_per_channel"]
    for number in range(len(channels)):
        properties.setdefault(str(number), properties.get("0", {}))
    for settings in plans["configurations"].values():
        settings["normalization_schemes"] = ["ZScoreNormalization"] * len(channels)
        settings["use_mask_for_norm"] = [False] * len(channels)
    for name, content in (("plans.json", plans), ("dataset.json", dataset)):
        (model / name).write_text(json.dumps(content))
    path = model / "fold_0" / "checkpoint_final.pth"
    content = torch.load(path, weights_only=False)
    weights = content["network_weights"]
    for key, value in weights.items():  # the first layer, under each of its names
        if value.ndim > 3 and value.shape[1] == 1:
            weights[key] = torch.cat([value * (1 + number) for number in range(len(channels))], 1)
    content["init_args"] = {**content["init_args"], "plans": plans, "dataset_json": dataset}
    torch.save(content, path)
    return model


def _stock(model: Path, images: Path, output: Path) -> None:
    predictor = make_predictor()
    predictor.initialize_from_trained_model_folder(str(model), (0,))
    output.mkdir()
    with silent():
        if hasattr(predictor, "predict_from_files_sequential"):
            predictor.predict_from_files_sequential(str(images), str(output))
        else:  # nnU-Net 2.3
            predictor.predict_from_files(str(images), str(output), False, True, 1, 1)


def test_channels_are_those_that_the_reader_finds_as_in_stock_nnunet(make_model, tmp_path):
    """Two pictures in colour, or one file per channel; a case with other channels is refused alone."""
    from skimage import io

    images, rng = tmp_path / "in", np.random.default_rng(0)
    images.mkdir()
    files = {"colours_0000": 3, "colours_0001": 3, "few_0000": 4, "many_0000": 4, "many_0001": 4, "mixed_0000": 3}
    for name, channels in {**files, **{f"c.1_000{number}": 0 for number in range(6)}, "mixed_0001": 0}.items():
        shape = (40, 36, channels) if channels else (40, 36)
        io.imsave(images / f"{name}.png", rng.integers(0, 255, shape, dtype=np.uint8), check_contrast=False)
    model = _model_for(make_model, "NaturalImage2DIO", ".png", tuple("RGBrgb"), "2d")
    records = predict_folder(images, tmp_path / "ours", model, None, STOCK)
    needed = "the model needs 6 channel(s) (R, G, B, r, g, b), found"
    assert {r.name: r.error for r in records} == {
        "colours": "",
        "c.1": "",
        "few": f"{needed} 4 in 1 file(s): few_0000.png",
        "many": f"{needed} 8 in 2 file(s): many_0000.png, many_0001.png",
        "mixed": "mixed_0000.png, mixed_0001.png cannot be read: its reader wants files of one shape and spacing",
    }
    for name in ("few", "many", "mixed"):
        for file in images.glob(f"{name}_*"):
            file.unlink()
    _stock(model, images, tmp_path / "stock")
    for name in ("colours", "c.1"):
        ours, stock = (io.imread(tmp_path / kind / f"{name}.png") for kind in ("ours", "stock"))
        assert ours.shape == (40, 36) and np.array_equal(ours, stock)
    with prepare_images(Source.of(load_stock(model)), images, 2) as prepared:
        assert [prepared.load(number).shape[0] for number in range(2)] == [6, 6]


def test_everything_that_a_writer_wrote_is_moved_and_checked(make_model, tmp_path):
    """nnU-Net's TIFF has its spacing in a file of its own; an .mhd names the file of its voxels."""
    import tifffile

    for reader, ending, side in (("Tiff3DIO", ".tif", "json"), ("SimpleITKIO", ".mhd", "zraw")):
        images, output = tmp_path / f"in{side}", tmp_path / f"out{side}"
        images.mkdir()
        voxels_in = np.random.default_rng(0).integers(0, 255, (20, 18, 17), dtype=np.uint8)
        if side == "json":
            tifffile.imwrite(images / "cell_0000.tif", voxels_in)
            (images / "cell.json").write_text('{"spacing": [2.0, 1.0, 1.0]}')
        else:
            SimpleITK.WriteImage(SimpleITK.GetImageFromArray(voxels_in), str(images / "cell_0000.mhd"))
        assert not list_cases(images, ending).left_out
        model = _model_for(lambda kind, parent=side: make_model(kind, parent=parent), reader, ending)
        output.mkdir()
        (output / f".nnslim-0123abcd-cell.{side}").write_text("of a run of an earlier version that was killed")
        for expected in ("done", "there"):
            assert predict_folder(images, output, model, None, STOCK)[0].status == expected
        assert {path.name for path in output.iterdir()} == {f"cell{ending}", f"cell.{side}", "manifest.jsonl"}
        assert read_volume(output / f"cell{ending}")[1] == ((1.0, 1.0, 2.0) if side == "json" else (1.0, 1.0, 1.0))
        (output / f"cell.{side}").unlink()
        (record,) = predict_folder(images, output, model, None, STOCK)
        assert record.status == "done" and list(record.side_files) == [f"cell.{side}"]
        assert (output / f"cell.{side}").is_file()


@pytest.mark.parametrize("reader", ["SimpleITKIO", "NibabelIO"])
def test_what_the_reader_reads_is_predicted_and_what_is_cut_is_not(make_model, tmp_path, reader):
    images, whole = tmp_path / "in", np.random.default_rng(0).standard_normal((16, 17, 18)).astype(np.float32)
    images.mkdir()
    _image(images / "whole_0000.nii.gz", whole)
    packed = (images / "whole_0000.nii.gz").read_bytes()
    plain, half = gzip.decompress(packed), 10_000
    odd = {
        "plain": plain,
        "behind": packed + b"xx",
        "behind_voxels": gzip.compress(plain + b"xx"),
        "members": gzip.compress(plain[:half]) + gzip.compress(plain[half:]) + gzip.compress(b""),
        "stored": gzip.compress(plain, 0),
        "intent": gzip.compress(plain[:68] + struct.pack("<h", 32000) + plain[70:]),
        "no_magic": gzip.compress(plain[:344] + bytes(4) + plain[348:]),
        "voxel_type": gzip.compress(plain[:70] + struct.pack("<h", 999) + plain[72:]),
        "nifti2": gzip.compress(nib.Nifti2Image(whole, np.eye(4)).to_bytes()),
        "sheared": gzip.compress(nib.Nifti1Image(whole, np.eye(4) + np.diag([0.2, 0, 0], 1)).to_bytes()),
        "text": b"this is no image",
        "empty": b"",
    }
    cut = {
        "cut": packed[: len(packed) // 2],
        "cut_sum": packed[:-6],
        "cut_plain": plain[:-1],
        "cut_packed": gzip.compress(plain[:half]),
        "cut_member": gzip.compress(plain[:half]) + gzip.compress(plain[half:])[:-2000],
        "wrong_sum": packed[:-6] + bytes(6),
    }
    for name, content in (odd | cut).items():
        (images / f"{name}_0000.nii.gz").write_bytes(content)
    model = _model_for(make_model, reader, ".nii.gz")
    reads = load_stock(model).plans_manager.image_reader_writer_class()
    expected = {"whole": "done", **dict.fromkeys(cut, "failed")}
    for name in odd:
        try:
            reads.read_images([str(images / f"{name}_0000.nii.gz")])
            expected[name] = "done"
        except Exception:  # readers raise whatever their format library raises
            expected[name] = "failed"
    records = predict_folder(images, tmp_path / "ours", model, None, STOCK)
    assert {record.name: record.status for record in records} == expected
    assert expected["plain"] == expected["no_magic"] == ("done" if reader == "SimpleITKIO" else "failed")
    assert all("cannot be read" in record.error and "\n" not in record.error for record in records if record.error)
    first = voxels(tmp_path / "ours" / "whole.nii.gz")
    for name in ("plain", "behind", "behind_voxels", "members", "stored", "intent"):
        if expected[name] == "done":
            assert np.array_equal(voxels(tmp_path / "ours" / f"{name}.nii.gz"), first)
