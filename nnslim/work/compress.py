"""Compress one network, with the weights of all its folds, by one configuration."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nnslim.cost import Cost, measure_cost
from nnslim.errors import SpecError
from nnslim.methods.base import Decision, method_named
from nnslim.spec import SlimSpec, apply_spec
from nnslim.surgery.walk import unwrap
from nnslim.work.config import SlimConfig

StateDict = dict[str, Tensor]


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
        seconds: spent on planning and computing weights; not part of the summary, which is reproducible.
    """

    network: nn.Module
    weights: tuple[StateDict, ...]
    spec: SlimSpec
    decisions: tuple[Decision, ...]
    dense: Counts
    slim: Counts
    input_shape: tuple[int, ...]
    seconds: float = 0.0

    def summary(self) -> dict[str, Any]:
        """Return what is worth keeping beside the weights, as JSON values."""
        return {
            "input_shape": list(self.input_shape),
            "dense": vars(self.dense),
            "slim": vars(self.slim),
            "layers": [vars(decision) for decision in self.decisions],
        }


def compress(
    network: nn.Module,
    weights: Sequence[StateDict],
    config: SlimConfig,
    input_shape: Sequence[int],
    *,
    progress: Callable[[int, int], None] | None = None,
) -> Slimmed:
    """Plan once, then compute the weights of each fold; `network` and `weights` are not modified.

    Args:
        network: dense network of the folds; wrappers of torch.compile and DDP are looked through.
        weights: state dicts of the folds, at least one. Half precision is computed on in float32 and kept.
        config: the methods, in order.
        input_shape: (1, channels, *patch) in voxels.
        progress: called with (folds done, folds in all).
    Raises:
        SpecError, ConfigError: the network or the configuration does not fit.
    """
    started = time.perf_counter()
    if not weights:
        raise SpecError("compress needs the weights of at least one fold")
    base = copy.deepcopy(unwrap(network)).to("cpu", torch.float32).eval()
    dense_cost = measure_cost(base, input_shape)
    edits, decisions = [], []
    structure = copy.deepcopy(base)
    for entry in config.methods if config.apply else ():
        # Later methods plan on the structure that earlier ones leave.
        cost = dense_cost if not edits else measure_cost(structure, input_shape)
        plan = method_named(entry.method).plan(structure, entry.settings, cost)
        edits += plan.edits
        decisions += plan.decisions
        structure = apply_spec(SlimSpec(tuple(edits)), copy.deepcopy(base))
    spec = SlimSpec(tuple(edits))
    slim, states = structure, []
    for done, fold in enumerate(weights):
        dense = copy.deepcopy(base)
        try:
            dense.load_state_dict({key: value.float() for key, value in fold.items()})
        except RuntimeError as error:
            reason = " ".join(line.strip() for line in str(error).splitlines()[:2])
            raise SpecError(f"the weights of fold number {done + 1} of {len(weights)} do not fit: {reason}") from error
        filled = apply_spec(spec, dense, fill=True)
        if all(value.dtype == torch.half for value in fold.values()):
            # Kept in the precision that the model was stored in: half the file, and the same result from a folder,
            # from the cache and in memory.
            filled = filled.half().float()
            states.append(half_precision(filled.state_dict()))
        else:
            states.append(_copied(filled.state_dict()))
        if done == 0:
            slim = filled
        if progress is not None:
            progress(done + 1, len(weights))
    return Slimmed(
        slim.eval(),
        tuple(states),
        spec,
        tuple(decisions),
        Counts.of(dense_cost),
        Counts.of(measure_cost(slim, input_shape)),
        tuple(input_shape),
        time.perf_counter() - started,
    )


def half_precision(weights: Mapping[str, Tensor]) -> StateDict:
    """Return the weights in float16; names that share one tensor go on sharing it, so that it is stored once.

    Stock nnU-Net loads the result: `load_state_dict` copies into the network's float32 parameters.
    """
    halves: dict[tuple[int, torch.Size], Tensor] = {}
    return {
        name: halves.setdefault((tensor.data_ptr(), tensor.shape), tensor.detach().half())
        for name, tensor in weights.items()
    }


def _copied(state: StateDict) -> StateDict:
    """Return tensors of their own: nnU-Net loads one fold after the other into the network that is handed out."""
    copies: dict[tuple[int, torch.Size], Tensor] = {}
    return {
        name: copies.setdefault((tensor.data_ptr(), tensor.shape), tensor.detach().clone())
        for name, tensor in state.items()
    }


def rebuild(network: nn.Module, spec: SlimSpec, weights: StateDict) -> nn.Module:
    """Return a slim copy of a dense network from a spec and slim weights, in eval mode."""
    slim = apply_spec(spec, copy.deepcopy(unwrap(network)).to("cpu", torch.float32))
    slim.load_state_dict(weights)
    return slim.eval()
