"""Measured forward time of layers and of the chains that could stand for them, on this machine."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from torch import nn

from nnslim.methods.tucker.edit import TuckerConv
from nnslim.network.cost import Cost
from nnslim.network.walk import Layer
from nnslim.running.timing import pass_seconds

_VOXELS = 1 << 16  # larger grids are timed on a part of about this size and scaled: time grows with the voxels
_POINTS = 4  # ranks per side that are measured; between them times are interpolated


class LatencyTable:
    """Milliseconds per forward pass of one patch, measured at first use and kept by the layer's geometry."""

    def __init__(self, cost: Cost, measure: Callable[..., float] | None = None) -> None:
        """Take the cost of the dense network, and what is called in place of `chain_milliseconds`."""
        self._cost, self._measure = cost, measure or chain_milliseconds
        self._known: dict[tuple, float] = {}

    def total(self, layers: Mapping[str, Layer]) -> float:
        """Return the time of the given layers when dense, milliseconds."""
        return sum(self.milliseconds(layer.name, layer.module, None) for layer in layers.values())

    def milliseconds(self, name: str, conv: nn.Module, ranks: tuple[int | None, int | None] | None) -> float:
        """Return the time of a layer, dense (None) or as a chain, interpolated between measured ranks."""
        if ranks is None:
            return self._measured(name, conv, None)
        sides = [
            [(None, 1.0)] if rank is None else measured_neighbours(rank, channels)
            for rank, channels in zip(ranks, (conv.out_channels, conv.in_channels), strict=True)
        ]
        return sum(
            share_out * share_in * self._measured(name, conv, (out, in_))
            for out, share_out in sides[0]
            for in_, share_in in sides[1]
        )

    def _measured(self, name: str, conv: nn.Module, ranks: tuple[int | None, int | None] | None) -> float:
        shape = self._cost.layers[name].input_shape
        grid, scale = _part(shape[1:], conv)
        key = (str(conv), grid, scale, ranks)
        if key not in self._known:
            self._known[key] = scale * self._measure(conv, (1, shape[0], *grid), ranks)
        return self._known[key]


def measured_ranks(channels: int) -> list[int]:
    """Return ranks that are measured: multiples of 8 in about equal ratios, from 8 up to the channels."""
    top = max(channels, 9)
    return sorted({max(8, 8 * round(8 ** (1 - s) * top**s / 8)) for s in (i / (_POINTS - 1) for i in range(_POINTS))})


def measured_neighbours(rank: int, channels: int) -> list[tuple[int, float]]:
    """Return the measured ranks around a rank, each with its share in the interpolation."""
    known = measured_ranks(channels)
    above = next((point for point in known if point >= rank), known[-1])
    below = max((point for point in known if point <= rank), default=known[0])
    if above == below:
        return [(above, 1.0)]
    share = (rank - below) / (above - below)
    return [(below, 1 - share), (above, share)]


def _part(grid: tuple[int, ...], conv: nn.Module) -> tuple[tuple[int, ...], float]:
    """Return a smaller grid of the same proportions, a multiple of the stride, and how much larger the real one is."""
    total = math.prod(grid)
    if total <= _VOXELS:
        return tuple(grid), 1.0
    factor = (_VOXELS / total) ** (1 / len(grid))
    part = tuple(
        min(size, max(step, step * round(size * factor / step))) for size, step in zip(grid, conv.stride, strict=True)
    )
    return part, total / math.prod(part)


def chain_milliseconds(conv: nn.Module, shape: tuple[int, ...], ranks: tuple[int | None, int | None] | None) -> float:
    """Return the measured time of one pass of a convolution (ranks None) or of its chain, on inputs (B, I, *spatial).

    Ranks beyond the channels count as the channels.
    """
    layer = conv
    if ranks is not None:
        channels = conv.out_channels, conv.in_channels
        layer = TuckerConv(conv, *(None if r is None else min(r, c) for r, c in zip(ranks, channels, strict=True)))
    return 1000 * pass_seconds([layer], shape)[0]
