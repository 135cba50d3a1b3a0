"""Budgets of MACs and parameters: the counts of a network whose widths shrink, without running it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from torch import nn

from nnslim.network.cost import Counts, measure_cost
from nnslim.network.walk import LayerIndex, deep_supervision
from nnslim.surgery.channels import ChannelMap, Kept


class CostTable:
    """Counts of a network as it is, and as it would be with fewer channels.

    Heads of deep supervision, which do not run at inference, are in neither count.

    Attributes:
        macs, parameters, macs_fvcore: counts of the network as it is. layer_macs: by layer, convention "macs".
        shapes: (outputs, inputs, *kernel) and parameters of each convolution.
    """

    def __init__(self, network: nn.Module, shape: Sequence[int]) -> None:
        """Count once; reads only.

        Args:
            network: plain, without hooks. shape: (1, C, *patch).
        """
        with deep_supervision(network, False):
            cost = measure_cost(network, shape)
        layers = LayerIndex(network)
        self.layer_macs = {name: layer.macs for name, layer in cost.layers.items()}
        self.macs, self.parameters = sum(self.layer_macs.values()), cost.parameters
        self.macs_fvcore = cost.macs("fvcore")
        self._layers = {name: layers[name].module for name in cost.layers}
        self.shapes = {
            name: (
                (layer.out_channels, layer.in_channels, *layer.kernel_size),
                sum(p.numel() for p in layer.parameters()),
            )
            for name, layer in self._layers.items()
            if isinstance(layer, nn.modules.conv._ConvNd)
        }

    @property
    def counts(self) -> Counts:
        """The totals, as reports have them."""
        return Counts(self.parameters, self.macs, self.macs_fvcore)

    def after(self, kept: Mapping[str, Kept]) -> tuple[int, int]:
        """Return MACs and parameters once only the channels of `kept` are left, see `ChannelMap.narrowing`."""
        macs, parameters = self.macs, self.parameters
        for name, sides in kept.items():
            layer = self._layers.get(name)
            if layer is None or (weight := getattr(layer, "weight", None)) is None:
                continue
            share = _share(layer, sides)
            macs += round(self.layer_macs[name] * share) - self.layer_macs[name]
            parameters += round(weight.numel() * share) - weight.numel()
            if getattr(layer, "bias", None) is not None and sides.outputs is not None:
                parameters += len(sides.outputs) - layer.bias.numel()
        return macs, parameters


def _share(layer: nn.Module, sides: Kept) -> float:
    """Return which share of the weight is left."""
    outputs = getattr(layer, "out_channels", getattr(layer, "num_features", 1))
    share = 1.0 if sides.outputs is None else len(sides.outputs) / outputs
    return share if sides.inputs is None else share * len(sides.inputs) / layer.in_channels


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

    low, high = 0, len(candidates)
    while low < high:
        middle = (low + high) // 2
        if met(first(middle)):
            high = middle
        else:
            low = middle + 1
    return first(low)
