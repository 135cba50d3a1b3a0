"""DAEFormer (Azad et al., arXiv 2212.13504) and the smaller forms that Embedded-ViT makes of it, for 2D slices.

Overlapping patch embeddings, transformer blocks that attend to tokens and to channels with a cost linear in the number
of tokens, and a decoder that reaches the encoder's stages by cross-attention. The published programs also build
layers that their forward pass never calls (74 to 77 % of the parameters of the smaller forms) and compute one layer
twice; here every layer runs, once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from nnslim.errors import ConfigError, nearest


@dataclass(frozen=True)
class DAEFormerForm:
    """What one form is made of.

    Attributes:
        dims: channels of each encoder stage, fine to coarse; stages work at 1/4, 1/8, 1/16 of the image.
        blocks: transformer blocks of each encoder stage.
        grouped: depth-wise 3x3 convolutions in the feed-forward part, or dense ones (published as "no grouping").
        edge: of the slices that it is published for; the network takes others.
    """

    dims: tuple[int, ...]
    blocks: tuple[int, ...]
    grouped: bool = True
    edge: int = 224

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values: keyword arguments of `DAEFormer`."""
        return {"dims": list(self.dims), "blocks": list(self.blocks), "grouped": self.grouped}


# "full" is DAEFormer itself.
FORMS = {
    "full": DAEFormerForm((128, 320, 512), (2, 2, 2)),
    "224": DAEFormerForm((128, 320), (2, 2)),
    "128": DAEFormerForm((64, 160), (1, 1), edge=128),
    "64": DAEFormerForm((32, 80), (1, 1), edge=64),
}
FORMS |= {f"{name}-dense": replace(form, grouped=False) for name, form in FORMS.items()}


def form_named(name: str) -> DAEFormerForm:
    """Return a form by its name; ConfigError where there is none."""
    if name not in FORMS:
        raise ConfigError(f"no DAEFormer form '{name}'; {nearest(name, FORMS)}")
    return FORMS[name]


def _attend(keys: Tensor, queries: Tensor, values: Tensor) -> Tensor:
    """Attend in a time linear in the tokens: keys and queries (B, C, N), values (B, N, C) give (B, C, N)."""
    context = functional.softmax(keys, dim=2) @ values  # over tokens: (B, C, C)
    return context.transpose(1, 2) @ functional.softmax(queries, dim=1)  # over channels


class EfficientAttention(nn.Module):
    """Attention whose cost is linear in the tokens: the keys' summary of the values, read by the queries."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.keys, self.queries, self.values = (nn.Conv2d(dim, dim, 1) for _ in range(3))
        self.reprojection = nn.Conv2d(dim, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to the same shape."""
        keys, queries, values = (layer(x).flatten(2) for layer in (self.keys, self.queries, self.values))
        return self.reprojection(_attend(keys, queries, values.transpose(1, 2)).reshape(x.shape))


class CrossAttention(nn.Module):
    """The same with keys and queries from the decoder and values from the encoder; twice as many channels come out."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.reprojection = nn.Conv2d(dim, 2 * dim, 1)
        self.norm = nn.LayerNorm(2 * dim)

    def forward(self, x: Tensor, skip: Tensor, size: tuple[int, int]) -> Tensor:
        """Map (B, N, C) twice to (B, N, 2C), N = H * W tokens."""
        read = _attend(x.transpose(1, 2), x.transpose(1, 2), skip).unflatten(2, size)  # (B, C, H, W)
        return self.norm(self.reprojection(read).flatten(2).transpose(1, 2))


class ChannelAttention(nn.Module):
    """Channels attend to channels, in heads; queries and keys have unit length over the tokens."""

    def __init__(self, dim: int, heads: int = 8) -> None:
        super().__init__()
        self.heads = heads
        self.temperature = nn.Parameter(torch.ones(heads, 1, 1))
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, N, C) to the same shape."""
        query, key, value = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 4, 1)  # (B, h, C / h, N)
        query, key = functional.normalize(query, dim=-1), functional.normalize(key, dim=-1)
        weights = (query @ key.transpose(-2, -1) * self.temperature).softmax(dim=-1)
        return self.proj((weights @ value).flatten(1, 2).transpose(1, 2))


