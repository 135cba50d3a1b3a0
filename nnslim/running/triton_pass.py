"""Triton kernels for CUDA: the moments of rows, and 1x1 -> leaky ReLU -> 1x1 with the wide rows in registers alone."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from nnslim.running.triton_kernels import moments_kernel, product_kernel

NARROW = 64  # channels of z: a covariance of more does not fit in registers
WIDEST_OUT = 128  # channels that a product may put out
_ROWS = 64  # rows at a time
_WIDE = 32  # wide channels at a time
_SAMPLE = 1024  # rows all over the volume: one alone may be of its border, far from all others
_PROGRAMS = 512  # that share the rows when moments are summed: a few for each multiprocessor


def fits(channels: int, products: list[int]) -> bool:
    """Return whether rows of so many channels, and products of these widths, are done here."""
    return channels <= NARROW and all(width <= WIDEST_OUT for width in products)


def moments(z: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean (C,) and the covariance (C, C) of the rows, float64.

    Sums go around the mean of a sample, because the difference of two large numbers would lose digits; each program
    adds up its own share in float32, and the shares are added in float64. No atomics: the same input gives the same
    numbers.

    Args:
        z: (N, C) contiguous, float32 or 16 bits, on a CUDA device (or in Triton's interpreter).
    """
    rows, channels = z.shape
    padded = _padded(channels)
    programs = min(_PROGRAMS, triton.cdiv(rows, _ROWS))
    each = triton.cdiv(triton.cdiv(rows, programs), _ROWS) * _ROWS
    sums = torch.empty((programs, padded), dtype=torch.float32, device=z.device)
    squares = torch.empty((programs, padded, padded), dtype=torch.float32, device=z.device)
    pivot = z[:: max(1, rows // _SAMPLE)].float().mean(0)
    moments_kernel[(programs,)](z, pivot, sums, squares, rows, each, C=channels, CP=padded, BLOCK=_ROWS)
    mean = sums.sum(0, dtype=torch.float64)[:channels] / rows
    square = squares.sum(0, dtype=torch.float64)[:channels, :channels] / rows
    return mean + pivot, square - mean.outer(mean)


def product(
    z: Tensor, weight: Tensor, shift: Tensor, slope: float, v: Tensor, bias: Tensor | None, out: Tensor
) -> None:
    """out = act(z @ weight + shift) @ v + bias, without the wide rows ever being in memory.

    Args:
        z: (N, R) contiguous. weight: (R, C). shift: (C,). slope: of the activation for negative numbers.
        v: (C, K). bias: (K,) or None. out: (N, K) contiguous, of z's type; written.
    """
    (rows, narrow), (wide, outputs) = z.shape, v.shape
    bias = torch.zeros(outputs, dtype=torch.float32, device=z.device) if bias is None else bias
    product_kernel[(triton.cdiv(rows, _ROWS),)](
        z,
        weight.to(z.dtype).contiguous(),
        shift.float().contiguous(),
        v.to(z.dtype).contiguous(),
        bias.float().contiguous(),
        out,
        rows,
        slope,
        R=narrow,
        C=wide,
        K=outputs,
        RP=_padded(narrow),
        KP=_padded(outputs),
        CB=_WIDE,
        BLOCK=_ROWS,
    )


def _padded(width: int) -> int:
    return max(16, triton.next_power_of_2(width))  # 16: the smallest side of a tensor core's product
