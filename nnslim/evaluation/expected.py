"""Dice of a segmentation with labels of which only probabilities are known."""

from __future__ import annotations

import math
from collections.abc import Sequence

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


def as_segmentation(segmentation: Tensor | np.ndarray) -> Tensor:
    """Return integers or booleans as a tensor; floating-point numbers are an InputError."""
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
                chosen = one[slab].flatten().long()
                if chosen.numel() and not 0 <= int(chosen.min()) <= int(chosen.max()) < channels:
                    raise InputError(f"the label map has values outside 0..{channels - 1}")
                own += torch.bincount(chosen, minlength=channels)
                both += torch.bincount(chosen, soft.gather(0, chosen[None])[0].double(), minlength=channels)
    dices = [torch.where((own == 0) & (expected < 1), _NAN, 2 * both / (expected + own)) for both, own in sums]
    return [dice.numpy()[int(background) :] for dice in dices]


def _soften(probabilities: Tensor, background: bool, temperature: float) -> Tensor:
    """Return (C, voxels) probabilities as if the logits had been divided by `temperature`."""
    if temperature == 1:
        return probabilities
    if not background:
        return torch.sigmoid(torch.logit(probabilities, eps=1e-7) / temperature)
    return torch.softmax(probabilities.clamp_min(torch.finfo(torch.float32).tiny).log() / temperature, 0)


def drop_of(dense: np.ndarray, slim: np.ndarray) -> np.ndarray:
    """Return dense - slim. A class that is rightly found empty (NaN) counts as 1 where the other model finds some."""
    neither = np.isnan(dense) & np.isnan(slim)
    return np.where(neither, _NAN, np.nan_to_num(dense, nan=1.0) - np.nan_to_num(slim, nan=1.0))


def expected_drop_of(dense: np.ndarray, slim: np.ndarray) -> np.ndarray:
    """Return `drop_of` two expected Dice; NaN for a class that neither model finds.

    Softened probabilities expect a little of nearly every class. Counted as a drop of 0, the many classes that an image
    does not show would hide what the others lose.
    """
    return np.where((dense == 0) & (slim == 0), _NAN, drop_of(dense, slim))
