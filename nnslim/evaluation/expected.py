"""Overlap of two segmentations, and of a segmentation with labels that are known as probabilities only."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from nnslim.errors import InputError

# A trained nnU-Net is too sure of itself. Divided by 1.75, the logits of the Hippocampus model had the best likelihood
# on held-out labels, and the estimated drop in Dice came closest to the one measured against these labels.
TEMPERATURE = 1.75
_SLAB = 1 << 20  # voxels that are softened at a time, so that no second copy of all probabilities is made
_NAN = float("nan")


def expected_dice(
    probabilities: Tensor | np.ndarray,
    segmentation: Tensor | np.ndarray,
    *,
    background: bool = True,
    temperature: float = 1.0,
) -> np.ndarray:
    """Return the Dice to expect if the true labels were drawn, voxel by voxel, from the probabilities.

    Per class 2 sum(p [s = c]) / (sum(p) + sum([s = c])). Voxels about which the probabilities are undecided cost a
    segmentation little, whichever way it decides them.

    Args:
        probabilities: (C, *spatial), softmax with the background first, or a sigmoid per region.
        segmentation: (*spatial) integer map of channels, or (C, *spatial) booleans.
        background: channel 0 is the background, which is left out of the result; False for regions.
        temperature: above 1 softens the probabilities (logits are divided by it).
    Returns:
        (C - background,) Dice; NaN for a class that the segmentation lacks and whose expected volume is < 1 voxel.
    Raises:
        InputError: the shapes do not fit, or the map has values outside the channels.
    """
    return expected_dices(torch.as_tensor(probabilities), [as_segmentation(segmentation)], background, temperature)[0]


def harden(probabilities: Tensor, background: bool) -> Tensor:
    """Return the segmentation as nnU-Net decides: (*spatial) map of the largest channel, or (C, *spatial) p > 0.5."""
    return probabilities.argmax(0) if background else probabilities > 0.5


class LabelMaps(NamedTuple):
    """Label maps of one case in the grid of its image, where labels are compared.

    Attributes:
        dense, slim, truth: (*grid) integers.
        spacing: mm per voxel along each axis.
        members: per class the labels that it consists of (a region may have several).
        ignore: label of the voxels in `truth` that do not count, if there is one.
    """

    dense: np.ndarray
    slim: np.ndarray
    truth: np.ndarray
    spacing: Sequence[float]
    members: Sequence[Sequence[int]]
    ignore: int | None = None


def as_segmentation(segmentation: Tensor | np.ndarray) -> Tensor:
    """Return integers or booleans as a tensor.

    Raises:
        InputError: floating-point numbers.
    """
    if isinstance(segmentation, np.ndarray) and segmentation.dtype.kind == "u" and segmentation.itemsize > 1:
        segmentation = segmentation.astype(np.int64)  # torch before 2.3 has no uint16
    segmentation = torch.as_tensor(segmentation)
    if segmentation.is_floating_point():
        raise InputError("a segmentation of integers or booleans is expected, found floating-point numbers")
    return segmentation


def expected_dices(
    probabilities: Tensor, segmentations: Sequence[Tensor], background: bool, temperature: float
) -> list[np.ndarray]:
    """Return `expected_dice` of several segmentations, (C - background,) each, from one pass over the probabilities."""
    channels, spatial = len(probabilities), tuple(probabilities.shape[1:])
    for one in segmentations:
        if tuple(one.shape) not in {(channels, *spatial)} | ({spatial} if background else set()):
            raise InputError(f"segmentation of shape {tuple(one.shape)} does not fit {channels} channels of {spatial}")
    expected = torch.zeros(channels, dtype=torch.float64)
    sums = [(torch.zeros_like(expected), torch.zeros_like(expected)) for _ in segmentations]
    rows = max(1, _SLAB // max(1, math.prod(spatial[1:])))
    for start in range(0, spatial[0], rows):
        slab = slice(start, start + rows)
        soft = _soften(probabilities[:, slab].flatten(1).float(), background, temperature)
        expected += soft.sum(1, dtype=torch.float64)
        for one, (both, own) in zip(segmentations, sums, strict=True):
            if one.ndim == probabilities.ndim:
                masks = one[:, slab].flatten(1) != 0
                both += (soft * masks).sum(1, dtype=torch.float64)
                own += masks.sum(1)
            else:
                chosen = _checked(one[slab].flatten().long(), channels)
                own += torch.bincount(chosen, minlength=channels)
                both += torch.bincount(chosen, soft.gather(0, chosen[None])[0].double(), minlength=channels)
    results = []
    for both, own in sums:
        dice = 2 * both / (expected + own)
        results.append(torch.where((own == 0) & (expected < 1), _NAN, dice).numpy()[int(background) :])
    return results


def _checked(labels: Tensor, channels: int) -> Tensor:
    if labels.numel() and not 0 <= int(labels.min()) <= int(labels.max()) < channels:
        raise InputError(f"the label map has values outside 0..{channels - 1}")
    return labels


def _soften(probabilities: Tensor, background: bool, temperature: float) -> Tensor:
    """Return (C, voxels) probabilities as if the logits had been divided by `temperature`."""
    if temperature == 1:
        return probabilities
    if not background:
        return torch.sigmoid(torch.logit(probabilities, eps=1e-7) / temperature)
    return torch.softmax(probabilities.clamp_min(torch.finfo(torch.float32).tiny).log() / temperature, 0)


def overlaps(first: Tensor, second: Tensor, channels: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return voxels per channel, (C,): in both segmentations, in the first, in the second."""
    if first.ndim != second.ndim:  # a map against booleans with the background first
        second = second.long().argmax(0)
    if first.dtype == torch.bool:
        masks = [one.flatten(1) != 0 for one in (first, second)]
        return tuple(one.sum(1).numpy() for one in (masks[0] & masks[1], *masks))
    first, second = first.flatten(), _checked(second.flatten().long(), channels)
    parts = (first[first == second], first, second)
    return tuple(torch.bincount(one, minlength=channels).numpy() for one in parts)


