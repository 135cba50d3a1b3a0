"""Decoders from the maps of a transformer to logits: UPerNet (Xiao et al., 2018) and SETR-PUP (Zheng et al., 2021)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from nnslim.errors import ConfigError, nearest

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

    def __init__(
        self, channels: Sequence[int], strides: Sequence[int], classes: int, *, width: int | None = None
    ) -> None:
        """Build; see `UPerNet`. width: inner channels, 256 by default."""
        super().__init__()
        width = width or 256
        steps = max(1, math.ceil(math.log2(strides[-1])))
        self.stages = nn.ModuleList(_block(channels[-1] if step == 0 else width, width) for step in range(steps))
        self.logits = nn.Conv2d(width, classes, 1)

    def forward(self, maps: Sequence[Tensor], size: Sequence[int]) -> Tensor:
        """Return logits (N, classes, *size)."""
        x = maps[-1]
        for number, stage in enumerate(self.stages):
            x = stage(x)
            last = number == len(self.stages) - 1
            x = _resized(x, [edge if last else min(2 * now, edge) for now, edge in zip(x.shape[2:], size, strict=True)])
        return self.logits(x)


DECODERS = {"upernet": UPerNet, "setrpup": SETRPUP}


def make_decoder(
    name: str, channels: Sequence[int], strides: Sequence[int], classes: int, *, width: int | None = None
) -> nn.Module:
    """Build a decoder of `DECODERS` by its name.

    Raises:
        ConfigError: no such decoder.
    """
    if name not in DECODERS:
        raise ConfigError(f"inflation: no decoder '{name}'; {nearest(name, DECODERS)}")
    return DECODERS[name](channels, strides, classes, width=width)
