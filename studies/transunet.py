"""The rule by which TransUNet and its followers score Synapse, for comparison with their papers only.

Distances are in voxels, whatever the spacing, and empty classes get numbers: a prediction where the reference has
nothing counts as perfect (Dice 1, distance 0), nothing in both as a failure (Dice 0, distance 0). Report the
evaluation in millimetres beside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas
from scipy import ndimage

from nnslim.errors import InputError
from nnslim.evaluation.label_files import check_same_grid, pair_cases, read_label_map
from nnslim.evaluation.overlap import dice_of_counts, joint_counts


def transunet_scores(predicted: np.ndarray, reference: np.ndarray) -> tuple[float, float]:
    """Return Dice and HD95 (voxels) of one class, from booleans of one shape, by TransUNet's rule."""
    predicted, reference = np.asarray(predicted, bool), np.asarray(reference, bool)
    if predicted.any() and reference.any():
        return dice_of_counts(*joint_counts(predicted, reference).overlap([1])), hd95_voxels(predicted, reference)
    return float(predicted.any()), 0.0


def hd95_voxels(first: np.ndarray, second: np.ndarray) -> float:
    """Return the 95th percentile of the distances between two borders, both directions together, in voxels.

    A border is the voxels of a mask that have a face towards outside; the definition is medpy's `hd95`.
    """
    structure = ndimage.generate_binary_structure(first.ndim, 1)
    borders = [mask & ~ndimage.binary_erosion(mask, structure) for mask in (first, second)]
    there, back = (ndimage.distance_transform_edt(~borders[1 - one])[borders[one]] for one in (0, 1))
    return float(np.percentile(np.hstack((there, back)), 95))


def transunet_table(
    predictions: Path, references: Path, labels: Sequence[int], ending: str | None = None
) -> pandas.DataFrame:
    """Return case, label, dice and hd95 (voxels) of all cases of two folders; what is published are the means.

    Raises:
        InputError: folders that cannot be paired, a reference without a prediction, or two grids.
    """
    pairing = pair_cases(Path(predictions), Path(references), ending)
    if pairing.missing:
        raise InputError(f"{predictions} lacks {len(pairing.missing)} case(s): {', '.join(pairing.missing[:5])}")
    rows = []
    for case, files in pairing.pairs.items():
        found, truth = (read_label_map(file) for file in files)
        check_same_grid(found, truth)
        rows += [(case, label, *transunet_scores(found.labels == label, truth.labels == label)) for label in labels]
    return pandas.DataFrame(rows, columns=["case", "label", "dice", "hd95"])
