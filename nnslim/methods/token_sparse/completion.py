"""Completion: one token for every position, from the groups of tokens that stages dropped."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from nnslim.methods.token_sparse.sequence import Sequence3d, unshuffle

Completion = Literal["fusion", "fusion_v2", "mask", "last"]
RunBlock = Callable[..., Tensor]  # (block, full sequence, whatever else the host's blocks need)
Part = tuple[int, Tensor]  # (stage, tokens), see `Sequence3d.parts`


def sincos_3d(grid: Sequence[int], dim: int, *, prefix: int = 0) -> Tensor:
    """Return the fixed position embedding of the published completion nets, (1, prefix + tokens, dim).

    Args:
        grid: tokens along each of the three axes; the last runs fastest.
        dim: a multiple of 6: sine and cosine of each axis.
        prefix: rows of zeros before it.
    """
    part = dim // 6
    omega = 1.0 / 10000 ** (torch.arange(part, dtype=torch.float64) / part)
    axes = torch.meshgrid(*(torch.arange(size, dtype=torch.float64) for size in grid), indexing="ij")
    waves = [wave(axis.reshape(-1, 1) * omega) for axis in axes for wave in (torch.sin, torch.cos)]
    full = torch.zeros(1, prefix + math.prod(grid), dim)
    full[0, prefix:, : 6 * part] = torch.cat(waves, dim=1).float()
    return full


class _PublishedNet(nn.Module):
    """The second half of both published completion nets: dense blocks on the full sequence, class token first."""

    def _add_blocks(
        self, dim: int, width: int, grid: Sequence[int], blocks: Sequence[nn.Module], *, linear: bool
    ) -> None:
        self.grid = tuple(grid)
        self.pos_embed = nn.Parameter(sincos_3d(grid, width, prefix=1), requires_grad=False)
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.output = nn.Linear(width, dim) if linear else nn.Identity()

    def _complete(self, rows: Tensor, positions: Tensor, grid: Sequence[int]) -> Tensor:
        """Put rows back to their positions (B, 1 + L), and return (B, L, D) without the class token."""
        full = unshuffle(rows, positions)
        known = tuple(grid) == self.grid
        full = full + (self.pos_embed if known else sincos_3d(grid, full.shape[-1], prefix=1).to(full))
        for block in self.blocks:
            full = block(full)
        return self.output(self.norm(full))[:, 1:]


class FusionNet(_PublishedNet):
    """Multi-layer token assembly, as published: each group through a linear of its own, then a few dense blocks.

    `version` 2 leaves out the linears on both sides (its width must be that of the tokens).
    """

    def __init__(
        self, dim: int, width: int, groups: int, grid: Sequence[int], blocks: Sequence[nn.Module], *, version: int = 1
    ) -> None:
        super().__init__()
        if version == 2 and width != dim:
            raise ValueError(f"fusion_v2 has no linears, so its width is {dim}, the features of a token; found {width}")
        linears = [nn.Linear(dim, width) if version == 1 else nn.Identity() for _ in range(groups)]
        self.inputs = nn.ModuleList(linears)
        self.layer_tokens = nn.ParameterList(nn.Parameter(torch.zeros(1, 1, width)) for _ in range(groups))
        self._add_blocks(dim, width, grid, blocks, linear=version == 1)

    def forward(self, parts: Sequence[Part], positions: Tensor, grid: Sequence[int]) -> Tensor:
        """Return (B, L, D) for every patch position.

        Args:
            parts: see `Sequence3d.parts`; (B, n_j, D) each, the last one with the class token in front.
            positions: (B, 1 + L) of the concatenated groups. grid: tokens along each axis.
        """
        mapped = [self.inputs[stage](group) + self.layer_tokens[stage] for stage, group in parts]
        return self._complete(torch.cat(mapped, dim=1), positions, grid)


class MaskCompletion(_PublishedNet):
    """The masked baseline, as published: a mask token at every dropped position, only the last tokens are used."""

    def __init__(self, dim: int, width: int, grid: Sequence[int], blocks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.input_norm = nn.LayerNorm(dim, eps=1e-6)
        self.input = nn.Linear(dim, width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self._add_blocks(dim, width, grid, blocks, linear=True)

    def forward(self, parts: Sequence[Part], positions: Tensor, grid: Sequence[int]) -> Tensor:
        """See `FusionNet.forward`."""
        kept = self.input(self.input_norm(parts[-1][1]))
        missing = self.mask_token.expand(kept.shape[0], positions.shape[1] - kept.shape[1], -1)
        return self._complete(torch.cat((missing, kept), dim=1), positions, grid)


class GentleCompletion(nn.Module):
    """Completion for a trained dense network: at the start it changes nothing.

    Each group goes through a linear that starts as the identity, gets a layer token that starts at 0, and the full
    sequence runs through blocks whose contributions start at 0. So the untrained result is the last value of every
    token ("last", which has no parameters at all), and a trained dense network loses as little as it can.
    """

    def __init__(self, dim: int, groups: int, blocks: Sequence[nn.Module], kind: Completion, run: RunBlock) -> None:
        """Build.

        Args:
            dim: features. groups: dropped groups, plus one.
            blocks: dense blocks of the host's own kind, whose output does not count at first.
            kind: fusion; fusion_v2 (without linears); mask (one learned token for all that were dropped).
            run: how the host calls a block on the full sequence.
        """
        super().__init__()
        self.kind = kind
        self.linears = nn.ModuleList(identity_linear(dim) for _ in range(groups if kind == "fusion" else 0))
        tokens = {"fusion": groups, "fusion_v2": groups, "mask": 1}[kind]
        self.layer_tokens = nn.Parameter(torch.zeros(tokens, 1, 1, dim))
        self.blocks = nn.ModuleList(blocks)
        self._run = run

    def map(self, parts: Sequence[Part]) -> list[Tensor]:
        """Return each of `Sequence3d.parts` as it enters the full sequence, (B, n_j, D)."""
        if self.kind == "mask":
            return [self.layer_tokens[0].expand_as(group) if stage >= 0 else group for stage, group in parts]
        linear = [self.linears[stage](group) if self.kind == "fusion" else group for stage, group in parts]
        return [group + self.layer_tokens[stage] for (stage, _), group in zip(parts, linear, strict=True)]

    def forward(self, now: Sequence3d, *arguments: Tensor | None) -> Tensor:
        """Return the full sequence (B, N, D): every group mapped and put back, then the blocks."""
        full = now.last_values(self.map(now.parts()))
        for block in self.blocks:
            full = self._run(block, full, *arguments)
        return full


def identity_linear(dim: int) -> nn.Linear:
    """Return a linear layer that returns its input."""
    linear = nn.Linear(dim, dim)
    nn.init.eye_(linear.weight)
    nn.init.zeros_(linear.bias)
    return linear
