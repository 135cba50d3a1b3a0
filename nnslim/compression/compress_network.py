"""Compress one network, with the weights of all its folds, by one configuration."""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nnslim.compression.calibration import Calibration
from nnslim.compression.config import SlimConfig
from nnslim.compression.guard import Guard
from nnslim.compression.plan_and_fit import FoldRun, plan_methods, settle
from nnslim.compression.recover import Progress, Recovery
from nnslim.compression.storage import StateDict, agreement_record, in_half, stored, tile_agreement
from nnslim.errors import ConfigError, SpecError
from nnslim.methods.base import Decision, Plan
from nnslim.network.cost import Cost, Counts, measure_cost
from nnslim.network.spec import SlimSpec, apply_spec, spec_of
from nnslim.network.walk import unwrap
from nnslim.running.speed import Speed

_log = logging.getLogger("nnslim")


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
            fold = FoldRun(config, plans, input_shape, data, progress, _beside(checkpoint, number))
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
    from nnslim.compression.search import find_budget, searched  # the search compresses, too

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
