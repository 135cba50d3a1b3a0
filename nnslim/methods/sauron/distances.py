"""Distances between the feature maps of one layer (Valverde et al., arXiv 2209.13590), safe at every corner.

All take maps (B, C, *spatial), 2D or 3D, reduce over all spatial axes, compute in float32 also under autocast, and have
finite values and gradients for equal maps, constant maps and maps smaller than the pool.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from nnslim.methods.sauron.config import Distance

_SAFE = 1e-12  # squared distance below which two maps are equal, and have no gradient
_POOL = 2


def pooled(maps: Tensor) -> Tensor:
    """Average over cells of 2 voxels along each axis, of 1 where the axis has no more.

    Args:
        maps: (B, C, *spatial).
    """
    window = [min(_POOL, size) for size in maps.shape[2:]]
    return (F.avg_pool2d, F.avg_pool3d)[maps.dim() - 4](maps, window, window)


def scaled(maps: Tensor, like: Tensor | None = None) -> Tensor:
    """Scale each map of each sample to 0..1 by the minimum and maximum that it has; a constant map becomes 0.

    Args:
        maps: (B, C, *spatial). like: whose minimum and maximum count, the maps' own if None.
    """
    like = maps if like is None else like
    axes = tuple(range(2, like.dim()))
    low, high = like.amin(axes, keepdim=True), like.amax(axes, keepdim=True)
    spread = high - low
    return (maps - low) / torch.where(spread > 1e-8, spread, torch.ones_like(spread))


def root_mean_square(difference: Tensor) -> Tensor:
    """(B, C, *spatial) -> (B, C): the root of the mean square; 0, without a gradient, where that is next to nothing."""
    square = difference.square().flatten(2).mean(2)
    return torch.where(square > _SAFE, square.clamp_min(_SAFE).sqrt(), torch.zeros_like(square))


def distances(maps: Tensor, reference: int, kind: Distance) -> Tensor:
    """Return the distance of each map from that of the reference channel.

    Pooling is linear, so the scaling is applied to the pooled maps, with minimum and maximum of the whole ones: the
    same result for an eighth of the work.

    Args:
        maps: (B, C, *spatial), C > 1. reference: channel. kind: see `SauronConfig`.
    Returns:
        (B, C), 0 at the reference.
    """
    with torch.autocast(maps.device.type, enabled=False):
        maps = maps.float()
        small = pooled(maps)
        if kind == "euc_norm":
            small = scaled(small, maps)
        found = root_mean_square(small - small[:, reference : reference + 1])
        if kind in ("euc_rand", "euc_norm_deltaprunenorm"):
            found = found / (found.amax(1, keepdim=True) + 1e-15)
        return found


def delta_opt(maps: Tensor, reference: int, kind: Distance) -> Tensor:
    """Return the mean distance from the reference, over samples and the other channels: a scalar to be made small."""
    return distances(maps, reference, kind).sum() / (maps.shape[0] * (maps.shape[1] - 1))


@torch.no_grad()
def delta_prune(maps: Tensor, reference: int, kind: Distance) -> Tensor:
    """Return (C,): the distances, averaged over samples. With a kind that divides by the largest, in 0..1."""
    return distances(maps, reference, kind).mean(0)


@torch.no_grad()
def mean_distances(maps: Tensor) -> Tensor:
    """Return (C,): each map's mean distance from the others, by which the medoid is found.

    Cost: one product of (C, voxels / 8) with its transpose for each sample.
    """
    flat = pooled(maps.float()).flatten(2)
    return torch.cdist(flat, flat).mean((0, 2)) / flat.shape[2] ** 0.5
