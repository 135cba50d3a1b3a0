"""ACDC and KiTS19 as nnU-Net datasets, from small files of their layouts."""

from __future__ import annotations

import json
import subprocess
import sys

import nibabel as nib
import numpy as np
import pytest
from helpers import ROOT

from nnslim.errors import InputError
from studies.public_datasets import convert_acdc, convert_kits19

AFFINE = np.diag([1.5, 1.5, 10.0, 1.0])


def save(path, values):
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(values, AFFINE), path)


@pytest.fixture
def kits(tmp_path):
    """Three cases; the last has no labels, as the challenge's from 210 on."""
    for number, values in enumerate(np.random.default_rng(0).integers(-100, 300, (3, 5, 6, 7)).astype(np.int16)):
        save(tmp_path / "data" / f"case_{number:05d}" / "imaging.nii.gz", values)
        if number < 2:
            save(tmp_path / "data" / f"case_{number:05d}" / "segmentation.nii.gz", (values % 3).astype(np.uint8))
    (tmp_path / "data" / "kits.json").write_text("[]")
    return tmp_path / "data"


def test_kits19_becomes_an_nnunet_dataset(kits, tmp_path):
    script, target = str(ROOT / "scripts" / "15_convert_dataset.py"), tmp_path / "Dataset064_KiTS19"
    done = subprocess.run([sys.executable, script, "kits19", "-i", str(kits), "-o", str(target)], cwd=ROOT)
    assert done.returncode == 0
    from nnunetv2.experiment_planning.verify_dataset_integrity import verify_dataset_integrity

    verify_dataset_integrity(str(target), 1)
    described = json.loads((target / "dataset.json").read_text())
    assert described["labels"] == {"background": 0, "kidney": 1, "tumor": 2} and described["numTraining"] == 2
    assert not (target / "splits_final.json").exists()
    assert [path.name for path in (target / "imagesTs").iterdir()] == ["case_00002_0000.nii.gz"]
    for name in ("case_00000", "case_00001"):
        image, label = (
            nib.load(target / place).get_fdata()
            for place in (f"imagesTr/{name}_0000.nii.gz", f"labelsTr/{name}.nii.gz")
        )
        assert np.array_equal(image, nib.load(kits / name / "imaging.nii.gz").get_fdata())
        assert np.array_equal(label, image % 3)


def test_kits19_faults_are_named_and_leave_nothing(kits, tmp_path):
    with pytest.raises(InputError, match=r"no case_NNNNN/imaging.nii.gz with segmentation.nii.gz in .*KiTS19's data"):
        convert_kits19(kits / "case_00000", tmp_path / "out")
    save(kits / "case_00001" / "segmentation.nii.gz", np.full((5, 6, 7), 3, np.uint8))
    with pytest.raises(InputError, match=r"case_00001/segmentation.nii.gz holds labels \[3\], expected 0..2"):
        convert_kits19(kits, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.fixture
def acdc(tmp_path):
    """Six patients for training and two for testing, the last without labels."""
    rng = np.random.default_rng(0)
    for number in range(1, 9):
        folder = tmp_path / "ACDC" / ("training" if number < 7 else "testing") / f"patient{number:03d}"
        for frame in ("01", "12"):
            label = rng.integers(0, 4, (8, 9, 4)).astype(np.uint8)
            save(folder / f"patient{number:03d}_frame{frame}.nii.gz", (10 * label + number).astype(np.int16))
            if number < 8:
                save(folder / f"patient{number:03d}_frame{frame}_gt.nii.gz", label)
        save(folder / f"patient{number:03d}_4d.nii.gz", np.zeros((8, 9, 4, 2), np.int16))
        (folder / "Info.cfg").write_text("ED: 1\nES: 12\n")
    return tmp_path / "ACDC"


def test_acdc_becomes_an_nnunet_dataset_with_nnunets_split_by_patient(acdc, tmp_path):
    target = tmp_path / "Dataset027_ACDC"
    convert_acdc(acdc, target)
    from nnunetv2.dataset_conversion.Dataset027_ACDC import create_ACDC_split
    from nnunetv2.experiment_planning.verify_dataset_integrity import verify_dataset_integrity

    verify_dataset_integrity(str(target), 1)
    assert json.loads((target / "dataset.json").read_text())["numTraining"] == 12
    assert len(list((target / "imagesTs").iterdir())) == 4 and len(list((target / "labelsTs").iterdir())) == 2
    folds = json.loads((target / "splits_final.json").read_text())
    stock = create_ACDC_split(str(target / "labelsTr"))
    assert [{side: set(names) for side, names in fold.items()} for fold in folds] == [
        {side: set(names) for side, names in fold.items()} for fold in stock
    ]
    for fold in folds:
        assert not {name[:10] for name in fold["train"]} & {name[:10] for name in fold["val"]}
    for name in folds[0]["val"]:
        image, label = (
            target / place / f"{name}{end}" for place, end in (("imagesTr", "_0000.nii.gz"), ("labelsTr", ".nii.gz"))
        )
        assert np.array_equal(nib.load(image).get_fdata() // 10, nib.load(label).get_fdata())


def test_acdc_faults_are_named_and_leave_nothing(acdc, tmp_path):
    with pytest.raises(InputError, match=r"expected ACDC's folder"):
        convert_acdc(acdc / "training", tmp_path / "out")
    (acdc / "training" / "patient003" / "patient003_frame12_gt.nii.gz").unlink()
    with pytest.raises(InputError, match=r"patient003_frame12.nii.gz has no labels"):
        convert_acdc(acdc, tmp_path / "out")
    assert not (tmp_path / "out").exists()
