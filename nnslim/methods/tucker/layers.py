"""The chain of convolutions that stands for one factored convolution."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from nnslim.errors import SpecError
from nnslim.maths.lowrank import TuckerFactors
from nnslim.network.walk import LayerIndex

CONVOLUTIONS = (nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_POINTWISE = {
    nn.Conv2d: nn.Conv2d,
    nn.Conv3d: nn.Conv3d,
    nn.ConvTranspose2d: nn.Conv2d,
    nn.ConvTranspose3d: nn.Conv3d,
}


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
        pointwise = next(made for kind, made in _POINTWISE.items() if isinstance(conv, kind))
        bias = conv.bias is not None
        core_in = rank_in or conv.in_channels
        core_out = rank_out or conv.out_channels
        # Registration order is the order of execution, so that tables and exports read front to back.
        self.first = pointwise(conv.in_channels, rank_in, 1, bias=False, **like) if rank_in else None
        settings = {
            "kernel_size": conv.kernel_size,
            "stride": conv.stride,
            "padding": conv.padding,
            "dilation": conv.dilation,
            "padding_mode": conv.padding_mode,
            "bias": bias and not rank_out,
        }
        if is_transposed(conv):
            settings["output_padding"] = conv.output_padding
        kind = next(kind for kind in _POINTWISE if isinstance(conv, kind))
        self.core = kind(core_in, core_out, **settings, **like)
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
        if self.first is None:
            core = torch.einsum("ab...,ib->ai...", core, factors.in_)
        else:
            self.first.weight.copy_(factors.in_.T.reshape(self.first.weight.shape))
        if self.last is None:
            core = torch.einsum("oa,ab...->ob...", factors.out, core)
        else:
            self.last.weight.copy_(factors.out.reshape(self.last.weight.shape))
        self.core.weight.copy_(core.transpose(0, 1) if is_transposed(self.core) else core)
        if bias is not None:
            (self.core if self.last is None else self.last).bias.copy_(bias)

    @torch.no_grad()
    def kernel(self) -> Tensor:
        """Return the kernel (O, I, *K) that the chain stands for."""
        kernel = kernel_of(self.core)
        if self.first is not None:
            kernel = torch.einsum("ab...,bi->ai...", kernel, self.first.weight.flatten(1))
        if self.last is not None:
            kernel = torch.einsum("oa,ai...->oi...", self.last.weight.flatten(1), kernel)
        return kernel


def weight_errors(dense: nn.Module, slim: nn.Module) -> dict[str, float]:
    """Return ||W - W~||_F / ||W||_F of each layer that was factored between the two, 0 for a kernel of zeros."""
    originals = LayerIndex(dense)
    errors = {}
    for layer in LayerIndex(slim).of_type(TuckerConv):
        if not isinstance(originals[layer.name].module, CONVOLUTIONS):
            continue  # an earlier method's
        kernel = kernel_of(originals[layer.name].module).detach()
        norm = float(kernel.norm())
        errors[layer.name] = float((kernel - layer.module.kernel()).norm()) / norm if norm else 0.0
    return errors


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
