"""Compress one network, with the weights of all its folds, by one configuration."""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from nnslim.cost import Cost, measure_cost
from nnslim.errors import ConfigError, SpecError
from nnslim.methods.base import Decision, Plan, filled, method_named
from nnslim.running.guard import Speed
from nnslim.spec import SlimSpec, apply_spec, spec_of
from nnslim.surgery.walk import unwrap
from nnslim.work.calibration import Calibration
from nnslim.work.config import SlimConfig
from nnslim.work.guard import Guard
from nnslim.work.recover import Progress, Recovery, recover
from nnslim.work.referee import Referee
from nnslim.work.storage import StateDict, agreement_record, in_half, stored, tile_agreement

_log = logging.getLogger("nnslim")


@dataclass(frozen=True)
class Counts:
    """Parameters that the forward pass reaches, and MACs of one patch in both conventions."""

    parameters: int
    macs: int
    macs_fvcore: int

    @classmethod
    def of(cls, cost: Cost) -> Counts:
        """Summarise a measured cost."""
        return cls(cost.parameters, cost.macs(), cost.macs("fvcore"))


@dataclass(frozen=True)
class Slimmed:
    """A compressed network and how it came about.

    Attributes:
        network: the slim network with the weights of the first fold, in eval mode.
        weights: one state dict per fold, all of the same shapes.
        spec: the structural edits.
        decisions: one per layer that a method looked at.
        dense, slim: counts for one patch.
        input_shape: (1, channels, *patch) in voxels, for which the counts hold.
        recovery: how recovery went for each fold, see `Recovery.to_dict`; empty without calibration images.
        seconds: spent on planning and computing weights; not part of the summary, which is reproducible.
        speed: forward pass dense and slim, where a guard measured it; not part of the summary.
        half_agreement: Dice per class of the first fold stored in half precision with the same in float32, on held-out
            tiles; None where it is not stored so, or there were no images.
        file_bytes: of all checkpoints, dense and slim, where they were written; not part of the summary.
    """

    network: nn.Module
    weights: tuple[StateDict, ...]
    spec: SlimSpec
    decisions: tuple[Decision, ...]
    dense: Counts
    slim: Counts
    input_shape: tuple[int, ...]
    recovery: tuple[dict[str, Any], ...] = ()
    seconds: float = 0.0
    speed: Speed | None = None
    half_agreement: dict[str, Any] | None = None
    file_bytes: tuple[int, int] | None = None

    @property
    def refused(self) -> bool:
        """Whether a guard left the model dense, because no slim form of it was faster here."""
        return self.speed is not None and not self.spec.edits

    def summary(self) -> dict[str, Any]:
        """Return what is worth keeping beside the weights, as JSON values."""
        return {
            "input_shape": list(self.input_shape),
            "dense": vars(self.dense),
            "slim": vars(self.slim),
            "layers": [vars(decision) for decision in self.decisions],
            "recovery": list(self.recovery),
            "half_agreement": self.half_agreement,
        }


def compress(
    network: nn.Module,
    weights: Sequence[StateDict],
    config: SlimConfig,
    input_shape: Sequence[int],
    *,
    data: Calibration | None = None,
    progress: Progress | None = None,
    checkpoint: Path | None = None,
    guard: Guard | None = None,
) -> Slimmed:
    """Plan once, then compute the weights of each fold; `network` and `weights` are not modified.

    Args:
        network: dense network of the folds; wrappers of torch.compile and DDP are looked through.
        weights: state dicts of the folds, at least one. Half precision is computed on in float32 and kept.
        config: the methods, in order, and how data are used.
        input_shape: (1, channels, *patch) in voxels.
        data: calibration images; without them the weights alone decide, and nothing is recovered.
        progress: called with (what is done, units done, units in all).
        checkpoint: file beside which the state of an interrupted recovery is kept (`<name>.fold<N>`).
        guard: puts layers back to dense where the plan is not faster, before weights are computed.
    Raises:
        SpecError, ConfigError, RankError: the network or the configuration does not fit.
    """
    started = time.perf_counter()
    if not weights:
        raise SpecError("compress needs the weights of at least one fold")
    if config.active and spec_of(unwrap(network)) is not None:
        raise SpecError("the network already carries a SlimSpec; compress the network that it was made from")
    base = copy.deepcopy(unwrap(network)).to("cpu", torch.float32).eval()
    dense_cost = measure_cost(base, input_shape)
    device = _device(config) if data is not None else torch.device("cpu")
    first = _with_weights(base, weights, 0).to(device)
    config, plans, speed, done = _planned(first, config, dense_cost, input_shape, data, progress, guard)
    slims, states, recoveries, agreement, errors = [], [], [], None, {}
    for number in range(len(weights)):
        if number == 0 and done is not None:
            slim, recovery = done
        else:
            fold = _Fold(config, plans, input_shape, data, progress, _beside(checkpoint, number))
            slim, recovery, layer_errors = fold.compress(_with_weights(base, weights, number).to(device))
            errors = errors if number else layer_errors
        slim = slim.to("cpu").eval()
        # Half precision is kept where the model was stored in it.
        kept, state = stored(slim, half=config.store == "half" or in_half(weights[number]))
        if number == 0 and config.store == "half" and data is not None and in_half(state):
            agreement = _agreement(slim, kept, data, device)
        states.append(state)
        slims.append(kept)
        slims = slims[:1]  # the first fold's network is handed out
        recoveries.append(recovery)
        if progress is not None:
            progress("folds", number + 1, len(weights))
    return Slimmed(
        slims[0],
        tuple(states),
        spec_of(slims[0]) or SlimSpec(),
        tuple(_with_error(decision, errors) for plan in plans for decision in plan.decisions),
        Counts.of(dense_cost),
        Counts.of(measure_cost(slims[0], input_shape)),
        tuple(input_shape),
        tuple(recovery.to_dict() for recovery in recoveries if recovery is not None),
        time.perf_counter() - started,
        speed,
        agreement,
    )


