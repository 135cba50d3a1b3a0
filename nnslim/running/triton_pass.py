# ruff: noqa: ANN001, N803 - Triton compiles annotations, too, so they are not postponed; its constants are in capitals
"""Triton kernels for CUDA: the moments of rows, and 1x1 -> leaky ReLU -> 1x1 with the wide rows in registers alone."""

import torch
import triton
import triton.language as tl
from torch import Tensor

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
    weight, v = (tensor.to(z.dtype).contiguous() for tensor in (weight, v))
    shift, bias = (tensor.float().contiguous() for tensor in (shift, bias))
    sizes = {"R": narrow, "C": wide, "K": outputs, "RP": _padded(narrow), "KP": _padded(outputs), "CB": _WIDE}
    product_kernel[(triton.cdiv(rows, _ROWS),)](z, weight, shift, v, bias, out, rows, slope, BLOCK=_ROWS, **sizes)


def _padded(width: int) -> int:
    return max(16, triton.next_power_of_2(width))  # 16: the smallest side of a tensor core's product


@triton.jit
def moments_kernel(z, pivot, sums, squares, rows, each, C: tl.constexpr, CP: tl.constexpr, BLOCK: tl.constexpr) -> None:
    program = tl.program_id(0)
    channel = tl.arange(0, CP)
    middle = tl.load(pivot + channel, mask=channel < C, other=0.0)
    total = tl.zeros((CP,), dtype=tl.float32)
    square = tl.zeros((CP, CP), dtype=tl.float32)
    first = program.to(tl.int64) * each
    for start in range(0, each, BLOCK):
        row = first + start + tl.arange(0, BLOCK)
        inside = (row[:, None] < rows) & (channel[None, :] < C)
        part = tl.load(z + row[:, None] * C + channel[None, :], mask=inside, other=0.0).to(tl.float32)
        part = tl.where(inside, part - middle[None, :], 0.0)
        total += tl.sum(part, axis=0)
        square += tl.dot(tl.trans(part), part, input_precision="ieee")
    tl.store(sums + program * CP + channel, total)
    place = channel[:, None] * CP + channel[None, :]
    tl.store(squares + program * CP * CP + place, square)


@triton.jit
def product_kernel(
    z,
    weight,
    shift,
    v,
    bias,
    out,
    rows,
    slope,
    R: tl.constexpr,
    C: tl.constexpr,
    K: tl.constexpr,
    RP: tl.constexpr,
    KP: tl.constexpr,
    CB: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    narrow, output = tl.arange(0, RP), tl.arange(0, KP)
    there = (row[:, None] < rows) & (narrow[None, :] < R)
    part = tl.load(z + row[:, None] * R + narrow[None, :], mask=there, other=0.0)
    made = tl.zeros((BLOCK, KP), dtype=tl.float32)
    for start in range(0, C, CB):
        channel = start + tl.arange(0, CB)
        first = tl.load(
            weight + narrow[:, None] * C + channel[None, :],
            mask=(narrow[:, None] < R) & (channel[None, :] < C),
            other=0.0,
        )
        y = tl.dot(part, first, input_precision="ieee")
        y += tl.load(shift + channel, mask=channel < C, other=0.0)[None, :]
        y = tl.where(y > 0, y, y * slope)
        out_of = (channel[:, None] < C) & (output[None, :] < K)
        second = tl.load(v + channel[:, None] * K + output[None, :], mask=out_of, other=0.0)
        made += tl.dot(y.to(second.dtype), second, input_precision="ieee")
    made += tl.load(bias + output, mask=output < K, other=0.0)[None, :]
    inside = (row[:, None] < rows) & (output[None, :] < K)
    tl.store(out + row[:, None] * K + output[None, :], made.to(out.dtype.element_ty), mask=inside)
