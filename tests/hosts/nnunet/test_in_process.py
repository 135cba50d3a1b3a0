"""One image alone is predicted without nnU-Net's worker processes, with the same result; all else is left to them."""

from __future__ import annotations

import functools
import json

import nibabel as nib
import nnunetv2.inference.data_iterators as data_iterators
import nnunetv2.utilities.utils as listing
import numpy as np
import pytest
from helpers import load_stock
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

    monkeypatch.setattr(listing, "Pool", fail)
    monkeypatch.setattr(data_iterators, "preprocessing_iterator_fromfiles", fail)
    monkeypatch.setattr(nnUNetPredictor, "predict_from_data_iterator", fail)


def _array(path):
    return np.asarray(nib.load(path).dataobj)


def test_file_is_that_of_the_workers(make_model, one_image, tmp_path, monkeypatch):
    model = make_model()
    few = {"num_processes_preprocessing": 1, "num_processes_segmentation_export": 1}
    load_stock(model).predict_from_files(str(one_image), str(tmp_path / "workers"), **few)
    with monkeypatch.context() as patched, NNSlimContext({"run": {"backend": "stock", "export": "stock"}}):
        patched.setattr(listing, "Pool", None)
        patched.setattr(nnUNetPredictor, "predict_from_data_iterator", None)
        load_stock(model).predict_from_files(str(one_image), str(tmp_path / "new" / "here"), **few)
    found, expected = tmp_path / "new" / "here", tmp_path / "workers"
    assert np.array_equal(_array(found / "a.nii.gz"), _array(expected / "a.nii.gz"))
    assert {path.name for path in found.iterdir()} == {path.name for path in expected.iterdir()}
    for name in ("dataset.json", "plans.json"):
        assert json.loads((found / name).read_text()) == json.loads((expected / name).read_text())


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
