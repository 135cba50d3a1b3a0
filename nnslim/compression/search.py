"""Find the smallest budget of MACs that keeps the estimated drop in Dice within a limit, recovery included."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from torch import nn

from nnslim.compression.calibration import Calibration
from nnslim.compression.config import MethodEntry, SlimConfig
from nnslim.compression.plan_and_fit import fit_and_recover, fit_plans, plan_methods
from nnslim.compression.recover import Progress, Recovery
from nnslim.compression.referee import Referee
from nnslim.errors import ConfigError, RankError
from nnslim.methods.base import Plan
from nnslim.network.cost import Cost

_log = logging.getLogger("nnslim")
SHARES = (0.7, 0.5, 0.35, 0.25, 0.18, 0.14, 0.11, 0.083, 0.065, 0.05, 0.035)  # of the dense MACs
START = SHARES.index(0.083)
_MOST_TRIALS = 5
_LEFT = 0.5  # the share of a fit's drop that recovery leaves at best: measured .5 to .56 at 0.05 to 0.09 of the MACs


@dataclass(frozen=True)
class Found:
    """Result of a search.

    Attributes:
        config: with the share in place of `max_drop`. plans: made from it.
        slim, recovery: of the first fold.
    """

    config: SlimConfig
    plans: tuple[Plan, ...]
    slim: nn.Module
    recovery: Recovery


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
) -> Found:
    """Return the smallest share of MACs that keeps `max_drop`, and the network of the trial that showed it.

    The search starts at a strong share and goes to weaker ones while the drop is too large, or to stronger ones while
    it is not. Each trial is a full compression with recovery, which ends as soon as the limit is met; the recovery of
    the share that was found then runs to its end. The images that a network has learned from do not judge it fairly,
    least of all its mirrored answers. So a share is also rejected where the fit alone, plain or mirrored, loses more
    than recovery can win back.

    Args:
        dense: with the weights of the first fold.
        position: of the method in `config.methods`.
        data: calibration images; None is refused.
    Raises:
        ConfigError: there are no images. RankError: not even the weakest share keeps the limit.
    """
    entry = config.methods[position]
    limit = entry.settings.drop_limit
    if data is None:
        raise ConfigError(f"max_drop={limit:g} is measured on images: name their folder (-i, or calibration.images)")
    unfitted = Referee.of(dense, replace(data, mirrored=bool(data.mirror_axes)), tiles=data.fresh)
    with tempfile.TemporaryDirectory(prefix="nnslim-") as work:
        states = [Path(work) / f"{share:g}" for share in SHARES]
        step, drops, best = START, {}, None
        while (
            0 <= step < len(SHARES)
            and step not in drops
            and sum(drop != float("inf") for drop in drops.values()) < _MOST_TRIALS
        ):
            trial = _with_share(config, position, SHARES[step])
            try:
                plans = plan_methods(dense, trial, cost, input_shape, data)
                fitted = fit_plans(dense, trial, plans, input_shape, data, progress)
                left = _LEFT * unfitted.drop(fitted[0]) if config.recovery.learns else 0.0
                if left > limit:
                    drops[step] = left
                else:
                    learning = {"target": limit, "checkpoint": states[step], "progress": progress}
                    given = (dense, trial, plans, input_shape, data)
                    slim, recovery, _ = fit_and_recover(*given, fitted=fitted, **learning)
                    recovery = recovery or Recovery()
                    drops[step] = recovery.after
            except RankError:  # cheaper than the layers that are never factored
                drops[step] = float("inf")
            _log.info("max_drop: %g of the MACs give an estimated drop of %.4f", SHARES[step], drops[step])
            if drops[step] <= limit:
                best, state = Found(trial, plans, slim, recovery), states[step]
                step += 1
            else:
                step -= 1
        if best is None:
            tried = ", ".join(f"{SHARES[n]:g}: {drop:.4f}" for n, drop in drops.items())
            raise RankError(
                f"max_drop={limit:g} was not kept by any of the shares of MACs that were tried (share: estimated drop "
                f"{tried}); allow more recovery steps, or a larger drop"
            )
        if best.recovery.stopped != "target":
            return best
        given = (dense, best.config, best.plans, input_shape, data)
        slim, recovery, _ = fit_and_recover(*given, fitted=(best.slim, {}), checkpoint=state, progress=progress)
        return replace(best, slim=slim, recovery=recovery or Recovery())


def _with_share(config: SlimConfig, position: int, share: float) -> SlimConfig:
    entry = config.methods[position]
    methods = list(config.methods)
    methods[position] = MethodEntry(method=entry.method, settings=entry.settings.with_macs(share))
    return config.model_copy(update={"methods": tuple(methods)})
