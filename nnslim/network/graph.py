"""A network as a graph of torch's own layers, so that rewrites see which layer feeds which."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import partial
from operator import attrgetter
from typing import Any

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.passes.fake_tensor_prop import FakeTensorProp

from nnslim.errors import RewriteError, first_line

CONVOLUTIONS = (nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose2d, nn.ConvTranspose3d)
PASSING = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout)


def trace(network: nn.Module, shape: Sequence[int]) -> fx.GraphModule:
    """Return the network in eval mode as a graph whose nodes are torch's own layers, with the shape at each node.

    The layers are the network's own objects, not copies. Layers that do nothing in eval mode are left out. Other
    threads may use networks meanwhile, this one included where it is in eval mode.

    Args:
        network: any module of one tensor argument whose path does not depend on the values or the size of its input.
        shape: (B, C, *patch) of the input.
    Raises:
        RewriteError: the path depends on the input, or the network does not run on that shape.
    """
    training = [module for module in network.modules() if module.training]
    network.eval()
    try:
        traced = _Recorder().record(network)
        for node in list(traced.graph.nodes):
            if isinstance(layer_of(node), PASSING):
                node.replace_all_uses_with(node.args[0])
                traced.graph.erase_node(node)
        traced.graph.eliminate_dead_code()
        return note_shapes(traced.eval(), shape)
    except RewriteError:
        raise
    except Exception as error:  # whatever the network's own code raises on a proxy
        raise RewriteError(f"{type(network).__name__} cannot be traced: {first_line(error)}") from error
    finally:
        for module in training:
            module.training = True


class _Recorder(fx.Tracer):
    """Records the calls of a network's layers without a patch on `nn.Module`.

    `fx.Tracer.trace` replaces `nn.Module.__call__` for the whole process, and so records what other threads call. This
    one walks through a twin of the network: the same parameters and layers in objects whose classes record.
    """

    def record(self, network: nn.Module) -> fx.GraphModule:
        self.proxies: dict[str, fx.Proxy] = {}
        self.classes: dict[type, type] = {}
        self.twins: dict[nn.Module, nn.Module] = {}
        self.root = root = self._twin(network)
        self.root_module_name = type(network).__name__
        self.submodule_paths = {module: name for name, module in root.named_modules()}
        self.tensor_attrs = {
            value: f"{name}.{key}" if name else key
            for name, module in root.named_modules()
            for key, value in vars(module).items()
            if isinstance(value, torch.Tensor)
        }
        self.graph = fx.Graph()
        forward, given = self.create_args_for_root(type(root).forward, True)
        self.create_node("output", "output", (self.create_arg(forward(*given)),), {})
        for node in self.graph.nodes:
            node.meta.clear()  # names the twin's classes
        named = {str(node.target) for node in self.graph.nodes if node.op in ("call_module", "get_attr")}
        # Tensors that the code computed itself became constants of the twin.
        held = {name: vars(root)[name] if name in vars(root) else attrgetter(name)(network) for name in named}
        return fx.GraphModule(held, self.graph, type(network).__name__)

    def _twin(self, module: nn.Module) -> nn.Module:
        if (twin := self.twins.get(module)) is None:
            cls = type(module)
            if cls not in self.classes:
                self.classes[cls] = type(cls.__name__, (_recording(self, cls), cls), {"__module__": cls.__module__})
            twin = self.twins[module] = object.__new__(self.classes[cls])
            vars(twin).update(vars(module))
            twin._modules = {name: item and self._twin(item) for name, item in module._modules.items()}
        return twin


def _recording(tracer: _Recorder, cls: type) -> type:
    """Return what makes the calls and the parameters of a class of layers known to a tracer."""

    class Recording:
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return tracer.call_module(self, partial(cls.__call__, self), args, kwargs)

        def __getattr__(self, name: str) -> Any:
            return tracer.getattr(name, cls.__getattr__(self, name), tracer.proxies)

    return Recording


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
