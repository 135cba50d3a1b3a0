"""Decide what the levers do to each layer."""

from __future__ import annotations

import copy
import logging
import math

from torch import nn

from nnslim.errors import ConfigError
from nnslim.methods.base import Decision, Plan, check_patterns
from nnslim.methods.embedded.config import EmbeddedConfig
from nnslim.methods.embedded.depthwise import CONVOLUTIONS, DepthwiseEdit, SeparableConv, most_groups
from nnslim.methods.embedded.drop_stage import DropStageEdit
from nnslim.methods.embedded.unstructured import PRUNABLE, SparseEdit
from nnslim.network.cost import Cost, LayerCost, measure_cost
from nnslim.network.reached import StripEdit, reached_parameters, strip_edits
from nnslim.network.spec import Edit, extend_spec
from nnslim.network.walk import Layer, LayerIndex
from nnslim.surgery.streaming import Tiles

_log = logging.getLogger("nnslim")
_Shape = tuple[int, ...]


def plan_embedded(network: nn.Module, config: EmbeddedConfig, cost: Cost, tiles: Tiles | None = None) -> Plan:
    """Return the edits of the levers, in the order drop, strip, depth-wise, zeros; reads only.

    Args:
        network: the dense network. config: the levers. cost: of the network at its patch. tiles: not used.
    Raises:
        ConfigError: no lever is named, or a pattern matches no layer. SpecError: a lever does not fit the network.
    """
    if not (config.drop_stages or config.depthwise != "none" or config.sparsity or config.strip or config.coarser != 1):
        raise ConfigError("embedded: no lever is named: drop_stages, depthwise, coarser, sparsity or strip")
    shape = cost.input_shape  # what the first layer sees may be another: DAEFormer repeats its channel
    slim, edits = copy.deepcopy(network), []

    def do(*more: Edit) -> None:
        extend_spec(more, slim)
        edits.extend(more)

    if config.drop_stages:
        do(DropStageEdit(config.drop_stages))
    if config.strip:
        do(*strip_edits(slim, shape))
    kept: dict[str, str] = {}
    if config.depthwise != "none":
        kept = _not_depthwise(slim, config, measure_cost(slim, shape))
        do(*(DepthwiseEdit(name, config.depthwise) for name, reason in kept.items() if not reason))
    if config.sparsity:
        do(_sparse(slim, config, shape))
    return Plan(tuple(edits), _decisions(network, slim, cost, measure_cost(slim, shape), edits, kept))


def _chosen(layers: list[Layer], config: EmbeddedConfig) -> list[Layer]:
    check_patterns("embedded", "layer", {"include": config.include, "exclude": config.exclude}, layers)
    return [one for one in layers if one.matches(*config.include) and not one.matches(*config.exclude)]


def _not_depthwise(network: nn.Module, config: EmbeddedConfig, cost: Cost) -> dict[str, str]:
    """Return for each convolution why it keeps its form, "" where it does not."""
    layers = LayerIndex(network).of_type(*CONVOLUTIONS)
    chosen, first = {layer.name for layer in _chosen(layers, config)}, next(iter(cost.layers), None)
    found = {}
    for layer in layers:
        conv, size = layer.module, math.prod(layer.module.kernel_size)
        inputs, outputs = conv.in_channels, conv.out_channels
        reason = ""
        if layer.name not in chosen:
            reason = "excluded"
        elif layer.name not in cost.layers:
            reason = "not reached by the forward pass"
        elif config.depthwise == "dense":
            reason = "dense already" if conv.groups == 1 else ""
        elif conv.groups != 1:
            reason = f"grouped convolution (groups={conv.groups})"
        elif layer.name == first:
            reason = "first layer"
        elif size == 1:
            reason = "1x1 kernel"
        elif config.depthwise == "separable" and inputs * size + inputs * outputs >= inputs * outputs * size:
            reason = "would not get cheaper"
        elif config.depthwise == "grouped" and most_groups(conv) == 1:
            reason = "inputs and outputs have no common divisor"
        found[layer.name] = reason
    return found