class MixFFN(nn.Module):
    """Feed-forward with a 3x3 convolution over the slice, added to what goes into it."""

    def __init__(self, dim: int, hidden: int, *, grouped: bool) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.conv = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden if grouped else 1)
        self.norm, self.act = nn.LayerNorm(hidden), nn.GELU()
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """Map (B, N, C) to the same shape; N = H * W tokens."""
        inner = self.fc1(x)
        mixed = self.conv(inner.transpose(1, 2).unflatten(2, size)).flatten(2).transpose(1, 2)
        return self.fc2(self.act(self.norm(mixed + inner)))


class DualBlock(nn.Module):
    """Attention over tokens, then over channels, each with a feed-forward part; all four are added to what comes in."""

    def __init__(self, dim: int, *, grouped: bool) -> None:
        super().__init__()
        self.norm1, self.norm2, self.norm3, self.norm4 = (nn.LayerNorm(dim) for _ in range(4))
        self.attn, self.channel_attn = EfficientAttention(dim), ChannelAttention(dim)
        self.mlp1, self.mlp2 = (MixFFN(dim, 4 * dim, grouped=grouped) for _ in range(2))

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """Map (B, N, C) to the same shape; N = H * W tokens."""
        image = self.norm1(x).transpose(1, 2).unflatten(2, size)
        x = x + self.attn(image).flatten(2).transpose(1, 2)
        x = x + self.mlp1(self.norm2(x), size)
        x = x + self.channel_attn(self.norm3(x))
        return x + self.mlp2(self.norm4(x), size)


class Stage(nn.Module):
    """An encoder stage: a patch embedding that overlaps, then blocks."""

    def __init__(self, inputs: int, dim: int, blocks: int, *, kernel: int, stride: int, grouped: bool) -> None:
        super().__init__()
        self.embed = nn.Conv2d(inputs, dim, kernel, stride, kernel // 2)
        self.embed_norm = nn.LayerNorm(dim)
        self.blocks = nn.ModuleList(DualBlock(dim, grouped=grouped) for _ in range(blocks))
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, dim, H / stride, W / stride)."""
        x = self.embed(x)
        size = x.shape[2:]
        x = self.embed_norm(x.flatten(2).transpose(1, 2))
        for block in self.blocks:
            x = block(x, size)
        return self.norm(x).transpose(1, 2).unflatten(2, size)


class Expand(nn.Module):
    """Finer tokens from coarse ones: a linear layer, whose channels become positions."""

    def __init__(self, dim: int, factor: int, channels: int) -> None:
        super().__init__()
        self.factor, self.channels = factor, channels
        self.linear = nn.Linear(dim, factor * factor * channels, bias=False)
        self.norm = nn.LayerNorm(channels)

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """Map (B, H * W, dim) to (B, factor^2 * H * W, channels)."""
        (height, width), factor = size, self.factor
        fine = self.linear(x).reshape(-1, height, width, factor, factor, self.channels).transpose(2, 3)
        return self.norm(fine.reshape(-1, factor * factor * height * width, self.channels))


class CrossBlock(nn.Module):
    """Decoder tokens and those of an encoder stage side by side, after cross-attention and a feed-forward part."""

    def __init__(self, dim: int, *, grouped: bool) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(2 * dim)
        self.attn = CrossAttention(dim)
        self.mlp = MixFFN(2 * dim, 4 * dim, grouped=grouped)

    def forward(self, x: Tensor, skip: Tensor, size: tuple[int, int]) -> Tensor:
        """Map (B, N, C) twice to (B, N, 2C)."""
        both = torch.cat((x, skip), dim=2) + self.attn(self.norm1(x), self.norm1(skip), size)
        return both + self.mlp(self.norm2(both), size)


class DecoderLevel(nn.Module):
    """One level of the decoder: meet the encoder's stage, two blocks, then expand."""

    def __init__(self, inputs: int, dim: int, factor: int, channels: int, *, grouped: bool) -> None:
        super().__init__()
        self.linear = nn.Linear(inputs, dim)
        self.cross = CrossBlock(dim, grouped=grouped)
        self.merge = nn.Linear(2 * dim, dim)
        self.blocks = nn.ModuleList(DualBlock(dim, grouped=grouped) for _ in range(2))
        self.expand = Expand(dim, factor, channels)

    def forward(self, x: Tensor, skip: Tensor, size: tuple[int, int]) -> Tensor:
        """Map (B, N, inputs), and the stage's (B, N, dim), to (B, factor^2 * N, channels)."""
        x = self.merge(self.cross(self.linear(x), skip, size))
        for block in self.blocks:
            x = block(x, size)
        return self.expand(x, size)


