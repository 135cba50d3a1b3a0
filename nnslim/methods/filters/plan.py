"""Choose filters by importance, and take them out."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from nnslim.errors import ConfigError
from nnslim.methods.base import OnLayer, Plan, narrowed
from nnslim.methods.filters.config import FiltersConfig
from nnslim.network.cost import Cost
from nnslim.network.walk import LayerIndex
from nnslim.surgery.channels import ChannelMap, channel_map, fewest, without
from nnslim.surgery.folding import MapMoments, fold_channels, map_moments
from nnslim.surgery.importance import weight_importance
from nnslim.surgery.narrow import CostTable, narrow_edits, narrow_layers, widths_of
from nnslim.surgery.streaming import Tiles


def plan_filters(network: nn.Module, config: FiltersConfig, cost: Cost, tiles: Any = None) -> Plan:
    """Choose the widths on these weights (the first fold's); reads only.

    Raises:
        ConfigError: the budget cannot be met with `min_filters` in each layer. RewriteError: no graph can be traced.
    """
    shape = cost.input_shape
    channels, table = channel_map(network, shape), CostTable(network, shape)
    budget = config.macs if config.macs is not None else config.params

    def share(gone: dict[str, list[int]]) -> float:
        macs, parameters = table.after(channels.narrowing(without(channels, gone)))
        return macs / table.macs if config.macs is not None else parameters / table.parameters

    order = _order(LayerIndex(network), channels, config)
    gone = fewest(order, channels, config.min_filters, config.multiple, lambda less: share(less) <= budget)
    if share(gone) > budget:
        raise ConfigError(
            f"filters: {share(gone):.3f} of the budgeted is the least that can be left, {budget} is asked"
        )
    slim = copy.deepcopy(network)
    narrow_layers(LayerIndex(slim), channels.narrowing(without(channels, gone)))
    edits = narrow_edits(widths_of(network), slim)
    return Plan(edits, narrowed(table, CostTable(slim, shape)))


def _order(layers: LayerIndex, channels: ChannelMap, config: FiltersConfig) -> list[tuple[str, int]]:
    """Return (group, channel), what should go first."""
    ranked = []
    for name, group in channels.groups.items():
        scores = weight_importance(layers, group, config.importance, config.seed).tolist()
        places = sorted(range(len(scores)), key=scores.__getitem__)
        for place, index in enumerate(places):
            key = scores[index] if config.ranking == "global" else (place + 1) / len(places)
            ranked.append((key, name, index))
    return [(name, index) for _, name, index in sorted(ranked)]


def fill_filters(dense: nn.Module, slim: nn.Module, config: FiltersConfig, shape: Sequence[int]) -> None:
    """Put the most important filters of a dense network, as many as there is room for, into a slim one, in place."""
    channels = channel_map(dense, shape)
    _put(dense, slim, channels, _kept(dense, slim, config, channels), {})


def fit_filters(
    dense: nn.Module,
    slim: nn.Module,
    config: FiltersConfig,
    cost: Cost,
    tiles: Tiles,
    *,
    compensate: bool = True,
    seed: int = 0,
    on_layer: OnLayer = None,
) -> dict[str, float]:
    """Fold the filters that go into those that stay, by ridge regression on the maps of unlabelled images.

    See `fold_channels`; filters are chosen as without images. Returns, by layer, the root of the share of its maps'
    variance that is lost.
    """
    channels = channel_map(dense, cost.input_shape)
    keep = _kept(dense, slim, config, channels)
    moments = map_moments(dense, [channels.groups[name] for name in keep], tiles)
    if compensate:
        _put(dense, slim, channels, keep, moments)
    errors = {}
    for number, (name, kept) in enumerate(keep.items()):
        gone = sorted(set(range(channels.groups[name].channels)) - set(kept))
        if name in moments:
            errors |= dict.fromkeys(channels.groups[name].producers, moments[name].unexplained(kept, gone))
        if on_layer is not None:
            on_layer(number + 1, len(keep))
    return errors


def _kept(dense: nn.Module, slim: nn.Module, config: FiltersConfig, channels: ChannelMap) -> dict[str, list[int]]:
    """Return the most important channels of each group, as many as the slim network has room for."""
    layers = LayerIndex(dense)
    widths = widths_of(slim)
    keep = {}
    for name, group in channels.groups.items():
        room = widths[name][0]
        if room < group.channels:
            best = weight_importance(layers, group, config.importance, config.seed).topk(room).indices
            keep[name] = sorted(best.tolist())
    return keep


def _put(
    dense: nn.Module,
    slim: nn.Module,
    channels: ChannelMap,
    keep: Mapping[str, Sequence[int]],
    moments: Mapping[str, MapMoments],
) -> None:
    full = copy.deepcopy(dense)
    fold_channels(LayerIndex(full), channels, keep, moments)
    narrow_layers(LayerIndex(full), channels.narrowing(keep))
    slim.load_state_dict(full.state_dict())
