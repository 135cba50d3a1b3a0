"""Multiply-accumulates of every operation of a forward pass, attention included, in three named conventions.

`nnslim.network.cost` counts layers. Here operations are counted as they run, module by module, on torch's meta device.

Convention "torch": products only, as `torch.utils.flop_counter` / 2: linear, matrix product, convolution; a transposed
convolution costs C_in * C_out * prod(K) * voxels of its *input*.

Convention "torchprofile": what torchprofile 0.0.4 and 0.1.0 print, which the token-sparse paper publishes: the above,
but a transposed convolution is charged the voxels of its *output* (8 times too many for kernel = stride = 2 in 3D), and
elementwise products, means, average pooling and affine layer norms cost 1 per element. The scale inside attention
counts as such a product, fused or not.

Convention "ptflops": what ptflops 0.7.5 counts by default, which the Embedded-ViT paper publishes. It looks at calls,
not at operations: layers with their biases, 1 per element of a norm (2 where it is an affine batch, instance or group
norm), 1 of an activation or softmax that is a layer or called from torch.nn.functional (2 where it is both), and
`torch.matmul`, but not `@`: products of attention are left out. Here a layer that a network holds under several names
counts once, and nothing inside fused attention counts.
"""

from __future__ import annotations

import copy
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from nnslim.errors import SpecError
from nnslim.network.walk import unwrap

Convention = Literal["torch", "torchprofile", "ptflops"]
CONVENTIONS: tuple[Convention, ...] = ("torch", "torchprofile", "ptflops")
_aten = torch.ops.aten
_Shape = Sequence[int]


@dataclass
class OperationCost:
    """Counts of one forward pass.

    Attributes:
        counts: (module path, operation) -> MACs in each of CONVENTIONS; the path is of the innermost module that ran
            the operation, "" for the network's own forward.
        parameters: of all modules, each tensor once.
    """

    counts: dict[tuple[str, str], list[int]] = field(default_factory=lambda: defaultdict(lambda: [0, 0, 0]))
    parameters: int = 0

    def macs(self, convention: Convention = "torch", prefix: str = "") -> int:
        """Return the multiply-accumulates of a module and all below it ("" for the network)."""
        position, inside = CONVENTIONS.index(convention), f"{prefix}." if prefix else ""
        return sum(value[position] for (path, _), value in self.counts.items() if f"{path}.".startswith(inside))

    def by_operation(self, convention: Convention = "torch") -> dict[str, int]:
        """Return the total of each kind of operation."""
        totals: Counter[str] = Counter()
        for (_, operation), value in self.counts.items():
            totals[operation] += value[CONVENTIONS.index(convention)]
        return dict(+totals)


