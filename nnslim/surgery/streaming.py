"""Run tiles through a dense and a slim network side by side; stream the inputs and outputs of chosen layers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from nnslim.maths.moments import ChannelMoments, Moments, Places, choose_places, sample_inputs, sample_outputs
from nnslim.network.walk import LayerIndex

_NORM = (nn.modules.instancenorm._InstanceNorm, nn.GroupNorm)
_PASSING = (nn.Dropout, nn.Dropout2d, nn.Dropout3d, nn.Identity)


class Tiles(Protocol):
    """Calibration input: any number of tiles, the same ones in the same order each time, one in memory at a time."""

    def __len__(self) -> int:
        """Return the number of tiles."""

    def __iter__(self) -> Iterator[Tensor]:
        """Yield (1, C, *patch) float32 tensors on the CPU."""


class EndOfPass(Exception):  # noqa: N818  not an error
    """Raised by a hook that has seen enough: ends the pass of one tile."""


@contextmanager
def hooked(network: nn.Module, before: Mapping[str, Callable], after: Mapping[str, Callable]) -> Iterator[None]:
    """Attach hooks by layer name: before(module, inputs), after(module, inputs, output); remove them at the end."""
    layers = LayerIndex(network)
    handles = [layers[name].module.register_forward_pre_hook(hook) for name, hook in before.items()]
    handles += [layers[name].module.register_forward_hook(hook) for name, hook in after.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def run_hooked(
    network: nn.Module,
    tiles: Tiles,
    *,
    before: Mapping[str, Callable] = MappingProxyType({}),
    after: Mapping[str, Callable] = MappingProxyType({}),
) -> None:
    """Run all tiles through a network in eval mode, without gradients; hooks as for `hooked`."""
    device = next(network.parameters()).device
    with hooked(network, before, after), torch.no_grad():
        for tile in tiles:
            with suppress(EndOfPass):
                network(tile.to(device))


def following_norms(network: nn.Module, tile: Tensor) -> dict[str, str]:
    """Return the norm layer that takes each layer's output, by name, where there is one (dropout may lie between).

    Args:
        network: in eval mode. tile: (1, C, *patch).
    """
    index = LayerIndex(network)
    made: dict[int, str] = {}
    alive: list[Tensor] = []
    found: dict[str, str] = {}

    def record(name: str, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        source = made.get(id(inputs[0])) if inputs else None
        if isinstance(module, _NORM):
            if source is not None:
                found[source] = name
        elif isinstance(output, Tensor) and not (isinstance(module, _PASSING) and source is None):
            alive.append(output)  # keeps ids unique while the pass runs
            made[id(output)] = source if isinstance(module, _PASSING) else name

    leaves = [layer for layer in index.values() if not layer.module._modules]
    hooks = {
        layer.name: lambda module, inputs, output, name=layer.name: record(name, module, inputs, output)
        for layer in leaves
    }
    with hooked(network, {}, hooks), torch.no_grad():
        network(tile)
    return found


@dataclass(frozen=True)
class Request:
    """One layer to sample.

    Attributes:
        layer: name, the same in both networks. conv: the dense convolution, for its geometry.
        moments: where its samples go.
        project: (I, R) input factor that is already known: moments of R channels instead of I.
    """

    layer: str
    conv: nn.Module
    moments: Moments | ChannelMoments
    project: Tensor | None = None

    def add(self, x: Tensor, y: Tensor) -> None:
        """Take the rows of one tile."""
        if self.project is not None:
            x = torch.einsum("nik,ib->nbk", x.unflatten(1, (len(self.project), -1)), self.project).flatten(1)
        self.moments.add(x, y)


def stream_moments(
    dense: nn.Module,
    slim: nn.Module,
    tiles: Tiles,
    requests: Sequence[Request],
    *,
    samples: int,
    seed: int,
    on_tile: Callable[[], None] | None = None,
) -> None:
    """Fill the moments of each requested layer: inputs from the slim network, outputs from the dense one.

    Both passes end at the last layer that is needed. Memory: the moments, and the activations of one tile.

    Args:
        dense, slim: in eval mode, on one device; `slim` may be `dense` itself.
        tiles: calibration tiles.
        requests: layers to sample.
        samples: positions for each layer, over all tiles.
        seed: decides the positions; each layer and tile has its own stream, so the grouping of layers does not matter.
        on_tile: called after each tile.
    """
    device = next(dense.parameters()).device
    each = -(-samples // len(tiles))
    order = {layer.name: number for number, layer in enumerate(LayerIndex(dense).values())}
    for number, tile in enumerate(tiles):
        pair = _TilePair(requests, each, {name: (seed * 1_000_003 + number) * 10_007 + n for name, n in order.items()})
        tile = tile.to(device)
        with torch.inference_mode():
            with hooked(dense, {}, {r.layer: partial(pair.take_output, r) for r in requests}), suppress(EndOfPass):
                dense(tile)
            with hooked(slim, {r.layer: partial(pair.take_input, r) for r in requests}, {}), suppress(EndOfPass):
                slim(tile)
        if on_tile is not None:
            on_tile()


class _TilePair:
    """Samples of one tile: first the dense network's outputs, then the slim one's inputs at the same places."""

    def __init__(self, requests: Sequence[Request], count: int, seeds: Mapping[str, int]) -> None:
        self._wanted, self._count, self._seeds = len(requests), count, seeds
        self._places: dict[str, Places] = {}
        self._outputs: dict[str, Tensor] = {}
        self._taken = 0

    def take_output(self, request: Request, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        generator = torch.Generator().manual_seed(self._seeds[request.layer])
        places = choose_places(request.conv, inputs[0], output, self._count, generator)
        self._places[request.layer] = places
        self._outputs[request.layer] = sample_outputs(request.conv, output, places)
        if len(self._outputs) == self._wanted:
            raise EndOfPass

    def take_input(self, request: Request, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        rows = sample_inputs(request.conv, inputs[0], self._places[request.layer])
        request.add(rows, self._outputs[request.layer])
        self._taken += 1
        if self._taken == self._wanted:
            raise EndOfPass
