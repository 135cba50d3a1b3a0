"""Sauron itself: once per epoch, thresholds move and filters are removed. It knows networks, and no trainer."""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor, nn

from nnslim.methods.sauron.config import SauronConfig
from nnslim.methods.sauron.feature_maps import MapWatch
from nnslim.network.walk import LayerIndex
from nnslim.surgery.channels import channel_map, fewest, removable, without
from nnslim.surgery.folding import MapMoments, fold_channels
from nnslim.surgery.importance import gradient_importance, weight_importance
from nnslim.surgery.narrow import CostTable, Cut, narrow_layers


@dataclass
class LayerState:
    """The state of one layer (group of channels) that lasts from epoch to epoch.

    Attributes:
        step: index of the threshold in the grid.
        patience: epochs to wait before the next raise.
        removed: filters removed in the last epoch.
    """

    step: int = 0
    patience: int = 0
    removed: int = 0

    def advance(
        self, config: SauronConfig, filters: int, training: Sequence[float], validation: Sequence[float]
    ) -> None:
        """Wait one more epoch, or raise the threshold where the layer has converged; see `has_converged`."""
        if self.patience > 0:
            self.patience -= 1
        elif has_converged(config, filters, self.removed, training, validation):
            self.patience = config.patience
            self.step = min(self.step + 1, config.steps)


def has_converged(
    config: SauronConfig, filters: int, removed: int, training: Sequence[float], validation: Sequence[float]
) -> bool:
    """Return whether a layer is ready for a higher threshold.

    The losses of rho epochs are looked back on (`config.patience`, at least 1): the last training loss lies within
    theirs, neither falling nor diverging; the last validation loss is no new minimum of the history *before* it (the
    original's history held the value itself, so that this was always true); few filters were removed in the last epoch.
    Without validation losses, or with `convergence: training`, the training losses must not have a new minimum, which
    follows from the first condition.

    Args:
        filters: number that the layer has. removed: number that the last epoch removed.
        training, validation: losses of all epochs so far; the latter may be empty.
    """
    look_back = max(1, config.patience)
    validation = [loss for loss in validation if math.isfinite(loss)]
    judged = config.convergence == "validation" or (config.convergence == "auto" and bool(validation))
    if len(training) < look_back + 1 or (judged and len(validation) < look_back + 1):
        return False
    last, before = training[-1], training[-1 - look_back : -1]
    # NaN compares as False: a diverged training never counts as converged.
    if not min(before) <= last <= max(before):
        return False
    if judged and validation[-1] < min(validation[:-1]):
        return False
    return removed < math.ceil(config.few * filters)


def below(scores: np.ndarray, threshold: float, reference: int, config: SauronConfig) -> np.ndarray:
    """Return the filters of one layer that may be removed, the nearest to the reference first.

    Args:
        scores: (C,) delta_prune. reference: channel that always stays.
    Returns:
        Indices. `min_filters` stay, and the width is a multiple of `multiple`, or unchanged.
    """
    order = np.argsort(scores, kind="stable")
    order = order[order != reference]
    wanted = int((scores[order] < threshold).sum())
    return order[: removable(wanted, len(scores), config.min_filters, config.multiple)]


def due(target: float, epoch: int, until: float) -> float:
    """Return the share due after an epoch (from 0), in equal ratios from 1 to the target, due after `until` epochs."""
    return math.pow(target, min(1.0, (epoch + 1) / max(1.0, until)))


Scores = Mapping[str, Sequence[float]]


@dataclass
class Removal:
    """What to do after an epoch; every process of a training must act on the same one.

    Attributes:
        keep: group -> channels that stay, for the groups that lose some.
        states: all groups' states, with new thresholds.
        medoids: channel by group, before the removal; empty with another policy.
    """

    keep: dict[str, list[int]] = field(default_factory=dict)
    states: dict[str, LayerState] = field(default_factory=dict)
    medoids: dict[str, int] = field(default_factory=dict)


