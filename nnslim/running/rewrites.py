"""Exact rewrites of a network's graph: the same function, with fewer multiplications and less memory traffic.

Each function takes a graph from `trace` and returns a new one; layers of the original are shared or replaced, never
changed. All are exact in real numbers.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Sequence

import torch
from torch import Tensor, fx, nn

from nnslim.network.graph import (
    CONVOLUTIONS,
    TRANSPOSED,
    add_layer,
    copied,
    is_pointwise,
    layer_of,
    matrix,
    note_shapes,
    shape_of,
    trace,
)
from nnslim.running.norm_pass import NormPass


def split_concatenations(graph: fx.GraphModule) -> fx.GraphModule:
    """Replace each 1x1 convolution of a concatenation by the sum of one per part.

    conv([a; b]) = conv_a(a) + conv_b(b). The product of a skip connection is computed where the skip is made, so that
    what is kept for the decoder is its few rank channels instead of the whole tensor.
    """
    graph = copied(graph)
    order = {node: number for number, node in enumerate(graph.graph.nodes)}
    for cat in [node for node in graph.graph.nodes if _is_concatenation(node)]:
        parts = list(cat.args[0])
        for user in list(cat.users):
            conv = layer_of(user)
            if not is_pointwise(conv):
                continue
            products = []
            last = max(parts, key=order.__getitem__)
            weights = matrix(conv).split([shape_of(part)[1] for part in parts], 1)
            for part, weight in zip(parts, weights, strict=True):
                piece = _pointwise_like(conv, weight, conv.bias if part is last else None)
                with graph.graph.inserting_after(_after_placeholders(part)):
                    products.append(add_layer(graph, piece, f"{user.target}_part", (part,)))
            with graph.graph.inserting_before(user):
                total = functools.reduce(lambda a, b: graph.graph.call_function(torch.add, (a, b)), products)
            user.replace_all_uses_with(total)
            graph.graph.erase_node(user)
        if not cat.users:
            graph.graph.erase_node(cat)
    return note_shapes(graph, _input_shape(graph))


def merge_products(graph: fx.GraphModule) -> fx.GraphModule:
    """Replace a convolution, plain or transposed, and the 1x1 after it by one convolution, where that costs less.

    W2 (W1 * x + b1) + b2 = (W2 W1) * x + (W2 b1 + b2). Above all a transposed convolution followed by the input factor
    of the next layer, which becomes a transposed convolution to a few rank channels.
    """
    graph = copied(graph)
    changed = True
    while changed:
        changed = False
        for node in list(graph.graph.nodes):
            first = layer_of(node)
            if not isinstance(first, CONVOLUTIONS + TRANSPOSED) or first.groups != 1 or len(node.users) != 1:
                continue
            (user,) = node.users
            second = layer_of(user)
            if not is_pointwise(second) or not _merging_pays(node, first, second):
                continue
            with graph.graph.inserting_before(node):
                made = add_layer(graph, _merged(first, second), f"{node.target}_merged", node.args)
            made.meta.update(user.meta)  # its shape, asked for when the next pair is looked at
            user.replace_all_uses_with(made)
            graph.graph.erase_node(user)
            graph.graph.erase_node(node)
            changed = True
    return note_shapes(graph, _input_shape(graph))


def fold_norms(graph: fx.GraphModule) -> fx.GraphModule:
    """Replace 1x1 -> instance norm -> leaky ReLU -> 1x1 by one pass over the low-rank tensor, see `NormPass`.

    Any of the products, and the activation, may be missing. A wide tensor that other nodes need as well is
    returned by the same pass.
    """
    graph = copied(graph)
    norms = [node for node in graph.graph.nodes if isinstance(layer_of(node), (nn.InstanceNorm2d, nn.InstanceNorm3d))]
    for norm in [node for node in norms if not layer_of(node).track_running_stats]:
        source = norm.args[0]
        before = layer_of(source)
        wide = is_pointwise(before) and len(source.users) == 1
        last, slope = norm, 1.0
        user = next(iter(norm.users), None)
        if len(norm.users) == 1 and isinstance(layer_of(user), (nn.LeakyReLU, nn.ReLU)):
            last, slope = user, getattr(layer_of(user), "negative_slope", 0.0)
        following = [user for user in last.users if is_pointwise(layer_of(user))]
        others = len(following) < len(last.users)
        layer = NormPass(
            before if wide else None,
            layer_of(norm),
            slope,
            [layer_of(user) for user in following],
            keep=others or not following,
            in_place=not wide and len(source.users) == 1 and source.op == "call_module",
        )
        with graph.graph.inserting_before(norm):
            made = add_layer(graph, layer, f"{norm.target}_pass", (source.args[0] if wide else source,))
            pieces = [graph.graph.call_function(operator.getitem, (made, n)) for n in range(layer.outputs)]
        for user, piece in zip(following, pieces, strict=False):
            user.replace_all_uses_with(piece)
            graph.graph.erase_node(user)
        if layer.keep:
            last.replace_all_uses_with(pieces[-1])
        for node in dict.fromkeys((last, norm, source if wide else norm)):
            graph.graph.erase_node(node)
    return note_shapes(graph, _input_shape(graph))


def _input_shape(graph: fx.GraphModule) -> tuple[int, ...]:
    return shape_of(next(node for node in graph.graph.nodes if node.op == "placeholder"))


def _after_placeholders(node: fx.Node) -> fx.Node:
    while node.op == "placeholder" and node.next.op == "placeholder":
        node = node.next
    return node


def _is_concatenation(node: fx.Node) -> bool:
    if node.op != "call_function" or node.target not in (torch.cat, torch.concat, torch.concatenate):
        return False
    dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
    return dim in (1, 1 - len(shape_of(node)))


def _pointwise_like(conv: nn.Module, weight: Tensor, bias: Tensor | None) -> nn.Module:
    kind = nn.Conv3d if isinstance(conv, (nn.Conv3d, nn.ConvTranspose3d)) else nn.Conv2d
    made = kind(weight.shape[1], weight.shape[0], 1, bias=bias is not None, device=weight.device, dtype=weight.dtype)
    return _filled(made, weight.reshape(made.weight.shape).clone(), None if bias is None else bias.detach().clone())


def _filled(conv: nn.Module, weight: Tensor, bias: Tensor | None) -> nn.Module:
    """Give a convolution its numbers, as they are."""
    conv.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        conv.bias = nn.Parameter(bias, requires_grad=False)
    return conv.eval()


def _merging_pays(node: fx.Node, first: nn.Module, second: nn.Module) -> bool:
    """Compare MACs per voxel: both apart against the merged one."""
    out = shape_of(node)[2:]
    inner = shape_of(node.args[0])[2:] if isinstance(first, TRANSPOSED) else out
    voxels, inner_voxels, taps = math.prod(out), math.prod(inner), math.prod(first.kernel_size)
    apart = inner_voxels * first.in_channels * first.out_channels * taps
    apart += voxels * second.in_channels * second.out_channels
    return inner_voxels * first.in_channels * second.out_channels * taps <= apart


def _merged(first: nn.Module, second: nn.Module) -> nn.Module:
    transposed = isinstance(first, TRANSPOSED)
    outer = matrix(second).double()
    weight = first.weight.detach().double()
    weight = torch.einsum("ro,io...->ir..." if transposed else "ro,oi...->ri...", outer, weight)
    bias = None if first.bias is None else outer @ first.bias.detach().double()
    if second.bias is not None:
        bias = second.bias.detach().double() + (0 if bias is None else bias)
    names = ["kernel_size", "stride", "padding", "dilation", "padding_mode"] + ["output_padding"] * transposed
    settings = {**{name: getattr(first, name) for name in names}, "bias": bias is not None}
    like = {"device": first.weight.device, "dtype": first.weight.dtype}
    kind = next(kind for kind in CONVOLUTIONS + TRANSPOSED if isinstance(first, kind))
    made = kind(first.in_channels, second.out_channels, **settings, **like)
    dtype = first.weight.dtype
    return _filled(made, weight.to(dtype).contiguous(), None if bias is None else bias.to(dtype))


def rewritten(network: nn.Module, shape: Sequence[int]) -> fx.GraphModule:
    """Return the network's graph after the rewrites that save work on every backend.

    Raises:
        RewriteError: see `trace`.
    """
    return merge_products(split_concatenations(trace(network, shape)))