class Decoder(nn.Module):
    """From the coarsest stage to the logits.

    Attributes:
        deep_supervision: also hand out coarser logits, which is how nnU-Net's trainers call a network.
    """

    def __init__(self, dims: Sequence[int], classes: int, *, grouped: bool) -> None:
        super().__init__()
        self.deep_supervision = False
        self.expand = Expand(dims[-1], 2, dims[-1] // 2)
        self.levels = nn.ModuleList()
        for place in reversed(range(len(dims) - 1)):
            # Every level but the last is followed by another of half its channels.
            factor, channels = (2, dims[place] // 2) if place else (4, dims[0])
            self.levels.append(DecoderLevel(dims[place + 1] // 2, dims[place], factor, channels, grouped=grouped))
        self.head = nn.Conv2d(dims[0], classes, 1)

    def forward(self, stages: Sequence[Tensor]) -> Tensor:
        """Map the stages' outputs, fine to coarse, to (B, classes, H, W)."""
        x = self.expand(stages[-1].flatten(2).transpose(1, 2), stages[-1].shape[2:])
        for level, skip in zip(self.levels, reversed(stages[:-1]), strict=True):
            x = level(x, skip.flatten(2).transpose(1, 2), skip.shape[2:])
        height, width = stages[0].shape[2:]
        return self.head(x.transpose(1, 2).unflatten(2, (4 * height, 4 * width)))


class DAEFormer(nn.Module):
    """A 2D segmentation transformer.

    Args:
        input_channels: of the slice; one channel is repeated to three, as published.
        num_classes: logits per pixel.
        dims, blocks, grouped: see `DAEFormerForm`.
    """

    def __init__(
        self,
        input_channels: int,
        num_classes: int,
        dims: Sequence[int] = FORMS["224"].dims,
        blocks: Sequence[int] = FORMS["224"].blocks,
        grouped: bool = True,
    ) -> None:
        super().__init__()
        if len(dims) < 2 or len(dims) != len(blocks) or any(dim < 8 or dim % 8 for dim in dims):
            what = f"dims {list(dims)} and blocks {list(blocks)}"
            raise ConfigError(f"{what}: expected two or more stages each, dims in 8s")
        self.encoder = nn.ModuleList()
        self.repeats = 3 if input_channels == 1 else 1
        inputs = self.repeats * input_channels
        for place, (dim, count) in enumerate(zip(dims, blocks, strict=True)):
            kernel, stride = (3, 2) if place else (7, 4)
            self.encoder.append(Stage(inputs, dim, count, kernel=kernel, stride=stride, grouped=grouped))
            inputs = dim
        self.multiple = 4 * 2 ** (len(dims) - 1)
        self.decoder = Decoder(dims, num_classes, grouped=grouped)

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        """Map (B, C, H, W), H and W multiples of 8 (16 with three stages), to (B, classes, H, W).

        With deep supervision a list, whose second entry is every fourth logit: nnU-Net's loss gives the last scale of
        several no weight, so this is a loss on the full logits.
        """
        if self.repeats > 1:
            x = x.repeat(1, self.repeats, 1, 1)
        stages = []
        for stage in self.encoder:
            stages.append(stage(stages[-1] if stages else x))
        logits = self.decoder(stages)
        return [logits, logits[:, :, ::4, ::4]] if self.decoder.deep_supervision else logits
