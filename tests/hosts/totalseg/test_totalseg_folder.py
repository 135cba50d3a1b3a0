"""TotalSegmentator on folders: weights loaded once, results of `totalsegmentator()` itself, nothing left patched."""

from __future__ import annotations

import functools
import json
import shutil
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

pytest.importorskip("totalsegmentator", reason="TotalSegmentator is not installed (pip install nnslim[ts])")

from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

from nnslim import NNSlimContext
from nnslim.compression.config import RunConfig, SlimConfig
from nnslim.errors import ConfigError, InputError
from nnslim.hosts.totalseg import stand_in as standin
from nnslim.hosts.totalseg.stand_in import Layout, write_stand_in
from nnslim.hosts.totalseg.task_directory import TaskSettings, predict_task_folder, task_cases
from nnslim.hosts.totalseg.task_weights import STAND_IN_NOTE, task_source, weights_folder
from nnslim.hosts.totalseg.tasks import find_task
from nnslim.prediction.case import Crew
from nnslim.prediction.run_directory import FolderSettings

SMALL_PATCH = (64, 64, 64)


@pytest.fixture
def cts(ct: Path, tmp_path: Path) -> Path:
    """Two CTs as a person has them: a file, and a subject's folder as in TotalSegmentator's own data set."""
    folder = tmp_path / "CTs mit ä"
    (folder / "s0001").mkdir(parents=True)
    image = nib.load(ct)
    nib.save(image.slicer[:40], folder / "one.nii.gz")
    nib.save(image.slicer[8:, 4:], folder / "s0001" / "ct.nii.gz")
    return folder


@pytest.fixture
def loads(monkeypatch) -> list[str]:
    """Record what is loaded from disk, as nnU-Net itself sees it."""
    seen = []
    original = nnUNetPredictor.initialize_from_trained_model_folder

    def initialize_from_trained_model_folder(
        self, model_training_output_dir, use_folds, checkpoint_name="checkpoint_final.pth"
    ):
        seen.append(Path(model_training_output_dir).parent.name[:10])
        return original(self, model_training_output_dir, use_folds, checkpoint_name)

    monkeypatch.setattr(nnUNetPredictor, "initialize_from_trained_model_folder", initialize_from_trained_model_folder)
    return seen


class QuietHandler(SimpleHTTPRequestHandler):
    """Serves files, and logs nothing."""

    def log_message(self, *_) -> None:
        pass


def plain(image: Path, out: Path, **options) -> None:
    from totalsegmentator.python_api import totalsegmentator

    totalsegmentator(image, out, device="cpu", quiet=True, nr_thr_saving=1, **options)


def same_file(one: Path, other: Path) -> bool:
    a, b = nib.load(one), nib.load(other)
    same = np.array_equal(np.asarray(a.dataobj), np.asarray(b.dataobj)) and np.array_equal(a.affine, b.affine)
    return same and a.header == b.header and a.get_data_dtype() == b.get_data_dtype()


def state_of_hosts() -> dict[str, object]:
    import totalsegmentator.nnunet as totalseg
    from totalsegmentator import python_api

    owners = {"predictor": nnUNetPredictor, "api": python_api, "totalseg": totalseg}
    return {f"{key}.{n}": v for key, owner in owners.items() for n, v in vars(owner).items() if callable(v)}


@pytest.mark.slow  # the plain call starts two processes for each part of each image
def test_five_parts_are_loaded_once_for_all_images_and_equal_the_plain_call(cts, home, loads, tmp_path):
    for task in (291, 292, 293, 294, 295):
        write_stand_in(task, weights_folder(), base_features=2, patch_size=SMALL_PATCH)
    plain(cts / "one.nii.gz", tmp_path / "plain.nii.gz", ml=True)  # imports and settles TotalSegmentator's own patches
    loads.clear()
    before = state_of_hosts()
    records = predict_task_folder(cts, tmp_path / "out", TaskSettings("total", ml=True))
    assert state_of_hosts() == before
    assert [(r.name, r.status, r.error) for r in records] == [("one", "done", ""), ("s0001", "done", "")]
    assert sorted(loads) == [f"Dataset{number}" for number in (291, 292, 293, 294, 295)]
    plain(cts / "s0001" / "ct.nii.gz", tmp_path / "plain2.nii.gz", ml=True)
    for ours, theirs in (("one", "plain"), ("s0001", "plain2")):
        assert same_file(tmp_path / "out" / f"{ours}.nii.gz", tmp_path / f"{theirs}.nii.gz")
    made = nib.load(tmp_path / "out" / "one.nii.gz")
    assert len(np.unique(made.dataobj)) > 2 and b"spleen" in made.header.extensions[-1].get_content()
    assert {r.status for r in predict_task_folder(cts, tmp_path / "out", TaskSettings("total", ml=True))} == {"there"}
    with pytest.raises(Exception, match="another model or of other settings"):
        predict_task_folder(cts, tmp_path / "out", TaskSettings("total", ml=True, precision="bf16"))