class Pruner:
    """Follows one network through its training and narrows it.

    Attributes:
        network: plain; narrowed in place.
        states: of each group. channels: groups of the network as it is. watch: on its maps.
        cost: counts as it is. before: counts at the start of the training. full: channels of each group then.
    """

    def __init__(self, network: nn.Module, shape: Sequence[int], config: SauronConfig, epochs: int) -> None:
        """Trace and count a plain network, not wrapped by torch.compile or DDP.

        Args:
            shape: (1, C, *patch). epochs: of the whole training.
        """
        self.network, self.shape, self.config, self.epochs = network, (1, *shape[1:]), config, epochs
        self._look()
        self.states = {name: LayerState() for name in self.channels.groups}
        self.before = self.cost
        self.full = {name: group.channels for name, group in self.channels.groups.items()}
        self.medoids: dict[str, int] = {}
        self._effects: dict[str, Tensor] = {}

    def _look(self) -> None:
        """Trace and count anew; hooks would run along, so the watch comes last."""
        self.channels = channel_map(self.network, self.shape)
        self.cost = CostTable(self.network, self.shape)
        self.watch = MapWatch(self.network, self.channels.groups.values(), self.config)

    def begin_epoch(self, epoch: int) -> None:
        """Choose the references of an epoch; the same ones in every process and after a resume."""
        policy = self.config.reference
        for number, (name, group) in enumerate(self.watch.groups.items()):
            drawn = random.Random(f"{self.config.seed} {epoch} {number}").randrange(group.channels)
            if policy == "published":  # the names stand for a reference each
                kinds = (self.config.delta_opt, self.config.delta_prune)
                loss, criterion = (drawn if kind == "euc_rand" else 0 for kind in kinds)
            else:
                loss = criterion = {"first": 0, "random": drawn, "medoid": self.medoids.get(name, 0)}[policy]
            self.watch.references[name] = (loss, criterion if self.config.importance == "maps" else -1)

    def observe_gradients(self) -> None:
        """Add the last step's gradients to the criterion that is made of them."""
        if self.config.importance == "taylor":
            for name, effect in gradient_importance(LayerIndex(self.network), self.channels).items():
                self._effects[name] = self._effects.get(name, 0) + effect

    def take(self) -> tuple[dict[str, list[float]], dict[str, int], dict[str, MapMoments]]:
        """Return by group the criterion over the passes observed, medoid and moments, and start again."""
        scores, medoids = self.watch.take()
        found, self._effects = self._effects, {}
        if self.config.importance in ("l1", "fpgm", "random"):
            layers, kind, seed = LayerIndex(self.network), self.config.importance, self.config.seed
            found = {name: weight_importance(layers, group, kind, seed) for name, group in self.channels.groups.items()}
        for name in self.watch.groups if found else ():
            scores[name] = (found[name] / found[name].max().clamp_min(1e-30)).tolist()
        return scores, medoids, self.watch.take_moments()

    def decide(
        self,
        epoch: int,
        scores: Scores,
        medoids: Mapping[str, int],
        training: Sequence[float],
        validation: Sequence[float],
    ) -> Removal:
        """Move the thresholds and choose the filters to remove; changes nothing yet.

        Args:
            epoch: the one that has ended, from 0. scores: delta_prune by group. medoids: see `MapWatch.take`.
            training, validation: losses of all epochs so far, this one last.
        """
        states = {name: dataclasses.replace(state) for name, state in self.states.items()}
        gone: dict[str, list[int]] = {}
        for name, group in self.channels.groups.items():
            states[name].advance(self.config, group.channels, training, validation)
            states[name].removed = 0
            if name in scores and self._removes(epoch):
                threshold = self.config.grid[states[name].step]
                reference = self.watch.references[name][1]
                gone[name] = below(np.asarray(scores[name]), threshold, reference, self.config).tolist()
        if self.config.target is not None and self._removes(epoch):
            gone = self._within_target(epoch, gone, scores)
        for name, indices in gone.items():
            states[name].removed = len(indices)
        return Removal(without(self.channels, gone), states, dict(medoids))

    @property
    def _last(self) -> int:
        """How many epochs have ended when filters are removed for the last time."""
        return min(math.ceil(self.epochs * (1 - self.config.settle)), self.epochs) - 1

    def _removes(self, epoch: int) -> bool:
        return epoch < self._last

    def missed(self) -> str:
        """Return how far a finished training is from its target, and what to change; empty where it is not."""
        config = self.config
        if config.target is None or (left := self.share({})) <= config.target:
            return ""
        key, what = ("macs", "MACs") if config.macs is not None else ("params", "parameters")
        remedy = "lower min_filters or multiple" if config.reach else "set reach (0.5), lower patience and steps"
        return (
            f"the target {key} {config.target:g} was not reached: {left:.1%} of the {what} are left after "
            f"{self.epochs} epoch(s); {remedy}, or train more epochs"
        )

    def share(self, gone: Mapping[str, Sequence[int]]) -> float:
        """Return the MACs or the parameters, whichever has a target, as a share of those at the start."""
        macs, parameters = self.cost.after(self.channels.narrowing(without(self.channels, gone)))
        if self.config.params is not None:
            return parameters / self.before.parameters
        return macs / self.before.macs

    def _within_target(self, epoch: int, gone: dict[str, list[int]], scores: Scores) -> dict[str, list[int]]:
        """Keep filters that the target does not need removed; remove more where the target is due and not met."""
        target = self.config.target
        if self.share({}) <= target:
            return {}
        wanted = (
            1.0 if self.config.reach is None else due(target, epoch, min(self.config.reach * self.epochs, self._last))
        )
        candidates = self._ranked(gone, scores)
        if wanted < self.share(gone):
            target, candidates = max(wanted, target), self._ranked(dict.fromkeys(scores), scores)
        elif self.share(gone) >= target:
            return gone
        least, multiple = self.config.min_filters, self.config.multiple
        return fewest(candidates, self.channels, least, multiple, lambda less: self.share(less) <= target)

    def _ranked(self, among: Mapping[str, Sequence[int] | None], scores: Scores) -> list[tuple[str, int]]:
        """Return (group, channel) in order of removal; None stands for all but the reference.

        By `ranking`: the nearest to its reference in all layers, or the nearest in the layer that has lost the smallest
        share of its first width. Distances of different layers are hardly comparable: ranked globally, a bottleneck
        may lose nearly everything while others keep all.
        """
        found = []
        for name, indices in among.items():
            reference, distances = self.watch.references[name][1], scores[name]
            indices = range(len(distances)) if indices is None else indices
            nearest = sorted((distances[index], index) for index in indices if index != reference)
            lost = self.full[name] - self.channels.groups[name].channels
            for place, (distance, index) in enumerate(nearest, start=1):
                even = self.config.ranking == "uniform"
                found.append(((lost + place) / self.full[name] if even else distance, name, index))
        return [(name, index) for _, name, index in sorted(found)]

    def act(self, decision: Removal, moments: Mapping[str, MapMoments] | None = None) -> dict[nn.Parameter, Cut]:
        """Remove the filters, trace and count anew; return what became of the parameters.

        Args:
            decision: this epoch's. moments: of the maps, to fold removed filters into those that stay.
        """
        self.states = decision.states
        self.medoids = {
            name: decision.keep.get(name, list(range(self.channels.groups[name].channels))).index(medoid)
            for name, medoid in decision.medoids.items()
            if medoid in decision.keep.get(name, [medoid])
        }
        if not decision.keep:
            return {}
        if moments:
            fold_channels(LayerIndex(self.network), self.channels, decision.keep, moments)
        cuts = narrow_layers(LayerIndex(self.network), self.channels.narrowing(decision.keep))
        self.refit()
        return cuts

    def refit(self) -> None:
        """Trace and count anew after the widths changed."""
        self.watch.close()
        self._look()

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed training needs beside the weights, as JSON values."""
        return {
            "states": {name: dataclasses.asdict(state) for name, state in self.states.items()},
            "medoids": dict(self.medoids),
            "full": dict(self.full),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        self.states = {name: LayerState(**values) for name, values in state["states"].items()}
        self.medoids = dict(state["medoids"])
        self.full = dict(state.get("full", self.full))
