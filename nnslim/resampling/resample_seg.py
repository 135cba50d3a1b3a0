"""Linear resampling of label maps with exactly the labels of batchgenerators' `resize_segmentation`, ties included.

That function resamples the indicator of each label in double precision, and takes the greatest; where two are equal to
the last bit, the nearest neighbour's label. Here the same sums are made in the same order, but only in blocks in which
there is more than one label.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence

import numpy as np

from nnslim.resampling.resample import blocks, mapped_axis, spline_weights

_BLOCK = 32  # output voxels along each axis


@functools.lru_cache(maxsize=64)
def _taps(n_in: int, n_out: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return (2, n_out) inputs, (2, n_out) float64 weights, and the (n_out,) nearest input, as scipy has them.

    Beyond the edges both inputs are the outermost voxel; their weights still add up in the last bit as they do there.
    """
    where = np.arange(n_in, dtype=float) if n_in == n_out else (np.arange(n_out) + 0.5) * (n_in / n_out) - 0.5
    first = np.floor(where)
    far = where - first
    inputs = np.stack([first, first + 1]).astype(int).clip(0, n_in - 1)
    return inputs, np.stack([1 - far, far]), spline_weights(n_in, n_out, 0).argmax(1)


def resample_labels(seg: np.ndarray, new_shape: Sequence[int], last_axis: int | None = None) -> np.ndarray:
    """Resample a label map linearly.

    Args:
        seg: (D, H, W) of any number type.
        new_shape: three sizes.
        last_axis: slices across this axis are resampled first, and copied along it to the nearest place.
    Returns:
        (D', H', W') of the same number type.
    """
    made = np.empty(tuple(new_shape), seg.dtype)
    if last_axis is None:
        _fill(seg, made)
        return made
    seg, out = np.moveaxis(seg, last_axis, 0), np.moveaxis(made, last_axis, 0)
    source = mapped_axis(len(seg), len(out), 0).weights.argmax(1).tolist()
    for number, which in enumerate(source):
        if number and which == source[number - 1]:
            out[number] = out[number - 1]
        else:
            _fill(seg[which : which + 1], out[number : number + 1])
    return made


def _fill(seg: np.ndarray, out: np.ndarray) -> None:
    if seg.shape == out.shape:
        out[...] = seg
        return
    taps = [_taps(n, m) for n, m in zip(seg.shape, out.shape, strict=True)]
    for spans in itertools.product(*(blocks(n, _BLOCK) for n in out.shape)):
        block = tuple(slice(*span) for span in spans)
        inputs = [tap[0][:, part] for tap, part in zip(taps, block, strict=True)]
        labels = seg[tuple(slice(int(tap.min()), int(tap.max()) + 1) for tap in inputs)]
        if labels.min() == labels.max():
            out[block] = labels.flat[0]
        else:
            out[block] = _vote(seg, np.unique(labels), block, taps)


def _vote(seg: np.ndarray, labels: np.ndarray, block: tuple[slice, ...], taps: list) -> np.ndarray:
    """Return the labels of one block."""
    (deep, tall, wide) = ((tap[0][:, part], tap[1][:, part]) for tap, part in zip(taps, block, strict=True))
    scores = np.zeros((len(labels), *(part.stop - part.start for part in block)))
    for z, y, x in itertools.product((0, 1), repeat=3):  # scipy adds the corners and multiplies in this order
        weight = (deep[1][z][:, None, None] * tall[1][y][:, None]) * wide[1][x]
        corner = seg[np.ix_(deep[0][z], tall[0][y], wide[0][x])]
        for number, label in enumerate(labels):
            scores[number] += weight * (corner == label)
    np.minimum(scores, 1.0, out=scores)  # skimage clips to the range of the indicator
    best = scores.argmax(0)
    nearest = seg[np.ix_(*(tap[2][part] for tap, part in zip(taps, block, strict=True)))]
    place = np.searchsorted(labels, nearest)
    top = np.take_along_axis(scores, best[None], 0)[0]
    tied = np.take_along_axis(scores, place[None], 0)[0] == top
    return np.where(tied, nearest, labels[best])
