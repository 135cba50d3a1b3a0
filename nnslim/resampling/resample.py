"""Separable resampling as matrix products: one matrix per axis, equal to what scipy, skimage and torch compute.

Interpolation on a grid is linear and separable, the prefilter of a cubic spline and the repeated edge included. The
matrices are scipy's own answers to unit vectors. What is held beside input and output is one slab in single precision.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

_NEGLIGIBLE = 1e-10  # weights below it: far below single precision, also summed over a whole axis
_SLAB = 1 << 22  # floats of a slab in the works
_COLUMNS = 64  # outputs of one axis that share a product


@dataclass(frozen=True, eq=False)
class Axis:
    """How one axis is resampled.

    Attributes:
        weights: (n_out, n_in) float32, rows sum to 1.
        first, last: for each output, the inputs that it needs are first[i] .. last[i] - 1; both never fall.
        identity: nothing happens along this axis.
        convex: no weight is negative, so no output is outside the range of the inputs that it needs.
    """

    weights: Tensor
    first: tuple[int, ...]
    last: tuple[int, ...]
    identity: bool
    convex: bool

    @property
    def size(self) -> tuple[int, int]:
        """(n_in, n_out)."""
        return self.weights.shape[1], self.weights.shape[0]

    def part(self, low: int, high: int) -> tuple[int, int, Tensor]:
        """Return which inputs (begin, end) the outputs low .. high - 1 need, and their weights (high - low, needed)."""
        begin, end = self.first[low], self.last[high - 1]
        return begin, end, self.weights[low:high, begin:end]

    def piece(self, low: int, high: int) -> tuple[int, int, Axis]:
        """Return which inputs the outputs low .. high - 1 need, and the axis from these alone to those."""
        begin, end, weights = self.part(low, high)
        spans = [tuple(at - begin for at in side[low:high]) for side in (self.first, self.last)]
        return begin, end, Axis(weights.contiguous(), *spans, identity=False, convex=self.convex)


def _axis(weights: np.ndarray) -> Axis:
    weights = np.where(np.abs(weights) < _NEGLIGIBLE, 0.0, weights)
    used = weights != 0
    first = np.minimum.accumulate(used.argmax(1)[::-1])[::-1]
    last = np.maximum.accumulate(weights.shape[1] - used[:, ::-1].argmax(1))
    same = weights.shape[0] == weights.shape[1] and np.abs(weights - np.eye(len(weights))).max() < 1e-7
    return Axis(
        torch.from_numpy(weights.astype(np.float32)),
        tuple(first.tolist()),
        tuple(last.tolist()),
        bool(same),
        bool((weights >= 0).all()),
    )


@functools.lru_cache(maxsize=64)
def two_taps(axis: Axis) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:
    """Return an axis as out[i] = near[i] x[at[i]] + far[i] x[next[i]], next - at 0 or 1; None where it is not one.

    Returns:
        at, next (int32), near, far (float32), n_out each.
    """
    used = axis.weights != 0
    at = used.int().argmax(1)
    last = axis.size[0] - 1 - used.flip(1).int().argmax(1)
    if not axis.convex or (last - at > 1).any() or (at.diff() < 0).any():
        return None
    rows = torch.arange(len(at), device=at.device)
    near, far = axis.weights[rows, at], axis.weights[rows, last]
    return at.int(), last.int(), near.contiguous(), torch.where(last > at, far, 0.0)


@functools.lru_cache(maxsize=64)
def spline_axis(n_in: int, n_out: int, order: int) -> Axis:
    """Return the axis of skimage's `resize(mode="edge", anti_aliasing=False)` by a spline, before its clipping."""
    return _axis(spline_weights(n_in, n_out, order))


def spline_weights(n_in: int, n_out: int, order: int) -> np.ndarray:
    """Return (n_out, n_in) float64: what `resize` makes of each unit vector, by the call that it makes itself."""
    from scipy import ndimage

    if n_in == n_out:
        return np.eye(n_in)
    factor = 1 / np.divide(n_in, n_out)  # skimage's way to say it, digit by digit
    return ndimage.zoom(np.eye(n_in), (factor, 1.0), order=order, mode="nearest", grid_mode=True)


@functools.lru_cache(maxsize=64)
def mapped_axis(n_in: int, n_out: int, order: int) -> Axis:
    """Return the axis of `scipy.ndimage.map_coordinates(mode="nearest")` at voxel centres (align_corners=False)."""
    from scipy import ndimage

    if n_in == n_out:
        return _axis(np.eye(n_in))
    where = float(n_in) / n_out * (np.arange(n_out) + 0.5) - 0.5
    columns = [ndimage.map_coordinates(unit, where[None], order=order, mode="nearest") for unit in np.eye(n_in)]
    return _axis(np.stack(columns, axis=1))


@functools.lru_cache(maxsize=64)
def torch_axis(n_in: int, n_out: int, mode: str) -> Axis:
    """Return the axis of `torch.nn.functional.interpolate(mode=...)`, "linear" or "nearest-exact"."""
    if n_in == n_out:
        return _axis(np.eye(n_in))
    units = torch.eye(n_in, dtype=torch.float32, device="cpu")
    answer = torch.nn.functional.interpolate(units[None], n_out, mode=mode)[0]  # (unit vectors, n_out)
    return _axis(answer.T.double().numpy())


