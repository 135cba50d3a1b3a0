"""TotalSegmentator itself, offline, on a real CT, with stand-in weights: in and out of the context."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

pytest.importorskip("totalsegmentator", reason="TotalSegmentator is not installed (pip install nnslim[ts])")

from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

from nnslim import NNSlimContext
from nnslim.compression.config import RunConfig, tucker
from nnslim.hosts.nnunet.compress.compress_model import compress_model
from nnslim.hosts.nnunet.model.trained_model import read_trained_model
from nnslim.hosts.totalseg.stand_in import write_stand_in
from nnslim.hosts.totalseg.task_weights import weights_folder
from nnslim.network.spec import spec_of

# No guard: networks this narrow have nothing to gain, and are compressed to see that it is done.
SLIM = tucker(rank_factor=0.5, rank_min=2).model_copy(update={"run": RunConfig(guard=False)})
SMALL_PATCH = (64, 64, 64)


@pytest.fixture
def ran(monkeypatch):
    """Record (parameters, spec, folder) of every network that predicts, at the moment when it predicts."""
    seen = []
    original = nnUNetPredictor.predict_logits_from_preprocessed_data

    def predict_logits_from_preprocessed_data(self, data):
        seen.append((sum(p.numel() for p in self.network.parameters()), spec_of(self.network)))
        return original(self, data)

    monkeypatch.setattr(nnUNetPredictor, "predict_logits_from_preprocessed_data", predict_logits_from_preprocessed_data)
    return seen


def _segment(ct: Path, out: Path, **options) -> np.ndarray:
    from totalsegmentator.python_api import totalsegmentator

    totalsegmentator(ct, out, ml=True, device="cpu", quiet=True, **options)
    image, source = nib.load(out), nib.load(ct)
    assert image.shape == source.shape and np.allclose(image.affine, source.affine)
    labels = np.asarray(image.dataobj)
    assert labels.min() >= 0 and labels.max() <= 117 and len(np.unique(labels)) > 1
    return labels


def _state_of_hosts() -> dict[str, object]:
    import nnunetv2.inference.export_prediction as export
    import nnunetv2.inference.predict_from_raw_data as predict
    import totalsegmentator.nnunet as totalseg

    owners = {"predictor": nnUNetPredictor, "export": export, "predict": predict, "totalseg": totalseg}
    return {
        f"{where}.{name}": value
        for where, owner in owners.items()
        for name, value in vars(owner).items()
        if callable(value)
    }


def test_totalsegmentator_fast_runs_slim_inside_and_dense_outside(ct, home, ran, tmp_path):
    write_stand_in(297, weights_folder(), base_features=4, patch_size=SMALL_PATCH)
    before_labels = _segment(ct, tmp_path / "before.nii.gz", fast=True)
    before = _state_of_hosts()
    with NNSlimContext(SLIM) as slim:
        inside = _segment(ct, tmp_path / "inside.nii.gz", fast=True)
    assert _state_of_hosts() == before
    after_labels = _segment(ct, tmp_path / "after.nii.gz", fast=True)
    (dense, no_spec), (small, spec), (again, none_again) = ran
    assert (no_spec, none_again, again) == (None, None, dense) and spec is not None and small < dense / 2
    registered = sum(p.numel() for p in slim.report.models[0].slimmed.network.parameters())
    assert small == registered and "Dataset297" in slim.report.models[0].source
    assert np.array_equal(before_labels, after_labels) and not np.array_equal(before_labels, inside)


def test_totalsegmentator_five_parts_each_slim_and_higher_order_resampling_composes(ct, home, ran, tmp_path):
    for task in (291, 292, 293, 294, 295):
        write_stand_in(task, weights_folder(), base_features=2, patch_size=SMALL_PATCH)
    with NNSlimContext(SLIM) as slim:
        _segment(ct, tmp_path / "out.nii.gz", fast=False, higher_order_resampling=True)
    assert len(ran) == 5 and all(spec is not None for _, spec in ran)
    assert [model.source.split("Dataset")[1][:3] for model in slim.report.models] == ["291", "292", "293", "294", "295"]


def test_totalsegmentator_plans_argument_finds_the_compressed_sibling(ct, home, ran, tmp_path):
    dataset = write_stand_in(297, weights_folder(), base_features=4, patch_size=SMALL_PATCH)
    dense = next(dataset.glob("*__nnUNetPlans__3d_fullres"))
    sibling = dataset / dense.name.replace("__nnUNetPlans__", "__nnUNetPlansTucker05__")
    slimmed = compress_model(read_trained_model(dense), sibling, SLIM)
    assert json.loads((sibling / "plans.json").read_text())["plans_name"] == "nnUNetPlansTucker05"
    by_folder = _segment(ct, tmp_path / "folder.nii.gz", fast=True, plans="nnUNetPlansTucker05")
    # Stock torch inside, too, as outside: the default backend sums in single precision, and that can move a label.
    with NNSlimContext(SLIM.model_copy(update={"run": RunConfig(backend="stock", guard=False)})):
        by_context = _segment(ct, tmp_path / "context.nii.gz", fast=True)
    assert [spec for _, spec in ran] == [slimmed.spec, slimmed.spec]
    assert np.array_equal(by_folder, by_context)


@pytest.mark.slow
def test_totalsegmentator_fast_full_size_stand_in_runs_the_published_network(data_root, home, ran, tmp_path):
    """The real 3 mm architecture: 16,550,518 parameters and 387 more per unused head."""
    path = data_root / "data" / "totalsegmentator_samples" / "example_ct_sm.nii.gz"
    write_stand_in(297, weights_folder())
    _segment(path, tmp_path / "dense.nii.gz", fast=True)
    with NNSlimContext("tucker-balanced") as slim:
        _segment(path, tmp_path / "slim.nii.gz", fast=True)
    report = slim.report.models[0].slimmed
    assert report.dense.parameters == 16_550_518 and ran[0][1] is None and ran[1][1] == report.spec
