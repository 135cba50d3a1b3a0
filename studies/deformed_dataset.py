"""Many-class nnU-Net raw datasets made at random: one labelled CT, deformed and re-exposed, or brain label maps."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch

AIR = -1024.0  # HU, beyond the volume
# FreeSurfer's values of the structures of a brain, left and right as pairs, and those in the middle
_SIDES = {
    "cerebral_white_matter": (2, 41),
    "cerebral_cortex": (3, 42),
    "lateral_ventricle": (4, 43),
    "inferior_lateral_ventricle": (5, 44),
    "cerebellum_white_matter": (7, 46),
    "cerebellum_cortex": (8, 47),
    "thalamus": (10, 49),
    "caudate": (11, 50),
    "putamen": (12, 51),
    "pallidum": (13, 52),
    "hippocampus": (17, 53),
    "amygdala": (18, 54),
    "accumbens_area": (26, 58),
    "ventral_dc": (28, 60),
}
_MIDDLE = {"third_ventricle": 14, "fourth_ventricle": 15, "brain_stem": 16, "csf": 24}
BRAIN = _MIDDLE | {
    f"{side}_{name}": pair[n] for name, pair in _SIDES.items() for n, side in enumerate(("left", "right"))
}
_VALUES = 1024  # more than FreeSurfer has
_LAST = 4  # maps that are kept for testing


def _deformation(keys: Sequence[str], modes: Sequence[str], shape: tuple[int, ...]) -> Any:
    """Return MONAI's transform: one resampling does the affine and the elastic part.

    MONAI smooths white noise for the elastic field, so that a magnitude of 300 at 6 voxels is a displacement of about
    1.5 voxels (standard deviation). Rotations about the two axes in the slice plane are small, since a thin stack would
    leave its own volume.
    """
    from monai import transforms as mt

    return mt.Rand3DElasticd(
        keys,
        sigma_range=(5.0, 7.0),
        magnitude_range=(200.0, 450.0),
        spatial_size=shape,
        prob=1.0,
        rotate_range=[(-float(angle), float(angle)) for angle in np.deg2rad([3, 3, 10])],
        translate_range=[(-6.0, 6.0), (-6.0, 6.0), (-2.0, 2.0)],
        scale_range=[(-0.1, 0.1)] * 3,
        mode=modes,
        padding_mode="zeros",
    )


def random_case(shape: tuple[int, ...], seed: int) -> Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
    """Return MONAI's transform of a CT's {"image", "label"} (1, *shape) for a case; the seed fixes it."""
    from monai import transforms as mt

    return mt.Compose(
        [
            _deformation(("image", "label"), ("bilinear", "nearest"), shape),
            mt.RandGaussianSmoothd("image", (0.3, 0.8), (0.3, 0.8), (0.3, 0.8), prob=0.5),
            mt.RandAdjustContrastd("image", prob=0.8, gamma=(0.8, 1.3)),
            mt.RandScaleIntensityd("image", factors=0.1, prob=0.8),
            mt.RandShiftIntensityd("image", offsets=40.0, prob=0.8),
            mt.RandGaussianNoised("image", prob=1.0, std=60.0),
        ]
    ).set_random_state(seed=seed)


def write_deformed_dataset(image: Path, labels: Path, folder: Path, train: int, test: int, seed: int = 0) -> Path:
    """Write an nnU-Net raw dataset of deformed copies of one CT and return its folder.

    The labels are renumbered from 1 without gaps. Every sixth training case is a validation case of
    fold 0. Copies of one subject say how well a network kept its accuracy, never how well it does on new subjects.

    Args:
        image, labels: CT in HU and its label map on the same grid.
        folder: the raw dataset's, e.g. RAW/Dataset941_DeformedCT.
        train, test: number of cases.
        seed: case number n takes seed + n.
    """
    source = nib.load(image)
    hounsfield = np.asarray(source.dataobj, dtype=np.float32)
    values, renumbered = np.unique(np.asarray(nib.load(labels).dataobj), return_inverse=True)
    # MONAI fills with 0 beyond the volume; air is 0 there.
    pair = {
        "image": torch.from_numpy(hounsfield - AIR)[None],
        "label": torch.from_numpy(renumbered.reshape(hounsfield.shape).astype(np.float32))[None],
    }

    def cases() -> Iterator[_Case]:
        for number in range(train + test):
            case = random_case(hounsfield.shape, seed + number)({key: value.clone() for key, value in pair.items()})
            ct = np.clip(np.rint(np.asarray(case["image"])[0] + AIR), -2000, 4000).astype(np.int16)
            label_map = np.asarray(case["label"])[0].astype(np.uint8)
            yield f"deformed_{number:03d}", number >= train, ct, label_map, source.affine

    names = [f"deformed_{number:03d}" for number in range(train)]
    classes = [f"class_{int(value)}" for value in values if value != values[0]]
    return _write_raw(folder, cases(), "CT", classes, names, names[::6])


def write_brain_dataset(maps: Sequence[Path], folder: Path, train: int, test: int, seed: int = 0) -> Path:
    """Write an nnU-Net raw dataset of images that are made from brain label maps, and return its folder.

    One contrast, drawn by the seed, holds for all images: a mean and a deviation for each structure, the same on both
    sides. Each image has another deformation, means that differ by a tenth, a bias field, blur and noise (after
    Billot et al., SynthSeg, Medical Image Analysis 2023, which draws a contrast for each image). The last four maps are
    for testing; of the others every sixth is for validation in fold 0.

    Args:
        maps: label maps of 1 mm with FreeSurfer's values; other values are painted, and belong to the background.
        folder: the raw dataset's, e.g. RAW/Dataset943_Brain; 2 mm. train, test: images of each map.
        seed: of the contrast; image n of map m takes its own.
    """
    generator = np.random.default_rng(seed)
    means, deviations = generator.uniform(0.1, 1.0, _VALUES), generator.uniform(0.01, 0.04, _VALUES)
    for left, right in _SIDES.values():
        means[right], deviations[right] = means[left], deviations[left]
    numbers = np.zeros(_VALUES, np.uint8)
    numbers[list(BRAIN.values())] = np.arange(1, len(BRAIN) + 1)
    last = len(maps) - _LAST
    names = [[f"brain_{place:02d}_{n}" for n in range(test if place >= last else train)] for place in range(len(maps))]

    def cases() -> Iterator[_Case]:
        for place, path in enumerate(maps):
            values, affine = _at_2_mm(path)
            for number, name in enumerate(names[place]):
                own = seed + 1000 * place + number
                moved = _deformation(("label",), ("nearest",), values.shape).set_random_state(seed=own)
                found = np.asarray(moved({"label": torch.from_numpy(values)[None].float()})["label"])[0].astype(int)
                yield name, place >= last, _painted(found, means, deviations, own), numbers[found], affine

    return _write_raw(folder, cases(), "MR", list(BRAIN), [*chain(*names[:last])], [*chain(*names[:last:6])])


def _at_2_mm(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Return every second voxel of a label map, cropped to the head, and its affine."""
    source = nib.load(path)
    values = np.asarray(source.dataobj).astype(np.int16)[::2, ::2, ::2]
    first, last = (edge(np.argwhere(np.isin(values, list(BRAIN.values()))), axis=0) for edge in (np.min, np.max))
    first = np.maximum(first - 4, 0)
    affine = source.affine @ np.diag([2, 2, 2, 1])
    affine[:3, 3] += affine[:3, :3] @ first
    return values[tuple(slice(low, high + 5) for low, high in zip(first, last, strict=True))], affine


