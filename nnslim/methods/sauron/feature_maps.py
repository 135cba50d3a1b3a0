"""Feature maps of a network's groups of filters, recorded and saved."""

from __future__ import annotations

import io
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from nnslim.files import make_folder, write_bytes
from nnslim.network.walk import unwrap
from nnslim.surgery.channels import channel_map
from nnslim.surgery.streaming import hooked


def feature_maps(network: nn.Module, tile: Tensor) -> dict[str, np.ndarray]:
    """Return the maps of each group of filters, (C, *spatial) float32, after norm and activation.

    Args:
        network: any wrapper is removed; it runs once, in eval mode. tile: (1, C, *patch).
    """
    network = unwrap(network)
    groups = channel_map(network, tile.shape).groups
    found: dict[str, np.ndarray] = {}
    taps = {group.taps[-1]: name for name, group in groups.items() if group.taps}

    def keep(name: str, _module: nn.Module, _inputs: tuple[Tensor, ...], output: Tensor) -> None:
        found[name] = output[0].detach().float().cpu().numpy().copy()

    was_training = network.training
    network.eval()
    try:
        with hooked(network, {}, {tap: partial(keep, name) for tap, name in taps.items()}), torch.no_grad():
            network(tile)
    finally:
        network.train(was_training)
    return found


def save_maps(maps: Mapping[str, np.ndarray], folder: Path) -> None:
    """Write one .npy file per layer, named after it.

    Raises:
        OutputError: it cannot be written.
    """
    make_folder(folder)
    for name, values in maps.items():
        content = io.BytesIO()
        np.save(content, values)
        write_bytes(folder / f"{name}.npy", content.getvalue())
