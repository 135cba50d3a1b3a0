"""One image alone is predicted without nnU-Net's worker processes, with the same result; all else is left to them."""

from __future__ import annotations

import functools
import json
import subprocess
import sys

import nibabel as nib
import nnunetv2.inference.data_iterators as data_iterators
import nnunetv2.utilities.utils as listing
import numpy as np
import pytest
import torch
from helpers import ROOT, load_stock
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

from nnslim import NNSlimContext

DENSE = {"run": {"backend": "stock"}}


@pytest.fixture
def one_image(case_folder):
    """The folder of three images with two of them removed."""
    for name in "bc":
        (case_folder / f"{name}_0000.nii.gz").unlink()
    return case_folder


@pytest.fixture
def no_processes(monkeypatch):
    """Make each of the places fail where nnU-Net starts processes to predict from files."""

    def fail(*_, **__):
        raise AssertionError("a process was started")

    monkeypatch.setattr(listing, "Pool", fail, raising=False)  # absent before 2.4
    monkeypatch.setattr(data_iterators, "preprocessing_iterator_fromfiles", fail)
    monkeypatch.setattr(nnUNetPredictor, "predict_from_data_iterator", fail)


def _array(path):
    return np.asarray(nib.load(path).dataobj)


@pytest.mark.parametrize(
    ("kind", "images", "written", "probabilities"),
    [
        ("plain", 1, True, False),
        ("cascade", 1, False, True),
        pytest.param("plain", 1, False, False, marks=pytest.mark.slow),
        pytest.param("cascade", 1, True, True, marks=pytest.mark.slow),
        pytest.param("cascade", 3, True, False, marks=pytest.mark.slow),
    ],
)
def test_results_are_those_of_the_workers(make_model, case_folder, tmp_path, kind, images, written, probabilities):
    for name in "bc"[images - 1 :]:
        (case_folder / f"{name}_0000.nii.gz").unlink()
    stage = tmp_path / "stage"
    stage.mkdir()
    for file in case_folder.iterdir():  # the stage before a cascade: a third of the voxels for each label
        image = nib.load(file)
        labels = np.digitize(np.asarray(image.dataobj), (-0.43, 0.43)).astype(np.uint8)
        nib.save(nib.Nifti1Image(labels, image.affine), stage / file.name.replace("_0000", ""))
    options = {"folder_with_segs_from_prev_stage": str(stage)} if kind == "cascade" else {}
    options |= {"num_processes_preprocessing": 1, "num_processes_segmentation_export": 1}
    model, out = make_model(kind), tmp_path / "new" / "out"

    def predict(keep):
        predictor = load_stock(model)
        found = predictor.predict_from_files(
            str(case_folder), str(out) if written else None, save_probabilities=probabilities, **options
        )
        if written:
            out.rename(keep)
        return found

    expected = predict(tmp_path / "workers")
    with pytest.MonkeyPatch.context() as patched, NNSlimContext({"run": {"backend": "stock", "export": "stock"}}):
        if images == 1:
            patched.setattr(listing, "Pool", None, raising=False)
            patched.setattr(nnUNetPredictor, "predict_from_data_iterator", None)
        found = predict(tmp_path / "here")
    assert len(found) == len(expected) == images
    if not written:
        pairs = zip(found[0], expected[0], strict=True) if probabilities else [(found[0], expected[0])]
        assert all(np.array_equal(ours, stock) for ours, stock in pairs)
        return
    names = {path.name for path in (tmp_path / "workers").iterdir()}
    assert {path.name for path in (tmp_path / "here").iterdir()} == names and ("a.npz" in names) == probabilities
    for name in names:
        ours, stock = tmp_path / "here" / name, tmp_path / "workers" / name
        if name.endswith(".nii.gz"):
            assert np.array_equal(_array(ours), _array(stock)) and len(np.unique(_array(ours))) > 1
        elif name.endswith(".npz"):
            assert np.array_equal(np.load(ours)["probabilities"], np.load(stock)["probabilities"])
        elif name.endswith(".json"):
            assert json.loads(ours.read_text()) == json.loads(stock.read_text())