def against_labels(labels: LabelMaps, classes: int) -> tuple[dict[str, np.ndarray], list[np.ndarray]]:
    """Return Dice of both models against the labels, (K,) each by name, and the volumes of both in voxels, (K,) each.

    Raises:
        InputError: shapes or number of classes differ, or a label is negative.
    """
    if len(labels.members) != classes:
        raise InputError(f"{len(labels.members)} groups of labels do not fit {classes} classes")
    found, volumes = {}, []
    for key, label_map in (("dice_dense", labels.dense), ("dice_slim", labels.slim)):
        if label_map.shape != labels.truth.shape:
            raise InputError(f"labels have shape {labels.truth.shape}, the segmentation {label_map.shape}")
        joint = _joint(label_map, labels.truth)
        volumes.append(np.array([joint[_inside(group, joint)].sum() for group in labels.members], dtype=float))
        if labels.ignore is not None and 0 <= labels.ignore < len(joint):
            joint[:, labels.ignore] = 0
        rows = [_inside(group, joint) for group in labels.members]
        both = np.array([joint[np.ix_(group, group)].sum() for group in rows])
        sizes = [np.array([side[group].sum() for group in rows]) for side in (joint.sum(1), joint.sum(0))]
        found[key] = dice_of(both, *sizes)
    return found, volumes


def _joint(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Return (L, L) counts of voxels with label i in the first map and j in the second, plane by plane."""
    if min(first.min(initial=0), second.min(initial=0)) < 0:
        raise InputError("label maps must not have negative values")
    size = int(max(first.max(initial=0), second.max(initial=0))) + 1
    counts = np.zeros(size * size, dtype=np.int64)
    for one, other in zip(first, second, strict=True):
        counts += np.bincount(one.ravel().astype(np.int64) * size + other.ravel(), minlength=size * size)
    return counts.reshape(size, size)


def _inside(group: Sequence[int], joint: np.ndarray) -> list[int]:
    return [label for label in group if label < len(joint)]


def dice_of(both: np.ndarray, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Return 2 both / (first + second) of counts of any shape; NaN where neither has a voxel."""
    total = (first + second).astype(float)
    return np.divide(2.0 * both, total, out=np.full_like(total, _NAN), where=total > 0)


def drop_of(dense: np.ndarray, slim: np.ndarray) -> np.ndarray:
    """Return dense - slim. A class that is rightly found empty (NaN) counts as 1 where the other model finds some."""
    neither = np.isnan(dense) & np.isnan(slim)
    return np.where(neither, _NAN, np.nan_to_num(dense, nan=1.0) - np.nan_to_num(slim, nan=1.0))
