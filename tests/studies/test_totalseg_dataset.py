"""TotalSegmentator's public data set, in files of its layout, as a raw nnU-Net dataset."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

pytest.importorskip("totalsegmentator", reason="TotalSegmentator is not installed (pip install nnslim[ts])")

from nnslim.errors import InputError
from studies.totalseg_dataset import convert_totalseg, part_classes

ROOT = Path(__file__).resolve().parents[2]
AFFINE = np.diag((-1.5, -1.5, 1.5, 1.0))
META = """\
image_id;age;gender;institute;study_type;split;manufacturer;scanner_model;kvp;pathology;pathology_location
s0000;77.0;m;A;ct thorax;train;siemens;;120.0;no_pathology;
s0001;68.0;f;B;ct abdomen;val;siemens;;120.0;tumor;liver
s0002;30.0;f;B;ct abdomen;test;siemens;;;unclear;
s0003;51.0;m;C;ct neck;train;siemens;;;unclear;
"""


@pytest.fixture
def published(tmp_path):
    """Four subjects of the second version's layout, with a mask of each organ; two masks of s0000 overlap."""
    source = tmp_path / "Totalsegmentator_dataset_v201"
    for number in range(4):
        folder = source / f"s{number:04d}"
        (folder / "segmentations").mkdir(parents=True)
        nib.save(nib.Nifti1Image(np.full((6, 5, 8), number, np.int16), AFFINE), folder / "ct.nii.gz")
        for label, name in {**part_classes("organs"), 99: "heart"}.items():
            mask = np.zeros((6, 5, 8), np.uint8)
            mask.flat[label] = 1
            mask[5, 4, 7] = number == 0 and label in (3, 7)
            nib.save(nib.Nifti1Image(mask, AFFINE), folder / "segmentations" / f"{name}.nii.gz")
    (source / "meta.csv").write_text("\ufeff" + META, encoding="utf-8")
    return source


def test_subjects_become_label_maps_with_the_published_split(published, tmp_path):
    target = tmp_path / "Dataset095_Organ"
    command = [sys.executable, ROOT / "scripts" / "15_convert_dataset.py", "totalseg", "-i", published, "-o", target]
    ran = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    description = json.loads((target / "dataset.json").read_text())
    organs = part_classes("organs")
    assert description["labels"] == {"background": 0} | {name: label for label, name in organs.items()}
    assert description["channel_names"] == {"0": "CT"} and description["numTraining"] == 3
    split = [{"train": ["s0000", "s0003"], "val": ["s0001"]}]
    assert json.loads((target / "splits_final.json").read_text()) == split
    files = {str(path.relative_to(target)) for path in target.rglob("*.nii.gz")}
    expected = {f"imagesTr/s{n:04d}_0000.nii.gz" for n in (0, 1, 3)} | {f"labelsTr/s{n:04d}.nii.gz" for n in (0, 1, 3)}
    assert files == expected | {"imagesTs/s0002_0000.nii.gz", "labelsTs/s0002.nii.gz"}
    labels = nib.load(target / "labelsTr" / "s0000.nii.gz")
    assert np.array_equal(labels.affine, AFFINE) and labels.get_data_dtype() == np.uint8
    values = np.asarray(labels.dataobj)
    assert all(values.flat[label] == label for label in organs) and values[5, 4, 7] == 7
    assert np.count_nonzero(values) == len(organs) + 1  # the heart is of another part
    image = (published / "s0000" / "ct.nii.gz").read_bytes()
    assert (target / "imagesTr" / "s0000_0000.nii.gz").read_bytes() == image


def test_nnunet_accepts_the_dataset(published, tmp_path):
    from nnunetv2.experiment_planning.verify_dataset_integrity import verify_dataset_integrity

    convert_totalseg(published, tmp_path / "Dataset095_Organ", workers=1)
    verify_dataset_integrity(str(tmp_path / "Dataset095_Organ"), 1)


def test_parts_are_those_of_the_installed_totalsegmentator():
    assert len(part_classes("total")) == 117 and part_classes("class_map_part_organs") == part_classes("organs")
    assert sum(len(part_classes(part)) for part in ("organs", "vertebrae", "cardiac", "muscles", "ribs")) == 117
    with pytest.raises(InputError, match=r"'orgns' is neither"):
        part_classes("orgns")


@pytest.mark.parametrize(
    ("fault", "expected"),
    [
        ("no table", r"meta\.csv cannot be read"),
        ("split", r"expected columns image_id and split .* found s0001: validation"),
        ("commas", r"expected columns image_id and split"),
        ("no image", r"s0001/ct\.nii\.gz is missing"),
        ("no mask", r"s0003/segmentations/liver\.nii\.gz is missing"),
        ("cut mask", r"s0003/segmentations/liver\.nii\.gz is truncated"),
        ("other grid", r"liver\.nii\.gz is a grid of \(6, 5, 7\)"),
    ],
)
def test_faults_are_named_and_nothing_is_written(published, tmp_path, fault, expected):
    liver = published / "s0003" / "segmentations" / "liver.nii.gz"
    if fault == "no table":
        (published / "meta.csv").unlink()
    elif fault == "split":
        (published / "meta.csv").write_text(META.replace(";val;", ";validation;"))
    elif fault == "commas":
        (published / "meta.csv").write_text(META.replace(";", ","))
    elif fault == "no image":
        (published / "s0001" / "ct.nii.gz").unlink()
    elif fault == "no mask":
        liver.unlink()
    elif fault == "cut mask":
        liver.write_bytes(liver.read_bytes()[:-20])
    else:
        nib.save(nib.Nifti1Image(np.zeros((6, 5, 7), np.uint8), AFFINE), liver)
    with pytest.raises(InputError, match=expected):
        convert_totalseg(published, tmp_path / "Dataset095_Organ", workers=1)
    assert {path.name for path in tmp_path.iterdir()} == {published.name}
