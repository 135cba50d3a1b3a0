"""From class scores on one grid to labels on another, block by block: the scores on the other grid are never held.

A block of the result needs a small box of the scores. Where resampling is a weighted mean, a class whose largest score
in that box is below the smallest of another cannot win anywhere in the block and is left out; that is exact. Most
blocks of a real prediction have one class left and need no arithmetic at all.
"""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from nnslim.resampling.resample import Axis, Grid, blocks, slabs, times, two_taps
from nnslim.running.native import kernels

_BLOCK = 32  # output voxels along each axis
_SLICES = 32  # output slices at a time, of scores with the classes last
_AT_ONCE = 1 << 20  # floats of resampled scores in the works
_ROUNDED = (torch.float16, torch.float32)
_MARGIN = 1e-5  # of the largest score: beyond what sums in single precision can err
_COARSE_MARGIN = 1e-3  # beyond what rounding to float16 can move a score that is not one itself


@dataclass(frozen=True)
class Regions:
    """Classes that may overlap: each has a label, and later ones are painted over earlier ones.

    Attributes:
        labels: one per channel of the scores. above: a channel counts where its score is greater.
    """

    labels: tuple[int, ...]
    above: float = 0.0


def label_map(
    scores: Tensor, grid: Grid, out: Tensor, *, regions: Regions | None = None, rounded: torch.dtype | None = None
) -> bool:
    """Resample scores and write, for each voxel, the number of the best class; the first of equals.

    Args:
        scores: (C, D, H, W) float16 or float32 in any memory layout.
        grid: from (D, H, W) to (D', H', W').
        out: (D', H', W'), an integer type that holds the labels, on the device of the scores.
        regions: for classes that may overlap, in place of the best class.
        rounded: number type that resampled scores are rounded to before they are compared, as whoever holds them in
            that type does; None for none.
    Returns:
        False if a score is infinite or not a number: what is in `out` then means nothing.
    """
    if scores.dtype not in (torch.float16, torch.float32):
        scores = scores.float()
    if scores.stride(0) < scores.stride(3) and grid.convex and len(out) > _SLICES:
        # Classes last: class by class, that is one number per cache line. A few slices at a time are put in order.
        whole = True
        for low, high in blocks(len(out), _SLICES):
            begin, end, axis = grid.axes[0].piece(low, high)
            piece = replace(grid, axes=(axis, *grid.axes[1:]))
            given = scores[:, begin:end].contiguous()
            whole &= label_map(given, piece, out[low:high], regions=regions, rounded=rounded)
        return whole
    done = _by_kernel(scores, grid, out, regions, rounded)
    if done is not None:
        return done
    if not all(bool(torch.isfinite(channel.sum(dtype=torch.float32))) for channel in scores):
        return False
    grid = grid.to(scores.device)
    if grid.convex:
        _by_blocks(scores, grid, out, regions, rounded)
        return True
    walks = [slabs(volume, grid) for volume in scores]
    for low, high, first in walks[0]:
        vote = _Vote(out.movedim(grid.last_axis or 0, 0)[low:high], regions)
        for number, part in enumerate(itertools.chain((first,), (next(walk)[2] for walk in walks[1:]))):
            vote.add(number, _round(part, rounded))
    return True


class _CAxis(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_long) for name in ("size_in", "size_out")),
        *((name, ctypes.c_void_p) for name in ("at", "next", "near", "far")),
    )


class _LabelJob(ctypes.Structure):
    """The job of labels.c; whoever makes one keeps its tensors alive."""

    _fields_ = (
        ("scores", ctypes.c_void_p),
        ("half", ctypes.c_long),
        ("classes", ctypes.c_long),
        ("step", ctypes.c_long * 4),
        ("axes", _CAxis * 3),
        ("out", ctypes.c_void_p),
        ("wide_labels", ctypes.c_long),
        ("out_step", ctypes.c_long * 3),
        ("rounded", ctypes.c_long),
        ("labels", ctypes.c_void_p),
        ("above", ctypes.c_float),
        ("margin", ctypes.c_float),
    )


def _by_kernel(
    scores: Tensor, grid: Grid, out: Tensor, regions: Regions | None, rounded: torch.dtype | None
) -> bool | None:
    """Do it with the compiled kernel; None where there is none, or none for this case."""
    taps = [two_taps(axis) for axis in grid.axes]
    known = all(tap is not None for tap in taps) and out.dtype.itemsize <= 2 and rounded in (None, *_ROUNDED)
    if scores.device.type != "cpu" or not known or (native := kernels()) is None:
        return None
    axes = [_CAxis(*axis.size, *(part.data_ptr() for part in tap)) for axis, tap in zip(grid.axes, taps, strict=True)]
    painted = None if regions is None else torch.tensor(regions.labels, dtype=torch.int32, device="cpu")
    return native.labels(
        _LabelJob(
            scores.data_ptr(), scores.dtype == torch.float16, len(scores), scores.stride(), tuple(axes),
            out.data_ptr(), out.dtype.itemsize == 2, out.stride(),
            rounded == torch.float16, None if painted is None else painted.data_ptr(),
            0.0 if regions is None else regions.above, _margin(scores, rounded),
        )
    )  # fmt: skip


