"""Torch on a CPU: folded norms, and convolutions called directly in oneDNN on tensors with their channels last."""

from __future__ import annotations

import itertools
import operator

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor

from nnslim.network.graph import CONVOLUTIONS, TRANSPOSED, layer_of, tidy
from nnslim.running.native import LANES, WIDEST, Kernels, kernels
from nnslim.running.rewrites import fold_norms


def channels_last(graph: fx.GraphModule) -> fx.GraphModule:
    """Return the graph for torch on a CPU: norms folded, convolutions straight in oneDNN, channels last in memory.

    Raises:
        RewriteError: see `note_shapes`.
    """
    graph = fold_norms(graph)
    for node in list(graph.graph.nodes):
        made = direct(layer_of(node)) if node.op == "call_module" else None
        if made is not None:
            name = f"{str(node.target).replace('.', '_')}_direct"
            graph.add_submodule(name, made)
            node.target = name
    _add_while_laying_out(graph)
    return tidy(graph)


def _add_while_laying_out(graph: fx.GraphModule) -> None:
    """Let a transposed convolution add the skip connection's product as it writes its own."""
    for add in [node for node in graph.graph.nodes if node.target is torch.add and len(node.args) == 2]:
        nodes = [node for node in add.args if isinstance(node, fx.Node)]
        for node, other in zip(nodes, reversed(nodes), strict=True):
            if isinstance(layer_of(node), TiledTransposed) and len(node.users) == 1 and other is not node:
                with graph.graph.inserting_before(add):
                    made = graph.graph.call_module(node.target, (node.args[0], other))
                add.replace_all_uses_with(made)
                graph.graph.erase_node(add)
                graph.graph.erase_node(node)
                break


class DirectConv(nn.Module):
    """A convolution that always takes oneDNN's kernels.

    torch leaves small tensors at batch 1 (B * C * D * H at most 20480) to a path of its own, which is many times
    slower for the few channels of a factored network and for all deep layers.
    """

    def __init__(self, conv: nn.Module) -> None:
        """Take the weights of a Conv2d or Conv3d that pads with zeros; they are copied."""
        super().__init__()
        self.layout = torch.channels_last if isinstance(conv, nn.Conv2d) else torch.channels_last_3d
        self.weight = nn.Parameter(conv.weight.detach().contiguous(memory_format=self.layout), requires_grad=False)
        self.bias = None if conv.bias is None else nn.Parameter(conv.bias.detach().clone(), requires_grad=False)
        self.stride, self.padding = list(conv.stride), list(conv.padding)
        self.dilation, self.groups = list(conv.dilation), conv.groups
        self.native: tuple[Tensor, Tensor] | None = None
        same = all(k % 2 and p == k // 2 for k, p in zip(conv.kernel_size, conv.padding, strict=True))
        unit = {*conv.stride, *conv.dilation, conv.groups} == {1}
        if isinstance(conv, nn.Conv3d) and same and unit and conv.out_channels == LANES and kernels() is not None:
            # (C_out, C_in, *K) -> (*K, C_in, C_out). One vector of outputs fills oneDNN's AVX-512 kernel only by half.
            bias = conv.weight.new_zeros(LANES) if conv.bias is None else conv.bias
            self.native = conv.weight.detach().permute(2, 3, 4, 1, 0).contiguous(), bias.detach().clone()

    def forward(self, x: Tensor) -> Tensor:
        """(B, C_in, *spatial) -> (B, C_out, *spatial')."""
        x = _laid_out(x, self.layout)
        if self.native is not None and x.dtype == torch.float32:
            return self._native(x)
        return torch.mkldnn_convolution(
            x, self.weight, self.bias, self.padding, self.stride, self.dilation, self.groups
        )

    def _native(self, x: Tensor) -> Tensor:
        weight, bias = self.native
        shape = (len(x), len(bias), *x.shape[2:])
        out = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=self.layout)
        for number in range(len(x)):
            kernels().conv(x[number].movedim(0, -1), weight, bias, out[number].movedim(0, -1))
        return out


