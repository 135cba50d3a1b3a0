"""Depth-wise instead of dense convolutions, and back."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from nnslim.errors import SpecError
from nnslim.network.cost import Cost
from nnslim.network.spec import ReplacingEdit, register_edit
from nnslim.network.walk import Layer

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
FORMS = ("separable", "grouped", "dense")


class SeparableConv(nn.Module):
    """A convolution of each channel on its own, then a 1x1 convolution over channels."""

    def __init__(self, dense: nn.Module) -> None:
        """Take sizes, stride, padding and dilation from a dense convolution; weights are not set."""
        super().__init__()
        inputs = dense.in_channels
        self.depth = _like(dense, inputs, groups=inputs, bias=False)
        self.point = type(dense)(inputs, dense.out_channels, 1, bias=dense.bias is not None, **_kind(dense))

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, I, *spatial) to (B, O, *spatial)."""
        return self.point(self.depth(x))

    @torch.no_grad()
    def fill(self, dense: nn.Module) -> None:
        """Set the weights to the nearest ones (least squares): for each input channel, the first singular pair."""
        inputs, outputs = dense.in_channels, dense.out_channels
        kernels = dense.weight.detach().double().transpose(0, 1).reshape(inputs, outputs, -1)  # (I, O, K)
        left, sizes, right = torch.linalg.svd(kernels, full_matrices=False)
        root = sizes[:, :1].sqrt()  # (I, 1)
        self.depth.weight.copy_((right[:, 0] * root).reshape(self.depth.weight.shape))
        self.point.weight.copy_((left[:, :, 0] * root).T.reshape(self.point.weight.shape))
        if dense.bias is not None:
            self.point.bias.copy_(dense.bias)


def _kind(conv: nn.Module) -> dict[str, Any]:
    return {"device": conv.weight.device, "dtype": conv.weight.dtype}


def _like(conv: nn.Module, outputs: int, *, groups: int, bias: bool) -> nn.Module:
    geometry = (conv.kernel_size, conv.stride, conv.padding, conv.dilation)
    return type(conv)(conv.in_channels, outputs, *geometry, groups, bias, conv.padding_mode, **_kind(conv))


@torch.no_grad()
def regrouped(conv: nn.Module, groups: int, *, fill: bool = True) -> nn.Module:
    """Return a convolution with other groups; there is one group before or after.

    More groups keep the weights between channels of one group and lose the others. One group gets zeros elsewhere, so
    the output stays the same.
    """
    made = _like(conv, conv.out_channels, groups=groups, bias=conv.bias is not None)
    if not fill:
        return made
    one, many = (made, conv) if groups == 1 else (conv, made)
    place = torch.arange(many.groups)
    blocks = one.weight.unflatten(0, (many.groups, -1)).unflatten(2, (many.groups, -1))  # (G, O / G, G, I / G, *K)
    inside = many.weight.unflatten(0, (many.groups, -1))  # (G, O / G, I / G, *K)
    if groups == 1:
        made.weight.zero_()
        blocks[place, :, place] = inside
    else:
        inside.copy_(blocks[place, :, place])
    if conv.bias is not None:
        made.bias.copy_(conv.bias)
    return made


@register_edit
@dataclass(frozen=True)
class DepthwiseEdit(ReplacingEdit):
    """Give one convolution another form.

    Attributes:
        layer: any of the layer's names.
        form: a dense convolution becomes separable or grouped (as many groups as divide inputs and outputs, which is
            depth-wise where these are equal), a grouped one dense.
    """

    layer: str
    form: str = "separable"
    kind: ClassVar[str] = "depthwise"

    def made(self, dense: nn.Module, fill: bool) -> nn.Module:
        """See ReplacingEdit.made. A separable convolution has the layers `<name>.depth` and `<name>.point`."""
        groups = getattr(dense, "groups", None)
        if self.form not in FORMS or not isinstance(dense, CONVOLUTIONS) or (groups == 1) == (self.form == "dense"):
            raise SpecError(f"it cannot become {self.form}: it is {type(dense).__name__}, groups={groups}")
        if self.form != "separable":
            return regrouped(dense, 1 if self.form == "dense" else most_groups(dense), fill=fill)
        new = SeparableConv(dense)
        if fill:
            new.fill(dense)
        return new


def depthwise_hindrances(layers: Sequence[Layer], form: str, cost: Cost) -> dict[str, str]:
    """Return for each convolution why it cannot get another form, or would not gain from it; "" where it can.

    Args:
        layers: convolutions. form: see `DepthwiseEdit`. cost: of their network.
    """
    first = next(iter(cost.layers), None)
    found = {}
    for layer in layers:
        conv, size = layer.module, math.prod(layer.module.kernel_size)
        inputs, outputs = conv.in_channels, conv.out_channels
        costlier = inputs * size + inputs * outputs >= inputs * outputs * size
        reasons = {
            "not reached by the forward pass": layer.name not in cost.layers,
            "dense already": form == "dense" and conv.groups == 1,
            f"grouped convolution (groups={conv.groups})": form != "dense" and conv.groups != 1,
            "first layer": form != "dense" and layer.name == first,
            "1x1 kernel": form != "dense" and size == 1,
            "would not get cheaper": form == "separable" and costlier,
            "inputs and outputs have no common divisor": form == "grouped" and most_groups(conv) == 1,
        }
        found[layer.name] = next((reason for reason, holds in reasons.items() if holds), "")
    return found


def most_groups(conv: nn.Module) -> int:
    """Return the largest number of groups that divides inputs and outputs."""
    return math.gcd(conv.in_channels, conv.out_channels)