def test_file_per_class_of_some_classes_equals_the_plain_call(cts, home, loads, tmp_path):
    """With --roi TotalSegmentator first runs its 6 mm model to find where to look; that one is kept, too."""
    for task in (297, 298):
        write_stand_in(task, weights_folder(), base_features=2, patch_size=SMALL_PATCH)
    classes = ["sternum", "vertebrae_T1", "rib_right_5"]  # the stand-in "finds" them in both images
    settings = TaskSettings("total_fast", roi=tuple(classes), threads=1)
    records = predict_task_folder(cts, tmp_path / "out", settings)
    assert {r.status for r in records} == {"done"}, [r.error for r in records]
    assert sorted(loads) == ["Dataset297", "Dataset298"]
    plain(cts / "s0001" / "ct.nii.gz", tmp_path / "plain", task="total", fast=True, roi_subset=classes)
    names = sorted(path.name for path in (tmp_path / "plain").iterdir())
    assert names == sorted(f"{c}.nii.gz" for c in classes)
    assert sorted(path.name for path in (tmp_path / "out" / "s0001").iterdir()) == names
    assert all(same_file(tmp_path / "out" / "s0001" / name, tmp_path / "plain" / name) for name in names)
    torn = tmp_path / "out" / "one" / "sternum.nii.gz"
    torn.write_bytes(torn.read_bytes()[:-50])
    (tmp_path / "out" / "one" / "foreign.txt").write_text("x")
    again = predict_task_folder(cts, tmp_path / "out", settings)
    assert [r.status for r in again] == ["done", "there"]
    assert sorted(path.name for path in (tmp_path / "out" / "one").iterdir()) == names
    assert not list((tmp_path / "out").glob(".nnslim*"))


def test_body_task_writes_its_derived_masks(cts, home, tmp_path, monkeypatch):
    from totalsegmentator.map_to_binary import class_map

    monkeypatch.setitem(standin.LAYOUTS, 300, Layout(5, 6.0, (32, 32, 32), "nnUNetTrainer"))
    monkeypatch.setattr(standin, "part_classes", lambda task: dict(class_map["body"]))
    write_stand_in(300, weights_folder(), base_features=2)
    records = predict_task_folder(cts, tmp_path / "out", TaskSettings("body_fast"))
    assert {r.status for r in records} == {"done"}, [r.error for r in records]
    plain(cts / "one.nii.gz", tmp_path / "plain", task="body", fast=True)
    names = sorted(path.name for path in (tmp_path / "plain").iterdir())
    assert "skin.nii.gz" in names and "body.nii.gz" in names
    assert sorted(path.name for path in (tmp_path / "out" / "one").iterdir()) == names
    assert all(same_file(tmp_path / "out" / "one" / name, tmp_path / "plain" / name) for name in names)


def test_two_workers_and_a_damaged_image(cts, home, tmp_path):
    write_stand_in(297, weights_folder(), base_features=2, patch_size=SMALL_PATCH)
    cut = cts / "cut.nii.gz"
    cut.write_bytes((cts / "one.nii.gz").read_bytes()[:9000])
    folder = FolderSettings("local", Crew(2, threads=1))
    records = predict_task_folder(cts, tmp_path / "out", TaskSettings("total_fast", ml=True), folder=folder)
    assert [(r.name, r.status) for r in records] == [("cut", "failed"), ("one", "done"), ("s0001", "done")]
    assert records[0].error.startswith("cut.nii.gz cannot be read")
    assert {"TotalSegmentator", "nnunetv2"} <= records[1].versions.keys()
    plain(cts / "one.nii.gz", tmp_path / "plain.nii.gz", ml=True, fast=True)
    assert same_file(tmp_path / "out" / "one.nii.gz", tmp_path / "plain.nii.gz")
    config = json.loads((home / "config.json").read_text())
    assert config["prediction_counter"] == 3 and config["send_usage_stats"] is False


