"""MACs and parameters of a network whose widths shrink, without running it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from torch import nn

from nnslim.cost import measure_cost
from nnslim.surgery.channels import Kept, deep_supervision
from nnslim.surgery.walk import LayerIndex


class CostTable:
    """Counts of a network as it is, and as it would be with fewer channels.

    Heads of deep supervision, which do not run at inference, are in neither count.

    Attributes:
        macs, parameters: as it is. layer_macs: by layer, convention "macs".
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
        self._layers = {name: layers[name].module for name in cost.layers}

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


def path(target: float, epoch: int, until: float) -> float:
    """Return the share that is due after an epoch, on the way from 1 to the target in equal ratios.

    Args:
        target: share at the end. epoch: counted from 0. until: number of epochs by which the target is due.
    """
    return math.pow(target, min(1.0, (epoch + 1) / max(1.0, until)))
