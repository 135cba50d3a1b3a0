"""Which channels of a network belong together: the traced graph, followed channel by channel.

Every channel of every tensor gets a number. A convolution makes new ones; norms, activations and pools pass them on;
a concatenation joins them; a sum makes its two sides one. The result is groups of channels that can only be removed
together, and for each layer the numbers it reads and writes, so that skips by concatenation (at their offset), residual
sums and shared layers need no rules of their own.
"""

from __future__ import annotations

import math
import operator
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import fx, nn

from nnslim.errors import SpecError, nearest
from nnslim.network.graph import CONVOLUTIONS, PASSING, TRANSPOSED, layer_of, trace
from nnslim.network.walk import LayerIndex, deep_supervision

NORMS = (nn.modules.instancenorm._InstanceNorm, nn.modules.batchnorm._BatchNorm)
_RESIZING = (
    *(nn.AvgPool2d, nn.AvgPool3d, nn.MaxPool2d, nn.MaxPool3d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d),
    nn.Upsample,
)
_SAME_CHANNELS = (
    *(nn.ReLU, nn.LeakyReLU, nn.ELU, nn.GELU, nn.SiLU, nn.Sigmoid, nn.Tanh, nn.Hardswish, nn.ReLU6, nn.Mish),
    *PASSING,
    *_RESIZING,
)
_SAME = {
    "call_function": {
        *(F.relu, F.leaky_relu, F.elu, F.gelu, F.silu, F.sigmoid, F.tanh, F.interpolate),
        *(F.avg_pool2d, F.avg_pool3d, F.max_pool2d, F.max_pool3d, torch.relu, torch.sigmoid, torch.tanh),
    },
    "call_method": {"contiguous", "relu", "relu_", "sigmoid", "tanh", "clone", "detach", "float"},
}
_MEANS = {torch.mean, torch.sum}
_SUMS = {operator.add, operator.iadd, operator.sub, operator.isub, operator.mul, operator.imul, torch.add, torch.mul}
_CAT = {torch.cat, getattr(torch, "concat", torch.cat)}


@dataclass(frozen=True)
class ChannelGroup:
    """Channels that can be removed, one by one, each from all producers at once.

    Attributes:
        name: canonical name of the first layer that makes them.
        channels: how many.
        producers: convolutions whose outputs they are, in order of execution.
        taps: layers whose outputs are the final maps of the group, after norm and activation: what consumers read.
    """

    name: str
    channels: int
    producers: tuple[str, ...]
    taps: tuple[str, ...]


@dataclass(frozen=True)
class Kept:
    """Channels of one layer that stay; None: the side keeps all of them."""

    outputs: tuple[int, ...] | None = None
    inputs: tuple[int, ...] | None = None


@dataclass(frozen=True)
class ChannelMap:
    """The channel groups of a network, and what each layer reads and writes of them.

    Attributes:
        groups: by name, in order of execution.
        reads, writes: number of each input and output channel, by layer. A norm only writes.
        numbers: of the channels of each group, ascending.
    """

    groups: Mapping[str, ChannelGroup]
    reads: Mapping[str, np.ndarray]
    writes: Mapping[str, np.ndarray]
    numbers: Mapping[str, np.ndarray]

    def narrowing(self, keep: Mapping[str, Sequence[int]]) -> dict[str, Kept]:
        """Return which channels of which layers stay if groups keep only some of theirs.

        Args:
            keep: group -> indices of the channels that stay, ascending, at least one.
        Raises:
            SpecError: an unknown group, no channel left, or an index twice, out of order or out of range.
        """
        gone = [np.zeros(0, dtype=int)]
        for name, kept in keep.items():
            if name not in self.groups:
                raise SpecError(f"no channel group '{name}'; {nearest(name, self.groups)}")
            kept, channels = list(kept), self.groups[name].channels
            if not kept or kept != sorted(set(kept)) or kept[0] < 0 or kept[-1] >= channels:
                raise SpecError(f"group '{name}': expected some of 0..{channels - 1}, each once and ascending: {kept}")
            gone.append(np.delete(self.numbers[name], kept))
        removed = np.concatenate(gone)
        made: dict[str, Kept] = {}
        for layer in dict.fromkeys((*self.reads, *self.writes)):
            sides = [_left(side.get(layer), removed) for side in (self.writes, self.reads)]
            if sides != [None, None]:
                made[layer] = Kept(*sides)
        return made


