"""Transformers that see a window of slices: timm's, whose 3D patch embedding takes all its depth, and the 3D Swin."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Mapping, Sequence
from functools import partial
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
# Name in the published programs -> ours.
PUBLISHED_NAMES = {"swint": "swin", "swint3d": "videoswin", "videoswint": "videoswin", "upernet-swint": "upernet"}
PUBLISHED_NAMES |= {"centering": "center", "inflation": "average"}
_SIZES: dict[str, dict[str, Any]] = {
    "swin3d_t": {"embed_dim": 96, "depths": [2, 2, 6, 2], "num_heads": [3, 6, 12, 24]},
    "swin3d_s": {"embed_dim": 96, "depths": [2, 2, 18, 2], "num_heads": [3, 6, 12, 24]},
    "swin3d_b": {"embed_dim": 128, "depths": [2, 2, 18, 2], "num_heads": [4, 8, 16, 32]},
}
_BLOCK = re.compile(r"layers\.(\d+)\.blocks\.(\d+)\.(.+)")
_MERGE = re.compile(r"layers\.(\d+)\.downsample\.(.+)")
DERIVED = ("relative_position_index", "attn_mask")


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
        if other := set(options) & set(inspect.signature(timm.create_model).parameters):
            # Such as checkpoint_path: timm would unpickle the file, and plans.json may hold these options.
            raise ConfigError(f"inflation: '{sorted(other)[0]}' is no argument of timm's network '{model}'")
        patch = _patch_of(timm, model, options.get("patch_size"))
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
        if swin:
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


def _patch_of(timm: Any, model: str, given: int | None) -> int:
    if model not in timm.list_models():
        raise ConfigError(f"inflation: timm {timm.__version__} has no network '{model}'; {nearest(model, ENCODERS)}")
    if given:
        return given
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
    """Build a `VideoSwin` or `WindowEncoder` by its name in `ENCODERS`, or raise a ConfigError."""
    name = PUBLISHED_NAMES.get(name, name)
    if name not in ENCODERS:
        raise ConfigError(f"inflation: no encoder '{name}'; {nearest(name, ENCODERS)}")
    model = model or ENCODERS[name]
    if name == "videoswin":
        return VideoSwin(channels, depth, model=model, options=options)
    return WindowEncoder(channels, depth, size, model=model, options=options)


def reach_of(depth: int) -> int:
    """Return how many slices stand before and after the one that a window predicts; an even depth is a ConfigError."""
    if depth < 1 or depth % 2 == 0:
        raise ConfigError(f"inflation: a window has a centre slice, so its depth is odd; found {depth}")
    return depth // 2


def repeat_ends(volume: Tensor, before: int, bottom: int = 0, right: int = 0) -> Tensor:
    """Repeat the last rows and columns of (N, C, H, W), of (N, C, D, H, W) also the first and last slices."""
    padding = (0, right, 0, bottom, before, before)[: 2 * (volume.dim() - 2)]
    return nn.functional.pad(volume, padding, mode="replicate") if any(padding) else volume


class VideoSwin(nn.Module):
    """torchvision's 3D Swin on windows of slices; of each stage the token layer in the middle goes to the decoder.

    Attributes:
        trunk: torchvision's network; its weights keep torchvision's names, which are also those of its 2D Swin.
        norms: one for each map, as in a Swin that feeds a decoder.
        channels, strides, multiple: see `WindowEncoder`.
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
        module = "torchvision.models.video.swin_transformer"
        swin = needed(module, "nnslim[window]", purpose="videoswin", error=ConfigError)
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
        windows = volume.unfold(2, self.depth, 1).permute(0, 2, 1, 5, 3, 4)  # (B, D, C, depth, H, W)
        return self.encode(windows.flatten(0, 1))

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
    return _from_torchvision_2d(made) if "features.0.0.weight" in made else made


def _from_torchvision_2d(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    made = {}
    for key, value in weights.items():
        number, rest = key.removeprefix("features.").split(".", 1)
        if number == "0":
            made[f"patch_embed.{'proj' if rest.startswith('0.') else 'norm'}.{rest.split('.')[-1]}"] = value
        else:
            made[f"features.{int(number) - 1}.{rest}"] = value
    return made
