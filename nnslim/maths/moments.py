"""Streamed second moments of a convolution's input patches and outputs, in float64.

A convolution is a linear map of patches: y = W x, with x the (channels x taps) patch under an output voxel. Everything
that a data-aware decomposition needs of the data are the centred moments sum(x x^T) and sum(y x^T); no activation is
kept.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_PADDING = {"zeros": "constant", "reflect": "reflect", "replicate": "replicate", "circular": "circular"}


@dataclass(frozen=True)
class LinearView:
    """How a convolution becomes a linear map between sampled rows.

    For a convolution, x holds (inputs x taps) and y the outputs of one output voxel. For a transposed convolution whose
    blocks do not overlap (kernel = stride), x holds the inputs of one input voxel and y the (outputs x taps) of the
    block that it makes.

    Attributes:
        inputs, outputs, taps: channels, and positions of the kernel.
        transposed: which of the two.
    """

    inputs: int
    outputs: int
    taps: int
    transposed: bool

    @classmethod
    def of(cls, conv: nn.Module) -> LinearView | None:
        """Return the view of a convolution, None for one that has none: groups, or overlapping blocks."""
        transposed = isinstance(conv, _TRANSPOSED)
        plain = (
            tuple(conv.kernel_size) == tuple(conv.stride)
            and not any(conv.padding)
            and not any(conv.output_padding)
            and set(conv.dilation) == {1}
            if transposed
            else not isinstance(conv.padding, str)
        )
        if conv.groups != 1 or not plain:
            return None
        return cls(conv.in_channels, conv.out_channels, math.prod(conv.kernel_size), transposed)

    @property
    def columns(self) -> int:
        """Length of x."""
        return self.inputs if self.transposed else self.inputs * self.taps

    @property
    def rows(self) -> int:
        """Length of y."""
        return self.outputs * self.taps if self.transposed else self.outputs

    @property
    def bytes(self) -> int:
        """Memory of the moments."""
        return 8 * self.columns * (self.columns + self.rows)


@dataclass(frozen=True)
class Places:
    """Positions at which a layer is sampled: output voxels, or input voxels of a transposed convolution.

    Attributes:
        batch: (N,) sample of the batch. axes: one (N,) tensor for each spatial axis.
    """

    batch: Tensor
    axes: tuple[Tensor, ...]


def choose_places(conv: nn.Module, inputs: Tensor, outputs: Tensor, count: int, generator: torch.Generator) -> Places:
    """Choose positions without repetition; all of them, in order, where there are not more than `count`.

    Args:
        conv: a convolution that has a `LinearView`; only its geometry is read.
        inputs: (B, I, *spatial). outputs: (B, O, *spatial').
        count: positions wanted.
        generator: of the CPU, decides.
    """
    base = inputs if isinstance(conv, _TRANSPOSED) else outputs
    grid = (base.shape[0], *base.shape[2:])
    total = math.prod(grid)
    chosen = torch.arange(total) if count >= total else torch.randperm(total, generator=generator)[:count]
    batch, *axes = torch.unravel_index(chosen.to(base.device), grid)
    return Places(batch, tuple(axes))


def sample_inputs(conv: nn.Module, inputs: Tensor, places: Places) -> Tensor:
    """Return what the layer sees at the places, (N, columns), float64 on the CPU."""
    if isinstance(conv, _TRANSPOSED):
        return _rows(inputs.movedim(1, -1)[(places.batch, *places.axes)])
    sides = [side for size in reversed(conv.padding) for side in (size, size)]
    padded = functional.pad(inputs, sides, mode=_PADDING[conv.padding_mode])
    offsets = _taps(conv.kernel_size, conv.dilation, inputs.device)
    rows = [p[:, None] * s + offset for p, s, offset in zip(places.axes, conv.stride, offsets, strict=True)]
    found = padded.movedim(1, -1)[(places.batch[:, None], *rows)]  # (N, taps, I)
    return _rows(found.transpose(1, 2).flatten(1))


def sample_outputs(conv: nn.Module, outputs: Tensor, places: Places) -> Tensor:
    """Return what the layer makes at the places, (N, rows), float64 on the CPU."""
    if not isinstance(conv, _TRANSPOSED):
        return _rows(outputs.movedim(1, -1)[(places.batch, *places.axes)])
    offsets = _taps(conv.kernel_size, (1,) * len(places.axes), outputs.device)
    rows = [p[:, None] * s + offset for p, s, offset in zip(places.axes, conv.stride, offsets, strict=True)]
    found = outputs.movedim(1, -1)[(places.batch[:, None], *rows)]  # (N, taps, O)
    return _rows(found.transpose(1, 2).flatten(1))


def _taps(kernel: tuple[int, ...], dilation: tuple[int, ...], device: torch.device) -> list[Tensor]:
    axes = [torch.arange(size, device=device) * step for size, step in zip(kernel, dilation, strict=True)]
    return [axis.flatten() for axis in torch.meshgrid(*axes, indexing="ij")]


def _rows(values: Tensor) -> Tensor:
    return values.detach().to("cpu", torch.float64)


class Moments:
    """Centred second moments of one layer over many tiles.

    Instance normalisation takes each tile's mean away, so what varies *within* a tile is what counts; `per_tile`
    centres by each tile's own mean. A layer that no norm follows is centred by the mean over all tiles.
    """

    def __init__(self, view: LinearView, *, per_tile: bool) -> None:
        self.view, self.per_tile, self.count = view, per_tile, 0
        size, rows = view.columns, view.rows
        self._xx = torch.zeros(size, size, dtype=torch.float64)
        self._yx = torch.zeros(rows, size, dtype=torch.float64)
        self._yy = torch.zeros(rows, dtype=torch.float64)
        self._x = torch.zeros(size, dtype=torch.float64)
        self._y = torch.zeros(rows, dtype=torch.float64)

    def add(self, x: Tensor, y: Tensor) -> None:
        """Add the rows of one tile: x (N, columns), y (N, rows), float64."""
        self.count += len(x)
        self._x += x.sum(0)
        self._y += y.sum(0)
        if self.per_tile:
            x, y = x - x.mean(0), y - y.mean(0)
        self._xx.addmm_(x.T, x)
        self._yx.addmm_(y.T, x)
        self._yy += y.square().sum(0)

    @property
    def mean_x(self) -> Tensor:
        """Mean patch, (columns,)."""
        return self._x / self.count

    @property
    def mean_y(self) -> Tensor:
        """Mean output, (rows,)."""
        return self._y / self.count

    @property
    def xx(self) -> Tensor:
        """Covariance of the patches, (columns, columns)."""
        return self._xx / self.count - self._between(self.mean_x, self.mean_x)

    @property
    def yx(self) -> Tensor:
        """Covariance of outputs and patches, (rows, columns)."""
        return self._yx / self.count - self._between(self.mean_y, self.mean_x)

    @property
    def variance_y(self) -> Tensor:
        """Variance of the outputs, (rows,)."""
        return self._yy / self.count - (0 if self.per_tile else self.mean_y.square())

    def _between(self, left: Tensor, right: Tensor) -> Tensor | float:
        return 0.0 if self.per_tile else torch.outer(left, right)


class ChannelMoments:
    """The part of `Moments` that fits in memory for wide layers: channel and tap covariance, not their product.

    Attributes:
        channels: (I, I) mean over taps. taps: (K, K), so that their Kronecker product has the patches' total variance;
            the identity for a transposed convolution, whose patches are single voxels.
    """

    def __init__(self, view: LinearView, *, per_tile: bool) -> None:
        self.view, self.per_tile, self.count = view, per_tile, 0
        self._width = 1 if view.transposed else view.taps
        self._channels = torch.zeros(view.inputs, view.inputs, dtype=torch.float64)
        self._taps = torch.zeros(self._width, self._width, dtype=torch.float64)
        self._yy = torch.zeros(view.rows, dtype=torch.float64)
        self._y = torch.zeros(view.rows, dtype=torch.float64)

    def add(self, x: Tensor, y: Tensor) -> None:
        """Add the rows of one tile: x (N, I * taps), y (N, rows), float64."""
        self.count += len(x)
        self._y += y.sum(0)
        if self.per_tile:
            x, y = x - x.mean(0), y - y.mean(0)
        blocks = x.unflatten(1, (self.view.inputs, self._width))
        by_channel, by_tap = blocks.transpose(1, 2).flatten(0, 1), blocks.flatten(0, 1)
        self._channels.addmm_(by_channel.T, by_channel)
        self._taps.addmm_(by_tap.T, by_tap)
        self._yy += y.square().sum(0)

    @property
    def channels(self) -> Tensor:
        """See the class."""
        return self._channels / (self.count * self._width)

    @property
    def taps(self) -> Tensor:
        """See the class."""
        if self.view.transposed:
            return torch.eye(self.view.taps, dtype=torch.float64)
        return self._taps / (self.count * self.channels.trace())

    @property
    def variance_y(self) -> Tensor:
        """Variance of the outputs, (rows,)."""
        return self._yy / self.count - (0 if self.per_tile else (self._y / self.count).square())