def _left(numbers: np.ndarray | None, removed: np.ndarray) -> tuple[int, ...] | None:
    if numbers is None:
        return None
    stays = ~np.isin(numbers, removed)
    return None if stays.all() else tuple(np.flatnonzero(stays).tolist())


def without(channels: ChannelMap, gone: Mapping[str, Sequence[int]]) -> dict[str, list[int]]:
    """Return the channels that stay in each group that loses some, from those that are removed."""
    return {
        name: sorted(set(range(channels.groups[name].channels)) - set(indices))
        for name, indices in gone.items()
        if indices
    }


def removable(wanted: int, width: int, least: int, multiple: int) -> int:
    """Return how many of the `wanted` channels may be removed: widths stay multiples, or as they were, >= least."""
    left = max(width - wanted, min(width, max(1, least)))
    if multiple > 1:
        left = min(width, multiple * math.ceil(left / multiple))
    return width - left


def fewest(
    candidates: Sequence[tuple[str, int]],
    channels: ChannelMap,
    least: int,
    multiple: int,
    met: Callable[[dict[str, list[int]]], bool],
) -> dict[str, list[int]]:
    """Return the shortest beginning of the candidates whose removal meets a target, or all of them.

    Args:
        candidates: (group, channel), in the order of removal.
        channels: the network's. least, multiple: see `removable`.
        met: whether the removal of these channels, by group, is enough.
    """

    def first(count: int) -> dict[str, list[int]]:
        chosen: dict[str, list[int]] = {}
        for name, index in candidates[:count]:
            chosen.setdefault(name, []).append(index)
        widths = {name: channels.groups[name].channels for name in chosen}
        return {name: gone[: removable(len(gone), widths[name], least, multiple)] for name, gone in chosen.items()}

    return first(bisect_left(range(len(candidates)), True, key=lambda count: met(first(count))))


def channel_map(network: nn.Module, shape: Sequence[int]) -> ChannelMap:
    """Find the channel groups of a network; reads only.

    Channels of the image and of any output are in no group, nor are those that pass through something unknown or
    through a grouped convolution that is not depth-wise: they are never removed.

    Args:
        network: plain (not wrapped by torch.compile or DDP).
        shape: (B, C, *patch) on which it runs.
    Raises:
        RewriteError: the network cannot be traced.
    """
    with deep_supervision(network, True):
        graph = trace(network, shape)
    follower = _Follower(LayerIndex(network))
    for node in graph.graph.nodes:
        follower.follow(node)
    return follower.result()


