"""Plans of a network, and the weights that follow from them: fitted, chosen between, searched, recovered."""

from __future__ import annotations

import copy
import json
import logging
import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
from torch import nn

from nnslim.compression.calibration import Calibration
from nnslim.compression.config import MethodEntry, SlimConfig
from nnslim.compression.recover import Progress, Recovery, recover
from nnslim.compression.referee import Referee
from nnslim.errors import ConfigError, RankError
from nnslim.files import temporary_folder
from nnslim.methods.base import Plan, filled, method_named
from nnslim.network.cost import Cost, measure_cost
from nnslim.network.spec import spec_of
from nnslim.running.kept_models import network_fingerprint

_log = logging.getLogger("nnslim")
_SAME_DROP = 0.001  # the drop by labels differs from the estimate by this much
SHARES = (0.7, 0.5, 0.35, 0.25, 0.18, 0.14, 0.11, 0.083, 0.065, 0.05, 0.035)  # of the dense MACs
START = SHARES.index(0.083)
_MOST_TRIALS = 5
_LEFT = 0.5  # the share of a fit's drop that recovery leaves at best: measured .5 to .56 at 0.05 to 0.09 of the MACs

Fitted = tuple[nn.Module, dict[str, float]]  # a slim network before recovery, and the error of each of its layers


def plan_methods(
    dense: nn.Module, config: SlimConfig, cost: Cost, input_shape: Sequence[int], data: Calibration | None
) -> tuple[Plan, ...]:
    """Return the plan of each method; later ones plan on what earlier ones leave. `cost` is that of `dense`."""
    plans: list[Plan] = []
    for number, entry in enumerate(config.methods if config.apply else ()):
        if plans:
            last = config.methods[number - 1]
            dense = filled(last.method, last.settings, dense, plans[-1], input_shape)
            cost = measure_cost(dense, input_shape)
        plans.append(method_named(entry.method).plan(dense, entry.settings, cost, data and data.tiles))
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
    teacher: nn.Module | None = None,
    fitted: Fitted | None = None,
    target: float | None = None,
    target_worst: float | None = None,
    checkpoint: Path | None = None,
    progress: Progress | None = None,
) -> tuple[nn.Module, Recovery | None, dict[str, float]]:
    """Compress one network by plans that are made.

    Args:
        teacher: see `recover`.
        fitted: what `settle` or `fit_plans` has made of them already; changed in place.
        target, target_worst: see `recover`.
        checkpoint: file for the state of learning; a call without the target goes on from it.
    Returns:
        The slim network, how recovery went (None without data or edits), and the error of each layer before it.
    """
    slim, errors = fitted or fit_plans(dense, config, plans, input_shape, data, progress)
    spec = spec_of(slim)
    if data is None or spec is None or not spec.edits:
        return slim, None, errors
    weights = " ".join(network_fingerprint(one) for one in (dense, teacher) if one is not None)
    identity = f"{data.fingerprint} {weights} {json.dumps(config.identity(), sort_keys=True)} {spec}"
    learning = {"teacher": teacher, "checkpoint": checkpoint, "identity": identity, "progress": progress}
    limits = {"target": target, "target_worst": target_worst}
    return slim, recover(dense, slim, data, config.recovery, **learning, **limits), errors


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
    referee = Referee.of(dense, data, tiles=data.fresh)
    referee.judged = ("plain", "mirrored")  # together they tell plans apart best
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


def searched(config: SlimConfig) -> int | None:
    """Return the position of the method whose budget is `max_drop`, or None."""
    found = [n for n, entry in enumerate(config.methods) if entry.settings.drop_limit is not None]
    if len(found) > 1:
        raise ConfigError("only one method may have the budget max_drop")
    return found[0] if found else None


