"""What a method is: a name, a configuration class, a plan made from a network, and hooks for what else it needs."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from nnslim.errors import ConfigError, nearest
from nnslim.network.cost import Cost
from nnslim.network.spec import Edit, extend_spec
from nnslim.network.walk import Layer, LayerIndex, unwrap
from nnslim.surgery.narrow import CostTable
from nnslim.surgery.streaming import Tiles
from nnslim.tables import write_table

OnLayer = Callable[[int, int], None] | None  # called with (layers done, layers in all)


class MethodConfig(BaseModel):
    """Base of all method configurations: immutable, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    @property
    def timed(self) -> bool:
        """Whether the plan depends on times that are measured."""
        return False

    @property
    def drop_limit(self) -> float | None:
        """The estimated drop in Dice within which the smallest share of the MACs is searched; None: no search."""
        return None

    @property
    def worst_limit(self) -> float | None:
        """The estimated drop of the class that loses most, within which that search stays; None: any."""
        return None

    def with_macs(self, share: float) -> MethodConfig:
        """Return the settings with a share of the dense MACs as the budget, in place of `drop_limit`."""
        raise ConfigError(f"{type(self).__name__} has no budget to search")


def check_patterns(method: str, kind: str, given: Mapping[str, Iterable[str]], layers: Sequence[Layer]) -> None:
    """Refuse a layer pattern that matches none of the candidates, where there are any.

    Args:
        method, kind: named in the message, kind as in "no convolution matches". given: patterns by configuration key.
    Raises:
        ConfigError: a pattern matches none of them; the message names the nearest layer.
    """
    for key, patterns in given.items():
        for pattern in patterns:
            if layers and not any(layer.matches(pattern) for layer in layers):
                # Beginnings of names are compared, too: "encodr.*" is nearest to "encoder".
                parts = [layer.name.split(".") for layer in layers]
                names = {".".join(part[:depth]) for part in parts for depth in range(1, len(part) + 1)}
                hint = nearest(pattern.strip("*."), names)
                raise ConfigError(f"{method}: no {kind} matches {key} pattern '{pattern}'; {hint}")


def left_dense(layer: Layer, config: Any, cost: Cost) -> str:
    """Return why a layer stays dense whatever a rule says (`config.include`, `config.exclude`), or an empty string."""
    if not layer.matches(*config.include):
        return "not included"
    if layer.matches(*config.exclude):
        return "excluded"
    return "" if layer.name in cost.layers else "not reached by the forward pass"


def replaced(
    dense: nn.Module, slim: nn.Module, kinds: type | tuple[type, ...], made: type
) -> dict[str, tuple[nn.Module, Any]]:
    """Return, by layer, the dense layer and the module of class `made` that stands for it in the slim network.

    Args:
        kinds: classes of the dense layers; where another class stands, an earlier method replaced the layer.
    """
    originals, found = LayerIndex(unwrap(dense)), LayerIndex(unwrap(slim)).of_type(made)
    pairs = {layer.name: (originals[layer.name].module, layer.module) for layer in found}
    return {name: pair for name, pair in pairs.items() if isinstance(pair[0], kinds)}


@torch.no_grad()
def relative_error(wanted: Tensor, found: Tensor) -> float:
    """Return ||wanted - found|| / ||wanted||, 0 where `wanted` is 0."""
    norm = float(wanted.norm())
    return float((wanted - found).norm()) / norm if norm else 0.0


@dataclass(frozen=True)
class Decision:
    """What a plan decided for one layer, and why.

    Attributes:
        layer: canonical name.
        action: name of the edit kind, or "dense".
        shape: (outputs, inputs, *kernel) of the dense layer.
        ranks: (R_out, R_in), None where the layer stays dense.
        macs_before, macs_after: for one patch, convention "macs".
        parameters_before, parameters_after: with bias.
        reason: why the layer stays dense; empty if it does not.
        error: relative error of the first fold's outputs (of its weights, without calibration images) before any
            recovery, where it is known.
    """

    layer: str
    action: str
    shape: tuple[int, ...]
    ranks: tuple[int, int] | None
    macs_before: int
    macs_after: int
    parameters_before: int
    parameters_after: int
    reason: str = ""
    error: float | None = None

    @property
    def why(self) -> str:
        """The reason without its details, under which layers are counted; never empty."""
        return self.reason.split(" (")[0] or "no reason recorded"

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Decision:
        """Read the `vars` of a decision, also from JSON.

        Raises:
            TypeError: the values are not those of a decision.
        """
        ranks = values.get("ranks")
        tuples = {"shape": tuple(values.get("shape", ())), "ranks": None if ranks is None else tuple(ranks)}
        return cls(**{**values, **tuples})