def _agreement(slim: nn.Module, kept: nn.Module, data: Calibration, device: torch.device) -> dict[str, Any]:
    """Compare a network with what is stored of it."""
    pair = [copy.deepcopy(network).to(device).eval() for network in (slim, kept)]
    return agreement_record(tile_agreement(*pair, data.held_out, data.class_names, regions=data.regions))


def _planned(
    first: nn.Module,
    config: SlimConfig,
    cost: Cost,
    input_shape: Sequence[int],
    data: Calibration | None,
    progress: Progress | None,
    guard: Guard | None,
) -> tuple[SlimConfig, tuple[Plan, ...], Speed | None, tuple[nn.Module, Recovery] | None]:
    """Return the settings in force, the plans, their measured speed, and the first fold where a search has made it."""
    from nnslim.work.search import find_budget, searched  # the search compresses, too

    done = None
    if config.active and (position := searched(config)) is not None:
        found = find_budget(first, config, position, cost, input_shape, data, progress)
        config, plans, done = found.config, found.plans, (found.slim, found.recovery)
    else:
        plans = plan_methods(first, config, cost, input_shape, data)
        if data is not None:
            plans, _ = settle(first, config, plans, input_shape, data, progress)
    if guard is None:
        return config, plans, None, done
    faster, speed = guard.check(first, plans, input_shape)
    return config, faster, speed, done if faster == plans else None


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


_SAME_DROP = 0.001  # estimates of the drop differ by as much from what labels say
Fitted = tuple[nn.Module, dict[str, float]]  # a slim network before recovery, and the error of each of its layers


@dataclass(frozen=True)
class _Fold:
    """How one fold is compressed once the plans are made."""

    config: SlimConfig
    plans: tuple[Plan, ...]
    input_shape: Sequence[int]
    data: Calibration | None
    progress: Progress | None
    checkpoint: Path | None
    target: float | None = None

    def compress(
        self, dense: nn.Module, fitted: Fitted | None = None
    ) -> tuple[nn.Module, Recovery | None, dict[str, float]]:
        """Return the slim network, how recovery went (None without data), and the error of each layer before it."""
        slim, errors = fitted or self.fit(dense)
        if self.data is None or spec_of(slim) is None or not spec_of(slim).edits:
            return slim, None, errors
        settings = json.dumps(self.config.identity(), sort_keys=True)
        identity = f"{self.data.fingerprint} {_digest(dense)} {settings} {spec_of(slim)}"
        recovery = recover(
            dense,
            slim,
            self.data,
            self.config.recovery,
            checkpoint=self.checkpoint,
            identity=identity,
            target=self.target,
            progress=self.progress,
        )
        return slim, recovery, errors

    def fit(self, dense: nn.Module) -> Fitted:
        """Return the slim network before recovery, and the relative error of each layer that a method can tell."""
        slim, errors = copy.deepcopy(dense), {}
        for entry, plan in zip(self.config.methods, self.plans, strict=False):
            before = slim
            slim = filled(entry.method, entry.settings, before, plan, self.input_shape).eval()
            method = method_named(entry.method)
            if self.data is not None and method.fit is not None and plan.edits:
                errors |= method.fit(
                    before,
                    slim,
                    entry.settings,
                    measure_cost(before, self.input_shape),
                    self.data.tiles,
                    compensate=self.config.recovery.compensate,
                    seed=self.config.calibration.seed,
                    on_layer=None if self.progress is None else partial(self.progress, "layers"),
                )
            elif method.weight_errors is not None:
                errors |= method.weight_errors(before, slim)
        return slim, errors


