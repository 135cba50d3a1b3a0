"""Choose Tucker ranks for every convolution of a network."""

from __future__ import annotations

import logging
import math
from dataclasses import replace

from torch import nn

from nnslim.methods.base import Decision, Plan, check_patterns, left_dense
from nnslim.methods.tucker.config import TuckerConfig
from nnslim.methods.tucker.edit import CONVOLUTIONS, TuckerEdit, chain_macs, chain_parameters, is_transposed, kernel_of
from nnslim.methods.tucker.ranks import Chosen, choose_ranks
from nnslim.network.cost import Cost
from nnslim.network.walk import Layer, LayerIndex, unwrap
from nnslim.surgery.streaming import Tiles

_log = logging.getLogger("nnslim")


def plan_tucker(network: nn.Module, config: TuckerConfig, cost: Cost, tiles: Tiles | None = None) -> Plan:
    """Decide for each convolution: ranks, or dense with a reason; see `Method.plan`.

    Ranks may depend on the weights (the first fold's). Without tiles, errors are those of the weights.

    Raises:
        ConfigError: a pattern of include, exclude or overrides matches no convolution, or a table does not fit.
        RankError: an override asks for a rank outside 1..channels, or a budget cannot be met.
    """
    layers = LayerIndex(unwrap(network)).of_type(*CONVOLUTIONS)
    patterns = {"include": config.include, "exclude": config.exclude, "overrides": tuple(config.overrides)}
    check_patterns("tucker", "convolution", patterns, layers)
    ran = [name for name in cost.layers if any(name == layer.name for layer in layers)]
    kept = {layer.name: _why_dense(layer, config, cost, layer.name in ran[:1]) for layer in layers}
    open_layers = {layer.name: layer for layer in layers if not kept[layer.name]}
    plans = []
    for chosen in choose_ranks(network, open_layers, config, cost, tiles):
        choices = {name: Chosen(reason=reason) for name, reason in kept.items() if reason} | chosen
        made = [_decide(layer, config, cost, choices[layer.name]) for layer in layers]
        plans.append(Plan(tuple(edit for _, edit in made if edit is not None), tuple(each for each, _ in made)))
        if config.verbose:
            for d, _ in made:
                _log.info("%s %s -> %s %s", d.layer, d.shape, d.ranks or "dense", d.reason)
    return replace(plans[0], rivals=tuple(plans[1:]))


def _why_dense(layer: Layer, config: TuckerConfig, cost: Cost, is_first: bool) -> str:
    """Return why the layer stays dense whatever its ranks, or an empty string."""
    conv = layer.module
    if reason := left_dense(layer, config, cost):
        return reason
    if conv.groups != 1:
        return f"grouped convolution (groups={conv.groups})"
    if is_first and not config.first_layer:
        return "first layer"
    if layer.name in cost.heads and not config.heads:
        return "segmentation head"
    if math.prod(conv.kernel_size) == 1 and layer.name not in cost.heads and not config.pointwise:
        return "1x1 kernel"
    if is_transposed(conv) and not config.transposed and config.rank_mode not in ("budget", "plan"):
        return "transposed convolution"
    return ""


def _decide(layer: Layer, config: TuckerConfig, cost: Cost, choice: Chosen) -> tuple[Decision, TuckerEdit | None]:
    conv = layer.module
    shape = tuple(kernel_of(conv).shape)
    parameters = sum(p.numel() for p in conv.parameters())
    ran = cost.layers.get(layer.name)
    macs = ran.macs if ran else 0

    def dense(reason: str) -> tuple[Decision, None]:
        return Decision(layer.name, "dense", shape, None, macs, macs, parameters, parameters, reason), None

    if choice.reason:
        return dense(choice.reason)
    ranks = (choice.ranks[0] or shape[0], choice.ranks[1] or shape[1])
    sides = [None if config.one_sided and rank == size else rank for rank, size in zip(ranks, shape, strict=False)]
    if sides == [None, None]:
        return dense("full rank")
    macs_after = chain_macs(conv, *sides, ran.voxels_in, ran.voxels_out)
    if config.only_if_cheaper and macs_after >= macs and config.rank_mode not in ("budget", "plan"):
        return dense(f"would not get cheaper ({macs_after:,} MACs against {macs:,})")
    counts = (macs, macs_after, parameters, chain_parameters(conv, *sides))
    decision = Decision(layer.name, "tucker", shape, ranks, *counts, error=choice.error)
    return decision, TuckerEdit(layer.name, *sides, decompose=config.decompose)
