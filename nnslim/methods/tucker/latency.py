"""Measured forward time of layers and of the chains that could stand for them, on this machine."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Mapping

import torch
from torch import nn

from nnslim.methods.tucker.layers import TuckerConv
from nnslim.network.cost import Cost
from nnslim.network.walk import Layer

_VOXELS = 1 << 16  # larger grids are timed on a part of about this size and scaled: time grows with the voxels
_POINTS = 4  # ranks per side that are measured; between them times are interpolated
_REPEATS = 3


class LatencyTable:
    """Milliseconds per forward pass of one patch, measured on first use and remembered by the layer's geometry."""

    def __init__(self, cost: Cost) -> None:
        """Prepare; nothing is measured yet.

        Args:
            cost: of the dense network, for the input shape of each layer.
        """
        self._cost = cost
        self._known: dict[tuple, float] = {}

    def total(self, layers: Mapping[str, Layer]) -> float:
        """Return the time of the given layers when dense, milliseconds."""
        return sum(self.milliseconds(layer.name, layer.module, None) for layer in layers.values())

    def milliseconds(self, name: str, conv: nn.Module, ranks: tuple[int | None, int | None] | None) -> float:
        """Return the time of a layer, dense (None) or as a chain, interpolated between measured ranks."""
        if ranks is None:
            return self._measured(name, conv, None)
        sides = [
            [(None, 1.0)] if rank is None else _neighbours(rank, channels)
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
            self._known[key] = scale * _time(conv, (1, shape[0], *grid), ranks)
        return self._known[key]


def _grid(channels: int) -> list[int]:
    """Return ranks that are measured: multiples of 8 in about equal ratios, from 8 up to the channels."""
    top = max(channels, 9)
    return sorted({max(8, 8 * round(8 ** (1 - s) * top**s / 8)) for s in (i / (_POINTS - 1) for i in range(_POINTS))})


def _neighbours(rank: int, channels: int) -> list[tuple[int, float]]:
    known = _grid(channels)
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


@torch.inference_mode()
def _time(conv: nn.Module, shape: tuple[int, ...], ranks: tuple[int | None, int | None] | None) -> float:
    layer = conv
    if ranks is not None:
        sides = [
            None if rank is None else min(rank, channels)
            for rank, channels in zip(ranks, (conv.out_channels, conv.in_channels), strict=True)
        ]
        layer = TuckerConv(conv, *sides)
    inputs = torch.randn(shape, device=conv.weight.device, dtype=conv.weight.dtype)
    times = []
    for _ in range(_REPEATS + 1):
        started = time.perf_counter()
        layer(inputs)
        if inputs.is_cuda:
            torch.cuda.synchronize()
        times.append(1000 * (time.perf_counter() - started))
    return statistics.median(times[1:])  # the first pass warms up
