"""The chain of convolutions that stands for one factored convolution, its counts, and the edit that puts it there."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from nnslim.errors import SpecError
from nnslim.maths.lowrank import TuckerFactors, mode_products, partial_tucker
from nnslim.methods.base import relative_error, replaced
from nnslim.network.spec import ReplacingEdit, register_edit

CONVOLUTIONS = (nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def is_transposed(conv: nn.Module) -> bool:
    """Return whether the convolution stores its kernel as (inputs, outputs, *K)."""
    return isinstance(conv, (nn.ConvTranspose2d, nn.ConvTranspose3d))


def kernel_of(conv: nn.Module) -> Tensor:
    """Return the kernel as (outputs, inputs, *K), also for a transposed convolution."""
    return conv.weight.transpose(0, 1) if is_transposed(conv) else conv.weight


class TuckerConv(nn.Module):
    """first (1x1, C_in -> R_in), core (the original's class, stride, padding ...), last (1x1, R_out -> C_out).

    Nothing lies between them. `first` or `last` is missing where that side is not factored; the bias sits on the last
    piece there is. Pointwise pieces commute with every padding mode, so the core pads in rank space exactly as the
    original pads its input.
    """

    def __init__(self, conv: nn.Module, rank_out: int | None, rank_in: int | None) -> None:
        """Build the structure for `conv` (not modified), with weights allocated but not set.

        Args:
            conv: Conv2d, Conv3d, ConvTranspose2d or ConvTranspose3d without groups.
            rank_out: channels of the core's output; None leaves the output side whole.
            rank_in: channels of the core's input; None leaves the input side whole.
        Raises:
            SpecError: another kind of layer, groups, or a rank outside 1..channels.
        """
        super().__init__()
        _check(conv, rank_out, rank_in)
        like = {"device": conv.weight.device, "dtype": conv.weight.dtype}
        kind = next(kind for kind in CONVOLUTIONS if isinstance(conv, kind))
        pointwise = (nn.Conv2d, nn.Conv3d)[len(conv.kernel_size) - 2]
        bias = conv.bias is not None
        core_in = rank_in or conv.in_channels
        core_out = rank_out or conv.out_channels
        # Registration order is the order of execution, so that tables and exports read front to back.
        self.first = pointwise(conv.in_channels, rank_in, 1, bias=False, **like) if rank_in else None
        kept = ("kernel_size", "stride", "padding", "dilation", "padding_mode")
        settings = {name: getattr(conv, name) for name in (*kept, *(["output_padding"] if is_transposed(conv) else []))}
        self.core = kind(core_in, core_out, bias=bias and not rank_out, **settings, **like)
        self.last = pointwise(rank_out, conv.out_channels, 1, bias=bias, **like) if rank_out else None
        # Some readers of nnU-Net networks ask a convolution for these.
        self.in_channels, self.out_channels = conv.in_channels, conv.out_channels
        self.kernel_size, self.stride = conv.kernel_size, conv.stride

    def forward(self, x: Tensor) -> Tensor:
        """(B, C_in, *spatial) -> (B, C_out, *spatial'), as the original convolution."""
        if self.first is not None:
            x = self.first(x)
        x = self.core(x)
        return x if self.last is None else self.last(x)

    @torch.no_grad()
    def fill(self, factors: TuckerFactors, bias: Tensor | None) -> None:
        """Set the weights: factors of a side that is whole are multiplied into the core."""
        core = factors.core
        for mode, (piece, factor) in enumerate(((self.last, factors.out), (self.first, factors.in_))):
            if piece is None:
                core = mode_products(core, [factor], [mode])
            else:
                piece.weight.copy_((factor.T if mode else factor).reshape(piece.weight.shape))
        self.core.weight.copy_(core.transpose(0, 1) if is_transposed(self.core) else core)
        if bias is not None:
            (self.core if self.last is None else self.last).bias.copy_(bias)

    @torch.no_grad()
    def kernel(self) -> Tensor:
        """Return the kernel (O, I, *K) that the chain stands for."""
        kernel = kernel_of(self.core)
        if self.first is not None:
            kernel = mode_products(kernel, [self.first.weight.flatten(1)], [1], transpose=True)
        return kernel if self.last is None else mode_products(kernel, [self.last.weight.flatten(1)], [0])


def weight_errors(dense: nn.Module, slim: nn.Module) -> dict[str, float]:
    """Return ||W - W~||_F / ||W||_F of each layer that was factored between the two, 0 for a kernel of zeros."""
    return {
        name: relative_error(kernel_of(conv), chain.kernel())
        for name, (conv, chain) in replaced(dense, slim, CONVOLUTIONS, TuckerConv).items()
    }


def _check(conv: nn.Module, rank_out: int | None, rank_in: int | None) -> None:
    if not isinstance(conv, CONVOLUTIONS):
        raise SpecError(f"tucker: expected a 2D or 3D convolution, found {type(conv).__name__}")
    if conv.groups != 1:
        raise SpecError(f"tucker: grouped convolutions stay dense, found groups={conv.groups}")
    for side, rank, channels in (("output", rank_out, conv.out_channels), ("input", rank_in, conv.in_channels)):
        if rank is not None and not 1 <= rank <= channels:
            raise SpecError(f"tucker: {side} rank {rank} is outside 1..{channels}")
    if rank_out is None and rank_in is None:
        raise SpecError("tucker: an edit needs at least one rank")


@register_edit
@dataclass(frozen=True)
class TuckerEdit(ReplacingEdit):
    """Replace one convolution by a Tucker chain, `<name>.first`, `.core` and `.last`.

    Attributes:
        layer: any of the layer's names.
        rank_out, rank_in: ranks of the output and the input side, None to leave that side whole.
        decompose: False leaves the new weights random even where they would be computed.
    """

    layer: str
    rank_out: int | None
    rank_in: int | None
    decompose: bool = True
    kind: ClassVar[str] = "tucker"

    def made(self, dense: nn.Module, fill: bool) -> nn.Module:
        """Return the chain."""
        chain = TuckerConv(dense, self.rank_out, self.rank_in)
        if fill and self.decompose:
            kernel = kernel_of(dense)
            ranks = (self.rank_out or kernel.shape[0], self.rank_in or kernel.shape[1])
            chain.fill(partial_tucker(kernel, ranks), dense.bias)
        return chain


def chain_macs(conv: nn.Module, rank_out: int | None, rank_in: int | None, v_in: int, v_out: int) -> int:
    """Return the MACs of a Tucker chain on v_in input and v_out output voxels, samples and calls counted in."""
    inputs, outputs = conv.in_channels, conv.out_channels
    core_voxels = v_in if is_transposed(conv) else v_out
    core = (rank_in or inputs) * (rank_out or outputs) * math.prod(conv.kernel_size) * core_voxels
    return core + (inputs * rank_in * v_in if rank_in else 0) + (rank_out * outputs * v_out if rank_out else 0)


def chain_parameters(conv: nn.Module, rank_out: int | None, rank_in: int | None) -> int:
    """Return the parameters of a Tucker chain, bias included."""
    inputs, outputs = conv.in_channels, conv.out_channels
    core = (rank_in or inputs) * (rank_out or outputs) * math.prod(conv.kernel_size)
    factors = (inputs * rank_in if rank_in else 0) + (rank_out * outputs if rank_out else 0)
    return core + factors + (0 if conv.bias is None else outputs)
