"""Compose the levers, and say what became of each layer."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Any

from torch import nn

from nnslim.errors import ConfigError
from nnslim.methods.base import Decision, Plan, check_patterns
from nnslim.methods.embedded.config import EmbeddedConfig
from nnslim.methods.embedded.depthwise import CONVOLUTIONS, DepthwiseEdit, SeparableConv, depthwise_hindrances
from nnslim.methods.embedded.drop_stage import DropStageEdit
from nnslim.methods.embedded.unstructured import PRUNABLE, SparseEdit, reached_layers
from nnslim.network.cost import Cost, measure_cost
from nnslim.network.reached import StripEdit, strip_edits
from nnslim.network.spec import Edit, extend_spec
from nnslim.network.walk import Layer, LayerIndex
from nnslim.surgery.streaming import Tiles


def coarser_settings(settings: Mapping[str, Any], config: EmbeddedConfig) -> dict[str, Any] | None:
    """Return a configuration of nnU-Net's plans at a coarser spacing, None where the spacing stays; see `Method.plans`.

    nnU-Net resamples images to the spacing, and its answers back to the image's own grid. The patch covers as many
    millimetres as before, rounded up to what the strides divide, and is never so small that the deepest stage has a
    single voxel, which an instance norm cannot learn from.

    Raises:
        ConfigError: there are factors for another number of axes, or the plans name no strides.
    """
    axes = len(settings["patch_size"])
    factors = config.coarser if isinstance(config.coarser, tuple) else (config.coarser,) * axes
    if len(factors) != axes:
        raise ConfigError(f"embedded: coarser has {len(factors)} factors, the patch {axes} axes")
    if all(factor == 1 for factor in factors):
        return None
    strides = settings["architecture"]["arch_kwargs"].get("strides")
    if strides is None:
        raise ConfigError("embedded: the plans name no strides, so the patch of a coarser spacing is not known")
    # All stages count, also those that will be dropped: the whole network is measured on this patch first.
    per_stage = [stride if isinstance(stride, (list, tuple)) else [stride] * axes for stride in strides]
    multiple = [math.prod(map(int, along)) for along in zip(*per_stage, strict=True)]
    patch = [
        step * max(1, math.ceil(size / factor / step - 1e-6))
        for size, factor, step in zip(settings["patch_size"], factors, multiple, strict=True)
    ]
    if patch == multiple:
        patch[0] += multiple[0]
    name = "x".join(f"{factor:g}" for factor in (factors if len(set(factors)) > 1 else factors[:1]))
    made = {**settings, "patch_size": patch, "data_identifier": f"{settings.get('data_identifier')}_coarser{name}"}
    made["spacing"] = _scaled(settings["spacing"], factors)
    if len(sizes := settings.get("median_image_size_in_voxels") or ()) >= axes:
        made["median_image_size_in_voxels"] = _scaled(sizes, [1 / factor for factor in factors])
    return made


def _scaled(values: list[float], factors: list[float] | tuple[float, ...]) -> list[float]:
    """Scale the last axes: the slices of a 2D configuration keep their distance."""
    kept = len(values) - len(factors)
    return [*values[:kept], *(float(value) * factor for value, factor in zip(values[kept:], factors, strict=True))]


def plan_embedded(network: nn.Module, config: EmbeddedConfig, cost: Cost, tiles: Tiles | None = None) -> Plan:
    """Return the edits of the levers, in the order drop, strip, depth-wise, zeros; see `Method.plan`.

    Raises:
        ConfigError: no lever is named, or a pattern matches no layer. SpecError: a lever does not fit the network.
    """
    if not (config.drop_stages or config.depthwise != "none" or config.sparsity or config.strip or config.coarser != 1):
        raise ConfigError("embedded: no lever is named: drop_stages, depthwise, coarser, sparsity or strip")
    shape = cost.input_shape  # the first layer may see another: DAEFormer repeats its channel
    slim, edits = copy.deepcopy(network), []

    def do(*more: Edit) -> None:
        extend_spec(more, slim)
        edits.extend(more)

    def chosen(*kinds: type[nn.Module]) -> list[Layer]:
        layers = LayerIndex(slim).of_type(*kinds)
        check_patterns("embedded", "layer", {"include": config.include, "exclude": config.exclude}, layers)
        return [one for one in layers if one.matches(*config.include) and not one.matches(*config.exclude)]

    if config.drop_stages:
        do(DropStageEdit(config.drop_stages))
    if config.strip:
        do(*strip_edits(slim, shape))
    kept: dict[str, str] = {}
    if config.depthwise != "none":
        hindrances = depthwise_hindrances(chosen(*CONVOLUTIONS), config.depthwise, measure_cost(slim, shape))
        kept = {one.name: "excluded" for one in LayerIndex(slim).of_type(*CONVOLUTIONS)} | hindrances
        do(*(DepthwiseEdit(name, config.depthwise) for name, reason in kept.items() if not reason))
    if config.sparsity:
        start = config.sparsity if config.start_sparsity is None else config.start_sparsity
        layers = reached_layers(chosen(*PRUNABLE), slim, shape)
        do(SparseEdit(layers, config.sparsity, start, config.begin, config.end))
    return Plan(tuple(edits), _decisions(network, slim, cost, measure_cost(slim, shape), edits, kept))


def _decisions(
    dense: nn.Module, slim: nn.Module, before: Cost, after: Cost, edits: list[Edit], kept: dict[str, str]
) -> tuple[Decision, ...]:
    """Return what became of each layer with weights, under the name that it has in the slim network.

    A layer that was dropped keeps its old name, in brackets.
    """
    drops = [edit for edit in edits if isinstance(edit, DropStageEdit)]
    sparse = {name for edit in edits if isinstance(edit, SparseEdit) for name in edit.layers}
    stripped = [edit.layer for edit in edits if isinstance(edit, StripEdit)]
    new, made = LayerIndex(slim), []
    for layer in LayerIndex(dense).of_type(*PRUNABLE):
        conv, ran = layer.module, before.layers.get(layer.name)
        transposed = isinstance(conv, nn.modules.conv._ConvTransposeNd)
        outputs, inputs, *kernel = conv.weight.transpose(0, 1).shape if transposed else conv.weight.shape
        shape = (outputs, inputs * getattr(conv, "groups", 1), *kernel)
        macs, parameters = ran.macs if ran else 0, sum(p.numel() for p in conv.parameters())
        name = drops[0].renamed(layer.name, dense) if drops else layer.name
        if name is None or any(_within(layer.name, one) for one in stripped):
            what = "dropped" if name is None else "stripped"
            made.append(Decision(f"({layer.name})", what, shape, None, macs, 0, parameters, 0))
            continue
        now = new[name].module
        macs_after = sum(one.macs for key, one in after.layers.items() if _within(key, name))
        changed = isinstance(now, SeparableConv) or getattr(now, "groups", 1) != getattr(conv, "groups", 1)
        zeros = any(_within(one, name) for one in sparse)
        action = "depthwise" if changed else "sparse" if zeros else "dense"
        reason = "dense kernels: zeros save no time" if zeros else "" if changed else kept.get(name) or "as it was"
        counts = macs, macs_after, parameters, sum(p.numel() for p in now.parameters())
        made.append(Decision(name, action, shape, None, *counts, reason))
    return tuple(made)


def _within(name: str, parent: str) -> bool:
    return name == parent or name.startswith(f"{parent}.")
