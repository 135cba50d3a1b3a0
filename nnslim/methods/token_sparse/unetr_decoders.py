"""Decoders of UNETR for patches of 16 and 8 voxels, made of MONAI's blocks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from monai.networks.blocks.dynunet_block import UnetOutBlock
from monai.networks.blocks.unetr_block import UnetrBasicBlock, UnetrPrUpBlock, UnetrUpBlock
from torch import Tensor, nn
from torch.nn import functional

from nnslim.errors import ConfigError

Decoder = Literal["x16", "x8", "x8v2"]


class UNETRDecoder(nn.Module):
    """From token maps at one resolution to logits at the image's.

    Attributes:
        hidden: which block's output each of the inner inputs is, in a dense encoder.
    """

    hidden: tuple[int, ...]
    patch: int

    def __init__(
        self,
        kind: Decoder,
        channels: int,
        classes: int,
        *,
        dim: int = 768,
        features: int = 16,
        as_published: bool = False,
    ) -> None:
        """Build.

        Args:
            kind: x16 (MONAI's UNETR); x8v2 (patch 8, four resolutions above the tokens); x8 (patch 8, three).
            channels: of the image. classes: output channels. dim: of a token. features: at full resolution.
            as_published: hold the 1x1 projections, too, that MONAI of the time built into residual blocks which keep
                their number of channels. No forward pass uses them, but published parameter counts contain them.
        """
        super().__init__()
        if kind not in ("x16", "x8", "x8v2"):
            raise ConfigError(f"token_sparse: decoder '{kind}' is not one of x16, x8, x8v2")
        self.kind, self.patch = kind, 16 if kind == "x16" else 8
        f = features
        common: dict[str, Any] = {"spatial_dims": 3, "kernel_size": 3, "norm_name": "instance", "res_block": True}

        def up_from_tokens(layers: int, out: int) -> nn.Module:
            return UnetrPrUpBlock(
                in_channels=dim,
                out_channels=out,
                num_layer=layers,
                stride=1,
                upsample_kernel_size=2,
                conv_block=True,
                **common,
            )

        def up(inputs: int, out: int) -> nn.Module:
            return UnetrUpBlock(in_channels=inputs, out_channels=out, upsample_kernel_size=2, **common)

        def plain(inputs: int, out: int) -> nn.Module:
            return UnetrBasicBlock(in_channels=inputs, out_channels=out, stride=1, **common)

        above = 1 if kind == "x16" else 0  # doublings of resolution more than with patches of 8
        self.encoder1 = plain(channels, f)
        self.encoder2 = up_from_tokens(1 + above, 2 * f)
        self.encoder3 = up_from_tokens(above, 4 * f)
        if kind == "x8":
            self.hidden = (4, 8)
            self.decoder4 = up(dim, 4 * f)
        else:
            self.hidden = (3, 6, 9)
            self.encoder4 = up_from_tokens(0, 8 * f) if above else plain(dim, 8 * f)
            self.decoder5 = up(dim, 8 * f)
            self.decoder4 = up(8 * f, 4 * f)
        self.decoder3 = up(4 * f, 2 * f)
        self.decoder2 = up(2 * f, f)
        kept = [2 * f] * (1 + above) + [4 * f] * above
        sizes = kept if as_published else []
        self.unused = nn.ModuleList(nn.Conv3d(size, size, 1, bias=False) for size in sizes)
        self.out = UnetOutBlock(spatial_dims=3, in_channels=f, out_channels=classes)

    def forward(self, image: Tensor, last: Tensor, hidden: Sequence[Tensor]) -> Tensor:
        """Return logits (B, classes, *size).

        Args:
            image: (B, C, *size). last: (B, D, *grid). hidden: as `last`, one for each of `self.hidden`.
        """
        if self.kind == "x8":
            deep = self.decoder4(last, self.encoder3(hidden[1]))
        else:
            if self.kind == "x8v2":
                last = _halve(last)
            deep = self.decoder5(last, self.encoder4(hidden[2]))
            deep = self.decoder4(deep, self.encoder3(hidden[1]))
        deep = self.decoder3(deep, self.encoder2(hidden[0]))
        return self.out(self.decoder2(deep, self.encoder1(image)))


def _halve(x: Tensor) -> Tensor:
    """Average with a stride of 2, as published: padding counts."""
    if any(size % 2 for size in x.shape[2:]):
        raise ConfigError(
            f"token_sparse: decoder x8v2 halves the token grid, so sizes must be divisible by 16, found a grid of "
            f"{tuple(x.shape[2:])} tokens; use decoder x8"
        )
    return functional.avg_pool3d(x, 3, 2, 1)


def to_volume(tokens: Tensor, grid: Sequence[int]) -> Tensor:
    """(B, L, D) -> (B, D, *grid)."""
    return torch.unflatten(tokens.transpose(1, 2), 2, tuple(grid))
