"""Exact counts of a Tucker chain."""

from __future__ import annotations

import math

from torch import nn

from nnslim.methods.tucker.layers import is_transposed


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