def count_operations(network: nn.Module, input_shape: Sequence[int]) -> OperationCost:
    """Count one forward pass in evaluation mode without computing it.

    Args:
        network: any module tree, also inside torch.compile's or DDP's wrapper; not modified.
        input_shape: (batch, channels, *spatial), voxels.
    Raises:
        SpecError: the network cannot take an input of that shape, or needs values (not shapes) to decide.
    """
    network = unwrap(network)
    cost = OperationCost(parameters=sum(p.numel() for p in network.parameters()))
    twin = copy.deepcopy(network).to("meta").eval()
    stack = [""]

    def add(operation: str, products: int, profile: int | None = None, calls: int = 0) -> None:
        entry = cost.counts[stack[-1], operation]
        entry[0] += products
        entry[1] += products if profile is None else profile
        entry[2] += calls

    def called(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        if count := _layer_calls(module, inputs, output):
            add("layers", 0, 0, count)
        stack.pop()

    for name, module in twin.named_modules():
        if name:
            module.register_forward_pre_hook(lambda _, __, name=name: stack.append(name))
            module.register_forward_hook(called)
    try:
        with torch.no_grad(), _counting(add):
            twin(torch.empty(tuple(input_shape), device="meta"))
    except (RuntimeError, AssertionError, ValueError, NotImplementedError) as error:
        raise SpecError(f"the network cannot be counted on an input of shape {tuple(input_shape)}: {error}") from error
    return cost


@contextmanager
def counted_products() -> Iterator[dict[str, int]]:
    """Count what runs inside, convention "torch": MACs of "linear", "matmul" (of activations) and "conv"."""
    totals: dict[str, int] = defaultdict(int)

    def add(operation: str, products: int, *_: int) -> None:
        totals[operation] += products

    with _counting(add):
        yield totals


@contextmanager
def _counting(add: Callable[..., None]) -> Iterator[None]:
    """Call add(operation, products, elements that count in "torchprofile", calls that count in "ptflops")."""
    counter = _Operations(add)
    with _Calls(counter), counter:
        yield


_PER_ELEMENT = {_aten.mul: "mul", _aten.mul_: "mul", _aten.mean: "mean"}
_PER_ELEMENT |= {_aten.avg_pool2d: "avg_pool", _aten.avg_pool3d: "avg_pool"}


class _Operations(TorchDispatchMode):
    """Counts primitive operations by the shapes that reach them."""

    def __init__(self, add: Callable[..., None]) -> None:
        super().__init__()
        self.add = add
        self.paused = False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if not self.paused:
            self._count(func.overloadpacket, args, result)
        return result

    def _count(self, operation: Any, args: tuple[Any, ...], result: Any) -> None:
        if operation in (_aten.mm, _aten.addmm, _aten.bmm, _aten.baddbmm):
            left, right = args[-2:]
            self.add("linear" if left.dim() == 2 else "matmul", math.prod(left.shape) * right.shape[-1])
        elif operation is _aten.convolution:
            source, weight, transposed, groups = args[0], args[1], args[6], args[8]
            per_position = weight.numel() // weight.shape[0]  # one output channel, or one input channel if transposed
            profile = result.numel() * source.shape[1] // groups * math.prod(weight.shape[2:])
            self.add("conv", (source if transposed else result).numel() * per_position, profile)
        elif operation is _aten.native_layer_norm:
            self.add("layer_norm", 0, args[0].numel() if args[2] is not None else 0)
        elif operation in _PER_ELEMENT:
            self.add(_PER_ELEMENT[operation], 0, result.numel())


_NORMS = (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm, nn.GroupNorm, nn.LayerNorm)
_ACTIVATIONS = (nn.ReLU, nn.PReLU, nn.ELU, nn.LeakyReLU, nn.ReLU6, nn.GELU)
_POOLS = tuple(
    getattr(nn, f"{kind}Pool{axes}d") for kind in ("Max", "Avg", "AdaptiveMax", "AdaptiveAvg") for axes in (1, 2, 3)
)
_BY_INPUT = {functional.relu, functional.prelu, functional.elu, functional.relu6, functional.gelu, functional.silu}
_BY_INPUT |= {functional.softmax} | {
    getattr(functional, f"{kind}_pool{axes}d")
    for kind in ("max", "avg", "adaptive_max", "adaptive_avg")
    for axes in (1, 2, 3)
}
# torch does not tell `a @ b` from `a.matmul(b)`; ptflops counts only the second, and here neither counts.
_PRODUCTS = {torch.matmul, torch.mm, torch.bmm}
_ELEMENTWISE = {torch.mul, torch.add}


def layer_products(module: nn.Module, inputs: Tensor, output: Tensor) -> int:
    """Return the products with weights of one call of a layer, 0 for modules other than convolutions and linear."""
    if not isinstance(module, (nn.modules.conv._ConvNd, nn.Linear)):
        return 0
    side = inputs if getattr(module, "transposed", False) else output
    return side.numel() // side.shape[-1 if isinstance(module, nn.Linear) else 1] * module.weight.numel()


def _layer_calls(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> int:
    """Return what ptflops charges one call of a layer."""
    if not inputs or not isinstance(inputs[0], Tensor) or not isinstance(output, Tensor):
        return 0
    if products := layer_products(module, inputs[0], output):
        return products + (0 if module.bias is None else output.numel())
    if isinstance(module, _NORMS):
        return inputs[0].numel() * (2 if getattr(module, "affine", False) else 1)
    if isinstance(module, _POOLS):
        return inputs[0].numel()
    return output.numel() if isinstance(module, (*_ACTIVATIONS, nn.Upsample)) else 0


class _Calls(TorchFunctionMode):
    """Counts calls of functions as ptflops does, and fused attention as the operations that it stands for."""

    def __init__(self, counter: _Operations) -> None:
        super().__init__()
        self.counter, self.add = counter, counter.add

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is functional.scaled_dot_product_attention:  # whatever torch runs on this device
            query, key, value = args[:3]
            pairs = math.prod(query.shape[:-1]) * key.shape[-2]
            self.add("matmul", pairs * (query.shape[-1] + value.shape[-1]))
            self.add("mul", 0, pairs)
            self.counter.paused = True
        try:
            result = func(*args, **(kwargs or {}))
        finally:
            self.counter.paused = False
        if func in _BY_INPUT:
            self.add("calls", 0, 0, (kwargs["input"] if kwargs and "input" in kwargs else args[0]).numel())
        elif func in _PRODUCTS:
            self.add("calls", 0, 0, args[0].numel() * args[1].shape[-1])
        elif func in _ELEMENTWISE or func is functional.interpolate:
            self.add("calls", 0, 0, result.numel())
        return result