def test_subclass_with_its_own_way_keeps_it(make_model, one_image, tmp_path):
    class Own(nnUNetPredictor):
        def predict_from_data_iterator(self, items, *rest, **options):
            return "its own"

    with NNSlimContext(DENSE):
        predictor = Own(device=torch.device("cpu"), allow_tqdm=False)
        predictor.initialize_from_trained_model_folder(str(make_model()), (0,))
        assert predictor.predict_from_files(str(one_image), str(tmp_path / "out")) == "its own"


def test_files_by_name_and_labels_returned(make_model, one_image, tmp_path, no_processes):
    files = [[str(one_image / "a_0000.nii.gz")]]
    with NNSlimContext(DENSE):
        predictor = load_stock(make_model())
        (labels,) = predictor.predict_from_files(files, None)
        predictor.predict_from_files(files, [str(tmp_path / "named" / "x")])
    assert labels.shape == (17, 20, 18)
    assert np.array_equal(_array(tmp_path / "named" / "x.nii.gz").transpose(2, 1, 0), labels)


@pytest.mark.parametrize("case", ["several", "stock", "not applied", "part", "stray file", "none"])
def test_anything_else_is_left_to_nnunet(make_model, case_folder, tmp_path, monkeypatch, case):
    seen = []

    def predict_from_files(self, list_of_lists_or_source_folder, *rest, **options):
        seen.append((list_of_lists_or_source_folder, *rest))

    monkeypatch.setattr(nnUNetPredictor, "predict_from_files", predict_from_files)
    if case != "several":
        for name in "bc" if case != "none" else "abc":
            (case_folder / f"{name}_0000.nii.gz").unlink()
    if case == "stray file":
        (case_folder / "other.nii.gz").write_bytes(b"")
    config = {
        "stock": {"run": {"backend": "stock", "processes": "stock"}},
        "not applied": {"apply": False},
    }.get(case, DENSE)
    parts = (2, 1) if case == "part" else (1, 0)
    with NNSlimContext(config):
        load_stock(make_model()).predict_from_files(
            str(case_folder), str(tmp_path / "out"), False, True, 2, 4, None, *parts
        )
    assert seen == [(str(case_folder), str(tmp_path / "out"), False, True, 2, 4, None, *parts)]
    assert not (tmp_path / "out").exists()


def test_wrapper_put_around_it_inside_the_block_is_called_once_and_stays(make_model, one_image, tmp_path, no_processes):
    calls = []
    stock = vars(nnUNetPredictor)["predict_from_files"]
    with NNSlimContext(DENSE):
        ours = vars(nnUNetPredictor)["predict_from_files"]
        assert ours.__nnslim_original__ is stock

        @functools.wraps(ours)
        def counted(*given, **named):
            calls.append(given[1])
            return ours(*given, **named)

        nnUNetPredictor.predict_from_files = counted
        try:
            predictor = load_stock(make_model())  # where the patches are looked after
            predictor.predict_from_files(str(one_image), str(tmp_path / "out"))
            assert vars(nnUNetPredictor)["predict_from_files"] is counted
        finally:
            nnUNetPredictor.predict_from_files = ours
    assert calls == [str(one_image)] and (tmp_path / "out" / "a.nii.gz").is_file()
    assert vars(nnUNetPredictor)["predict_from_files"] is stock


def test_default_trainer_s_network_is_built_without_importing_trainers():
    """They import scikit-learn and seaborn, which takes seconds; what they build is the same."""
    code = (
        "import sys\n"
        "from nnslim.hosts.nnunet.model.shipped import shipped_model\n"
        "from nnslim.hosts.nnunet.model.trained_model import build_network, read_trained_model\n"
        "from nnslim.hosts.nnunet.predict.load import load_predictor\n"
        "from nnslim.hosts.nnunet.predict.predict_settings import PredictSettings\n"
        "model = read_trained_model(shipped_model())\n"
        "alone = str(build_network(model))\n"
        "load_predictor(shipped_model(), None, PredictSettings())\n"
        "assert not {'sklearn', 'seaborn', 'nnunetv2.training.nnUNetTrainer.nnUNetTrainer'} & set(sys.modules)\n"
        "import nnunetv2.training.nnUNetTrainer.nnUNetTrainer\n"
        "assert str(build_network(model)) == alone\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
