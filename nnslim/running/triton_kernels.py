# ruff: noqa: ANN001, N803 - Triton compiles annotations, too; its constants are written in capitals
"""The kernels of `triton_pass`."""

import triton
import triton.language as tl


@triton.jit
def moments_kernel(
    z,
    pivot,
    sums,
    squares,
    rows,
    each,
    C: tl.constexpr,
    CP: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
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