def _sparse(network: nn.Module, config: EmbeddedConfig, shape: _Shape) -> SparseEdit:
    layers = _chosen(LayerIndex(network).of_type(*PRUNABLE), config)
    # Heads of deep supervision are not reached in use: their zeros would count and help nobody.
    alive = set(reached_parameters(network, shape).names)
    live = [layer.name for layer in layers if any(f"{alias}.weight" in alive for alias in layer.aliases)]
    learning = set(reached_parameters(network, shape, training=True).dead)
    if dead := [layer.name for layer in layers if f"{layer.name}.weight" in learning]:
        _log.warning("sparsity leaves out %d layer(s) that the output does not depend on: %s", len(dead), dead[:3])
    if not live:
        raise ConfigError("embedded: sparsity is asked for, and no layer with weights is reached")
    start = config.sparsity if config.start_sparsity is None else config.start_sparsity
    return SparseEdit(live, config.sparsity, start, config.begin, config.end)


def _decisions(
    dense: nn.Module, slim: nn.Module, before: Cost, after: Cost, edits: list[Edit], kept: dict[str, str]
) -> tuple[Decision, ...]:
    """Return what became of each layer with weights, under the name that it has in the slim network.

    A layer that was dropped keeps its old name, in brackets.
    """
    stages = sum(edit.stages for edit in edits if isinstance(edit, DropStageEdit))
    sparse = {name for edit in edits if isinstance(edit, SparseEdit) for name in edit.layers}
    stripped = [edit.layer for edit in edits if isinstance(edit, StripEdit)]
    old, new = LayerIndex(dense), LayerIndex(slim)
    deepest = len(dense.encoder.stages) - stages if stages else None
    made = []
    for layer in old.of_type(*PRUNABLE):
        conv, ran = layer.module, before.layers.get(layer.name)
        axes = (1, 0) if isinstance(conv, nn.modules.conv._ConvTransposeNd) else (0, 1)
        size = conv.weight.shape
        shape = (size[axes[0]], size[axes[1]] * getattr(conv, "groups", 1), *size[2:])
        counts = (ran.macs if ran else 0, sum(p.numel() for p in conv.parameters()))
        name = layer.name if deepest is None else _moved(layer.name, deepest, stages)
        if name is None or any(layer.name == one or layer.name.startswith(f"{one}.") for one in stripped):
            what = "dropped" if name is None else "stripped"
            made.append(Decision(f"({layer.name})", what, shape, None, counts[0], 0, counts[1], 0))
            continue
        now = new[name].module
        macs, parameters = _counts(after, name), sum(p.numel() for p in now.parameters())
        changed = isinstance(now, SeparableConv) or getattr(now, "groups", 1) != getattr(conv, "groups", 1)
        inside = name in sparse or any(one.startswith(f"{name}.") for one in sparse)
        action = "depthwise" if changed else "sparse" if inside else "dense"
        reason = "dense kernels: zeros save no time" if inside else kept.get(name, "") if not changed else ""
        made.append(Decision(name, action, shape, None, counts[0], macs, counts[1], parameters, reason))
    return tuple(made)


def _counts(cost: Cost, name: str) -> int:
    inside: list[LayerCost] = [one for key, one in cost.layers.items() if key == name or key.startswith(f"{name}.")]
    return sum(one.macs for one in inside)


def _moved(name: str, deepest: int, stages: int) -> str | None:
    """Return the name of a layer after stages were dropped, None for one that went with them."""
    parts = name.split(".")
    if parts[:2] == ["encoder", "stages"] and int(parts[2]) >= deepest:
        return None
    if parts[0] == "decoder" and parts[1] in ("stages", "transpconvs", "seg_layers"):
        place = int(parts[2]) - stages
        return None if place < 0 else ".".join((*parts[:2], str(place), *parts[3:]))
    return name
