"""Compress one network, with the weights of all its folds, by one configuration."""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nnslim.compression.calibration import Calibration
from nnslim.compression.config import SlimConfig
from nnslim.compression.distillation import FoldMean
from nnslim.compression.guard import Guard
from nnslim.compression.plan_and_fit import find_budget, fit_and_recover, plan_methods, searched, settle
from nnslim.compression.recover import Progress, Recovery
from nnslim.compression.storage import StateDict, agreement_record, in_half, stored, tile_agreement
from nnslim.errors import ConfigError, SpecError
from nnslim.files import no_memory
from nnslim.methods.base import Decision, Plan
from nnslim.network.cost import Cost, Counts, measure_cost
from nnslim.network.spec import SlimSpec, apply_spec, spec_of
from nnslim.network.walk import unwrap
from nnslim.running.speed import Speed


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
        half_agreement: Dice per class between the first fold in half precision and in float32, on held-out tiles; None
            where it is not stored in half precision, or there were no images.
        weight_bytes, file_bytes: of all folds' weights, and of the checkpoints that hold them, dense and slim, where
            they were written; not part of the summary.
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
    weight_bytes: tuple[int, int] | None = None
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
        weights: state dicts of the folds, at least one; with `recovery.target: ensemble` at least two, of which the
            first is compressed and learns the mean answer of all. Those in half precision are computed on in float32
            and written in half precision again.
        input_shape: (1, channels, *patch) in voxels.
        data: calibration images; without them, planning uses the weights alone and nothing is recovered.
        checkpoint: the state of an interrupted recovery is kept in files named after it, `<name>.fold<N>`.
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
    device = config.calibration.torch_device() if data is not None else torch.device("cpu")
    first = _with_weights(base, weights, 0).to(device)
    teacher = None
    if config.active and data is not None and config.recovery.target == "ensemble":
        if len(weights) < 2:
            raise ConfigError("recovery.target: ensemble learns the mean of several folds; there is only one")
        rest = [_with_weights(base, weights, number).to(device) for number in range(1, len(weights))]
        teacher, weights = FoldMean([first, *rest]), weights[:1]
    config, plans, speed, done = _planned(first, config, dense_cost, input_shape, data, progress, guard, teacher)
    states, recoveries, agreement = [], [], None
    for number in range(len(weights)):
        if number == 0 and done is not None:
            slim, recovery, layer_errors = done
        else:
            beside = None if checkpoint is None else checkpoint.with_name(f"{checkpoint.name}.fold{number}")
            given = (_with_weights(base, weights, number).to(device), config, plans, input_shape, data)
            learning = {"teacher": teacher, "checkpoint": beside, "progress": progress}
            slim, recovery, layer_errors = fit_and_recover(*given, **learning)
        slim = slim.to("cpu").eval()
        # Half precision is kept where the model was stored in it.
        network, state = stored(slim, half=config.store == "half" or in_half(weights[number]))
        if number == 0:
            handed_out, errors = network, layer_errors
            if config.store == "half" and data is not None and in_half(state):
                pair = [copy.deepcopy(one).to(device).eval() for one in (slim, network)]
                agreement = tile_agreement(*pair, data.held_out, data.class_names, regions=data.regions)
        states.append(state)
        if recovery is not None:
            recoveries.append(recovery.to_dict())
        if progress is not None:
            progress("folds", number + 1, len(weights))
    return Slimmed(
        handed_out,
        tuple(states),
        spec_of(handed_out) or SlimSpec(),
        tuple(_with_error(decision, errors) for plan in plans for decision in plan.decisions),
        Counts.of(dense_cost),
        Counts.of(measure_cost(handed_out, input_shape)),
        tuple(input_shape),
        tuple(recoveries),
        time.perf_counter() - started,
        speed,
        agreement and agreement_record(agreement),
    )


def _planned(
    first: nn.Module,
    config: SlimConfig,
    cost: Cost,
    input_shape: Sequence[int],
    data: Calibration | None,
    progress: Progress | None,
    guard: Guard | None,
    teacher: nn.Module | None,
) -> tuple[SlimConfig, tuple[Plan, ...], Speed | None, tuple[nn.Module, Recovery, dict[str, float]] | None]:
    """Return the settings in force, the plans, their measured speed, and the first fold where a search has made it."""
    done = None
    if config.active and (position := searched(config)) is not None:
        config, plans, *made = find_budget(first, config, position, cost, input_shape, data, progress, teacher)
        done = (*made, {})
    else:
        plans = plan_methods(first, config, cost, input_shape, data)
        if data is not None:
            plans, _ = settle(first, config, plans, input_shape, data, progress)
    if guard is None:
        return config, plans, None, done
    faster, speed = guard.check(first, plans, input_shape)
    return config, faster, speed, done if faster == plans else None


def _with_error(decision: Decision, errors: Mapping[str, float]) -> Decision:
    # What the layer came out with; the plan has at most predicted an error.
    if decision.action == "dense" or decision.layer not in errors:
        return decision
    return replace(decision, error=round(errors[decision.layer], 6))


def _with_weights(base: nn.Module, weights: Sequence[StateDict], number: int) -> nn.Module:
    dense = copy.deepcopy(base)
    try:
        dense.load_state_dict({key: value.float() for key, value in weights[number].items()})
    except RuntimeError as error:
        if no_memory(error):
            raise SpecError("there is not enough memory for the network") from error
        reason = " ".join(line.strip() for line in str(error).splitlines()[:2])
        raise SpecError(f"the weights of fold number {number + 1} of {len(weights)} do not fit: {reason}") from error
    return dense.eval()


def rebuild(network: nn.Module, spec: SlimSpec, weights: StateDict) -> nn.Module:
    """Return a slim copy of a dense network from a spec and slim weights, in eval mode."""
    slim = apply_spec(spec, copy.deepcopy(unwrap(network)).to("cpu", torch.float32))
    slim.load_state_dict(weights)
    return slim.eval()
