"""A network as a graph of torch's own layers, so that rewrites see which layer feeds which."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.passes.fake_tensor_prop import FakeTensorProp

from nnslim.errors import RewriteError

CONVOLUTIONS = (nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose2d, nn.ConvTranspose3d)
PASSING = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout)


def trace(network: nn.Module, shape: Sequence[int]) -> fx.GraphModule:
    """Return the network in eval mode as a graph whose nodes are torch's own layers, with the shape at each node.

    The layers are the network's own objects, not copies. Layers that do nothing in eval mode are left out.

    Args:
        network: any module of one tensor argument whose path does not depend on the values or the size of its input.
        shape: (B, C, *patch) of the input.
    Raises:
        RewriteError: the path depends on the input, or the network does not run on that shape.
    """
    was_training = network.training
    network.eval()
    try:
        graph = fx.Tracer().trace(network)
        traced = fx.GraphModule(network, graph, type(network).__name__)
    except Exception as error:  # whatever the network's own code raises on a proxy
        raise RewriteError(f"{type(network).__name__} cannot be traced: {error}") from error
    finally:
        network.train(was_training)
    traced.eval()
    for node in list(traced.graph.nodes):
        if isinstance(layer_of(node), PASSING):
            node.replace_all_uses_with(node.args[0])
            traced.graph.erase_node(node)
    traced.graph.eliminate_dead_code()
    return note_shapes(traced, shape)


def tidy(graph: fx.GraphModule) -> fx.GraphModule:
    """Drop layers without a use and compile the code; returns the same object."""
    graph.graph.eliminate_dead_code()
    graph.delete_all_unused_submodules()
    graph.graph.lint()
    graph.recompile()
    return graph


def note_shapes(graph: fx.GraphModule, shape: Sequence[int]) -> fx.GraphModule:
    """Tidy, and note the output shape of each node that has none yet, without computing anything; the same object.

    Raises:
        RewriteError: the network does not run on that shape.
    """
    tidy(graph)
    known = next((node.meta["val"] for node in graph.graph.nodes if "val" in node.meta), None)
    mode = FakeTensorMode(allow_non_fake_inputs=True) if known is None else known.fake_mode
    like = next(graph.parameters(), torch.empty(0))
    try:
        with torch.no_grad(), mode:
            x = torch.empty(tuple(shape), dtype=like.dtype, device=like.device)
            _Shapes(graph, mode).propagate_dont_convert_inputs(x)
    except Exception as error:  # whatever torch says about a shape
        raise RewriteError(f"the network does not run on {tuple(shape)}: {str(error).splitlines()[0]}") from error
    return graph


class _Shapes(FakeTensorProp):
    """Runs only what has no shape yet: a pass of a whole network in fake tensors takes seconds."""

    def run_node(self, n: fx.Node) -> Any:
        return n.meta["val"] if "val" in n.meta else super().run_node(n)

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        outputs = getattr(self.fetch_attr(target), "empty_outputs", None)
        return super().call_module(target, args, kwargs) if outputs is None else outputs(*args)


def copied(graph: fx.GraphModule) -> fx.GraphModule:
    """Return a graph of its own over the same layers."""
    made = fx.GraphModule(graph, copy.deepcopy(graph.graph), graph.__class__.__name__)
    return made.train(graph.training)


def layer_of(node: fx.Node) -> nn.Module | None:
    """Return the layer that a node calls, or None."""
    return node.graph.owning_module.get_submodule(str(node.target)) if node.op == "call_module" else None


def shape_of(node: fx.Node) -> tuple[int, ...]:
    """Return the shape of a node's output, as `note_shapes` noted it."""
    return tuple(node.meta["val"].shape)


def add_layer(graph: fx.GraphModule, layer: nn.Module, name: str, inputs: Sequence[fx.Node]) -> fx.Node:
    """Add a layer under a free name like `name`, and its call at the graph's insertion point."""
    free, number = name.replace(".", "_"), 0
    while hasattr(graph, free):
        number += 1
        free = f"{name.replace('.', '_')}_{number}"
    graph.add_submodule(free, layer)
    return graph.graph.call_module(free, tuple(inputs))


def is_pointwise(layer: nn.Module | None) -> bool:
    """Return whether the layer is a plain 1x1 convolution: a matrix product over channels."""
    return (
        isinstance(layer, CONVOLUTIONS)
        and set(layer.kernel_size) == {1}
        and set(layer.stride) == {1}
        and layer.groups == 1
        and (layer.padding == "valid" or not any(layer.padding))
    )


def matrix(conv: nn.Module) -> torch.Tensor:
    """Return the (outputs, inputs) matrix of a pointwise convolution."""
    return conv.weight.detach().flatten(1)
