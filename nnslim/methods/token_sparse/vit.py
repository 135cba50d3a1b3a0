"""The published 3D vision transformer that drops tokens after chosen blocks."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from nnslim.errors import ConfigError
from nnslim.methods.token_sparse.reduction import TokenReduction
from nnslim.methods.token_sparse.sequence import Sequence3d

PatchEmbedding = Literal["conv", "conv2p1d"]


class Attention(nn.Module):
    """Multi-head self-attention."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        if dim % heads:
            raise ConfigError(f"token_sparse: {dim} features cannot be shared by {heads} heads")
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, D) -> (B, N, D)."""
        batch, length, dim = x.shape
        query, key, value = self.qkv(x).reshape(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        mixed = functional.scaled_dot_product_attention(query, key, value)
        return self.proj(mixed.transpose(1, 2).reshape(batch, length, dim))


class Block(nn.Module):
    """Pre-norm transformer block with stochastic depth."""

    def __init__(self, dim: int, heads: int, drop_path: float = 0.0) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))
        self.drop_path = drop_path

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, D) -> (B, N, D)."""
        x = x + self._skip(self.attn(self.norm1(x)))
        return x + self._skip(self.mlp(self.norm2(x)))

    def _skip(self, x: Tensor) -> Tensor:
        if not (self.training and self.drop_path):
            return x
        alive = torch.rand(x.shape[0], 1, 1, device=x.device, dtype=x.dtype) >= self.drop_path
        return x * alive / (1 - self.drop_path)


class TokenPruningViT(nn.Module):
    """ViT with a class token, learned positions and token pruning; with ratio 0 it is the dense ViT."""

    def __init__(
        self,
        channels: int,
        image_size: Sequence[int],
        *,
        patch: int,
        dim: int,
        depth: int,
        heads: int,
        drop_path: float,
        patch_embed: PatchEmbedding,
        reduction: TokenReduction | None,
    ) -> None:
        """Build.

        Args:
            channels: of the image. image_size: for which positions are learned; other sizes interpolate them.
            patch: edge of a patch, voxels. drop_path: of the last block, rising linearly from 0.
            reduction: the pruning stages; None for a dense encoder.
        """
        super().__init__()
        self.patch = patch
        self.grid = _grid(image_size, patch)
        if patch_embed == "conv":
            embedding = nn.Conv3d(channels, dim, patch, patch)
        else:
            flat, rest = (patch, patch, 1), (1, 1, patch)
            embedding = nn.Sequential(nn.Conv3d(channels, dim, flat, flat), nn.Conv3d(dim, dim, rest, rest))
        self.patch_embed = nn.Sequential(OrderedDict(proj=embedding))
        self.cls_token = nn.Parameter(torch.empty(1, 1, dim).normal_(std=1e-6))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + math.prod(self.grid), dim))
        rates = [drop_path * number / max(1, depth - 1) for number in range(depth)]
        self.blocks = nn.ModuleList(Block(dim, heads, rate) for rate in rates)
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.reduction = reduction
        if reduction is not None:
            self.stage_norms = nn.ModuleList(nn.LayerNorm(dim, eps=1e-6) for _ in reduction.locations)
            # The original's mask of tokens to start from; a parameter there, so that its counts agree.
            self.policy = nn.Parameter(torch.ones(1, 1 + math.prod(self.grid), 1), requires_grad=False)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Name the parameters that an optimiser should not decay; the same for dense and sparse."""
        return {"pos_embed", "cls_token"}

    def grid_of(self, image: Tensor) -> tuple[int, ...]:
        """Return the tokens along each axis of an image (B, C, *size)."""
        return _grid(image.shape[2:], self.patch)

    def forward(self, image: Tensor, keep_hidden: Sequence[int] = ()) -> tuple[Sequence3d, list[Tensor]]:
        """Encode (B, C, *size), sizes divisible by the patch.

        Args:
            keep_hidden: indices of blocks whose outputs are wanted.
        Returns:
            The tokens, normalised, and the wanted outputs as full sequences without the class token, (B, L, D) each.
        """
        now, hidden = Sequence3d(self.embedded(image), math.prod(self.grid_of(image)), prefix=1), []
        for number, block in enumerate(self.blocks):
            if self.reduction is not None:
                now = self.reduction(now, number)
            now.x = block(now.x)
            if number in keep_hidden:
                hidden.append(now.last_values()[:, 1:])
        if self.reduction is not None:
            now = self.reduction(now, len(self.blocks))
        now.groups = [self.stage_norms[stage](group) for stage, group in zip(now.stages, now.groups, strict=True)]
        now.x = self.norm(now.x)
        return now, hidden

    def embedded(self, image: Tensor) -> Tensor:
        """Return (B, 1 + L, D): the class token and a token per patch, with their positions."""
        x = self.patch_embed(image).flatten(2).transpose(1, 2)
        return torch.cat((self.cls_token.expand(x.shape[0], -1, -1), x), dim=1) + self._positions(self.grid_of(image))

    def _positions(self, grid: tuple[int, ...]) -> Tensor:
        if grid == self.grid:
            return self.pos_embed
        first, rest = self.pos_embed[:, :1], self.pos_embed[:, 1:]
        volume = rest.transpose(1, 2).unflatten(2, self.grid)
        volume = functional.interpolate(volume, size=grid, mode="trilinear", align_corners=False)
        return torch.cat((first, volume.flatten(2).transpose(1, 2)), dim=1)


def _grid(size: Sequence[int], patch: int) -> tuple[int, ...]:
    if any(edge % patch for edge in size):
        raise ConfigError(f"token_sparse: an image of {tuple(size)} voxels does not divide into patches of {patch}")
    return tuple(int(edge) // patch for edge in size)
