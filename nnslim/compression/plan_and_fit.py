"""Plans of a network, and the weights that follow from them: fitted, chosen between, recovered."""

from __future__ import annotations

import copy
import json
import logging
import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
from torch import nn

from nnslim.compression.calibration import Calibration
from nnslim.compression.config import SlimConfig
from nnslim.compression.recover import Progress, Recovery, recover
from nnslim.compression.referee import Referee
from nnslim.methods.base import Plan, filled, method_named
from nnslim.network.cost import Cost, measure_cost
from nnslim.network.spec import spec_of
from nnslim.running.kept_models import network_fingerprint

_log = logging.getLogger("nnslim")
_SAME_DROP = 0.001  # the drop by labels differs from the estimate by this much

Fitted = tuple[nn.Module, dict[str, float]]  # a slim network before recovery, and the error of each of its layers


def plan_methods(
    dense: nn.Module, config: SlimConfig, cost: Cost, input_shape: Sequence[int], data: Calibration | None
) -> tuple[Plan, ...]:
    """Return the plan of each method; later methods plan on what earlier ones leave.

    Args:
        dense: with the weights of the first fold. cost: of it.
    """
    plans: list[Plan] = []
    structure = dense
    for entry in config.methods if config.apply else ():
        if plans:
            last = config.methods[len(plans) - 1]
            structure = filled(last.method, last.settings, structure, plans[-1], input_shape)
            cost = measure_cost(structure, input_shape)
        tiles = None if data is None else data.tiles
        plans.append(method_named(entry.method).plan(structure, entry.settings, cost, tiles))
    return tuple(plans)


def fit_plans(
    dense: nn.Module,
    config: SlimConfig,
    plans: tuple[Plan, ...],
    input_shape: Sequence[int],
    data: Calibration | None,
    progress: Progress | None = None,
) -> Fitted:
    """Compress one network by plans that are made, without recovery."""
    slim, errors = copy.deepcopy(dense), {}
    for entry, plan in zip(config.methods, plans, strict=False):
        before = slim
        slim = filled(entry.method, entry.settings, before, plan, input_shape).eval()
        method = method_named(entry.method)
        if data is not None and method.fit is not None and plan.edits:
            errors |= method.fit(
                before,
                slim,
                entry.settings,
                measure_cost(before, input_shape),
                data.tiles,
                compensate=config.recovery.compensate,
                seed=config.calibration.seed,
                on_layer=None if progress is None else partial(progress, "layers"),
            )
        elif method.weight_errors is not None:
            errors |= method.weight_errors(before, slim)
    return slim, errors


def fit_and_recover(
    dense: nn.Module,
    config: SlimConfig,
    plans: tuple[Plan, ...],
    input_shape: Sequence[int],
    data: Calibration | None,
    *,
    fitted: Fitted | None = None,
    target: float | None = None,
    checkpoint: Path | None = None,
    progress: Progress | None = None,
) -> tuple[nn.Module, Recovery | None, dict[str, float]]:
    """Compress one network by plans that are made.

    Args:
        fitted: what `settle` or `fit_plans` has made of them already; changed in place.
        target: learning ends early once the estimated drop is at most this.
        checkpoint: file for the state of learning; a call without the target goes on from it.
    Returns:
        The slim network, how recovery went (None without data or edits), and the error of each layer before it.
    """
    slim, errors = fitted or fit_plans(dense, config, plans, input_shape, data, progress)
    spec = spec_of(slim)
    if data is None or spec is None or not spec.edits:
        return slim, None, errors
    identity = f"{data.fingerprint} {network_fingerprint(dense)} {json.dumps(config.identity(), sort_keys=True)} {spec}"
    learning = {"checkpoint": checkpoint, "identity": identity, "target": target, "progress": progress}
    return slim, recover(dense, slim, data, config.recovery, **learning), errors


def settle(
    dense: nn.Module,
    config: SlimConfig,
    plans: tuple[Plan, ...],
    input_shape: Sequence[int],
    data: Calibration,
    progress: Progress | None = None,
) -> tuple[tuple[Plan, ...], Fitted | None]:
    """Choose between the last plan and its rivals by what each costs the network once it is fitted.

    Neither predictions from single layers nor a small sample of tiles can distinguish plans of about the same quality:
    the first rival, which is the simplest, is taken unless the best is clearly better (`_clearly_best`). Only the last
    method's plans compete: a rival of an earlier one would change what later ones plan on.
    """
    if not plans or not plans[-1].rivals:
        return plans, None
    # The plain and the mirrored answers together tell plans apart best.
    both = replace(data, mirrored=bool(data.mirror_axes))
    referee = Referee.of(dense, both, tiles=data.fresh)
    trials: list[tuple[tuple[Plan, ...], Fitted]] = []
    drops: list[np.ndarray] = []  # (tiles,) each
    for plan in (plans[-1].rivals[0], plans[-1], *plans[-1].rivals[1:]):
        trial = (*plans[:-1], plan)
        fitted = fit_plans(dense, config, trial, input_shape, data, progress)
        drops.append(np.mean(referee.drops(fitted[0]), axis=1))
        trials.append((trial, fitted))
    return trials[_clearly_best(np.stack(drops))]


def _clearly_best(drops: np.ndarray) -> int:
    """Return the row of (plans, tiles) with the smallest mean, 0 where that is not clear. NaN: a tile shows nothing.

    A gain is clear if it exceeds both twice the standard error over the tiles and `_SAME_DROP`.
    """
    seen = drops[:, np.isfinite(drops).all(axis=0)]
    if not seen.size:
        return 0
    _log.info("estimated drops of the plans before recovery: %s", np.round(seen.mean(axis=1), 4).tolist())
    best = int(seen.mean(axis=1).argmin())
    gain = seen[0] - seen[best]
    noise = gain.std(ddof=1) / math.sqrt(len(gain)) if len(gain) > 1 else 0.0
    return best if gain.mean() > max(_SAME_DROP, 2 * noise) else 0