class _Vote:
    """The best class so far of each voxel of a block."""

    def __init__(self, target: Tensor, regions: Regions | None) -> None:
        self._target, self._regions = target, regions
        self._best: Tensor | None = None
        if regions is not None:
            target.zero_()

    def add(self, number: int, scores: Tensor) -> None:
        """Let one class compete; classes come in the order of their numbers."""
        if self._regions is not None:
            self._target.masked_fill_(scores > self._regions.above, self._regions.labels[number])
        elif self._best is None:
            self._best = scores
            self._target.fill_(number)
        else:
            self._target.masked_fill_(scores > self._best, number)
            torch.maximum(self._best, scores, out=self._best)


def _round(scores: Tensor, dtype: torch.dtype | None) -> Tensor:
    return scores if dtype in (None, scores.dtype) else scores.to(dtype).to(scores.dtype)


def _by_blocks(scores: Tensor, grid: Grid, out: Tensor, regions: Regions | None, rounded: torch.dtype | None) -> None:
    cuts = [blocks(axis.size[1], _BLOCK) for axis in grid.axes]
    for d_low, d_high in cuts[0]:
        begin, end, _ = grid.axes[0].part(d_low, d_high)
        box = scores[:, begin:end]
        low, high = box.amin(1), box.amax(1)  # several times faster than aminmax
        for h_low, h_high in cuts[1]:
            begin, end, _ = grid.axes[1].part(h_low, h_high)
            lows, highs = _column_bounds(low[:, begin:end], high[:, begin:end], grid.axes[2], cuts[2])
            contenders, sure = _contenders(lows, highs, regions, _margin(scores, rounded))
            for (w_low, w_high), classes, settled in zip(cuts[2], contenders, sure, strict=True):
                target = out[d_low:d_high, h_low:h_high, w_low:w_high]
                if settled:
                    target.fill_(regions.labels[classes[-1]] if regions and classes else classes[0] if classes else 0)
                    continue
                vote = _Vote(target, regions)
                for group, part in _block(box, grid, classes, (d_low, d_high), (h_low, h_high), (w_low, w_high)):
                    for which, values in zip(group, _round(part, rounded), strict=True):
                        vote.add(which, values)


def _column_bounds(low: Tensor, high: Tensor, axis: Axis, cuts: Sequence[tuple[int, int]]) -> tuple[Tensor, Tensor]:
    """(C, n, W) bounds of a row of boxes -> (C, blocks) of each."""
    low, high = low.amin(1), high.amax(1)
    spans = [slice(*axis.part(*cut)[:2]) for cut in cuts]
    lows, highs = [low[:, span].amin(1) for span in spans], [high[:, span].amax(1) for span in spans]
    return torch.stack(lows, 1).float(), torch.stack(highs, 1).float()


def _margin(scores: Tensor, rounded: torch.dtype | None) -> float:
    return _MARGIN if rounded in (None, torch.float32, scores.dtype) else _COARSE_MARGIN


def _contenders(
    low: Tensor, high: Tensor, regions: Regions | None, margin: float
) -> tuple[list[list[int]], list[bool]]:
    """Return for each block the classes that may count somewhere in it, and whether that settles the block."""
    room = margin * torch.maximum(low.abs(), high.abs()).amax(0)
    if regions is None:
        open_ = high >= low.amax(0) - room
        table = open_.T.tolist()
        classes = [[number for number, may in enumerate(row) if may] for row in table]
        return classes, [len(row) == 1 for row in classes]
    may, must = (high > regions.above - room).T.tolist(), (low > regions.above + room).T.tolist()
    classes, sure = [], []
    for maybe, surely in zip(may, must, strict=True):
        # What lies under a class that fills the block is not seen.
        top = max((number for number, fills in enumerate(surely) if fills), default=0)
        row = [number for number, counts in enumerate(maybe) if counts and number >= top]
        classes.append(row)
        sure.append(not row or (len(row) == 1 and surely[row[0]]))
    return classes, sure


def _block(
    box: Tensor, grid: Grid, classes: Sequence[int], *spans: tuple[int, int]
) -> Iterator[tuple[Sequence[int], Tensor]]:
    """Yield groups of classes with their scores (k, d', h', w') on a block of the result."""
    parts = [axis.part(*span) for axis, span in zip(grid.axes, spans, strict=True)]
    (_, _, across), (h_begin, h_end, rows), (w_begin, w_end, columns) = parts
    for start, end in blocks(len(classes), max(1, _AT_ONCE // (len(across) * len(rows) * len(columns)))):
        group = classes[start:end]
        index = torch.tensor(group, device=box.device)
        values = box[:, :, h_begin:h_end, w_begin:w_end].index_select(0, index).float()
        for number, weights in ((2, columns), (1, rows), (0, across)):
            values = values if grid.axes[number].identity else times(weights, values, number - 3)
        yield group, values
