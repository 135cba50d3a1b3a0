"""Synapse multi-organ CT in TransUNet's layout (slices as npz, volumes as h5) as a raw nnU-Net dataset."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

import nibabel as nib
import numpy as np

from nnslim.errors import InputError
from nnslim.files import whole_folder, write_json
from nnslim.optional import needed

ORGANS = ("aorta", "gallbladder", "left_kidney", "right_kidney", "liver", "pancreas", "spleen", "stomach")
_SLICE = re.compile(r"(case\d{4})_slice(\d{3,})\.npz")


def convert_synapse(source: Path, target: Path, spacing: Sequence[float] = (1.0, 1.0, 1.0)) -> None:
    """Write the slices of each training case as one volume, and the test volumes with their labels.

    Intensities are those of the files, clipped CT in 0..1, and the channel is called noNorm so that nnU-Net leaves them
    so. The layout does not hold the spacing: where it is not given, millimetres of any evaluation are voxels.

    Args:
        source: holds `train_npz/caseXXXX_sliceYYY.npz` and, perhaps, `test_vol_h5/caseXXXX.npy.h5`; keys image, label.
        target: e.g. nnUNet_raw/Dataset122_Synapse; must not exist, or be empty.
        spacing: mm between slices, rows and columns.
    Raises:
        InputError: no slices, a file without image or label, slices missing or of several sizes, an unknown label, or
        h5py is not installed and there are volumes to read.
    """
    source = Path(source)
    cases: dict[str, dict[int, Path]] = {}
    for path in sorted((source / "train_npz").glob("*.npz")):
        if (found := _SLICE.fullmatch(path.name)) is None:
            raise InputError(f"{path}: expected a name such as case0005_slice000.npz")
        cases.setdefault(found[1], {})[int(found[2])] = path
    if not cases:
        raise InputError(f"no train_npz/caseXXXX_sliceYYY.npz in {source}; expected TransUNet's layout of Synapse")
    if len(spacing) != 3 or not all(np.isfinite(size) and size > 0 for size in spacing):
        raise InputError(f"spacing {list(spacing)}: expected three numbers of mm, slices first")
    volumes = sorted((source / "test_vol_h5").glob("case*.npy.h5"))
    with whole_folder(Path(target)) as side:
        for name in ("imagesTr", "labelsTr", "imagesTs", "labelsTs"):
            (side / name).mkdir()
        for case, slices in cases.items():
            numbers = sorted(slices)
            if numbers != list(range(numbers[0], numbers[0] + len(numbers))):
                lacking = sorted(set(range(numbers[0], numbers[-1])) - set(numbers))
                raise InputError(f"{source / 'train_npz'}: {case} lacks slice(s) {lacking[:5]}")
            pairs = [_read_slice(slices[number]) for number in numbers]
            if len({part.shape for pair in pairs for part in pair}) > 1:
                raise InputError(f"{source / 'train_npz'}: slices of {case} differ in size")
            image, label = (np.stack(part) for part in zip(*pairs, strict=True))
            _write_pair(side, "Tr", case, image, label, spacing)
        for path in volumes:
            image, label = _read_volume(path)
            _write_pair(side, "Ts", path.name.removesuffix(".npy.h5"), image, label, spacing)
        labels = {"background": 0} | {name: number for number, name in enumerate(ORGANS, 1)}
        description = {"channel_names": {"0": "noNorm"}, "labels": labels, "numTraining": len(cases)}
        write_json(side / "dataset.json", {**description, "file_ending": ".nii.gz"})
        # As published: all training cases train, and nothing chooses an epoch. nnU-Net wants some to watch.
        names = sorted(cases)
        split = [{"train": names, "val": names[-max(1, len(names) // 6) :]}]
        (side / "splits_final.json").write_text(json.dumps(split, indent=1), encoding="utf-8")


def _read_slice(path: Path) -> tuple[np.ndarray, np.ndarray]:
    try:
        with np.load(path) as content:
            return _checked(path, content["image"], content["label"], 2)
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"{path} cannot be read as a slice with image and label: {error}") from error


def _read_volume(path: Path) -> tuple[np.ndarray, np.ndarray]:
    h5py = needed("h5py", "nnslim[synapse]", purpose="reading TransUNet's test volumes", error=InputError)
    try:
        with h5py.File(path, "r") as content:
            return _checked(path, content["image"][:], content["label"][:], 3)
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"{path} cannot be read as a volume with image and label: {error}") from error


def _checked(path: Path, image: np.ndarray, label: np.ndarray, axes: int) -> tuple[np.ndarray, np.ndarray]:
    if image.ndim != axes or image.shape != label.shape:
        raise InputError(f"{path}: image is {image.shape}, label {label.shape}; expected {axes} axes, alike")
    found = np.unique(label)
    if not set(found.tolist()) <= set(range(len(ORGANS) + 1)):
        raise InputError(f"{path} holds labels {found.tolist()[-3:]}, expected 0..{len(ORGANS)}")
    if not np.isfinite(image).all():
        raise InputError(f"{path}: the image has values that are not finite")
    return image.astype(np.float32), label.astype(np.uint8)


def _write_pair(
    side: Path, part: str, case: str, image: np.ndarray, label: np.ndarray, spacing: Sequence[float]
) -> None:
    affine = np.diag((*(float(size) for size in reversed(spacing)), 1.0))
    # (slices, rows, columns) in the files; NIfTI's first axis is the fastest in memory
    nib.save(nib.Nifti1Image(image.T, affine), side / f"images{part}" / f"{case}_0000.nii.gz")
    nib.save(nib.Nifti1Image(label.T, affine), side / f"labels{part}" / f"{case}.nii.gz")