@pytest.mark.slow
def test_context_keeps_models_between_calls_on_request(cts, home, loads, tmp_path):
    write_stand_in(297, weights_folder(), base_features=2, patch_size=SMALL_PATCH)
    run = RunConfig(backend="stock", keep_models=True)
    with NNSlimContext(SlimConfig(run=run)) as slim:
        for number in range(2):
            plain(cts / "one.nii.gz", tmp_path / f"{number}.nii.gz", ml=True, fast=True)
    assert loads == ["Dataset297"] and len(slim.report.models) == 1
    plain(cts / "one.nii.gz", tmp_path / "after.nii.gz", ml=True, fast=True)
    assert loads == ["Dataset297"] * 2
    assert all(same_file(tmp_path / f"{name}.nii.gz", tmp_path / "after.nii.gz") for name in "01")


def test_missing_weights_are_fetched_before_they_name_the_results(cts, home, tmp_path, monkeypatch):
    """Were they fetched by the first image, a second run would take its results for those of another model."""
    dataset = write_stand_in(297, tmp_path / "source", base_features=2, patch_size=SMALL_PATCH)
    (dataset / STAND_IN_NOTE).unlink()
    name, url = task_source(297, base_url="http://web")
    archive = tmp_path / "web" / url.removeprefix("http://web/").removesuffix(".zip")
    shutil.make_archive(str(archive), "zip", dataset.parent, name)
    handler = functools.partial(QuietHandler, directory=tmp_path / "web")
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("NNSLIM_TS_URL", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        settings = TaskSettings("total_fast", ml=True, threads=1)
        records = predict_task_folder(cts / "one.nii.gz", tmp_path / "out", settings)
        server.shutdown()
    assert [(r.name, r.status, r.error) for r in records] == [("one", "done", "")]
    again = predict_task_folder(cts / "one.nii.gz", tmp_path / "out", settings)
    assert again[0].status == "there" and again[0].model == records[0].model


def test_kept_model_is_read_again_after_its_file_has_changed(home, loads, tmp_path):
    import torch

    dataset = write_stand_in(297, weights_folder(), base_features=2, patch_size=SMALL_PATCH)
    model = str(next(dataset.glob("*__3d_fullres")))
    with NNSlimContext(SlimConfig(run=RunConfig(backend="stock", keep_models=True))):
        predictors = [nnUNetPredictor(device=torch.device("cpu"), use_mirroring=False) for _ in range(3)]
        predictors[0].initialize_from_trained_model_folder(model, [0])
        predictors[1].initialize_from_trained_model_folder(model, [0])
        (Path(model) / "fold_0" / "checkpoint_final.pth").touch()
        predictors[2].initialize_from_trained_model_folder(model, [0])
    assert predictors[1].network is predictors[0].network and predictors[2].network is not predictors[0].network
    assert loads == ["Dataset297"] * 2


def test_task_names_have_resolutions_and_faults_name_the_nearest():
    assert find_task("total").ids == (291, 292, 293, 294, 295)
    fast = find_task("total_fast", ["liver"])
    assert (fast.ids, fast.trainer, fast.options["fast"]) == ((297,), "nnUNetTrainer_4000epochs_NoMirroring", True)
    assert find_task("body_fast").ids == (300,) and find_task("lung_vessels").mode == "default"
    for name, classes, message in (
        ("totl", (), "has no task 'totl'; nearest: total"),
        ("body_fastest", (), "has no task 'body_fastest'; it has body, body_fast"),
        ("total", ("livr",), "task total has no class 'livr'; nearest: liver"),
        ("body", ("body_trunc",), "--roi goes with the tasks total, total_v3 and total_mr only, found body"),
    ):
        with pytest.raises(ConfigError) as error:
            find_task(name, classes)
        assert message in str(error.value)


def test_listing_of_images_by_file_and_by_subject(tmp_path, caplog):
    folder = tmp_path / "in"
    folder.mkdir()
    with pytest.raises(InputError, match=r"holds no image named <case>.nii.gz, <case>.nii or <case>/ct.nii.gz"):
        task_cases(folder, ml=True)
    for name in (
        "a.nii.gz",
        "a.nii",
        "b.nii",
        "c/ct.nii.gz",
        "d/mri.nii",
        "d.nii.gz",
        "e/other.nii.gz",
        "f.txt",
        ".g.nii",
    ):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"x")
    cases = task_cases(folder, ml=False)
    assert [(case.name, case.target) for case in cases] == [(name, name) for name in "abcd"]
    problems = {case.name: case.problem for case in cases if case.problem}
    assert problems == {
        "a": "a.nii and a.nii.gz are both case 'a'; rename or remove one",
        "d": "d/mri.nii and d.nii.gz are both case 'd'; rename or remove one",
    }
    assert "2 files or folders are no images and left out: e, f.txt" in caplog.text
    assert task_cases(folder / "b.nii", ml=True)[0].target == "b.nii.gz"