class _Follower:
    """Numbers channels along a graph, and joins the numbers of channels that belong together."""

    def __init__(self, layers: LayerIndex) -> None:
        self.layers = layers
        self.count = 0
        self.pairs: list[tuple[int, int]] = []  # numbers that are one channel
        self.frozen: list[int] = []
        self.of_node: dict[fx.Node, np.ndarray] = {}
        self.reads: dict[str, np.ndarray] = {}
        self.writes: dict[str, np.ndarray] = {}
        self.makers: list[str] = []
        self.tapped: list[tuple[str, np.ndarray]] = []

    def follow(self, node: fx.Node) -> None:
        """Give the node's output channels their numbers; what an output or something unknown reads is frozen."""
        shape = getattr(node.meta.get("val"), "shape", ())
        followed = node.op != "output" and len(shape) > 1
        numbers = self._numbers(node, shape[1]) if followed else None
        if numbers is None or len(numbers) != shape[1]:
            for given in node.all_input_nodes:
                self.frozen.extend(self.of_node.get(given, ()))
            if not followed:
                return
            numbers = self._new(shape[1])
            self.frozen.extend(numbers)
        self.of_node[node] = numbers

    def _numbers(self, node: fx.Node, channels: int) -> np.ndarray | None:
        inputs = [self.of_node[given] for given in node.all_input_nodes if given in self.of_node]
        if node.op == "call_module":
            return self._through_layer(node, layer_of(node), inputs)
        if not inputs or len(inputs) != len(node.all_input_nodes):
            return None
        if node.op == "call_function" and node.target in _CAT:
            return self._joined(node)
        if node.op == "call_function" and node.target in _SUMS:
            if len(inputs) > 1 and any(len(numbers) != channels for numbers in inputs):
                return None  # one channel for all: broadcast
            return inputs[0] if len(inputs) == 1 else self._joint(*inputs)
        same = node.target in _SAME.get(node.op, ()) or self._is_spatial_mean(node)
        return inputs[0] if same else None

    def _through_layer(self, node: fx.Node, layer: nn.Module | None, inputs: list[np.ndarray]) -> np.ndarray | None:
        if len(inputs) != 1:
            return None
        name, numbers = self.layers[str(node.target)].name, inputs[0]
        convolution = isinstance(layer, (*CONVOLUTIONS, *TRANSPOSED))
        depthwise = convolution and 1 != layer.groups == layer.in_channels == layer.out_channels
        if depthwise or isinstance(layer, NORMS):  # reads what it writes
            self.writes[name] = self._joint(self.writes.get(name), numbers)
            return numbers
        if not convolution or layer.groups != 1:
            return numbers if isinstance(layer, _SAME_CHANNELS) else None
        self._tap(node.all_input_nodes[0])
        self.reads[name] = self._joint(self.reads.get(name), numbers)
        if name not in self.writes:
            self.writes[name] = self._new(layer.out_channels)
            self.makers.append(name)
        return self.writes[name]

    def _joined(self, node: fx.Node) -> np.ndarray | None:
        dim = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else 0)
        parts = node.args[0] if node.args else node.kwargs.get("tensors")
        if dim != 1 or any(part not in self.of_node for part in parts):
            return None
        for part in parts:
            self._tap(part)
        return np.concatenate([self.of_node[part] for part in parts])

    def _is_spatial_mean(self, node: fx.Node) -> bool:
        mean = node.target in _MEANS if node.op == "call_function" else node.target in ("mean", "sum")
        dims = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else None)
        keeps = node.kwargs.get("keepdim", node.args[2] if len(node.args) > 2 else False)
        return bool(mean and keeps and isinstance(dims, (list, tuple)) and all(dim > 1 for dim in dims))

    def _tap(self, node: fx.Node) -> None:
        """Remember which layer's output is read: the nearest at or above the node with the same channels, no pool."""
        numbers = self.of_node[node]
        while node.op != "call_module" or isinstance(layer_of(node), _RESIZING):
            above = [one for one in node.all_input_nodes if one in self.of_node]
            if not above or len(self.of_node[above[0]]) != len(numbers) or node.target in _CAT:
                return
            node = above[0]
        self.tapped.append((self.layers[str(node.target)].name, numbers))

    def _new(self, count: int) -> np.ndarray:
        self.count += count
        return np.arange(self.count - count, self.count)

    def _joint(self, one: np.ndarray | None, other: np.ndarray) -> np.ndarray:
        if one is not None:
            self.pairs.extend(zip(one.tolist(), other.tolist(), strict=False))
        return other

    def _first(self, pairs: Sequence[tuple[int, int]]) -> np.ndarray:
        """Return for each number the first of those that the pairs join with it."""
        joined = np.array(pairs, dtype=int).reshape(-1, 2)
        graph = coo_array((np.ones(len(joined)), joined.T), (self.count, self.count))
        _, labels = connected_components(graph, directed=False)
        return np.unique(labels, return_index=True)[1][labels]

    def result(self) -> ChannelMap:
        """Return the groups: makers that share a channel are one."""
        first = self._first(self.pairs)
        reads, writes = ({name: first[numbers] for name, numbers in side.items()} for side in (self.reads, self.writes))
        whole = [(self.writes[maker][0], number) for maker in self.makers for number in self.writes[maker]]
        leader, together = self._first([*self.pairs, *whole]), defaultdict(list)
        for maker in self.makers:
            together[leader[self.writes[maker][0]]].append(maker)
        groups, members = {}, {}
        for name, *others in together.values():
            numbers = np.unique(np.concatenate([writes[maker] for maker in (name, *others)]))
            if np.isin(numbers, first[self.frozen]).any():
                continue
            # layers that are read with exactly these channels
            taps = [tap for tap, tapped in self.tapped if np.array_equal(first[tapped], numbers)]
            members[name] = numbers
            groups[name] = ChannelGroup(name, len(numbers), (name, *others), tuple(dict.fromkeys(taps)))
        return ChannelMap(groups, reads, writes, members)
