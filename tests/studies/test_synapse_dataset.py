"""TransUNet's layout of Synapse as a dataset, its rule of scoring, and faults of the published programs."""

from __future__ import annotations

import compileall
import json
import re
import subprocess
import sys

import nibabel as nib
import numpy as np
import pytest
from helpers import ROOT

from nnslim.errors import BackendError, InputError
from nnslim.evaluation.directories import evaluate_directories
from nnslim.running import int8
from studies.synapse_dataset import ORGANS, convert_synapse
from studies.transunet import hd95_voxels, transunet_scores, transunet_table


@pytest.fixture
def synapse(tmp_path):
    """Two training cases of five slices and one test volume, (slices, rows, columns)."""
    h5py = pytest.importorskip("h5py")
    rng = np.random.default_rng(0)
    source, truth = tmp_path / "Synapse", {}
    (source / "train_npz").mkdir(parents=True)
    (source / "test_vol_h5").mkdir()
    for case in ("case0005", "case0006"):
        image, label = rng.random((5, 12, 10), np.float32), rng.integers(0, 9, (5, 12, 10))
        truth[case] = (image, label)
        for number in range(5):
            path = source / "train_npz" / f"{case}_slice{number:03d}.npz"
            np.savez(path, image=image[number], label=label[number].astype(np.float32))
    truth["case0008"] = (rng.random((4, 12, 10), np.float32), rng.integers(0, 9, (4, 12, 10)))
    with h5py.File(source / "test_vol_h5" / "case0008.npy.h5", "w") as file:
        file["image"], file["label"] = truth["case0008"]
    return source, truth


def test_slices_become_volumes_with_their_labels_and_spacing(synapse, tmp_path):
    source, truth = synapse
    target = tmp_path / "Dataset122_Synapse"
    convert_synapse(source, target, (3.0, 0.8, 0.7))
    for case, (image, label) in truth.items():
        part = "Ts" if case == "case0008" else "Tr"
        found = nib.load(target / f"images{part}" / f"{case}_0000.nii.gz")
        assert np.array_equal(found.get_fdata().T.astype(np.float32), image)
        assert found.header.get_zooms() == pytest.approx((0.7, 0.8, 3.0))
        labels = nib.load(target / f"labels{part}" / f"{case}.nii.gz")
        assert np.array_equal(np.asarray(labels.dataobj).T, label)
    description = json.loads((target / "dataset.json").read_text())
    assert description["channel_names"] == {"0": "noNorm"} and description["numTraining"] == 2
    assert list(description["labels"]) == ["background", *ORGANS]
    assert json.loads((target / "splits_final.json").read_text())[0]["train"] == ["case0005", "case0006"]


def test_script_converts_and_reports_faults(synapse, tmp_path):
    source, _ = synapse
    script = str(ROOT / "scripts" / "15_convert_dataset.py")
    command = [sys.executable, script, "synapse", "-i", str(source), "-o", str(tmp_path / "out")]
    assert subprocess.run(command, capture_output=True, cwd=ROOT).returncode == 0
    assert len(list((tmp_path / "out" / "imagesTr").iterdir())) == 2


