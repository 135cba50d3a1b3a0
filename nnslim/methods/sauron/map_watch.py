"""Watch the feature maps of every channel group while the network runs."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from nnslim.methods.sauron.config import SauronConfig
from nnslim.methods.sauron.distances import delta_opt, delta_prune, mean_distances
from nnslim.network.walk import LayerIndex
from nnslim.surgery.channels import ChannelGroup
from nnslim.surgery.folding import MapMoments


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

    def _keeper(self, tap: str) -> object:
        def keep(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            if module.training:
                self.maps[tap] = output

        return keep

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
        for name, group in self.groups.items():
            seen = [self.maps[tap] for tap in group.taps if tap in self.maps]
            if seen:
                reference = self.references[name][0]
                terms = [delta_opt(maps, reference, self.config.delta_opt) for maps in seen]
                found.append(torch.stack(terms).mean())
        return torch.stack(found).mean() if found else None

    @torch.no_grad()
    def observe(self) -> None:
        """Add the maps of the last pass to the criterion."""
        if not self.maps:
            return
        for name, group in self.groups.items():
            seen = [self.maps[tap].detach() for tap in group.taps if tap in self.maps]
            if not seen:
                continue
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
