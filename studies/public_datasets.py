"""Public datasets as raw nnU-Net datasets: BTCV and MSD BraTS with the token-sparse paper's splits, KiTS19, ACDC."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

from nnslim.errors import InputError
from nnslim.files import make_folder, whole_folder, write_json

BTCV_VALIDATION = (1, 2, 3, 4, 8, 22, 25, 29, 32, 35, 36, 38)  # TransUNet's 12 of 30
BTCV_ORGANS = (
    "spleen",
    "right_kidney",
    "left_kidney",
    "gallbladder",
    "esophagus",
    "liver",
    "stomach",
    "aorta",
    "inferior_vena_cava",
    "portal_and_splenic_veins",
    "pancreas",
    "right_adrenal_gland",
    "left_adrenal_gland",
)
# MSD's labels: 1 edema, 2 non-enhancing tumour, 3 enhancing tumour. (The paper's code took 2 for the enhancing one.)
BRATS_REGIONS = {"whole_tumor": [1, 2, 3], "tumor_core": [2, 3], "enhancing_tumor": 3}
BRATS_CHANNELS = ("FLAIR", "T1w", "T1gd", "T2w")
_SEED, _FOLDS = 12345, 5  # of MONAI's cross-validation in the paper's code


def convert_btcv(source: Path, target: Path) -> None:
    """Write BTCV's training part as a raw nnU-Net dataset; fold 0 is TransUNet's split of 18 and 12.

    Args:
        source: holds `img/imgNNNN.nii.gz` and `label/labelNNNN.nii.gz` (RawData/Training).
        target: e.g. nnUNet_raw/Dataset120_BTCV; must not exist, or be empty.
    Raises:
        InputError: no images there, one without labels, a label that is not one of the 13 organs, or two grids.
    """
    images = sorted((source / "img").glob("img[0-9][0-9][0-9][0-9].nii.gz"))
    if not images:
        raise InputError(f"no img/imgNNNN.nii.gz in {source}; expected BTCV's RawData/Training")

    def write(side: Path) -> dict[str, list[str]]:
        split: dict[str, list[str]] = {"train": [], "val": []}
        for image in images:
            number = int(image.name[3:7])
            label, name = source / "label" / f"label{number:04d}.nii.gz", f"btcv_{number:04d}"
            _copy_pair(side, "Tr", name, image, label, len(BTCV_ORGANS))
            split["val" if number in BTCV_VALIDATION else "train"].append(name)
        return split

    labels = {"background": 0} | {name: number for number, name in enumerate(BTCV_ORGANS, 1)}
    _write(target, write, {"channel_names": {"0": "CT"}, "labels": labels})


def convert_brats(source: Path, target: Path) -> None:
    """Write MSD's Task01_BrainTumour as a raw nnU-Net dataset with the three nested regions.

    Args:
        source: holds `imagesTr/BRATS_NNN.nii.gz`, (X, Y, Z, 4) each, `labelsTr` and `dataset.json`.
        target: e.g. nnUNet_raw/Dataset121_BraTS; must not exist, or be empty.
    Raises:
        InputError: no images there, not four channels, one without labels, an unknown label, or two grids.
    """
    images = sorted(path for path in (source / "imagesTr").glob("BRATS_*.nii.gz") if not path.name.startswith("."))
    if not images:
        raise InputError(f"no imagesTr/BRATS_NNN.nii.gz in {source}; expected MSD's Task01_BrainTumour")

    def write(side: Path) -> list[dict[str, list[str]]]:
        names = []
        for image in images:
            name, volume = image.name.removesuffix(".nii.gz"), nib.load(image)
            if len(volume.shape) != 4 or volume.shape[3] != len(BRATS_CHANNELS):
                raise InputError(f"{image} has shape {volume.shape}, expected (X, Y, Z, {len(BRATS_CHANNELS)})")
            _check_pair(image, source / "labelsTr" / image.name, 3)
            values = np.asanyarray(volume.dataobj)
            for channel in range(len(BRATS_CHANNELS)):
                part = nib.Nifti1Image(values[..., channel], volume.affine)
                nib.save(part, side / "imagesTr" / f"{name}_{channel:04d}.nii.gz")
            shutil.copyfile(source / "labelsTr" / image.name, side / "labelsTr" / image.name)
            names.append(name)
        from monai.data.utils import partition_dataset

        parts = partition_dataset(names, num_partitions=min(_FOLDS, len(names)), shuffle=True, seed=_SEED)
        return [{"train": sorted(set(names) - set(part)), "val": sorted(part)} for part in parts]

    channels = {str(number): name for number, name in enumerate(BRATS_CHANNELS)}
    labels = {"background": 0, **BRATS_REGIONS}
    _write(target, write, {"channel_names": channels, "labels": labels, "regions_class_order": [1, 2, 3]})


def convert_kits19(source: Path, target: Path) -> None:
    """Write KiTS19 as a raw nnU-Net dataset; cases without labels (the challenge's 90 for testing) go to imagesTs.

    Args:
        source: holds `case_NNNNN/imaging.nii.gz` and `segmentation.nii.gz` (1 kidney, 2 tumour): the challenge's data/.
        target: e.g. nnUNet_raw/Dataset064_KiTS19; must not exist, or be empty.
    Raises:
        InputError: no images there, none with labels, a label that is neither kidney nor tumour, or two grids.
    """
    images = sorted(source.glob("case_[0-9][0-9][0-9][0-9][0-9]/imaging.nii.gz"))
    pairs = [(image, image.with_name("segmentation.nii.gz")) for image in images]
    if not any(label.is_file() for _, label in pairs):
        raise InputError(f"no case_NNNNN/imaging.nii.gz with segmentation.nii.gz in {source}; expected KiTS19's data")

    def write(side: Path) -> None:
        for image, label in pairs:
            _copy_pair(side, "Tr" if label.is_file() else "Ts", image.parent.name, image, label, 2)

    _write(target, write, {"channel_names": {"0": "CT"}, "labels": {"background": 0, "kidney": 1, "tumor": 2}})


def convert_acdc(source: Path, target: Path) -> None:
    """Write ACDC's end-diastolic and end-systolic volumes as a raw nnU-Net dataset, folds by patient as nnU-Net's own.

    nnU-Net's converter fails in nnU-Net 2.8.

    Args:
        source: holds `training/patientNNN/patientNNN_frameNN.nii.gz` and `..._gt.nii.gz`, perhaps the same in testing/.
        target: e.g. nnUNet_raw/Dataset027_ACDC; must not exist, or be empty.
    Raises:
        InputError: no images there, one for training without labels, an unknown label, or two grids.
    """
    named = "patient[0-9][0-9][0-9]/patient[0-9][0-9][0-9]_frame[0-9][0-9].nii.gz"
    parts = {"Tr": sorted((source / "training").glob(named)), "Ts": sorted((source / "testing").glob(named))}
    if not parts["Tr"]:
        raise InputError(f"no training/patientNNN/patientNNN_frameNN.nii.gz in {source}; expected ACDC's folder")

    def write(side: Path) -> list[dict[str, list[str]]]:
        for part, images in parts.items():
            for image in images:
                name = image.name.removesuffix(".nii.gz")
                _copy_pair(side, part, name, image, image.with_name(f"{name}_gt.nii.gz"), 3)
        names = [image.name.removesuffix(".nii.gz") for image in parts["Tr"]]
        patients = np.unique([name.split("_")[0] for name in names])
        np.random.RandomState(1234).shuffle(patients)
        held_out = [set(patients[fold::_FOLDS]) for fold in range(min(_FOLDS, len(patients)))]
        sides = [{name: "val" if name.split("_")[0] in held else "train" for name in names} for held in held_out]
        return [{side: [n for n, s in one.items() if s == side] for side in ("train", "val")} for one in sides]

    labels = {"background": 0, "RV": 1, "MYO": 2, "LV": 3}
    _write(target, write, {"channel_names": {"0": "cineMRI"}, "labels": labels})


def _copy_pair(side: Path, part: str, name: str, image: Path, label: Path, largest: int) -> None:
    """Copy an image and its labels, which only images for testing (Ts) may lack."""
    if part == "Tr" or label.is_file():
        _check_pair(image, label, largest)
        make_folder(side / f"labels{part}")
        shutil.copyfile(label, side / f"labels{part}" / f"{name}.nii.gz")
    make_folder(side / f"images{part}")
    shutil.copyfile(image, side / f"images{part}" / f"{name}_0000.nii.gz")


def _check_pair(image: Path, label: Path, largest: int) -> None:
    if not label.is_file():
        raise InputError(f"{image.name} has no labels: {label} is missing")
    volume, segmentation = nib.load(image), nib.load(label)
    if volume.shape[:3] != segmentation.shape:
        raise InputError(f"{image} is a grid of {volume.shape[:3]}, its labels {label} of {segmentation.shape}")
    found = np.unique(np.asanyarray(segmentation.dataobj))
    if not set(found.tolist()) <= set(range(largest + 1)):
        raise InputError(f"{label} holds labels {found.tolist()[-3:]}, expected 0..{largest}")


def _write(target: Path, write: Callable[[Path], Any], description: dict[str, Any]) -> None:
    with whole_folder(Path(target)) as side:
        (side / "imagesTr").mkdir()
        (side / "labelsTr").mkdir()
        split = write(side)
        count = len(list((side / "labelsTr").glob("*.nii.gz")))
        write_json(side / "dataset.json", {**description, "numTraining": count, "file_ending": ".nii.gz"})
        if split is not None:  # else nnU-Net makes its own five folds
            folds = split if isinstance(split, list) else [split]
            (side / "splits_final.json").write_text(json.dumps(folds, indent=1), encoding="utf-8")
