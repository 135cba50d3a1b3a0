"""Never slower: dense and slim are measured on this device, at the real patch, as wholes and layer by layer."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from nnslim.errors import RewriteError
from nnslim.network.cost import measure_cost
from nnslim.network.graph import layer_of, trace
from nnslim.network.walk import LayerIndex
from nnslim.running.engine import Settings, remembered, with_fallback
from nnslim.running.machine import cpu_name, machine_threads
from nnslim.running.timing import pass_seconds

# Seconds of the dense pass below which overheads decide, and nobody waits. A whole 128^3 patch takes a GPU 0.02 s.
_NEGLIGIBLE, _NEGLIGIBLE_ON_CUDA = 0.05, 0.001
_NAMED = 3  # layers in a message
_NORMS = (nn.InstanceNorm2d, nn.InstanceNorm3d, nn.BatchNorm2d, nn.BatchNorm3d)
_ACTIVATIONS = (nn.LeakyReLU, nn.ReLU)


@dataclass(frozen=True)
class Speed:
    """Seconds of one forward pass, dense and slim, in alternated rounds on one backend.

    Attributes:
        dense, slim: medians. backend: both ran on it.
        where: the device, threads and version of torch that it holds for, see `place`.
        planned: seconds of the slim network before layers went back to dense; None where `slim` is of the whole plan.
        put_back: the layers that went back to dense, because the network was not faster with them factored.
        device: "cpu" or "cuda".
    """

    dense: float
    slim: float
    backend: str
    where: str = ""
    planned: float | None = None
    put_back: tuple[str, ...] = ()
    device: str = "cpu"

    @property
    def gains(self) -> bool:
        """Whether slim wins, or a pass is so short that it does not matter."""
        return self.slim < self.dense or self.dense < (_NEGLIGIBLE_ON_CUDA if self.device == "cuda" else _NEGLIGIBLE)

    def __str__(self) -> str:
        text = f"{self.slim:.3g} s per patch, dense {self.dense:.3g} s ({self.dense / self.slim:.2f}x, {self.backend})"
        if not self.put_back:
            return text
        named = ", ".join(self.put_back[:_NAMED]) + (", ..." if len(self.put_back) > _NAMED else "")
        if self.planned is None:
            return f"{text}, no factored layer saves time, of {len(self.put_back)} measured: {named}"
        return f"{text}, {self.planned:.3g} s before {len(self.put_back)} layer(s) went back to dense: {named}"

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values, milliseconds."""
        return {
            "dense_ms": round(self.dense * 1e3, 2),
            "slim_ms": round(self.slim * 1e3, 2),
            "backend": self.backend,
            "where": self.where,
            "planned_ms": None if self.planned is None else round(self.planned * 1e3, 2),
            "put_back": list(self.put_back),
            "device": self.device,
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Speed:
        """Read what `to_dict` made."""
        times = [None if (ms := values[f"{name}_ms"]) is None else ms / 1e3 for name in ("dense", "slim", "planned")]
        rest = {"planned": times[2], "put_back": tuple(values["put_back"]), "device": values.get("device", "cpu")}
        return cls(*times[:2], values["backend"], values["where"], **rest)


def place(device: torch.device, settings: Settings) -> str:
    """Return in words what a measurement holds for: device, threads, asked backend, version of torch."""
    version = f"{settings.backend}, torch {torch.__version__}"
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, {version}"
    return f"{cpu_name()} ({device.type}), {settings.threads or machine_threads()} threads, {version}"


def compare_speed(dense: nn.Module, slim: nn.Module, shape: Sequence[int], settings: Settings) -> Speed:
    """Measure both networks on the same backend, in single precision: int8 models are made from the result only later.

    Args:
        dense, slim: in eval mode, on one device. shape: (B, C, *patch).
        settings: "auto" takes the backend known to be the fastest for the dense network here, else eager.
    Raises:
        BackendError: not even stock torch runs one of them.
    """
    single = replace(settings, precision="f32")
    if single.backend == "auto":
        single = replace(single, backend=remembered(dense, shape, single) or "eager")
    engines = [with_fallback(network, shape, single) for network in (dense, slim)]
    seconds = pass_seconds([engine for engine, _ in engines], shape)
    device = next(dense.parameters()).device
    return Speed(*seconds, engines[1][1], place(device, settings), device=device.type)


def layer_gains(
    dense: nn.Module, slim: nn.Module, names: Iterable[str], shape: Sequence[int], backend: str
) -> dict[str, float]:
    """Measure layers one by one; return the seconds of a forward pass that each saves in the slim network.

    Each is measured with the norm and the activation that follow it, because what a factored layer saves lies partly
    in them. On openvino and compile, which take long to prepare, eager stands in: it makes the same rewrites.

    Args:
        dense, slim: in eval mode, on one device. names: layers that differ.
        shape: (B, C, *patch). backend: that the networks run on.
    """
    settings = Settings("stock" if backend == "stock" else "eager")
    cost, followers = measure_cost(dense, shape), _followers(dense, shape)
    before, after = LayerIndex(dense), LayerIndex(slim)
    gains = {}
    for name in names:
        layer = before[name]
        size = (shape[0], *cost.layers[layer.name].input_shape)
        rest = followers.get(id(layer.module), [])
        pair = [nn.Sequential(module, *rest).eval() for module in (layer.module, after[name].module)]
        seconds = pass_seconds([with_fallback(copy.deepcopy(one), size, settings)[0] for one in pair], size)
        gains[name] = seconds[0] - seconds[1]
    return gains


def _followers(network: nn.Module, shape: Sequence[int]) -> dict[int, list[nn.Module]]:
    """Return the norm and the activation behind each layer, by the layer's id; nothing where tracing fails."""
    try:
        graph = trace(network, shape)
    except RewriteError:
        return {}
    found = {}
    for node in graph.graph.nodes:
        if (layer := layer_of(node)) is not None:
            found[id(layer)] = behind = []
            for kinds in (_NORMS, _ACTIVATIONS):
                node = next(iter(node.users)) if len(node.users) == 1 else None
                if node is None or not isinstance(layer_of(node), kinds):
                    break
                behind.append(layer_of(node))
    return found
