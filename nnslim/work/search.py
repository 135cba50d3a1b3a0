"""Find the smallest budget of MACs that keeps the estimated drop in Dice within a limit, recovery included."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence

from torch import nn

from nnslim.cost import Cost
from nnslim.errors import ConfigError, RankError
from nnslim.work.calibration import Calibration
from nnslim.work.compress import fit_and_recover, plan_methods
from nnslim.work.config import MethodEntry, SlimConfig
from nnslim.work.recover import Progress

_log = logging.getLogger("nnslim")
SHARES = (0.7, 0.5, 0.35, 0.25, 0.18, 0.125, 0.09, 0.075, 0.06, 0.045, 0.03)  # of the dense MACs
_START = SHARES.index(0.075)
_MOST_TRIALS = 4


def searched(config: SlimConfig) -> int | None:
    """Return the position of the method whose budget is `max_drop`, or None."""
    found = [n for n, entry in enumerate(config.methods) if getattr(entry.settings, "max_drop", None) is not None]
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
) -> SlimConfig:
    """Return the configuration with `max_drop` replaced by the share of MACs that keeps it.

    Shares are tried from a strong one on: weaker ones where the drop is too large, stronger ones while it is not. Each
    trial is a full compression with recovery, which ends as soon as the limit is met.

    Args:
        dense: with the weights of the first fold.
        position: of the method in `config.methods`.
        data: calibration images, needed.
    Raises:
        ConfigError: without images. RankError: not even the weakest share keeps the limit.
    """
    entry = config.methods[position]
    limit = entry.settings.max_drop
    if data is None:
        raise ConfigError(
            f"max_drop={limit:g} is measured on images: name a folder of them (-i, or calibration.images)"
        )
    started = time.perf_counter()
    step, tried = _START, {}
    while 0 <= step < len(SHARES) and step not in tried and len(tried) < _MOST_TRIALS:
        trial = _with_share(config, position, SHARES[step])
        try:
            plans = plan_methods(dense, trial, cost, input_shape, data)
            _, recovery = fit_and_recover(dense, trial, plans, input_shape, data, target=limit, progress=progress)
            tried[step] = recovery.after
        except RankError:  # cheaper than the layers that are never factored
            tried[step] = float("inf")
        _log.info("max_drop: %.3f of the MACs give an estimated drop of %.4f", SHARES[step], tried[step])
        step += 1 if tried[step] <= limit else -1
    kept = [number for number, drop in tried.items() if drop <= limit]
    if not kept:
        raise RankError(
            f"max_drop={limit:g} was not kept by any of the shares of MACs that were tried "
            f"({', '.join(f'{SHARES[n]:g}: {drop:.4f}' for n, drop in tried.items())}); allow more recovery steps"
        )
    best = max(kept)
    _log.info("max_drop: %.3f of the MACs, found in %.0f s", SHARES[best], time.perf_counter() - started)
    return _with_share(config, position, SHARES[best])


def _with_share(config: SlimConfig, position: int, share: float) -> SlimConfig:
    entry = config.methods[position]
    settings = entry.settings.model_copy(update={"max_drop": None, "macs": share})
    methods = list(config.methods)
    methods[position] = MethodEntry(method=entry.method, settings=settings)
    return config.model_copy(update={"methods": tuple(methods)})
