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
from nnslim.network.graph import PASSING
from nnslim.network.walk import LayerIndex

Hooks = Mapping[str, Callable]
Sampled = tuple[Places, Tensor]  # places and the rows of outputs there, float64 on the CPU
_NO_HOOKS: Hooks = MappingProxyType({})
_NORM = (nn.modules.instancenorm._InstanceNorm, nn.GroupNorm)


class Tiles(Protocol):
    """Calibration input: any number of tiles, the same ones in the same order each time, one in memory at a time."""

    def __len__(self) -> int:
        """Return the number of tiles."""

    def __iter__(self) -> Iterator[Tensor]:
        """Yield (1, C, *patch) float32 tensors on the CPU."""


class EndOfPass(Exception):  # noqa: N818  not an error
    """Raised by a hook that has seen enough: ends the pass of one tile."""


@contextmanager
def hooked(network: nn.Module, before: Hooks, after: Hooks) -> Iterator[None]:
    """Attach hooks by layer name: before(module, inputs), after(module, inputs, output); remove them at the end."""
    layers = LayerIndex(network)
    handles = [layers[name].module.register_forward_pre_hook(hook) for name, hook in before.items()]
    handles += [layers[name].module.register_forward_hook(hook) for name, hook in after.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def run_hooked(network: nn.Module, tiles: Tiles, *, before: Hooks = _NO_HOOKS, after: Hooks = _NO_HOOKS) -> None:
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
    made: dict[int, str] = {}
    alive: list[Tensor] = []
    found: dict[str, str] = {}

    def record(name: str, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        source = made.get(id(inputs[0])) if inputs else None
        if isinstance(module, _NORM):
            if source is not None:
                found[source] = name
        elif isinstance(output, Tensor) and not (isinstance(module, PASSING) and source is None):
            alive.append(output)  # keeps ids unique while the pass runs
            made[id(output)] = source if isinstance(module, PASSING) else name

    leaves = (layer.name for layer in LayerIndex(network).values() if not layer.module._modules)
    hooks = {name: partial(record, name) for name in leaves}
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
    dense: nn.Module, slim: nn.Module, tiles: Tiles, requests: Sequence[Request], *, samples: int, seed: int
) -> None:
    """Fill the moments of each requested layer: inputs from the slim network, outputs from the dense one.

    Both passes end at the last layer that is needed. Memory: the moments, and the activations of one tile.

    Args:
        dense, slim: in eval mode, on one device; `slim` may be `dense` itself.
        samples: positions for each layer, over all tiles.
        seed: decides the positions; each layer and tile has its own stream, so the grouping of layers does not matter.
    """
    convs = {request.layer: request.conv for request in requests}
    for tile, found in sample_dense(dense, tiles, convs, samples=samples, seed=seed):
        _sample_slim(slim, tile, requests, found)


def sample_dense(
    dense: nn.Module, tiles: Tiles, convs: Mapping[str, nn.Module], *, samples: int, seed: int
) -> Iterator[tuple[Tensor, dict[str, Sampled]]]:
    """Yield each tile, on the network's device, with what the layers `convs` put out at sampled places.

    See `stream_moments`. The pass ends at the last layer that is needed.
    """
    device = next(dense.parameters()).device
    count = -(-samples // len(tiles))
    order = {layer.name: number for number, layer in enumerate(LayerIndex(dense).values())}

    def take(found: dict[str, Sampled], tile: int, name: str, module: nn.Module, inputs: Any, output: Tensor) -> None:
        generator = torch.Generator().manual_seed((seed * 1_000_003 + tile) * 10_007 + order[name])
        places = choose_places(convs[name], inputs[0], output, count, generator)
        found[name] = places, sample_outputs(convs[name], output, places)
        if len(found) == len(convs):
            raise EndOfPass

    for number, tile in enumerate(tiles):
        tile, found = tile.to(device), {}
        hooks = {name: partial(take, found, number, name) for name in convs}
        with torch.inference_mode(), suppress(EndOfPass), hooked(dense, {}, hooks):
            dense(tile)
        yield tile, found


@torch.inference_mode()
def _sample_slim(slim: nn.Module, tile: Tensor, requests: Sequence[Request], found: Mapping[str, Sampled]) -> None:
    """Add the slim network's inputs of one tile, at the places where the dense one's outputs were taken."""
    taken: list[str] = []

    def take(request: Request, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        places, outputs = found[request.layer]
        request.add(sample_inputs(request.conv, inputs[0], places), outputs)
        taken.append(request.layer)
        if len(taken) == len(requests):
            raise EndOfPass

    with suppress(EndOfPass), hooked(slim, {request.layer: partial(take, request) for request in requests}, {}):
        slim(tile)