@pytest.mark.parametrize(
    ("fault", "text"),
    [
        ("missing", r"case0005 lacks slice\(s\) \[2\]"),
        ("label", r"holds labels \[9\.0\], expected 0\.\.8"),
        ("size", "slices of case0005 differ in size"),
        ("key", "cannot be read as a slice with image and label"),
        ("name", "expected a name such as"),
        ("none", "expected TransUNet's layout"),
    ],
)
def test_faulty_slices_are_named_and_nothing_is_written(synapse, tmp_path, fault, text):
    source, _ = synapse
    path = source / "train_npz" / "case0005_slice002.npz"
    image, label = np.zeros((12, 10), np.float32), np.zeros((12, 10))
    if fault == "missing":
        path.unlink()
    elif fault == "label":
        np.savez(path, image=image, label=label + 9)
    elif fault == "size":
        np.savez(path, image=image[:4], label=label[:4])
    elif fault == "key":
        np.savez(path, image=image)
    elif fault == "name":
        path.rename(path.with_name("x.npz"))
    else:
        for file in (source / "train_npz").iterdir():
            file.unlink()
    with pytest.raises(InputError, match=text):
        convert_synapse(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_spacing_of_two_numbers_is_refused(synapse, tmp_path):
    with pytest.raises(InputError, match="expected three numbers of mm"):
        convert_synapse(synapse[0], tmp_path / "out", (1.0, 1.0))


def test_transunet_rule_of_empty_classes():
    """It rewards a false positive and punishes a correct nothing; ours says so in the column `empty`."""
    full, empty = np.ones((3, 3), bool), np.zeros((3, 3), bool)
    assert transunet_scores(full, empty) == (1.0, 0.0)
    assert transunet_scores(empty, full) == (0.0, 0.0)
    assert transunet_scores(empty, empty) == (0.0, 0.0)
    assert transunet_scores(full, full) == (1.0, 0.0)


def test_transunet_hd95_is_medpys_in_voxels():
    """Constants: medpy 0.5.2, `metric.binary.hd95` and `dc` on these masks."""
    grid = np.indices((20, 18, 16))
    first = ((grid - np.array([9, 9, 8]).reshape(3, 1, 1, 1)) ** 2).sum(0) < 30
    second = ((grid - np.array([11, 8, 7]).reshape(3, 1, 1, 1)) ** 2).sum(0) < 20
    second[0, 0, 0] = True
    dice, distance = transunet_scores(first, second)
    assert (round(dice, 6), round(distance, 6)) == (0.575213, 3.162278)
    assert hd95_voxels(second, first) == distance


def test_folders_are_scored_in_millimetres_and_by_the_rule_beside_it(tmp_path):
    for name in ("pred", "ref"):
        (tmp_path / name).mkdir()
    truth, found = np.zeros((10, 10, 6), np.uint8), np.zeros((10, 10, 6), np.uint8)
    truth[2:6, 2:6, 1:4], found[3:7, 2:6, 1:4] = 1, 1
    found[8:, 8:, 5] = 2  # a false positive
    affine = np.diag((0.5, 0.5, 4.0, 1.0))
    for name, values in (("pred", found), ("ref", truth)):
        nib.save(nib.Nifti1Image(values, affine), tmp_path / name / "case0001.nii.gz")
    table = transunet_table(tmp_path / "pred", tmp_path / "ref", (1, 2))
    assert table.to_numpy().tolist() == [["case0001", 1, 0.75, 1.0], ["case0001", 2, 1.0, 0.0]]
    assert table[["dice", "hd95"]].mean().tolist() == [0.875, 0.5]
    ours = evaluate_directories(tmp_path / "pred", tmp_path / "ref", workers=1)
    assert ours.cases[0].score("1").hd95 == pytest.approx(0.5)  # mm
    assert ours.cases[0].score("2").dice == 0 and ours.cases[0].score("2").empty == "reference"
    (tmp_path / "pred" / "case0001.nii.gz").rename(tmp_path / "pred" / "case0002.nii.gz")
    with pytest.raises(InputError):
        transunet_table(tmp_path / "pred", tmp_path / "ref", (1, 2))


def test_quantisation_that_changes_nothing_raises(monkeypatch):
    """A convert without preparation left every weight as it was, and nobody noticed."""
    pytest.importorskip("openvino")
    nncf = pytest.importorskip("nncf")
    import torch
    from torch import nn

    network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 1)).eval()
    tiles = [torch.randn(1, 1, 16, 16) for _ in range(2)]
    assert int8.quantize(network, (1, 1, 16, 16), tiles).in_int8 >= 1
    monkeypatch.setattr(nncf, "quantize", lambda model, *_, **__: model)
    with pytest.raises(BackendError, match="nothing changed: none of 3 convolutions"):
        int8.quantize(network, (1, 1, 16, 16), tiles)


def test_every_source_compiles_and_nothing_imports_what_is_not_declared_or_names_a_device():
    """The published programs had IndentationErrors, missing modules, undeclared packages and a fixed CUDA device."""
    for folder in (ROOT / "nnslim" / "methods" / "embedded", ROOT / "nnslim" / "hosts" / "nnunet" / "train"):
        assert compileall.compile_dir(str(folder), quiet=2, force=True) and list(folder.glob("*.py"))
        for file in folder.glob("*.py"):
            assert not re.search(r"sparseml|imgaug|medpy|\.cuda\(|CUDA_VISIBLE_DEVICES", file.read_text()), file
