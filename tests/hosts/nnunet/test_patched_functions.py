"""What a context puts in place of nnU-Net's functions takes the same arguments and gives the same back."""

from __future__ import annotations

import importlib
import inspect
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import load_stock

from nnslim import NNSlimContext
from nnslim.hosts.nnunet.cases import export_patches, write_labels
from nnslim.hosts.nnunet.cases.preprocess import silent
from nnslim.patching import AttributePatch

DENSE = {"run": {"backend": "stock", "export": "stock"}}  # to the bit, also for images and probabilities
FEW = {"num_processes_preprocessing": 1, "num_processes_segmentation_export": 1}


def test_every_patched_function_takes_the_arguments_of_the_original(monkeypatch):
    """By position, and by nnU-Net's names."""
    patched, apply = [], AttributePatch.apply

    def noted(patch: AttributePatch) -> None:
        before = vars(patch.owner)[patch.name]
        apply(patch)
        patched.append((patch.name, before, vars(patch.owner)[patch.name]))

    monkeypatch.setattr(AttributePatch, "apply", noted)
    for place in ("nnunetv2.inference.data_iterators", export_patches._PREPROCESSOR, export_patches._PREDICTOR):
        importlib.import_module(place)
    with NNSlimContext(DENSE):
        for name, original, ours in patched:
            if isinstance(ours, export_patches.Exporter):
                ours = getattr(write_labels, name)
            taken = inspect.signature(ours, follow_wrapped=False)
            names = list(inspect.signature(original).parameters)
            taken.bind(*names)
            first = names[: names[0] in ("self", "data")]  # of methods, and data: anything may be called by position
            taken.bind(*first, **{word: None for word in names[len(first) :]})
    assert {"predict_from_files", "run_case_npy", "export_prediction_from_logits"} <= {name for name, *_ in patched}


def _outcome(call: Any, folder: Path) -> Any:
    """Return what a call gives back, or the kind of its error, and the files that are then in a folder."""

    def plain(value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return [type(value), *map(plain, value)]
        return (value.shape, value.dtype, value.tobytes()) if isinstance(value, np.ndarray) else value

    with silent():
        try:
            found = plain(call())
        except Exception as error:  # whatever nnU-Net raises
            found = type(error)
    return found, sorted(path.name for path in folder.rglob("*") if path.is_file())


def _arrays(predictor: Any, images: Path) -> tuple[np.ndarray, dict[str, Any]]:
    return predictor.plans_manager.image_reader_writer_class().read_images([str(images / "a_0000.nii.gz")])


_SEQUENTIAL = {
    "folder": lambda p, i, o: p.predict_from_files_sequential(str(i), str(o)),
    "path": lambda p, i, o: p.predict_from_files_sequential(str(i), o),
    "path of images": lambda p, i, o: p.predict_from_files_sequential(i, str(o)),
    "arrays": lambda p, i, o: p.predict_from_files_sequential([[str(i / "a_0000.nii.gz")]], None),
    "probabilities": lambda p, i, o: p.predict_from_files_sequential(str(i), None, save_probabilities=True),
    "files": lambda p, i, o: p.predict_from_files_sequential([[str(i / "a_0000.nii.gz")]], [str(o / "x")]),
    "paths": lambda p, i, o: p.predict_from_files_sequential([[i / "a_0000.nii.gz"]], [str(o / "x")]),
    "flat": lambda p, i, o: p.predict_from_files_sequential([str(i / "a_0000.nii.gz")], str(o)),
    "one array": lambda p, i, o: p.predict_single_npy_array(*_arrays(p, i)),
    "one array, written": lambda p, i, o: p.predict_single_npy_array(*_arrays(p, i), None, str(o / "x"), True),
    "one array, probabilities": lambda p, i, o: p.predict_single_npy_array(
        *_arrays(p, i), save_or_return_probabilities=True
    ),
}
_WITH_WORKERS = {
    "path": lambda p, i, o: p.predict_from_files(str(i), o, **FEW),
    "path of images": lambda p, i, o: p.predict_from_files(i, str(o), **FEW),
    "by name": lambda p, i, o: p.predict_from_files(
        list_of_lists_or_source_folder=str(i), output_folder_or_list_of_truncated_output_files=str(o), **FEW
    ),
    "none": lambda p, i, o: p.predict_from_files([], str(o), **FEW),
}


@pytest.mark.parametrize(
    "call",
    [*_SEQUENTIAL.values(), *_WITH_WORKERS.values()],
    ids=[*_SEQUENTIAL, *(f"workers, {name}" for name in _WITH_WORKERS)],
)
def test_each_form_of_arguments_gives_what_stock_gives(make_model, case_folder, tmp_path, call):
    for name in "bc":
        (case_folder / f"{name}_0000.nii.gz").unlink()
    model, found = make_model(), []
    for name, context in (("stock", nullcontext()), ("context", NNSlimContext(DENSE))):
        (output := tmp_path / "out").mkdir()
        with context:
            predictor = load_stock(model)
            found.append(_outcome(partial(call, predictor, case_folder, output), output))
        output.rename(tmp_path / name)
    assert found[0] == found[1]