class TiledTransposed(nn.Module):
    """A transposed convolution whose kernel is its stride: a matrix product per voxel, whose results are laid out."""

    def __init__(self, conv: nn.Module) -> None:
        """Take the weights of a ConvTranspose2d or 3d without padding, dilation and groups; they are copied."""
        super().__init__()
        self.kernel = tuple(conv.kernel_size)
        self.width = conv.out_channels
        self.layout = torch.channels_last if isinstance(conv, nn.ConvTranspose2d) else torch.channels_last_3d
        # (C_in, C_out, *K) -> (C_in, K * C_out)
        weight = conv.weight.detach().movedim(1, -1).reshape(conv.in_channels, -1)
        self.weight = nn.Parameter(weight.contiguous(), requires_grad=False)
        bias = conv.bias
        self.bias = None if bias is None else nn.Parameter(bias.detach().repeat(weight.shape[1] // self.width), False)

    def forward(self, x: Tensor, add: Tensor | None = None) -> Tensor:
        """(B, C_in, *spatial) -> (B, C_out, *spatial * kernel), plus `add` of the output's shape."""
        x = x.contiguous(memory_format=self.layout)
        if self._fits(x) and (native := kernels()) is not None:
            return self._native(native, x, add)
        batch, _, *spatial = x.shape
        rows = x.movedim(1, -1).reshape(-1, x.shape[1])
        made = rows @ self.weight if self.bias is None else torch.addmm(self.bias, rows, self.weight)
        made = made.view(batch, *spatial, *self.kernel, self.width)
        dims = len(spatial)
        order = [0] + [axis for d in range(dims) for axis in (1 + d, 1 + dims + d)] + [2 * dims + 1]
        made = made.permute(order).reshape(batch, *map(operator.mul, spatial, self.kernel), -1).movedim(-1, 1)
        return made if add is None else made.add_(add)

    def _fits(self, x: Tensor) -> bool:
        columns = self.weight.shape[1]
        fits = x.dim() == 5 and x.device.type == "cpu" and x.dtype == torch.float32 and not isinstance(x, FakeTensor)
        return fits and columns % LANES == 0 and columns <= WIDEST * 8 and x.shape[1] <= 2 * WIDEST

    def _native(self, native: Kernels, x: Tensor, add: Tensor | None) -> Tensor:
        shape = (len(x), self.width, *map(operator.mul, x.shape[2:], self.kernel))
        out = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=self.layout)
        bias = self.weight.new_zeros(self.weight.shape[1]) if self.bias is None else self.bias
        add = None if add is None else add.contiguous(memory_format=self.layout)
        for n in range(len(x)):
            more = None if add is None else add[n].movedim(0, -1)
            native.transposed(x[n].movedim(0, -1), self.weight, bias, self.kernel, more, out[n].movedim(0, -1))
        return out


def _laid_out(x: Tensor, layout: torch.memory_format) -> Tensor:
    """Return x with the strides of the layout, also where one channel leaves them open: oneDNN follows them."""
    x = x.contiguous(memory_format=layout)
    if x.shape[1] != 1:
        return x
    whole, *spatial = reversed(list(itertools.accumulate(reversed(x.shape[2:]), operator.mul, initial=1)))
    return x.as_strided(x.shape, (whole, 1, *spatial))


def direct(layer: nn.Module) -> nn.Module | None:
    """Return the direct form of a convolution, or None where there is none."""
    if isinstance(layer, CONVOLUTIONS) and layer.padding_mode == "zeros" and not isinstance(layer.padding, str):
        return DirectConv(layer)
    if not isinstance(layer, TRANSPOSED) or tuple(layer.kernel_size) != tuple(layer.stride):
        return None
    plain = layer.groups == 1 and set(layer.dilation) == {1} and not any((*layer.padding, *layer.output_padding))
    return TiledTransposed(layer) if plain else None
