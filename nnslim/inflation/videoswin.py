"""The 3D Swin of torchvision as an encoder of windows of slices, from 2D Swin weights or published VideoSwin ones."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import Tensor, nn

from nnslim.errors import ConfigError
from nnslim.optional import needed

_SIZES: dict[str, dict[str, Any]] = {
    "swin3d_t": {"embed_dim": 96, "depths": [2, 2, 6, 2], "num_heads": [3, 6, 12, 24]},
    "swin3d_s": {"embed_dim": 96, "depths": [2, 2, 18, 2], "num_heads": [3, 6, 12, 24]},
    "swin3d_b": {"embed_dim": 128, "depths": [2, 2, 18, 2], "num_heads": [4, 8, 16, 32]},
}
_BLOCK = re.compile(r"layers\.(\d+)\.blocks\.(\d+)\.(.+)")
_MERGE = re.compile(r"layers\.(\d+)\.downsample\.(.+)")
DERIVED = ("relative_position_index", "attn_mask")


class VideoSwin(nn.Module):
    """torchvision's 3D Swin on windows of slices; of each stage the token layer in the middle goes to the decoder.

    Attributes:
        trunk: torchvision's network; its weights keep torchvision's names, which are also those of its 2D Swin.
        norms: one for each map, as in a Swin that feeds a decoder.
        channels, strides, multiple: see `nnslim.inflation.window_encoders.WindowEncoder`.
    """

    def __init__(
        self, channels: int, depth: int, *, model: str = "swin3d_b", options: dict[str, Any] | None = None
    ) -> None:
        """Build with random weights.

        Args:
            channels: of the images. depth: slices of a window.
            model: swin3d_t, swin3d_s or swin3d_b. options: changed embed_dim, depths, num_heads, patch_size,
                window_size; the last is (8, 7, 7), and (layers of tokens, 7, 7) is enough for a window.
        """
        super().__init__()
        swin = needed(
            "torchvision.models.video.swin_transformer", "nnslim[window]", purpose="videoswin", error=ConfigError
        )
        if model not in _SIZES:
            raise ConfigError(f"inflation: no 3D Swin '{model}'; known: {', '.join(_SIZES)}")
        settings = {"patch_size": [2, 4, 4], "window_size": [8, 7, 7], "stochastic_depth_prob": 0.1, **_SIZES[model]}
        settings |= options or {}
        from torchvision.models.swin_transformer import SwinTransformerBlock

        exact = _exact_attention(swin)

        def block(*args: Any, attn_layer: Any = None, **kwargs: Any) -> nn.Module:
            return SwinTransformerBlock(*args, attn_layer=exact, **kwargs)

        patch = settings["patch_size"]
        embedding = partial(swin.PatchEmbed3d, in_channels=channels)
        self.trunk = swin.SwinTransformer3d(num_classes=1, block=block, patch_embed=embedding, **settings)
        self.trunk.norm = self.trunk.head = nn.Identity()
        width, stages = settings["embed_dim"], len(settings["depths"])
        self.channels = [width * 2**stage for stage in range(stages)]
        self.strides = [patch[1] * 2**stage for stage in range(stages)]
        self.norms = nn.ModuleList(nn.LayerNorm(count) for count in self.channels)
        self.depth, self.multiple, self.window = depth, patch[1], tuple(settings["window_size"])

    def forward(self, volume: Tensor) -> list[Tensor]:
        """See `WindowEncoder.forward`; each window is encoded by itself, since its slices look at each other."""
        return self.encode(windows_of(volume, self.depth))

    def only_last(self) -> None:
        """Leave out the norms of maps that the decoder does not read; DDP would wait for their gradients."""
        self.norms = nn.ModuleList([*(nn.Identity() for _ in self.norms[:-1]), self.norms[-1]])

    def encode(self, windows: Tensor) -> list[Tensor]:
        """Encode windows (N, C, depth, H, W)."""
        tokens = self.trunk.pos_drop(self.trunk.patch_embed(windows))  # (N, layers, h, w, dim)
        maps = []
        for number, stage in enumerate(self.trunk.features):
            tokens = stage(tokens)
            if number % 2 == 0:  # odd ones merge patches
                middle = tokens[:, tokens.shape[1] // 2]
                maps.append(self.norms[number // 2](middle).permute(0, 3, 1, 2))
        return maps


def _exact_attention(swin: Any) -> type[nn.Module]:
    class ExactAttention3d(swin.ShiftedWindowAttention3d):
        """Where the map is smaller than a window, torchvision reads the first rows of the index, which belong to other
        offsets; this reads those of the smaller window."""

        def get_relative_position_bias(self, window_size: list[int]) -> Tensor:
            """Return (1, heads, tokens, tokens) for a window of that many tokens."""
            depth, rows, columns = window_size
            index = self.relative_position_index.view(*self.window_size, *self.window_size)
            index = index[:depth, :rows, :columns, :depth, :rows, :columns]
            tokens = depth * rows * columns
            chosen = self.relative_position_bias_table[index.reshape(-1)]
            return chosen.view(tokens, tokens, -1).permute(2, 0, 1).contiguous().unsqueeze(0)

    return ExactAttention3d


def videoswin_names(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Bring the weights of a Swin, 2D or 3D, to torchvision's names.

    Read are the names of the Swin and Video Swin repositories (`backbone.layers.0.blocks.0.attn.qkv.weight`, merging
    after each stage), of timm (merging before each stage but the first), and torchvision's own:

    | theirs | torchvision's |
    | --- | --- |
    | patch_embed.proj, patch_embed.norm | the same |
    | layers.i.blocks.j.{norm1,norm2,attn.*} | features.2i.j.* |
    | layers.i.blocks.j.mlp.{fc1,fc2} | features.2i.j.mlp.{0,3} |
    | layers.i.downsample.{reduction,norm} | features.(2i+1).*, in timm features.(2i-1).* |
    | norm, head, cls_head, fc_cls, tables of indices, masks | left out |

    Args:
        weights: without prefixes of wrappers, see `nnslim.inflation.read_weights`.
    """
    plain = {key.removeprefix("backbone."): value for key, value in weights.items()}
    before = not any(key.startswith("layers.0.downsample.") for key in plain)  # timm's order
    made = {}
    for key, value in plain.items():
        if key.endswith(DERIVED):
            continue
        if found := _BLOCK.fullmatch(key):
            inner = found[3].replace("mlp.fc1.", "mlp.0.").replace("mlp.fc2.", "mlp.3.")
            made[f"features.{2 * int(found[1])}.{found[2]}.{inner}"] = value
        elif found := _MERGE.fullmatch(key):
            made[f"features.{2 * int(found[1]) + (-1 if before else 1)}.{found[2]}"] = value
        elif key.startswith(("patch_embed.", "features.")):
            # torchvision's 2D Swin calls its patch embedding features.0 = (conv, permute, norm).
            made[key] = value
    if "features.0.0.weight" in made:
        made = _from_torchvision_2d(made)
    return made


def _from_torchvision_2d(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    made = {}
    for key, value in weights.items():
        number, rest = key.removeprefix("features.").split(".", 1)
        if number == "0":
            made[f"patch_embed.{'proj' if rest.startswith('0.') else 'norm'}.{rest.split('.')[-1]}"] = value
        else:
            made[f"features.{int(number) - 1}.{rest}"] = value
    return made


def windows_of(volume: Tensor, depth: int) -> Tensor:
    """(B, C, D + depth - 1, H, W) to windows (B * D, C, depth, H, W), for encoders that cannot share an embedding."""
    return volume.unfold(2, depth, 1).permute(0, 2, 1, 5, 3, 4).flatten(0, 1)
