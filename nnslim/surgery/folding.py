"""Fold channels that are removed into those that stay: readers take from the others what they took from them.

A redundant map is nearly a linear function of the other maps of its layer. Ridge regression on second moments finds
that function, and since convolutions are linear it moves into the kernels that read the maps:
h_r ~ c_r + sum_k A_kr h_k gives W_k += sum_r A_kr W_r, and c_r goes to the bias.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from nnslim.network.walk import LayerIndex
from nnslim.surgery.channels import ChannelGroup, ChannelMap
from nnslim.surgery.narrow import axes_of
from nnslim.surgery.streaming import Tiles, run_hooked

_SAMPLES = 8192  # voxels of a batch that count
_RIDGE = 1e-3  # of the mean variance


@dataclass
class MapMoments:
    """Streamed first and second moments of the C maps of one layer, float64.

    Attributes:
        count: number of voxels. total: (C,) sums. products: (C, C) sums of products.
    """

    count: int
    total: Tensor
    products: Tensor

    @classmethod
    def of(cls, maps: Tensor) -> MapMoments:
        """Return the moments of (B, C, *spatial) maps, over some thousand voxels spread evenly."""
        rows = maps.detach().movedim(1, 0).flatten(1)
        step = max(1, rows.shape[1] // _SAMPLES) | 1  # odd: no multiple of an axis of the patch
        return cls.of_rows(rows[:, ::step].T.double().cpu())

    @classmethod
    def of_rows(cls, rows: Tensor) -> MapMoments:
        """Return the moments of all rows (N, C), float64."""
        return cls(len(rows), rows.sum(0), rows.T @ rows)

    def __add__(self, other: MapMoments) -> MapMoments:
        return MapMoments(self.count + other.count, self.total + other.total, self.products + other.products)

    @property
    def mean(self) -> Tensor:
        """Mean of each map, (C,)."""
        return self.total / self.count

    @property
    def covariance(self) -> Tensor:
        """Covariance of the maps, (C, C)."""
        return self.products / self.count - torch.outer(self.mean, self.mean)

    def regression(self, kept: Sequence[int], gone: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return A (kept, gone) and c (gone,), with h_gone ~ c + A^T h_kept, by ridge regression."""
        mean, covariance = self.mean, self.covariance
        inner = covariance[kept][:, kept]
        ridge = _RIDGE * inner.diagonal().mean().clamp_min(torch.finfo(torch.float64).tiny)
        inner = inner + ridge * torch.eye(len(kept), dtype=torch.float64)
        weights = torch.linalg.solve(inner, covariance[kept][:, gone])
        return weights, mean[gone] - weights.T @ mean[kept]

    def unexplained(self, kept: Sequence[int], gone: Sequence[int]) -> float:
        """Return the root of the variance of the removed maps that the kept ones do not explain, over that of all."""
        weights, _ = self.regression(kept, gone)
        covariance = self.covariance
        left = covariance[gone][:, gone] - 2 * weights.T @ covariance[kept][:, gone]
        left = left + weights.T @ covariance[kept][:, kept] @ weights
        total = float(covariance.diagonal().sum())
        return (max(0.0, float(left.diagonal().sum())) / total) ** 0.5 if total > 0 else 0.0


def map_moments(network: nn.Module, groups: Iterable[ChannelGroup], tiles: Tiles) -> dict[str, MapMoments]:
    """Return the moments of each group's maps as readers see them, over all tiles, from one pass; no map is kept.

    Args:
        network: in eval mode. groups: of its channels. tiles: calibration tiles.
    """
    found: dict[str, MapMoments] = {}
    users: defaultdict[str, list[str]] = defaultdict(list)
    for group in groups:
        for tap in group.taps:
            users[tap].append(group.name)

    def add(names: Sequence[str], _module: nn.Module, _inputs: tuple[Tensor, ...], output: Tensor) -> None:
        made = MapMoments.of(output)
        found.update({name: found[name] + made if name in found else made for name in names})

    run_hooked(network, tiles, after={tap: partial(add, names) for tap, names in users.items()})
    return found


@torch.no_grad()
def fold_channels(
    layers: LayerIndex, channels: ChannelMap, keep: Mapping[str, Sequence[int]], moments: Mapping[str, MapMoments]
) -> list[str]:
    """Change the kernels that read channels which are about to be removed, in place; the removal itself comes after.

    Exact where the maps that go are linear functions of those that stay, but at the border of a zero-padded
    convolution where that function has a constant. Groups without moments are left alone.

    Args:
        layers: of the network. channels: of the network as it is. keep: see `ChannelMap.narrowing`.
        moments: of the groups' maps as readers see them.
    Returns:
        Names of the layers that were changed.
    """
    changed = []
    for name, kept in keep.items():
        if name not in moments:
            continue
        gone = sorted(set(range(channels.groups[name].channels)) - set(kept))
        weights, constants = moments[name].regression(list(kept), gone)
        numbers = channels.numbers[name]
        for reader, read in channels.reads.items():
            places = [_places(read, numbers[indices]) for indices in (list(kept), gone)]
            if all(place is not None for place in places):
                _fold(layers[reader].module, *places, weights, constants)
                changed.append(reader)
    return changed


def _places(read: np.ndarray, numbers: Iterable[int]) -> list[int] | None:
    """Return where each channel stands among a layer's inputs; None unless each does exactly once."""
    found = [np.flatnonzero(read == number) for number in numbers]
    return [int(place[0]) for place in found] if all(len(place) == 1 for place in found) else None


def _fold(conv: nn.Module, kept: list[int], gone: list[int], weights: Tensor, constants: Tensor) -> None:
    outputs, inputs = axes_of(conv, "weight")
    kernel = conv.weight.data.movedim((inputs, outputs), (0, 1))  # a view: (inputs, outputs, *kernel)
    old = kernel[gone].double()
    added = torch.einsum("kr,r...->k...", weights.to(old.device), old)
    kernel[kept] += added.to(kernel.dtype)
    if conv.bias is not None:
        taps = old.flatten(2).sum(2) if outputs == 0 else old.flatten(2).mean(2)  # transposed: one tap per voxel
        conv.bias.data += (constants.to(old.device) @ taps).to(conv.bias.dtype)
