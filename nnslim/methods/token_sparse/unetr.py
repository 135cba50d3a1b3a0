"""The published token-sparse UNETR as one network: sparse encoding, token completion, dense decoding.

Reference: Zhou et al., Token Sparsification for Faster Medical Image Segmentation, IPMI 2023, arXiv 2303.06522.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from torch import Tensor, nn

from nnslim.errors import ConfigError
from nnslim.methods.token_sparse.completion import Completion, FusionNet, MaskCompletion
from nnslim.methods.token_sparse.reduction import Mode, TokenReduction
from nnslim.methods.token_sparse.scorers import Scorer
from nnslim.methods.token_sparse.unetr_decoders import Decoder, UNETRDecoder, to_volume
from nnslim.methods.token_sparse.vit import Block, PatchEmbedding, TokenPruningViT

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
        mode: Mode = "drop",
        scorer: Scorer | Sequence[Scorer] = "mlp",
        shared: bool = False,
        tau: float = 1.0,
        noise: bool = True,
        completion: Completion | None = "fusion",
        completion_dim: int | None = None,
        completion_depth: int = 1,
        completion_heads: int | None = None,
        skips: Literal["completed", "blocks"] = "completed",
        as_published: bool = False,
    ) -> None:
        """Build.

        Args:
            channels, classes: of the image and of the logits.
            image_size: voxels, for which positions are learned; any size divisible by the patch runs.
            decoder: decides the edge of a patch, too: 16 (x16) or 8.
            features: of the decoder at full resolution. dim, depth, heads, drop_path: of the encoder.
            locations, ratios, mode, scorer, shared, tau, noise: see `TokenReduction`; no locations: a dense network.
            completion: None or "last" keeps the last value of each token. completion_*: its width, blocks, heads.
            skips: what the decoder gets beside the completed tokens: the same again (published), or, as in the dense
                network, the outputs of blocks, with dropped tokens at their last values.
            as_published: see `UNETRDecoder`.
        """
        super().__init__()
        self.decoder = UNETRDecoder(decoder, channels, classes, dim=dim, features=features, as_published=as_published)
        if max(self.decoder.hidden) >= depth:
            raise ConfigError(f"token_sparse: decoder {decoder} needs more than {max(self.decoder.hidden)} blocks")
        reduction = None
        if locations:
            reduction = TokenReduction(
                dim, locations, ratios, mode=mode, scorer=scorer, shared=shared, tau=tau, noise=noise
            )
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
        if reduction is not None and mode == "drop" and completion not in (None, "last"):
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
        from_blocks = not sparse or self.skips == "blocks"
        encoded = self.encoder(image, self.decoder.hidden if from_blocks else ())
        now = encoded.sequence
        if now.complete or self.completion is None:
            full = now.last_values([tokens for _, tokens in encoded.parts])[:, 1:]
        else:
            full = self.completion(encoded.parts, now.all_positions(), encoded.grid)
        last = to_volume(full, encoded.grid)
        hidden = [to_volume(each, encoded.grid) for each in encoded.hidden] or [last] * len(self.decoder.hidden)
        return self.decoder(image, last, hidden)


def published_unetr(name: str, **changes: Any) -> TokenSparseUNETR:
    """Build a published configuration, "btcv" or "brats", with changed arguments.

    Raises:
        ConfigError: another name.
    """
    if name not in PUBLISHED:
        raise ConfigError(f"token_sparse: published configurations are {', '.join(PUBLISHED)}, found '{name}'")
    return TokenSparseUNETR(**{**PUBLISHED[name], "as_published": True, **changes})
