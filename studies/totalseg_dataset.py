"""TotalSegmentator's public data set (Zenodo, a folder per subject, a mask per class) as a raw nnU-Net dataset."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import nibabel as nib
import numpy as np

from nnslim.errors import InputError
from nnslim.files import whole_folder, write_json
from nnslim.hosts.totalseg.tasks import task_classes, totalseg_table
from nnslim.running.machine import machine_threads


def part_classes(part: str) -> dict[int, str]:
    """Return label -> class of a task (`total`), or of one of the models that it consists of (`organs`, `ribs`, ...).

    Raises:
        HostError: TotalSegmentator is missing. InputError: it has no such part or task.
    """
    parts = totalseg_table("map_to_binary", "class_map_5_parts")
    found = parts.get(part) or parts.get(f"class_map_part_{part.removeprefix('class_map_part_')}")
    return dict(found) if found else task_classes(part)


def convert_totalseg(source: Path, target: Path, part: str = "organs", workers: int | None = None) -> None:
    """Write the subjects of `meta.csv`: those of train and val to train with, by its split, those of test apart.

    Where two masks claim a voxel, it is the class with the higher label, as in TotalSegmentator's own training data.

    Args:
        source: with `meta.csv` (image_id; ...; split), `<subject>/ct.nii.gz`, `<subject>/segmentations/<class>.nii.gz`.
        target: e.g. nnUNet_raw/Dataset095_Organ; must not exist, or be empty.
        part: see `part_classes`. workers: processes; None: one per CPU.
    Raises:
        InputError: no table, an unknown split, a subject without its image or a mask, or two grids.
    """
    classes, split = part_classes(part), read_split(source / "meta.csv")
    with whole_folder(Path(target)) as side:
        for name in ("imagesTr", "labelsTr", "imagesTs", "labelsTs"):
            (side / name).mkdir()
        jobs = [(subject, "Ts" if kind == "test" else "Tr") for kind, names in split.items() for subject in names]
        with ProcessPoolExecutor(workers or machine_threads()) as pool:
            list(pool.map(partial(_convert_subject, Path(source), side, classes), *zip(*jobs, strict=True)))
        labels = {"background": 0} | {name: number for number, name in sorted(classes.items())}
        description = {"channel_names": {"0": "CT"}, "labels": labels, "file_ending": ".nii.gz"}
        write_json(side / "dataset.json", {**description, "numTraining": len(split["train"]) + len(split["val"])})
        folds = [{"train": split["train"], "val": split["val"]}]
        (side / "splits_final.json").write_text(json.dumps(folds, indent=1), encoding="utf-8")


def read_split(path: Path) -> dict[str, list[str]]:
    """Return the subjects of train, val and test by the data set's table; an InputError says what is wrong with it."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = list(csv.DictReader(file, delimiter=";"))
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read: {error}; expected TotalSegmentator's data set") from error
    split: dict[str, list[str]] = {"train": [], "val": [], "test": []}
    for row in rows:
        if row.get("split") not in split or not row.get("image_id"):
            found = f"{row.get('image_id')}: {row.get('split')}"
            raise InputError(f"{path}: expected columns image_id and split (train, val, test) by ';', found {found}")
        split[row["split"]].append(row["image_id"])
    if not split["train"]:
        raise InputError(f"{path} names no subject of train")
    return split


def _convert_subject(source: Path, side: Path, classes: dict[int, str], subject: str, part: str) -> None:
    image, masks = source / subject / "ct.nii.gz", source / subject / "segmentations"
    if not image.is_file():
        raise InputError(f"{image} is missing; meta.csv names {subject}")
    scan = nib.load(image)
    labels = np.zeros(scan.shape, np.uint8)
    for number, name in sorted(classes.items()):
        labels[_mask(masks / f"{name}.nii.gz", scan.shape)] = number
    shutil.copyfile(image, side / f"images{part}" / f"{subject}_0000.nii.gz")
    nib.save(nib.Nifti1Image(labels, scan.affine), side / f"labels{part}" / f"{subject}.nii.gz")


def _mask(path: Path, shape: Iterable[int]) -> np.ndarray:
    if not path.is_file():
        raise InputError(f"{path} is missing; every subject has a file of each class")
    try:
        mask = np.asanyarray(nib.load(path).dataobj)
    except (OSError, EOFError, ValueError, nib.filebasedimages.ImageFileError) as error:
        raise InputError(f"{path} is truncated or damaged: {error}") from error
    if mask.shape != tuple(shape):
        raise InputError(f"{path} is a grid of {mask.shape}, its image of {tuple(shape)}")
    return mask > 0
