"""Overlap of two label maps."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from nnslim.errors import InputError


def dice_per_label(first: np.ndarray, second: np.ndarray, labels: Sequence[int]) -> dict[int, float]:
    """Return 2 |A and B| / (|A| + |B|) for each label, from one pass over the voxels.

    Args:
        first, second: integer label maps of one shape.
        labels: labels to compare.
    Returns:
        Dice by label; NaN where neither map has the label, 0 where only one has it.
    Raises:
        InputError: the shapes differ.
    """
    if first.shape != second.shape:
        raise InputError(f"label maps of different shapes cannot be compared: {first.shape} and {second.shape}")
    first, second = first.ravel().astype(np.int64), second.ravel().astype(np.int64)
    size = max(int(first.max(initial=0)), int(second.max(initial=0)), *labels, 0) + 1
    both = np.bincount(first[first == second], minlength=size)
    total = np.bincount(first, minlength=size) + np.bincount(second, minlength=size)
    return {int(label): float(2 * both[label] / total[label]) if total[label] else float("nan") for label in labels}
