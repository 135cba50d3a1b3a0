"""Transformers of timm that see a window of slices: only the patch embedding is 3D, and it takes all of its depth."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from nnslim.errors import ConfigError, InputError, nearest
from nnslim.optional import needed

# Encoder -> timm's name of the network it is by default.
ENCODERS = {
    "vit": "vit_base_patch16_224",
    "dino": "vit_base_patch16_224",
    "dinov2": "vit_small_patch14_dinov2",
    "beit": "beit_base_patch16_224",
    "swin": "swin_base_patch4_window7_224",
    "videoswin": "swin3d_b",
}


class _Tokens(nn.Module):
    """In the place of timm's patch embedding: takes maps (N, dim, h, w) that the window's convolution has made."""

    def __init__(self, norm: nn.Module, grid: tuple[int, int], last: bool) -> None:
        """Build. norm: of the embedding. last: the trunk wants (N, h, w, dim), not (N, h * w, dim)."""
        super().__init__()
        self.norm, self.grid_size, self.last = norm, grid, last

    def forward(self, maps: Tensor) -> Tensor:
        """(N, dim, h, w) to what the trunk takes."""
        made = maps.permute(0, 2, 3, 1)
        return self.norm(made if self.last else made.flatten(1, 2))

    def dynamic_feat_size(self, size: tuple[int, int]) -> tuple[int, int]:
        """Return the grid of what is fed in, which is a grid already."""
        return size


class WindowEncoder(nn.Module):
    """A 2D transformer whose patch embedding reads `depth` slices at once.

    Attributes:
        embed: Conv3d (depth, p, p), stride (1, p, p): the tokens of all windows of a volume, without cutting them out.
        trunk: timm's network behind its patch embedding; its weights keep timm's names.
        channels, strides: of the maps that `forward` gives, strides in pixels.
        multiple: in-plane sizes are multiples of it.
    """

    def __init__(
        self, channels: int, depth: int, size: Sequence[int], *, model: str, options: dict[str, Any] | None = None
    ) -> None:
        """Build with random weights.

        Args:
            channels: of the images. depth: slices of a window.
            size: (rows, columns) of the slices, pixels; a BEiT takes no larger ones later, the others any.
            model: timm's name of a ViT, DINO, DINOv2, BEiT or Swin.
            options: changed arguments of timm's network (embed_dim, depth, num_heads, depths, window_size ...).
        Raises:
            ConfigError: timm has no such network, or it is of another kind.
        """
        super().__init__()
        timm = needed("timm", "nnslim[window]", purpose="the window network", error=ConfigError)
        options = dict(options or {})
        patch = options.get("patch_size") or _patch_of(timm, model)
        grid = tuple(max(1, math.ceil(edge / patch)) for edge in size)
        swin = model.startswith("swin_")
        extra: dict[str, Any] = {"strict_img_size": False, "always_partition": True} if swin else {}
        try:
            pixels = tuple(edge * patch for edge in grid)
            trunk = timm.create_model(model, pretrained=False, num_classes=0, img_size=pixels, **extra, **options)
        except (RuntimeError, TypeError, AssertionError) as error:
            raise ConfigError(f"inflation: timm cannot make '{model}' with {options}: {error}") from error
        kind = type(trunk).__name__
        if kind not in ("VisionTransformer", "Beit", "SwinTransformer"):
            raise ConfigError(f"inflation: '{model}' is a {kind}; expected a ViT, BEiT or Swin of timm")
        old = trunk.patch_embed
        self.embed = nn.Conv3d(channels, old.proj.out_channels, (depth, patch, patch), (1, patch, patch))
        trunk.patch_embed = _Tokens(old.norm, grid, last=kind != "Beit")
        for unused in ("norm", "fc_norm", "head"):  # of the classifier; left in, DDP would miss their gradients
            if hasattr(trunk, unused):
                setattr(trunk, unused, nn.Identity())
        if kind == "VisionTransformer":
            trunk.dynamic_img_size = True
        self.trunk, self.multiple, self.depth, self.kind, self.grid = trunk, patch, depth, kind, grid
        if kind == "SwinTransformer":
            self.taken = list(range(len(trunk.layers)))
            self.channels = [int(info["num_chs"]) for info in trunk.feature_info]
            self.strides = [int(info["reduction"]) for info in trunk.feature_info]
        else:
            blocks = len(trunk.blocks)
            self.taken = sorted({max(0, round(blocks * part) - 1) for part in (1 / 3, 1 / 2, 2 / 3, 1)})
            self.channels = [self.embed.out_channels] * len(self.taken)
            self.strides = [patch] * len(self.taken)

    def forward(self, volume: Tensor) -> list[Tensor]:
        """Encode every window of a volume.

        Args:
            volume: (B, C, D + depth - 1, H, W), repeated at both ends, H and W multiples of `multiple`.
        Returns:
            Maps (B * D, channels, H / stride, W / stride), the first slices first.
        Raises:
            InputError: larger than the encoder was built for, where that cannot be.
        """
        return self.encode(self.embed(volume).transpose(1, 2).flatten(0, 1))

    def encode(self, tokens: Tensor) -> list[Tensor]:
        """Encode embedded windows (N, dim, h, w)."""
        rows, columns = tokens.shape[2:]
        if self.kind == "Beit":
            if rows > self.grid[0] or columns > self.grid[1]:
                raise InputError(
                    f"a BEiT encoder built for slices of {tuple(self.multiple * edge for edge in self.grid)} pixels "
                    f"got {(self.multiple * rows, self.multiple * columns)}: its table of relative positions ends there"
                )
            # One table for one grid: a smaller slice is filled up with its border.
            tokens = repeat_ends(tokens, 0, self.grid[0] - rows, self.grid[1] - columns)
        made = self.trunk.forward_intermediates(tokens, indices=self.taken, intermediates_only=True)
        return list(made) if self.kind != "Beit" else [each[:, :, :rows, :columns] for each in made]


def _patch_of(timm: Any, model: str) -> int:
    if model not in timm.list_models():
        raise ConfigError(f"inflation: timm {timm.__version__} has no network '{model}'; {nearest(model, ENCODERS)}")
    if model.startswith("swin_"):
        return 4
    if found := re.search(r"_patch(\d+)(?:_|$)", model):
        return int(found[1])
    raise ConfigError(f"inflation: the name '{model}' does not tell a patch size; give patch_size among the options")


def make_encoder(
    name: str,
    channels: int,
    depth: int,
    size: Sequence[int],
    *,
    model: str | None = None,
    options: dict[str, Any] | None = None,
) -> nn.Module:
    """Build an encoder of `ENCODERS` by its name; see `WindowEncoder` and `nnslim.inflation.videoswin.VideoSwin`.

    Raises:
        ConfigError: no such encoder, or its network cannot be made.
    """
    if name not in ENCODERS:
        raise ConfigError(f"inflation: no encoder '{name}'; {nearest(name, ENCODERS)}")
    if name == "videoswin":
        from nnslim.inflation.videoswin import VideoSwin

        return VideoSwin(channels, depth, model=model or ENCODERS[name], options=options)
    return WindowEncoder(channels, depth, size, model=model or ENCODERS[name], options=options)


def reach_of(depth: int) -> int:
    """Return how many slices stand before and after the one that a window predicts.

    Raises:
        ConfigError: an even number of slices has no centre.
    """
    if depth < 1 or depth % 2 == 0:
        raise ConfigError(f"inflation: a window has a centre slice, so its depth is odd; found {depth}")
    return depth // 2


def repeat_ends(volume: Tensor, before: int, bottom: int = 0, right: int = 0) -> Tensor:
    """Repeat the last rows and columns of (N, C, H, W), of (N, C, D, H, W) also the first and last slices."""
    padding = (0, right, 0, bottom, before, before)[: 2 * (volume.dim() - 2)]
    return nn.functional.pad(volume, padding, mode="replicate") if any(padding) else volume
