"""How much each filter of a layer counts, by its weights or by the gradients of those that read its map."""

from __future__ import annotations

import random

import numpy as np
import torch
from torch import Tensor

from nnslim.network.walk import LayerIndex
from nnslim.surgery.channels import ChannelGroup, ChannelMap
from nnslim.surgery.narrow import axes_of


@torch.no_grad()
def weight_importance(layers: LayerIndex, group: ChannelGroup, kind: str, seed: int) -> Tensor:
    """Return (channels,): how much each filter of a group counts, 1 on average.

    l1 (Li et al., arXiv 1608.08710): mean absolute weight. fpgm (He et al., arXiv 1811.00250): mean distance from the
    layer's other filters, small near their geometric median. random: a number for each filter. Where several layers
    make the channels (a residual stage), the mean over them.
    """
    if kind == "random":
        drawn = random.Random(f"{seed} {group.name}")
        return torch.tensor([drawn.random() for _ in range(group.channels)])
    found = []
    for name in group.producers:
        layer = layers[name].module
        filters = layer.weight.transpose(0, axes_of(layer, "weight")[0]).flatten(1).float()
        score = filters.abs().mean(1) if kind == "l1" else torch.cdist(filters, filters).mean(1)
        found.append(score / score.mean().clamp_min(torch.finfo(torch.float32).tiny))
    return torch.stack(found).mean(0)


@torch.no_grad()
def gradient_importance(layers: LayerIndex, channels: ChannelMap) -> dict[str, Tensor]:
    """Return (channels,) by group: how much the loss would change if a map were zero, to first order, squared.

    That is the sum of weight times gradient over the kernels that read the map. Molchanov et al. (arXiv 1906.10771) sum
    over the filter's own weights, which says nothing before a norm: there that sum is always zero.
    """
    found = {name: torch.zeros(group.channels, dtype=torch.float64) for name, group in channels.groups.items()}
    for layer, numbers in channels.reads.items():
        module = layers[layer].module
        if not isinstance(getattr(module, "weight", None), Tensor) or module.weight.grad is None:
            continue
        product = (module.weight * module.weight.grad).double().cpu()
        effects = product.transpose(0, axes_of(module, "weight")[1]).flatten(1).sum(1)
        for name, own in channels.numbers.items():
            here = np.isin(numbers, own)
            if here.any():
                found[name].index_add_(0, torch.from_numpy(np.searchsorted(own, numbers[here])), effects[here])
    return {name: effect.square() for name, effect in found.items()}