def settle(
    dense: nn.Module,
    config: SlimConfig,
    plans: tuple[Plan, ...],
    input_shape: Sequence[int],
    data: Calibration,
    progress: Progress | None = None,
) -> tuple[tuple[Plan, ...], Fitted | None]:
    """Choose between the last plan and its rivals by what each costs the network once it is fitted.

    Predictions from single layers do not tell plans of about the same quality apart, and neither does a small sample
    of tiles: the first rival, which is the simplest, is taken unless the best is clearly better (`_clearly_best`). Only
    the last method's plans compete: a rival of an earlier one would change what later ones plan on.
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

    Clear is what exceeds twice the standard error over the tiles, and what an estimate can tell at all.
    """
    seen = drops[:, np.isfinite(drops).all(axis=0)]
    if not seen.size:
        return 0
    _log.info("estimated drops of the plans before recovery: %s", np.round(seen.mean(axis=1), 4).tolist())
    best = int(seen.mean(axis=1).argmin())
    gain = seen[0] - seen[best]
    noise = gain.std(ddof=1) / math.sqrt(len(gain)) if len(gain) > 1 else 0.0
    return best if gain.mean() > max(_SAME_DROP, 2 * noise) else 0


def fit_plans(
    dense: nn.Module,
    config: SlimConfig,
    plans: tuple[Plan, ...],
    input_shape: Sequence[int],
    data: Calibration,
    progress: Progress | None = None,
) -> Fitted:
    """Compress one network by plans that are made, without recovery."""
    return _Fold(config, plans, input_shape, data, progress, None).fit(dense)


def fit_and_recover(
    dense: nn.Module,
    config: SlimConfig,
    plans: tuple[Plan, ...],
    input_shape: Sequence[int],
    data: Calibration,
    *,
    fitted: Fitted | None = None,
    target: float | None = None,
    checkpoint: Path | None = None,
    progress: Progress | None = None,
) -> tuple[nn.Module, Recovery]:
    """Compress one network by plans that are made.

    Args:
        fitted: what `settle` or `fit_plans` has made of them already.
        target: learning ends early once the estimated drop is at most so.
        checkpoint: file for the state of learning; a call without the target goes on from it.
    """
    slim, recovery, _ = _Fold(config, plans, input_shape, data, progress, checkpoint, target).compress(dense, fitted)
    return slim, recovery or Recovery()


def _with_error(decision: Decision, errors: Mapping[str, float]) -> Decision:
    """Return the decision with the error that its layer came out with; the plan has at most predicted one."""
    if decision.action == "dense" or decision.layer not in errors:
        return decision
    return replace(decision, error=round(errors[decision.layer], 6))


def _device(config: SlimConfig) -> torch.device:
    wanted = config.calibration.device
    if wanted == "cuda" and not torch.cuda.is_available():
        raise ConfigError("calibration.device is 'cuda', but torch finds no CUDA device; use 'auto' or 'cpu'")
    return torch.device("cuda" if wanted != "cpu" and torch.cuda.is_available() else "cpu")


def _digest(network: nn.Module) -> str:
    digest = hashlib.sha256()
    for parameter in network.parameters():
        digest.update(parameter.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _beside(checkpoint: Path | None, number: int) -> Path | None:
    return None if checkpoint is None else checkpoint.with_name(f"{checkpoint.name}.fold{number}")


def _with_weights(base: nn.Module, weights: Sequence[StateDict], number: int) -> nn.Module:
    dense = copy.deepcopy(base)
    try:
        dense.load_state_dict({key: value.float() for key, value in weights[number].items()})
    except RuntimeError as error:
        reason = " ".join(line.strip() for line in str(error).splitlines()[:2])
        where = f"fold number {number + 1} of {len(weights)}"
        raise SpecError(f"the weights of {where} do not fit: {reason}") from error
    return dense.eval()


def rebuild(network: nn.Module, spec: SlimSpec, weights: StateDict) -> nn.Module:
    """Return a slim copy of a dense network from a spec and slim weights, in eval mode."""
    slim = apply_spec(spec, copy.deepcopy(unwrap(network)).to("cpu", torch.float32))
    slim.load_state_dict(weights)
    return slim.eval()
