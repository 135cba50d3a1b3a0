"""The published token-sparse UNETR as one network: sparse encoding, token completion, dense decoding.

Reference: Zhou et al., Token Sparsification for Faster Medical Image Segmentation, IPMI 2023, arXiv 2303.06522.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from nnslim.errors import ConfigError
from nnslim.methods.token_sparse.completion import Completion, FusionNet, MaskCompletion
from nnslim.methods.token_sparse.reduction import TokenReduction
from nnslim.methods.token_sparse.vit import Block, PatchEmbedding, TokenPruningViT
from nnslim.optional import name_and_home

with name_and_home():
    from monai.networks.blocks.dynunet_block import UnetOutBlock
    from monai.networks.blocks.unetr_block import UnetrBasicBlock, UnetrPrUpBlock, UnetrUpBlock

Decoder = Literal["x16", "x8", "x8v2"]


class UNETRDecoder(nn.Module):
    """From token maps at one resolution to logits at the image's.

    Attributes:
        hidden: which block's output each of the inner inputs is, in a dense encoder.
    """

    def __init__(
        self, kind: Decoder, channels: int, classes: int, *, dim: int, features: int, as_published: bool
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
        common: dict[str, Any] = {"kernel_size": 3, "norm_name": "instance", "res_block": True}
        plain = partial(UnetrBasicBlock, 3, stride=1, **common)
        up = partial(UnetrUpBlock, 3, upsample_kernel_size=2, **common)
        from_tokens = partial(UnetrPrUpBlock, 3, dim, stride=1, upsample_kernel_size=2, conv_block=True, **common)
        above = 1 if kind == "x16" else 0  # doublings of resolution more than with patches of 8
        self.encoder1 = plain(channels, f)
        self.encoder2 = from_tokens(2 * f, num_layer=1 + above)
        self.encoder3 = from_tokens(4 * f, num_layer=above)
        if kind == "x8":
            self.hidden = (4, 8)
            self.decoder4 = up(dim, 4 * f)
        else:
            self.hidden = (3, 6, 9)
            self.encoder4 = from_tokens(8 * f, num_layer=0) if above else plain(dim, 8 * f)
            self.decoder5 = up(dim, 8 * f)
            self.decoder4 = up(8 * f, 4 * f)
        self.decoder3 = up(4 * f, 2 * f)
        self.decoder2 = up(2 * f, f)
        sizes = [2 * f] * (1 + above) + [4 * f] * above if as_published else []
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


# The configurations of the paper's repository: BTCV is 96^3 with one channel, BraTS 128^3 with four.
PUBLISHED: dict[str, dict[str, Any]] = {
    "btcv": {"channels": 1, "classes": 14, "image_size": (96, 96, 96), "ratios": 0.9},
    "brats": {"channels": 4, "classes": 3, "image_size": (128, 128, 128), "ratios": 0.75},
}


class TokenSparseUNETR(nn.Module):
    """UNETR whose encoder drops tokens; with ratio 0 it computes exactly what the dense UNETR computes."""

    def __init__(
        self,
        channels: int,
        classes: int,
        image_size: Sequence[int],
        *,
        decoder: Decoder = "x8v2",
        features: int = 16,
        dim: int = 768,
        depth: int = 12,
        heads: int = 12,
        drop_path: float = 0.0,
        patch_embed: PatchEmbedding = "conv",
        locations: Sequence[int] = (3, 6, 9),
        ratios: float | Sequence[float] = 0.75,
        completion: Completion | None = "fusion",
        completion_dim: int | None = None,
        completion_depth: int = 1,
        completion_heads: int | None = None,
        skips: Literal["completed", "blocks"] = "completed",
        as_published: bool = False,
        **stages: Any,
    ) -> None:
        """Build.

        Args:
            channels, classes: of the image and of the logits.
            image_size: voxels, for which positions are learned; any size divisible by the patch runs.
            decoder: decides the edge of a patch, too: 16 (x16) or 8.
            features: of the decoder at full resolution. dim, depth, heads, drop_path: of the encoder.
            locations, ratios, stages (mode, scorer, shared, tau, noise): see `TokenReduction`; no locations: a dense
                network.
            completion: None or "last" keeps the last value of each token. completion_*: its width, blocks, heads.
            skips: what the decoder gets beside the completed tokens: the same again (published), or, as in the dense
                network, the outputs of blocks, with dropped tokens at their last values.
            as_published: see `UNETRDecoder`.
        """
        super().__init__()
        self.decoder = UNETRDecoder(decoder, channels, classes, dim=dim, features=features, as_published=as_published)
        if max(self.decoder.hidden) >= depth:
            raise ConfigError(f"token_sparse: decoder {decoder} needs more than {max(self.decoder.hidden)} blocks")
        reduction = TokenReduction(dim, locations, ratios if locations else (), **stages)
        reduction = reduction if locations else None
        self.encoder = TokenPruningViT(
            channels,
            image_size,
            patch=self.decoder.patch,
            dim=dim,
            depth=depth,
            heads=heads,
            drop_path=drop_path,
            patch_embed=patch_embed,
            reduction=reduction,
        )
        self.completion: nn.Module | None = None
        if reduction is not None and reduction.mode == "drop" and completion not in (None, "last"):
            width = completion_dim or dim
            blocks = [Block(width, completion_heads or heads) for _ in range(completion_depth)]
            if completion == "mask":
                self.completion = MaskCompletion(dim, width, self.encoder.grid, blocks)
            else:
                version, groups = (2 if completion == "fusion_v2" else 1), len(locations) + 1
                self.completion = FusionNet(dim, width, groups, self.encoder.grid, blocks, version=version)
        self.skips = skips

    def forward(self, image: Tensor) -> Tensor:
        """Return logits (B, classes, *size) of images (B, channels, *size)."""
        reduction = self.encoder.reduction
        sparse = reduction is not None and reduction.active
        from_blocks = not sparse or getattr(self.encoder, "skips", self.skips) == "blocks"  # what an edit says counts
        now, hidden = self.encoder(image, self.decoder.hidden if from_blocks else ())
        grid = self.encoder.grid_of(image)
        if now.complete or self.completion is None:
            full = now.last_values()[:, 1:]
        else:
            full = self.completion(now.parts(), now.all_positions(), grid)
        last = to_volume(full, grid)
        hidden = [to_volume(each, grid) for each in hidden] or [last] * len(self.decoder.hidden)
        return self.decoder(image, last, hidden)


def published_unetr(name: str, **changes: Any) -> TokenSparseUNETR:
    """Build a published configuration, "btcv" or "brats", with changed arguments.

    Raises:
        ConfigError: another name.
    """
    if name not in PUBLISHED:
        raise ConfigError(f"token_sparse: published configurations are {', '.join(PUBLISHED)}, found '{name}'")
    return TokenSparseUNETR(**{**PUBLISHED[name], "as_published": True, **changes})
