"""Streamed export inside TotalSegmentator: beside its own patch, in any order of imports, in its worker processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

# This very module patches nnU-Net when it is imported.
pytest.importorskip("totalsegmentator.nnunet", reason="TotalSegmentator is not installed (pip install nnslim[ts])")

import totalsegmentator.nnunet_runtime_patches as theirs
from helpers import make_predictor

from nnslim import NNSlimContext
from nnslim.hosts.nnunet.cases import write_labels as streamed
from nnslim.hosts.totalseg.stand_in import write_stand_in
from nnslim.hosts.totalseg.task_weights import disable_usage_statistics, weights_folder

DENSE = {"run": {"backend": "stock"}}


@pytest.mark.parametrize("early", [True, False])
def test_patches_compose_whether_totalsegmentator_is_imported_before_or_inside(make_model, early):
    code = f"""
import pickle, torch
import nnunetv2.inference.predict_from_raw_data as predict
from nnslim import NNSlimContext
from nnslim.hosts.nnunet.cases import write_labels as streamed
NAMES = "export_prediction_from_logits", "convert_predicted_logits_to_segmentation_with_correct_shape"
stock = [getattr(predict, name) for name in NAMES]
if {early}:
    import totalsegmentator.nnunet
with NNSlimContext({DENSE!r}):
    import totalsegmentator.nnunet  # patches nnU-Net
    import totalsegmentator.nnunet_runtime_patches as theirs
    predictor = predict.nnUNetPredictor(device=torch.device("cpu"), allow_tqdm=False)
    predictor.initialize_from_trained_model_folder({str(make_model())!r}, (0,))
    for module in (predict, theirs):
        for name in NAMES:
            assert pickle.loads(pickle.dumps(getattr(module, name))) is getattr(streamed, name), (module, name)
for name in NAMES:
    own = getattr(theirs, name)
    assert own.__module__ == theirs.__name__ and not hasattr(own, "__nnslim_original__")
    assert getattr(predict, name) is own and own not in stock
assert not streamed.originals
print("composed")
"""
    done = subprocess.run([sys.executable, "-W", "error:::nnslim", "-c", code], capture_output=True, text=True)
    assert done.stdout.strip().endswith("composed"), done.stderr[-1500:]
    assert "somebody else" not in done.stderr


def test_wish_for_less_memory_is_met_exactly_in_the_context(make_model, monkeypatch):
    """TotalSegmentator's flag asks for its approximation; inside, the labels are those of nnU-Net's full export."""
    predictor = make_predictor()
    predictor.initialize_from_trained_model_folder(str(make_model()), (0,))
    image = np.random.default_rng(0).normal(size=(1, 20, 22, 24)).astype(np.float32)
    seen = []
    original = streamed.labels_of
    monkeypatch.setattr(streamed, "labels_of", lambda *given: seen.append(original(*given)) or seen[-1])
    approximated = []
    cropped = theirs._convert_logits_to_segmentation_with_cropped_resampling
    monkeypatch.setattr(
        theirs,
        "_convert_logits_to_segmentation_with_cropped_resampling",
        lambda *given: approximated.append(1) or cropped(*given),
    )

    def predict(**flag):
        return predictor.predict_single_npy_array(image.copy(), {"spacing": [0.7, 0.8, 0.9]}, **flag)

    full = predict()
    predict(use_cropped_logits_resampling=True)
    assert approximated == [1] and not seen
    with NNSlimContext(DENSE):
        inside = predict(use_cropped_logits_resampling=True)
    assert approximated == [1] and len(seen) == 1
    assert (inside == full).mean() > 0.999  # the image differs in the last digit


@pytest.fixture
def ct(data_root: Path, tmp_path: Path, monkeypatch) -> Path:
    """The middle of the sample CT, 48x48x30 voxels of 3 mm, and a TotalSegmentator home of its own with stand-ins."""
    path = data_root / "data" / "totalsegmentator_samples" / "example_ct_sm.nii.gz"
    if not path.is_file():
        pytest.skip(f"{path} is absent; set NNSLIM_DATA to the folder that holds data/totalsegmentator_samples")
    monkeypatch.setenv("TOTALSEG_HOME_DIR", str(tmp_path / "home"))
    monkeypatch.delenv("TOTALSEG_WEIGHTS_PATH", raising=False)
    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        monkeypatch.setenv(name, os.environ.get(name, str(tmp_path)))
    disable_usage_statistics()
    write_stand_in(297, weights_folder(), base_features=4, patch_size=(64, 64, 64))
    nib.save(nib.load(path).slicer[40:88, 30:78, :], tmp_path / "ct.nii.gz")
    return tmp_path / "ct.nii.gz"


@pytest.mark.data
@pytest.mark.parametrize("finer", [False, True])
def test_totalsegmentator_draws_the_same_inside(ct, tmp_path, finer):
    from totalsegmentator.python_api import totalsegmentator

    def draw(name):
        options = {"fast": True, "higher_order_resampling": finer}
        totalsegmentator(ct, tmp_path / name, ml=True, device="cpu", quiet=True, **options)
        return np.asarray(nib.load(tmp_path / name).dataobj)

    outside = draw("outside.nii.gz")
    with NNSlimContext(DENSE):
        inside = draw("inside.nii.gz")
    assert inside.shape == outside.shape and len(np.unique(inside)) > 3
    # With the flag, TotalSegmentator approximates, and leaves out classes that are nowhere best on the coarse grid.
    assert (inside == outside).mean() > (0.99 if finer else 0.9999)
