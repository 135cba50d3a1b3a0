"""Budgets of MACs and parameters: the counts of a network whose widths shrink, without running it."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence

from torch import nn

from nnslim.network.cost import Counts, measure_cost
from nnslim.network.walk import LayerIndex, deep_supervision
from nnslim.surgery.channels import ChannelMap, Kept


class CostTable:
    """Counts of a network as it is, and as it would be with fewer channels.

    Heads of deep supervision, which do not run at inference, are in neither count.

    Attributes:
        macs, parameters, counts: of the network as it is. layer_macs: by layer, convention "macs".
        shapes: (outputs, inputs, *kernel) and parameters of each convolution.
    """

    def __init__(self, network: nn.Module, shape: Sequence[int]) -> None:
        """Count once a plain network without hooks, on (1, C, *patch); reads only."""
        with deep_supervision(network, False):
            cost = measure_cost(network, shape)
        self.layer_macs = {name: layer.macs for name, layer in cost.layers.items()}
        self.macs, self.parameters = sum(self.layer_macs.values()), cost.parameters
        self.counts = Counts(self.parameters, self.macs, cost.macs("fvcore"))
        layers = LayerIndex(network)
        self._layers = {name: layers[name].module for name in cost.layers}
        self.shapes = {
            name: (
                (layer.out_channels, layer.in_channels, *layer.kernel_size),
                sum(p.numel() for p in layer.parameters()),
            )
            for name, layer in self._layers.items()
            if isinstance(layer, nn.modules.conv._ConvNd)
        }

    def after(self, kept: Mapping[str, Kept]) -> tuple[int, int]:
        """Return MACs and parameters once only the channels of `kept` are left, see `ChannelMap.narrowing`."""
        macs, parameters = self.macs, self.parameters
        for name, sides in kept.items():
            layer = self._layers.get(name)
            if layer is None or layer.weight is None:
                continue
            share = 1.0
            if sides.outputs is not None:
                share = len(sides.outputs) / getattr(layer, "out_channels", getattr(layer, "num_features", 1))
                if layer.bias is not None:
                    parameters += len(sides.outputs) - layer.bias.numel()
            if sides.inputs is not None:
                share = share * len(sides.inputs) / layer.in_channels
            macs += round(self.layer_macs[name] * share) - self.layer_macs[name]
            parameters += round(layer.weight.numel() * share) - layer.weight.numel()
        return macs, parameters


def without(channels: ChannelMap, gone: Mapping[str, Sequence[int]]) -> dict[str, list[int]]:
    """Return the channels that stay in each group that loses some, from those that are removed."""
    return {
        name: sorted(set(range(channels.groups[name].channels)) - set(indices))
        for name, indices in gone.items()
        if indices
    }


def removable(wanted: int, width: int, least: int, multiple: int) -> int:
    """Return how many of the `wanted` channels may be removed: widths stay multiples, or as they were, >= least."""
    left = max(width - wanted, min(width, max(1, least)))
    if multiple > 1:
        left = min(width, multiple * math.ceil(left / multiple))
    return width - left


def fewest(
    candidates: Sequence[tuple[str, int]],
    channels: ChannelMap,
    least: int,
    multiple: int,
    met: Callable[[dict[str, list[int]]], bool],
) -> dict[str, list[int]]:
    """Return the shortest beginning of the candidates whose removal meets a target, or all of them.

    Args:
        candidates: (group, channel), in the order of removal.
        channels: the network's. least, multiple: see `removable`.
        met: whether the removal of these channels, by group, is enough.
    """

    def first(count: int) -> dict[str, list[int]]:
        chosen: dict[str, list[int]] = {}
        for name, index in candidates[:count]:
            chosen.setdefault(name, []).append(index)
        widths = {name: channels.groups[name].channels for name in chosen}
        return {name: gone[: removable(len(gone), widths[name], least, multiple)] for name, gone in chosen.items()}

    return first(bisect_left(range(len(candidates)), True, key=lambda count: met(first(count))))