def _painted(values: np.ndarray, means: np.ndarray, deviations: np.ndarray, seed: int) -> np.ndarray:
    """Return an image of a map: normal noise for each structure, then what a scanner adds; int16."""
    from monai import transforms as mt

    generator = np.random.default_rng(seed)
    varied = means * (1 + 0.1 * generator.standard_normal(len(means)))
    varied[0] = 0
    image = varied[values] + deviations[values] * generator.standard_normal(values.shape)
    scanner = mt.Compose(
        [
            mt.RandGaussianSmooth((0.4, 0.8), (0.4, 0.8), (0.4, 0.8), prob=1.0),
            mt.RandBiasField(coeff_range=(0.0, 0.1), prob=1.0),
            mt.RandAdjustContrast(prob=0.8, gamma=(0.8, 1.3)),
            mt.RandGaussianNoise(prob=1.0, std=0.03),
        ]
    ).set_random_state(seed=seed)
    seen = np.asarray(scanner(torch.from_numpy(image.astype(np.float32))[None]))[0]
    return np.clip(np.rint(1000 * seen), -2000, 4000).astype(np.int16)


_Case = tuple[str, bool, np.ndarray, np.ndarray, np.ndarray]  # name, for testing, image, labels, affine


def _write_raw(
    folder: Path, cases: Iterable[_Case], channel: str, classes: Sequence[str], train: list[str], held_out: list[str]
) -> Path:
    """Write cases, and what nnU-Net must know of them; `held_out` are the validation cases of fold 0."""
    for name in ("imagesTr", "labelsTr", "imagesTs", "labelsTs"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for name, for_testing, image, labels, affine in cases:
        part = "Ts" if for_testing else "Tr"
        nib.save(nib.Nifti1Image(image, affine), folder / f"images{part}" / f"{name}_0000.nii.gz")
        nib.save(nib.Nifti1Image(labels, affine), folder / f"labels{part}" / f"{name}.nii.gz")
    dataset = {
        "channel_names": {"0": channel},
        "labels": {"background": 0} | {name: number for number, name in enumerate(classes, start=1)},
        "numTraining": len(train),
        "file_ending": ".nii.gz",
    }
    (folder / "dataset.json").write_text(json.dumps(dataset, indent=1), encoding="utf-8")
    split = {"train": [name for name in train if name not in held_out], "val": held_out}
    (folder / "splits_final.json").write_text(json.dumps([split], indent=1), encoding="utf-8")
    return folder