@dataclass(frozen=True)
class Grid:
    """How a volume is resampled.

    Attributes:
        axes: three, in the order of the volume's own.
        last_axis: the axis that is resampled after the other two, with clipping in between; None: all three as one.
        clip: keep to the range of the input as skimage does: of the whole volume, or of each slice across `last_axis`.
    """

    axes: tuple[Axis, Axis, Axis]
    last_axis: int | None = None
    clip: bool = True

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of the result."""
        return tuple(axis.size[1] for axis in self.axes)  # type: ignore[return-value]

    @property
    def identity(self) -> bool:
        """Whether nothing happens."""
        return all(axis.identity for axis in self.axes)

    @property
    def convex(self) -> bool:
        """Whether every result is a weighted mean of inputs: then clipping does nothing, and bounds are known."""
        return all(axis.convex for axis in self.axes)

    def to(self, device: torch.device) -> Grid:
        """Return it with the weights on a device."""
        return replace(self, axes=tuple(replace(axis, weights=axis.weights.to(device)) for axis in self.axes))


def blocks(size: int, length: int) -> list[tuple[int, int]]:
    """Return where blocks of an axis begin and end; the last one may be shorter."""
    return [(low, min(low + length, size)) for low in range(0, size, length)]


def along(tensor: Tensor, axis: Axis, dim: int) -> Tensor:
    """Resample one axis of a tensor.

    Args:
        tensor: (..., n_in, ...) float32. dim: which; -1 or -2 or -3.
    Returns:
        (..., n_out, ...); the tensor itself where nothing happens.
    """
    if axis.identity:
        return tensor
    n_in, n_out = axis.size
    if n_in <= _COLUMNS:
        return times(axis.weights, tensor, dim)
    made = tensor.new_empty([n_out if d == dim + tensor.ndim else n for d, n in enumerate(tensor.shape)])
    for low, high in blocks(n_out, _COLUMNS):
        begin, end, weights = axis.part(low, high)
        made.narrow(dim, low, high - low).copy_(times(weights, tensor.narrow(dim, begin, end - begin), dim))
    return made


def times(weights: Tensor, tensor: Tensor, dim: int) -> Tensor:
    """Multiply (n_out, n_in) weights to axis `dim`, -1 to -3, of (..., n_in, ...)."""
    if dim == -1:
        return tensor @ weights.T
    return weights @ tensor if dim == -2 else (weights @ tensor.flatten(-2)).unflatten(-1, tensor.shape[-2:])


def slabs(volume: Tensor, grid: Grid) -> Iterator[tuple[int, int, Tensor]]:
    """Resample a volume slab by slab.

    Args:
        volume: (D, H, W), any number type; on the device of the grid's weights.
    Yields:
        (begin, end, (end - begin, ...) float32): along `grid.last_axis`, which comes first in what is yielded (the
        other two follow in their order); along the first axis where it is None.
    """
    front = grid.last_axis or 0
    order = [front, *(axis for axis in range(3) if axis != front)]
    volume = volume.permute(order)
    across, *plane = (grid.axes[axis] for axis in order)
    bounds = _bounds(volume, grid)
    length = max(8, _SLAB // (max(plane[0].size) * max(plane[1].size)))  # a small number of output slices
    for low, high in blocks(across.size[1], length):
        begin, end, weights = across.part(low, high)
        slab = volume[begin:end].float()
        if grid.last_axis is None:
            slab = slab if across.identity else times(weights, slab, -3)
            slab = along(along(slab, plane[1], -1), plane[0], -2)
            slab = slab if bounds is None else slab.clamp(*bounds)
        else:
            slab = along(along(slab, plane[1], -1), plane[0], -2)
            if bounds is not None:
                slab = slab.clamp(bounds[0][begin:end], bounds[1][begin:end])
            slab = slab if across.identity else times(weights, slab, -3)
        yield low, high, slab


def _bounds(volume: Tensor, grid: Grid) -> tuple[Tensor, Tensor] | None:
    """Return what to clip to: two numbers, or (D, 1, 1) of each slice; None where clipping does nothing."""
    plane = [axis for number, axis in enumerate(grid.axes) if number != grid.last_axis]
    if not grid.clip or all(axis.convex for axis in plane):
        return None
    if grid.last_axis is None:
        return volume.min().float(), volume.max().float()
    return volume.amin((1, 2), keepdim=True).float(), volume.amax((1, 2), keepdim=True).float()


def resample(data: Tensor, grid: Grid, dtype: torch.dtype = torch.float32) -> Tensor:
    """(C, D, H, W) -> (C, D', H', W') of that type; nothing of that size is held beside the result."""
    made = torch.empty((len(data), *grid.shape), dtype=dtype, device=data.device)
    front = grid.last_axis or 0
    for volume, out in zip(data, made, strict=True):
        target = out.movedim(front, 0)
        for low, high, slab in slabs(volume, grid):
            target[low:high] = slab
    return made


def grid_like_resize(
    shape: Sequence[int], new_shape: Sequence[int], order: int, order_last: int = 0, last_axis: int | None = None
) -> Grid:
    """Return nnU-Net's default: skimage's resize of the volume, or of slices, and map_coordinates across them.

    Args:
        shape, new_shape: three sizes each. order: of the spline. order_last: along `last_axis`.
    """
    axes = tuple(
        mapped_axis(n, m, order_last) if number == last_axis else spline_axis(n, m, order)
        for number, (n, m) in enumerate(zip(shape, new_shape, strict=True))
    )
    return Grid(axes, last_axis)  # type: ignore[arg-type]


def grid_like_interpolate(
    shape: Sequence[int], new_shape: Sequence[int], last_mode: str = "linear", last_axis: int | None = None
) -> Grid:
    """Return what torch's linear interpolate does, on the volume or with another mode along `last_axis`."""
    axes = tuple(
        torch_axis(n, m, last_mode if number == last_axis else "linear")
        for number, (n, m) in enumerate(zip(shape, new_shape, strict=True))
    )
    return Grid(axes, last_axis, clip=False)  # type: ignore[arg-type]
