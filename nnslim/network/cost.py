"""Exact counts of multiply-accumulates (MACs) and parameters, in named conventions.

Convention "macs": products with weights (convolutions, transposed convolutions, linear layers), and of activations with
each other (attention). Padding counts as data, biases and norms count nothing. A transposed convolution costs
C_in * C_out * prod(K) * voxels of its *input*.

Convention "fvcore": the above plus what fvcore adds for normalisation, 5 per element (4 without affine weights) of each
instance, group or layer norm. tucker-cnn's published "GFLOPs" are in this convention.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from nnslim.errors import SpecError
from nnslim.network.operations import counted_products, layer_products
from nnslim.network.walk import LayerIndex, unwrap

Convention = Literal["macs", "fvcore"]
_NORM = (nn.modules.instancenorm._InstanceNorm, nn.GroupNorm, nn.LayerNorm)


@dataclass
class LayerCost:
    """What one leaf module did in one forward pass.

    Attributes:
        name: canonical name; "" for a network that is a single layer.
        macs, norm_ops: totals over the samples of the batch and all calls.
        parameters: number in tensors that no earlier layer of the pass has.
        input_shape, output_shape: shapes in the first call, without the batch axis.
        voxels_in, voxels_out: spatial positions, summed over samples and calls.
    """

    name: str
    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]
    macs: int = 0
    norm_ops: int = 0
    parameters: int = 0
    voxels_in: int = 0
    voxels_out: int = 0


@dataclass
class Cost:
    """Counts of one forward pass.

    Attributes:
        layers: the leaf modules that ran, by canonical name, in order of execution.
        registered_parameters: parameters of all modules, each tensor once.
        attention_macs: products of activations with each other, which belong to no layer.
        input_shape: (batch, channels, *spatial) that the network was counted on.
        heads: names of the modules whose output *is* an output of the network (segmentation heads).
    """

    layers: dict[str, LayerCost] = field(default_factory=dict)
    registered_parameters: int = 0
    attention_macs: int = 0
    heads: tuple[str, ...] = ()
    input_shape: tuple[int, ...] = ()

    @property
    def parameters(self) -> int:
        """Parameters that the forward pass reaches: without unused deep-supervision heads."""
        return sum(layer.parameters for layer in self.layers.values())

    def macs(self, convention: Convention = "macs") -> int:
        """Return the multiply-accumulates of the pass in the named convention."""
        extra = sum(layer.norm_ops for layer in self.layers.values()) if convention == "fvcore" else 0
        return sum(layer.macs for layer in self.layers.values()) + self.attention_macs + extra


def measure_cost(network: nn.Module, input_shape: Sequence[int]) -> Cost:
    """Count one forward pass without computing it (shapes only, on torch's meta device).

    Args:
        network: any module tree, also inside torch.compile's or DDP's wrapper; not modified.
        input_shape: (batch, channels, *spatial), voxels.
    Raises:
        SpecError: the network cannot take an input of that shape.
    """
    network = unwrap(network)
    cost = Cost(registered_parameters=sum(p.numel() for p in network.parameters()), input_shape=tuple(input_shape))
    twin = copy.deepcopy(network).to("meta").eval()
    # Moving to meta gives tied weights one tensor each: go by the identity in the original.
    originals = dict(network.named_parameters(remove_duplicate=False))
    identity = {id(p): id(originals[name]) for name, p in twin.named_parameters(remove_duplicate=False)}
    counted: set[int] = set()
    outputs: dict[int, tuple[str, Tensor]] = {}  # the tensor keeps its id unique while the pass runs

    def record(name: str, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        if not isinstance(output, Tensor) or not inputs or not isinstance(inputs[0], Tensor):
            return
        outputs[id(output)] = name, output
        fresh = [p for p in module.parameters() if identity[id(p)] not in counted]
        counted.update(identity[id(p)] for p in fresh)
        layer = cost.layers.setdefault(name, LayerCost(name, tuple(inputs[0].shape[1:]), tuple(output.shape[1:])))
        layer.voxels_in += inputs[0].shape[0] * math.prod(inputs[0].shape[2:])
        layer.voxels_out += output.shape[0] * math.prod(output.shape[2:])
        layer.macs += layer_products(module, inputs[0], output)
        if isinstance(module, _NORM):
            layer.norm_ops += inputs[0].numel() * (4 if module.weight is None else 5)
        layer.parameters += sum(p.numel() for p in fresh)

    leaves = {layer.name: layer.module for layer in LayerIndex(twin).values() if not layer.module._modules}
    for name, module in (leaves or {"": twin}).items():
        module.register_forward_hook(partial(record, name))
    try:
        with torch.no_grad(), counted_products() as products:
            result = twin(torch.empty(tuple(input_shape), device="meta"))
    except (RuntimeError, AssertionError, ValueError) as error:
        raise SpecError(f"the network cannot run on an input of shape {tuple(input_shape)}: {error}") from error
    cost.attention_macs = products["matmul"]
    results = result if isinstance(result, (list, tuple)) else [result]
    cost.heads = tuple(outputs[id(item)][0] for item in results if id(item) in outputs)
    return cost


@dataclass(frozen=True)
class Counts:
    """Parameters that the forward pass reaches, and MACs of one patch in both conventions."""

    parameters: int
    macs: int
    macs_fvcore: int

    @classmethod
    def of(cls, cost: Cost) -> Counts:
        """Summarise a measured cost."""
        return cls(cost.parameters, cost.macs(), cost.macs("fvcore"))
