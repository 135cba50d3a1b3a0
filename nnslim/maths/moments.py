"""Streamed second moments of a convolution's input patches and outputs, in float64.

A convolution is a linear map of patches: y = W x, with x the (channels x taps) patch under an output voxel. Everything
that a data-aware decomposition needs of the data are the centred moments sum(x x^T) and sum(y x^T); no activation is
kept.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional


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
        """Return the view of a convolution, None for what has none: groups, overlapping blocks, or another layer."""
        if not hasattr(conv, "kernel_size"):
            return None
        plain = conv.groups == 1 and not isinstance(conv.padding, str)
        if plain and conv.transposed:
            apart = tuple(conv.kernel_size) == tuple(conv.stride) and set(conv.dilation) == {1}
            plain = apart and not any((*conv.padding, *conv.output_padding))
        size = math.prod(conv.kernel_size)
        return cls(conv.in_channels, conv.out_channels, size, conv.transposed) if plain else None

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


Places = tuple[Tensor, ...]  # sample of the batch (N,), then one (N,) tensor for each spatial axis


def choose_places(conv: nn.Module, inputs: Tensor, outputs: Tensor, count: int, generator: torch.Generator) -> Places:
    """Choose output voxels (input voxels of a transposed convolution), none twice; all of them if `count` allows.

    Args:
        conv: a convolution that has a `LinearView`; only its geometry is read.
        inputs: (B, I, *spatial). outputs: (B, O, *spatial'). count: positions wanted. generator: of the CPU.
    """
    base = inputs if conv.transposed else outputs
    grid = (base.shape[0], *base.shape[2:])
    total = math.prod(grid)
    chosen = torch.arange(total) if count >= total else torch.randperm(total, generator=generator)[:count]
    return tuple(torch.from_numpy(place).to(base.device) for place in np.unravel_index(chosen.numpy(), grid))


def sample_inputs(conv: nn.Module, inputs: Tensor, places: Places) -> Tensor:
    """Return what the layer reads at the places, (N, columns), float64 on the CPU."""
    if conv.transposed:
        return _rows(inputs, places)
    sides = [side for size in reversed(conv.padding) for side in (size, size)]
    mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
    return _rows(functional.pad(inputs, sides, mode=mode), _blocks(conv, places))


def sample_outputs(conv: nn.Module, outputs: Tensor, places: Places) -> Tensor:
    """Return what the layer makes at the places, (N, rows), float64 on the CPU."""
    return _rows(outputs, _blocks(conv, places) if conv.transposed else places)


def _blocks(conv: nn.Module, places: Places) -> Places:
    """Return the (N, taps) positions under the kernel at each place."""
    batch, *axes = places
    sizes = zip(conv.kernel_size, conv.dilation, strict=True)
    steps = [torch.arange(size, device=batch.device) * step for size, step in sizes]
    offsets = [axis.flatten() for axis in torch.meshgrid(*steps, indexing="ij")]
    return (batch[:, None], *(p[:, None] * s + o for p, s, o in zip(axes, conv.stride, offsets, strict=True)))


def _rows(values: Tensor, places: Places) -> Tensor:
    """Return the channels at (N,) places, or (N, channels x taps) at (N, taps) places."""
    found = values.detach().movedim(1, -1)[places]
    return (found if found.dim() == 2 else found.transpose(1, 2).flatten(1)).to("cpu", torch.float64)


class _Streamed:
    """Sums over many tiles.

    Instance normalisation takes each tile's mean away, so what varies *within* a tile is what counts; `per_tile`
    centres by each tile's own mean. A layer that no norm follows is centred by the mean over all tiles.
    """

    def __init__(self, view: LinearView, *, per_tile: bool) -> None:
        self.view, self.per_tile, self.count = view, per_tile, 0
        self._y, self._yy = torch.zeros(2, view.rows, dtype=torch.float64)

    def _centred(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Add the sums of the outputs; return the rows, centred where `per_tile` says so."""
        self.count += len(x)
        self._y += y.sum(0)
        if self.per_tile:
            x, y = x - x.mean(0), y - y.mean(0)
        self._yy += y.square().sum(0)
        return x, y

    @property
    def mean_y(self) -> Tensor:
        """Mean output, (rows,)."""
        return self._y / self.count

    @property
    def variance_y(self) -> Tensor:
        """Variance of the outputs, (rows,)."""
        return self._yy / self.count - (0 if self.per_tile else self.mean_y.square())


class Moments(_Streamed):
    """Centred second moments of one layer over many tiles."""

    def __init__(self, view: LinearView, *, per_tile: bool) -> None:
        super().__init__(view, per_tile=per_tile)
        shapes = ((view.columns,), (view.columns, view.columns), (view.rows, view.columns))
        self._x, self._xx, self._yx = (torch.zeros(shape, dtype=torch.float64) for shape in shapes)

    def add(self, x: Tensor, y: Tensor) -> None:
        """Add the rows of one tile: x (N, columns), y (N, rows), float64."""
        self._x += x.sum(0)
        x, y = self._centred(x, y)
        self._xx.addmm_(x.T, x)
        self._yx.addmm_(y.T, x)

    @property
    def mean_x(self) -> Tensor:
        """Mean patch, (columns,)."""
        return self._x / self.count

    @property
    def xx(self) -> Tensor:
        """Covariance of the patches, (columns, columns)."""
        return self._xx / self.count - (0 if self.per_tile else torch.outer(self.mean_x, self.mean_x))

    @property
    def yx(self) -> Tensor:
        """Covariance of outputs and patches, (rows, columns)."""
        return self._yx / self.count - (0 if self.per_tile else torch.outer(self.mean_y, self.mean_x))


class ChannelMoments(_Streamed):
    """The part of `Moments` that fits in memory for wide layers: channel and tap covariance, not their product.

    Attributes:
        channels: (I, I) mean over taps. taps: (K, K), so that their Kronecker product has the patches' total variance;
            the identity for a transposed convolution, whose patches are single voxels.
    """

    def __init__(self, view: LinearView, *, per_tile: bool) -> None:
        super().__init__(view, per_tile=per_tile)
        self._width = 1 if view.transposed else view.taps
        self._channels = torch.zeros(view.inputs, view.inputs, dtype=torch.float64)
        self._taps = torch.zeros(self._width, self._width, dtype=torch.float64)

    def add(self, x: Tensor, y: Tensor) -> None:
        """Add the rows of one tile: x (N, I * taps), y (N, rows), float64."""
        x, _ = self._centred(x, y)
        blocks = x.unflatten(1, (self.view.inputs, self._width))
        by_channel, by_tap = blocks.transpose(1, 2).flatten(0, 1), blocks.flatten(0, 1)
        self._channels.addmm_(by_channel.T, by_channel)
        self._taps.addmm_(by_tap.T, by_tap)

    @property
    def channels(self) -> Tensor:
        return self._channels / (self.count * self._width)

    @property
    def taps(self) -> Tensor:
        if self.view.transposed:
            return torch.eye(self.view.taps, dtype=torch.float64)
        return self._taps / (self.count * self.channels.trace())
