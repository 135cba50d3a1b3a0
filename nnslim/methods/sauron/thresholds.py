"""When a layer's threshold is raised: convergence, patience, and what is below it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from nnslim.methods.sauron.config import SauronConfig
from nnslim.surgery.channels import removable


@dataclass
class LayerState:
    """The state of one layer (group of channels) that lasts from epoch to epoch.

    Attributes:
        step: index of the threshold in the grid.
        patience: epochs to wait before the next raise.
        removed: filters removed in the last epoch.
    """

    step: int = 0
    patience: int = 0
    removed: int = 0

    def advance(
        self, config: SauronConfig, filters: int, training: Sequence[float], validation: Sequence[float]
    ) -> None:
        """Wait one more epoch, or raise the threshold where the layer has converged; see `has_converged`."""
        if self.patience > 0:
            self.patience -= 1
        elif has_converged(config, filters, self.removed, training, validation):
            self.patience = config.patience
            self.step = min(self.step + 1, config.steps)


def has_converged(
    config: SauronConfig, filters: int, removed: int, training: Sequence[float], validation: Sequence[float]
) -> bool:
    """Return whether a layer is ready for a higher threshold.

    The losses of rho epochs are looked back on (`config.patience`, at least 1): the last training loss lies within
    theirs, neither falling nor diverging; the last validation loss is no new minimum of the history *before* it (the
    original's history held the value itself, so that this was always true); few filters were removed in the last epoch.
    Without validation losses, or with `convergence: training`, the training losses must not have a new minimum, which
    follows from the first condition.

    Args:
        filters: number that the layer has. removed: number that the last epoch removed.
        training, validation: losses of all epochs so far; the latter may be empty.
    """
    look_back = max(1, config.patience)
    validation = [loss for loss in validation if math.isfinite(loss)]
    judged = config.convergence == "validation" or (config.convergence == "auto" and bool(validation))
    if len(training) < look_back + 1 or (judged and len(validation) < look_back + 1):
        return False
    last, before = training[-1], training[-1 - look_back : -1]
    # NaN compares as False: a diverged training never counts as converged.
    if not min(before) <= last <= max(before):
        return False
    if judged and validation[-1] < min(validation[:-1]):
        return False
    return removed < math.ceil(config.few * filters)


def below(scores: np.ndarray, threshold: float, reference: int, config: SauronConfig) -> np.ndarray:
    """Return the filters of one layer that may be removed, the nearest to the reference first.

    Args:
        scores: (C,) delta_prune. reference: channel that always stays.
    Returns:
        Indices. `min_filters` stay, and the width is a multiple of `multiple`, or unchanged.
    """
    order = np.argsort(scores, kind="stable")
    order = order[order != reference]
    wanted = int((scores[order] < threshold).sum())
    return order[: removable(wanted, len(scores), config.min_filters, config.multiple)]


def due(target: float, epoch: int, until: float) -> float:
    """Return the share that is due after an epoch, on the way from 1 to the target in equal ratios.

    Args:
        target: share at the end. epoch: counted from 0. until: number of epochs by which the target is due.
    """
    return math.pow(target, min(1.0, (epoch + 1) / max(1.0, until)))
