"""The weight of an error in each output channel for the layers that follow."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from nnslim.maths.moments import ChannelMoments, Moments


def output_metric(moments: Moments | ChannelMoments, norm: nn.Module | None, damping: float) -> Tensor:
    """Return the metric of a layer's outputs, (O, O): each channel in units of its standard deviation.

    Instance norm divides each channel by its deviation and multiplies it by its affine weight, so an error of the
    channel reaches the next layers with that factor. Without a norm all channels count alike. The damping keeps
    channels that hardly vary (dead ones) from dominating the fit.
    """
    view = moments.view
    variance = moments.variance_y.unflatten(0, (view.outputs, -1)).mean(1)
    if norm is None:
        return torch.eye(view.outputs, dtype=torch.float64) / variance.mean().clamp(min=1e-30).sqrt()
    weight = torch.ones(view.outputs) if norm.weight is None else norm.weight.detach().cpu()
    scale = (variance + damping * variance.mean() + norm.eps).rsqrt()
    return torch.diag(weight.double().abs().clamp(min=1e-2) * scale)