def find_budget(
    dense: nn.Module,
    config: SlimConfig,
    position: int,
    cost: Cost,
    input_shape: Sequence[int],
    data: Calibration | None,
    progress: Progress | None,
    teacher: nn.Module | None = None,
) -> tuple[SlimConfig, tuple[Plan, ...], nn.Module, Recovery]:
    """Find the smallest share of MACs that keeps `max_drop` (and `max_drop_worst`), recovery included.

    The search starts at a strong share and goes to weaker ones while the drop is too large, or to stronger ones while
    it is not. Each trial is a full compression with recovery, which ends as soon as the limit is met; the recovery of
    the share that was found then runs to its end. The images that a network has learned from do not judge it fairly.
    So a share is also rejected where the fit alone loses more than recovery can win back.

    Args:
        dense: with the weights of the first fold.
        position: of the method in `config.methods`.
        data: calibration images; None is refused.
        teacher: see `recover`.
    Returns:
        The configuration with the share in place of `max_drop`, its plans, and the slim network and recovery of the
        trial that showed it.
    Raises:
        ConfigError: there are no images. RankError: not even the weakest share keeps the limit.
    """
    entry = config.methods[position]
    limit, worst = entry.settings.drop_limit, entry.settings.worst_limit
    if data is None:
        raise ConfigError(f"max_drop={limit:g} is measured on images: name their folder (-i, or calibration.images)")
    unfitted = Referee.of(teacher or dense, data, tiles=data.fresh)
    step, drops, best, kept = START, {}, None, True
    with temporary_folder() as work:
        while (
            0 <= step < len(SHARES)
            and step not in drops
            and (number := 1 + sum(drop != math.inf for drop in drops.values())) <= _MOST_TRIALS
        ):
            share, state, kept = SHARES[step], work / f"{step}", True
            _log.info("max_drop: trial %d of at most %d, with %g of the MACs", number, _MOST_TRIALS, share)
            methods = list(config.methods)
            methods[position] = MethodEntry(method=entry.method, settings=entry.settings.with_macs(share))
            trial = config.model_copy(update={"methods": tuple(methods)})
            try:
                plans = plan_methods(dense, trial, cost, input_shape, data)
                fitted = fit_plans(dense, trial, plans, input_shape, data, progress)
                drops[step] = _LEFT * unfitted.drop(fitted[0]) if config.recovery.learns else 0.0
                if not drops[step] > limit:
                    learning = {"teacher": teacher, "checkpoint": state, "progress": progress}
                    learning |= {"target": limit, "target_worst": worst}
                    given = (dense, trial, plans, input_shape, data)
                    slim, recovery, _ = fit_and_recover(*given, fitted=fitted, **learning)
                    recovery = recovery or Recovery()
                    drops[step] = recovery.after
                    kept = worst is None or not recovery.worst[1] > worst
            except RankError:  # cheaper than the layers that are never factored
                drops[step] = math.inf
            more = "" if kept else f", and {recovery.worst[1]:.4f} for {recovery.worst[0]}"
            _log.info("max_drop: %g of the MACs give an estimated drop of %.4f%s", share, drops[step], more)
            if drops[step] <= limit and kept:
                best, reached = (trial, plans, slim, recovery), state
                step += 1
            else:
                step -= 1
        if best is None:
            tried = ", ".join(f"{SHARES[n]:g}: {drop:.4f}" for n, drop in drops.items())
            second = "" if worst is None else f" with max_drop_worst={worst:g}"
            raise RankError(
                f"max_drop={limit:g}{second} was not kept by any of the shares of MACs that were tried (share: "
                f"estimated drop {tried}); allow more recovery steps, or a larger drop"
            )
        config, plans, slim, recovery = best
        if recovery.stopped == "target":
            given = (dense, config, plans, input_shape, data)
            learning = {"teacher": teacher, "checkpoint": reached, "progress": progress}
            slim, recovery, _ = fit_and_recover(*given, fitted=(slim, {}), **learning)
        return config, plans, slim, recovery or Recovery()