@dataclass(frozen=True)
class Plan:
    """Edits to make, and a decision for every layer that was looked at.

    Attributes:
        rivals: other plans of the same cost, the simplest first, that may be better once they are fitted to images.
    """

    edits: tuple[Edit, ...]
    decisions: tuple[Decision, ...]
    rivals: tuple[Plan, ...] = ()


@dataclass(frozen=True)
class Method:
    """A registered method, and all that the rest of nnslim knows about it; `Edit` has the hooks of a finished model.

    Attributes:
        plan: (network, config, cost, tiles) -> Plan; reads only. `cost` is of the network at its patch shape; `tiles`
            are calibration tiles or None.
        fit: (dense, slim, config, cost, tiles, *, compensate, seed, on_layer) -> relative output error by layer; sets
            the weights of the slim network, in place, from data. None for a method that does not use data.
        weight_errors: (dense, slim) -> relative error of the weights by layer, where no data decide them.
        fill: (dense, slim, config, input_shape); sets the weights of the slim network, in place, from those of the
            dense one, where the edits alone cannot, since each fold keeps channels of its own.
        plans: (settings, config) -> settings; what a configuration in nnU-Net's plans.json becomes (its spacing, for
            example), None where nothing changes; a pure function. Where it changes something, the method is refused
            for models in memory, whose images are preprocessed by plans that were read before.
        survey: (network, cost, tiles, folder, *, step, title, progress) -> one entry per layer; writes tables and
            pictures of what each setting would cost each layer.
        trains: it works while a network trains (`nnslim train`) and has no plan for a trained one.
    """

    name: str
    config_class: type[MethodConfig]
    plan: Callable[[nn.Module, Any, Cost, Tiles | None], Plan]
    fit: Callable[..., dict[str, float]] | None = None
    weight_errors: Callable[[nn.Module, nn.Module], dict[str, float]] | None = None
    fill: Callable[[nn.Module, nn.Module, Any, Sequence[int]], None] | None = None
    plans: Callable[[Mapping[str, Any], Any], dict[str, Any] | None] | None = None
    survey: Callable[..., Sequence[Any]] | None = None
    trains: bool = False


def narrowed(before: CostTable, after: CostTable) -> tuple[Decision, ...]:
    """Return what became of each convolution; the ranks of a decision are its widths (outputs, inputs)."""
    made = []
    for name, (shape, parameters) in before.shapes.items():
        now, left = after.shapes[name]
        counts = (before.layer_macs[name], after.layer_macs[name], parameters, left)
        fate = (
            ("dense", shape, None, *counts, "no filter removed")
            if now == shape
            else ("narrow", shape, now[:2], *counts)
        )
        made.append(Decision(name, *fate))
    return tuple(made)


_METHODS: dict[str, Method] = {}


def register_method(method: Method) -> None:
    """Make a method known by name.

    Raises:
        ConfigError: the name is taken, or is not lower case.
    """
    if method.name in _METHODS or method.name != method.name.lower():
        raise ConfigError(f"method name '{method.name}' is taken or not lower case")
    _METHODS[method.name] = method


def method_named(name: str) -> Method:
    """Return the method of that name, or raise a ConfigError that lists the nearest."""
    if name not in _METHODS:
        raise ConfigError(f"unknown method '{name}'; {nearest(name, _METHODS)}")
    return _METHODS[name]


def methods() -> dict[str, Method]:
    """Return all registered methods by name."""
    return dict(_METHODS)


def filled(name: str, settings: Any, dense: nn.Module, plan: Plan, input_shape: Sequence[int]) -> nn.Module:
    """Return a copy of a network after one plan of the named method, with weights that follow from its own."""
    slim = extend_spec(plan.edits, copy.deepcopy(dense), fill=True)
    if (fill := method_named(name).fill) is not None and plan.edits:
        fill(dense, slim, settings, input_shape)
    return slim


COLUMNS = (
    *("layer", "action", "rank_out", "rank_in", "outputs", "inputs", "kernel"),
    *("macs_before", "macs_after", "parameters_before", "parameters_after", "error", "reason"),
)


def write_decisions(decisions: Sequence[Decision], path: Path) -> None:
    """Write one line per layer, with `COLUMNS`.

    Raises:
        OutputError: the file cannot be written.
    """
    rows = [
        (
            *(one.layer, one.action, *(one.ranks or (None, None)), *one.shape[:2], "x".join(map(str, one.shape[2:]))),
            *(one.macs_before, one.macs_after, one.parameters_before, one.parameters_after),
            None if one.error is None else f"{one.error:.4f}",
            one.reason,
        )
        for one in decisions
    ]
    write_table(rows, path, COLUMNS)
