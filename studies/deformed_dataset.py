"""A many-class nnU-Net raw dataset out of one labelled CT: the same anatomy, deformed and re-exposed at random."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import torch

AIR = -1024.0  # HU, beyond the volume


def random_case(shape: tuple[int, ...], seed: int) -> Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
    """Return MONAI's transform of {"image", "label"} (1, *shape) for a case; the seed fixes it.

    One resampling does the affine and the elastic part. MONAI smooths white noise for the elastic field, so that a
    magnitude of 300 at 6 voxels is a displacement of about 1.5 voxels (standard deviation). Rotations about the two
    axes in the slice plane are small, since a thin stack would leave its own volume.
    """
    from monai import transforms as mt

    turn = np.deg2rad([3, 3, 10])
    both = ("image", "label")
    return mt.Compose(
        [
            mt.Rand3DElasticd(
                both,
                sigma_range=(5.0, 7.0),
                magnitude_range=(200.0, 450.0),
                spatial_size=shape,
                prob=1.0,
                rotate_range=[(-float(angle), float(angle)) for angle in turn],
                translate_range=[(-6.0, 6.0), (-6.0, 6.0), (-2.0, 2.0)],
                scale_range=[(-0.1, 0.1)] * 3,
                mode=("bilinear", "nearest"),
                padding_mode="zeros",
            ),
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
    for name in ("imagesTr", "labelsTr", "imagesTs", "labelsTs"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    names = [f"deformed_{number:03d}" for number in range(train + test)]
    for number, name in enumerate(names):
        case = random_case(hounsfield.shape, seed + number)({key: value.clone() for key, value in pair.items()})
        part = "Tr" if number < train else "Ts"
        ct = np.clip(np.rint(np.asarray(case["image"])[0] + AIR), -2000, 4000).astype(np.int16)
        label_map = np.asarray(case["label"])[0].astype(np.uint8)
        nib.save(nib.Nifti1Image(ct, source.affine), folder / f"images{part}" / f"{name}_0000.nii.gz")
        nib.save(nib.Nifti1Image(label_map, source.affine), folder / f"labels{part}" / f"{name}.nii.gz")
    dataset = {
        "channel_names": {"0": "CT"},
        "labels": {"background": 0} | {f"class_{int(value)}": index for index, value in enumerate(values) if index},
        "numTraining": train,
        "file_ending": ".nii.gz",
    }
    (folder / "dataset.json").write_text(json.dumps(dataset, indent=1), encoding="utf-8")
    held_out = names[:train:6]
    split = {"train": [name for name in names[:train] if name not in held_out], "val": held_out}
    (folder / "splits_final.json").write_text(json.dumps([split], indent=1), encoding="utf-8")
    return folder
