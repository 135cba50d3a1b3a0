"""Feature maps of a network's groups of filters: distances between them, watched, recorded and saved.

Distances (Valverde et al., arXiv 2209.13590) take maps (B, C, *spatial), 2D or 3D, reduce over all spatial axes, are
computed in float32 also under autocast, and have finite values and gradients for equal maps, constant maps and maps
smaller than the pool.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from nnslim.files import make_folder, write_bytes
from nnslim.methods.sauron.config import Distance, SauronConfig
from nnslim.network.walk import LayerIndex, unwrap
from nnslim.surgery.channels import ChannelGroup, channel_map
from nnslim.surgery.folding import MapMoments
from nnslim.surgery.streaming import run_hooked

_SAFE = 1e-12  # squared distance below which two maps are equal, and have no gradient


def pooled(maps: Tensor) -> Tensor:
    """Average maps (B, C, *spatial) over cells of 2 voxels along each axis, of 1 where the axis has no more."""
    window = [min(2, size) for size in maps.shape[2:]]
    return (F.avg_pool2d, F.avg_pool3d)[maps.dim() - 4](maps, window, window)


def scaled(maps: Tensor, like: Tensor) -> Tensor:
    """Scale each map (B, C, *spatial) of each sample to 0..1 by the minimum and maximum of `like`; 0 for a constant."""
    axes = tuple(range(2, like.dim()))
    low, high = like.amin(axes, keepdim=True), like.amax(axes, keepdim=True)
    spread = high - low
    return (maps - low) / torch.where(spread > 1e-8, spread, torch.ones_like(spread))


def root_mean_square(difference: Tensor) -> Tensor:
    """(B, C, *spatial) -> (B, C): the root of the mean square; 0, without a gradient, where that is next to nothing."""
    square = difference.square().flatten(2).mean(2)
    return torch.where(square > _SAFE, square.clamp_min(_SAFE).sqrt(), torch.zeros_like(square))


def distances(maps: Tensor, reference: int, kind: Distance) -> Tensor:
    """Return the distance of each map from that of the reference channel.

    Pooling is linear, so the scaling is applied to the pooled maps, with minimum and maximum of the whole ones: the
    same result for an eighth of the work.

    Args:
        maps: (B, C, *spatial), C > 1. reference: channel. kind: see `SauronConfig`.
    Returns:
        (B, C), 0 at the reference.
    """
    with torch.autocast(maps.device.type, enabled=False):
        maps = maps.float()
        small = pooled(maps)
        if kind == "euc_norm":
            small = scaled(small, maps)
        found = root_mean_square(small - small[:, reference : reference + 1])
        if kind in ("euc_rand", "euc_norm_deltaprunenorm"):
            found = found / (found.amax(1, keepdim=True) + 1e-15)
        return found


def delta_opt(maps: Tensor, reference: int, kind: Distance) -> Tensor:
    """Return the mean distance from the reference, over samples and the other channels: a scalar to be made small."""
    return distances(maps, reference, kind).sum() / (maps.shape[0] * (maps.shape[1] - 1))


@torch.no_grad()
def delta_prune(maps: Tensor, reference: int, kind: Distance) -> Tensor:
    """Return (C,): the distances, averaged over samples. With a kind that divides by the largest, in 0..1."""
    return distances(maps, reference, kind).mean(0)


@torch.no_grad()
def mean_distances(maps: Tensor) -> Tensor:
    """Return (C,): each map's mean distance from the others, by which the medoid is found.

    Cost: one product of (C, voxels / 8) with its transpose for each sample.
    """
    flat = pooled(maps.float()).flatten(2)
    return torch.cdist(flat, flat).mean((0, 2)) / flat.shape[2] ** 0.5


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
        run_hooked(network, [tile], after={tap: partial(keep, name) for tap, name in taps.items()})
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


class MapWatch:
    """Holds the maps of the last forward pass, and sums distances over several passes.

    A group with one channel has nothing to compare and is left out. Where a group's maps come out of several layers (a
    residual stage), distances are the mean over these.

    Attributes:
        groups: those that are watched, by name.
        references: channel for the loss and channel for the criterion, by group.
        passes: how many the criterion is summed over.
    """

    def __init__(self, network: nn.Module, groups: Iterable[ChannelGroup], config: SauronConfig) -> None:
        """Hook the layers; `close` removes the hooks."""
        self.config = config
        self.groups = {group.name: group for group in groups if group.channels > 1 and group.taps}
        self.references: dict[str, tuple[int, int]] = {name: (0, 0) for name in self.groups}
        self.maps: dict[str, Tensor] = {}
        self.passes = 0
        self._sums: dict[str, Tensor] = {}
        self._centrality: dict[str, Tensor] = {}
        self._moments: dict[str, MapMoments] = {}
        layers = LayerIndex(network)
        taps = dict.fromkeys(tap for group in self.groups.values() for tap in group.taps)
        self._hooks = [layers[tap].module.register_forward_hook(self._keeper(tap)) for tap in taps]

    def _keeper(self, tap: str) -> Callable[..., None]:
        def keep(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            if module.training:
                self.maps[tap] = output

        return keep  # a function: copies of the network share it, where they would copy a bound method with its maps

    def _seen(self) -> Iterator[tuple[str, list[Tensor]]]:
        """Yield each group whose layers ran in the last pass, with their maps."""
        for name, group in self.groups.items():
            if seen := [self.maps[tap] for tap in group.taps if tap in self.maps]:
                yield name, seen

    def close(self) -> None:
        """Remove the hooks and free the maps."""
        for hook in self._hooks:
            hook.remove()
        self.maps.clear()

    def clear(self) -> None:
        """Free the maps of the last pass."""
        self.maps.clear()

    def loss(self) -> Tensor | None:
        """Return the mean of delta_opt over the groups, a scalar with a gradient; None where nothing was seen."""
        found = []
        for name, seen in self._seen():
            reference = self.references[name][0]
            found.append(torch.stack([delta_opt(maps, reference, self.config.delta_opt) for maps in seen]).mean())
        return torch.stack(found).mean() if found else None

    @torch.no_grad()
    def observe(self) -> None:
        """Add the maps of the last pass to the criterion."""
        if not self.maps:
            return
        for name, seen in self._seen():
            if self.config.importance == "maps":
                reference = self.references[name][1]
                score = torch.stack([delta_prune(maps, reference, self.config.delta_prune) for maps in seen]).mean(0)
                self._sums[name] = self._sums.get(name, 0) + score
            if self.config.folds:
                found = [MapMoments.of(maps) for maps in seen]
                before = [self._moments[name]] if name in self._moments else []
                self._moments[name] = sum(found[1:] + before, start=found[0])
            if self.config.reference == "medoid":
                far = torch.stack([mean_distances(maps) for maps in seen]).mean(0)
                self._centrality[name] = self._centrality.get(name, 0) + far
        self.passes += 1

    def take(self) -> tuple[dict[str, list[float]], dict[str, int]]:
        """Return delta_prune and the medoid of each group over the passes observed, and start again."""
        scores = {name: (total / self.passes).cpu().tolist() for name, total in self._sums.items()}
        medoids = {name: int(far.argmin()) for name, far in self._centrality.items()}
        self._sums, self._centrality, self.passes = {}, {}, 0
        return scores, medoids

    def take_moments(self) -> dict[str, MapMoments]:
        """Return the moments of each group's maps over the passes observed, and start again; none without folding."""
        found, self._moments = self._moments, {}
        return found
