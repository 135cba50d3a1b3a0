"""A method outside nnslim, of the shortest kind that uses every hook: kernels shrink to their centre."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from nnslim.methods.base import Decision, Method, MethodConfig, Plan, check_patterns, register_method
from nnslim.network.spec import ReplacingEdit, register_edit, spec_of
from nnslim.network.walk import LayerIndex


class CentreConfig(MethodConfig):
    include: tuple[str, ...] = ("*",)
    patch: int = 0  # edge of the patch in the plans, voxels; 0: as it is


class KeptBias:
    def __init__(self, conv: nn.Module) -> None:
        self.conv, self.bias = conv, conv.bias.detach().clone()

    @torch.no_grad()
    def hold(self) -> None:
        self.conv.bias.copy_(self.bias)

    def advance(self, share: float) -> None:
        pass  # nothing changes in the course of a training


@register_edit
@dataclass(frozen=True)
class CentreEdit(ReplacingEdit):
    layer: str
    kind: ClassVar[str] = "toy_centre"

    def made(self, dense: nn.Module, fill: bool) -> nn.Module:
        made = type(dense)(dense.in_channels, dense.out_channels, 1, dense.stride)
        if fill:
            middle = [slice(size // 2, size // 2 + 1) for size in dense.kernel_size]
            made.load_state_dict({"weight": dense.weight[(..., *middle)], "bias": dense.bias})
        return made

    def held(self, layers: LayerIndex) -> KeptBias:
        return KeptBias(layers[self.layer].module)


def plan(network: nn.Module, config: CentreConfig, cost: Any, tiles: Any) -> Plan:
    layers = LayerIndex(network).of_type(nn.Conv2d, nn.Conv3d)
    check_patterns("toy", "convolution", {"include": config.include}, layers)
    edits, decisions = [], []
    for layer in (layer for layer in layers if layer.name in cost.layers and layer.matches(*config.include)):
        size, macs, weight = math.prod(layer.module.kernel_size), cost.layers[layer.name].macs, layer.module.weight
        edits += [CentreEdit(layer.name)] if size > 1 else []
        counts = macs, macs // size, weight.numel() + len(weight), weight.numel() // size + len(weight)
        decisions.append(Decision(layer.name, "centre" if size > 1 else "dense", tuple(weight.shape), None, *counts))
    return Plan(tuple(edits), tuple(decisions))


def fit(dense: nn.Module, slim: nn.Module, config: CentreConfig, cost: Any, tiles: Any, **_: Any) -> dict[str, float]:
    """Return the error that every layer shares: of the output on the first tile."""
    wanted, found = (network(next(iter(tiles))).detach() for network in (dense, slim))
    return {edit.layer: float((found - wanted).norm() / wanted.norm()) for edit in spec_of(slim).edits}


def plans(settings: Mapping[str, Any], config: CentreConfig) -> dict[str, Any] | None:
    return {**settings, "patch_size": [config.patch] * len(settings["patch_size"])} if config.patch else None


register_method(Method("toy", CentreConfig, plan, fit, plans=plans))
