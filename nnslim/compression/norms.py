"""Recalibrate the affine weights of norm layers after a compression."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from nnslim.network.walk import LayerIndex
from nnslim.surgery.streaming import Tiles, hooked

NORMS = (nn.modules.instancenorm._InstanceNorm, nn.GroupNorm)


@torch.inference_mode()
def recalibrate_norms(dense: nn.Module, slim: nn.Module, tiles: Tiles) -> None:
    """Set the slim norms' affine weights, in place, so that their outputs are nearest to the dense ones'.

    For each channel the least-squares line from the slim norm's output to the dense norm's: an output that follows the
    dense one only partly is scaled down accordingly. One pass over the tiles.

    Args:
        dense, slim: in eval mode, on one device. tiles: calibration tiles.
    """
    layers, others = LayerIndex(slim), LayerIndex(dense)
    names = [layer.name for layer in layers.of_type(*NORMS) if layer.module.weight is not None and layer.name in others]
    sums = {name: torch.zeros(5, len(layers[name].module.weight), dtype=torch.float64) for name in names}
    counts = dict.fromkeys(names, 0)
    device = next(dense.parameters()).device
    for tile in tiles:
        tile = tile.to(device)
        wanted: dict[str, Tensor] = {}

        # Copies, because activations work in place on what the norm puts out.
        def keep(name: str, output: Tensor, wanted: dict[str, Tensor] = wanted) -> None:
            wanted[name] = output.clone()

        def compare(name: str, output: Tensor, wanted: dict[str, Tensor] = wanted) -> None:
            u = output.transpose(0, 1).flatten(1).double().cpu()
            v = wanted.pop(name).transpose(0, 1).flatten(1).double().cpu()
            sums[name] += torch.stack([u.sum(1), v.sum(1), (u * u).sum(1), (u * v).sum(1), (v * v).sum(1)])
            counts[name] += u.shape[1]

        with hooked(dense, {}, {n: lambda m, i, o, n=n: keep(n, o) for n in names}):
            dense(tile)
        with hooked(slim, {}, {n: lambda m, i, o, n=n: compare(n, o) for n in names}):
            slim(tile)
    for name in names:
        if counts[name]:
            _set_line(layers[name].module, sums[name] / counts[name])


def _set_line(norm: nn.Module, means: Tensor) -> None:
    u, v, uu, uv, _ = means
    slope = ((uv - u * v) / (uu - u * u).clamp(min=1e-12)).clamp(0.0, 2.0).to(norm.weight)
    shift = (v - slope.double().cpu() * u).to(norm.weight)
    norm.bias.copy_(norm.bias * slope + shift)
    norm.weight.copy_(norm.weight * slope)
