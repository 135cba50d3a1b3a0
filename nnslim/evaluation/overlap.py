"""Overlap of two label maps: all voxels are counted once, and everything else follows from the counts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from nnslim.errors import InputError

_SLAB = 1 << 22  # voxels counted at a time, so that no index as large as the maps is made
_DIRECT = 1 << 20  # entries of a histogram that is used as it is; with larger labels only those that occur get a row


class JointCounts(NamedTuple):
    """How many voxels each pair of labels has.

    Attributes:
        counts: (first, second) voxels.
        first, second: labels of the rows and columns, ascending.
    """

    counts: np.ndarray
    first: np.ndarray
    second: np.ndarray

    def overlap(self, members: Sequence[int]) -> tuple[int, int, int]:
        """Return voxels of a class in the first, in the second and in both maps; `members` are its labels."""
        rows, columns = np.isin(self.first, members), np.isin(self.second, members)
        both = self.counts[np.ix_(rows, columns)]
        return int(self.counts[rows].sum()), int(self.counts[:, columns].sum()), int(both.sum())

    def without(self, ignored: int | None) -> JointCounts:
        """Return the counts of the voxels whose second label is another one."""
        if ignored is None:
            return self
        kept = self.second != ignored
        return JointCounts(self.counts[:, kept], self.first, self.second[kept])


def joint_counts(first: np.ndarray, second: np.ndarray) -> JointCounts:
    """Count all pairs of labels in one pass over the voxels.

    Args:
        first, second: label maps of one shape, integers; or masks, where True is label 1.
    Raises:
        InputError: the shapes differ, or a label is negative.
    """
    if first.shape != second.shape:
        raise InputError(f"label maps of different shapes cannot be compared: {first.shape} and {second.shape}")
    order = "F" if first.flags.f_contiguous and second.flags.f_contiguous else "C"  # F would be copied otherwise
    maps = [labels.reshape(-1, order=order) for labels in (first, second)]
    if any(labels.min(initial=0) < 0 for labels in maps):
        raise InputError("label maps must not have negative values")
    values = [np.arange(int(labels.max(initial=0)) + 1) for labels in maps]
    if len(values[0]) * len(values[1]) > _DIRECT:
        values, maps = zip(*(np.unique(labels, return_inverse=True) for labels in maps), strict=True)
    size = (len(values[0]), len(values[1]))
    kind = np.min_scalar_type(size[0] * size[1])  # a small index is a fast one
    counts = np.zeros(size[0] * size[1], np.int64)
    for start in range(0, maps[0].size, _SLAB):
        one, other = (labels[start : start + _SLAB].astype(kind) for labels in maps)
        counts += np.bincount(one * kind.type(size[1]) + other, minlength=len(counts))
    return JointCounts(counts.reshape(size), *values)


def dice_of_counts(first: int, second: int, both: int) -> float:
    """Return 2 |A and B| / (|A| + |B|); NaN where both are empty."""
    return 2 * both / (first + second) if first + second else float("nan")


def dice_per_label(first: np.ndarray, second: np.ndarray, labels: Sequence[int]) -> dict[int, float]:
    """Return the Dice of each label: NaN where neither map has it, 0 where only one has it. Errors: `joint_counts`'."""
    counted = joint_counts(np.asarray(first), np.asarray(second))
    return {int(label): dice_of_counts(*counted.overlap([label])) for label in labels}
