"""The dense network as a teacher: its answers to patches, and to their mirror images."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from nnslim.running.engine import Settings, with_fallback

Axes = tuple[int, ...]


def mirrors(axes: Sequence[int] | None, most: int | None = None) -> list[Axes]:
    """Return the ways to mirror along any of the axes, () first.

    Args:
        axes: spatial axes, 0 the first.
        most: so many at most; of few, each axis is mirrored in as near to a half as can be.
    """
    found = [chosen for size in range(len(axes or ()) + 1) for chosen in itertools.combinations(axes or (), size)]
    if most is None or len(found) <= most:
        return found
    pairs = [(way, tuple(axis for axis in axes if axis not in way)) for way in found[: len(found) // 2 + 1]]
    return list(dict.fromkeys(way for pair in pairs for way in pair))[:most]


def flip(x: Tensor, axes: Axes) -> Tensor:
    """Return (B, C, *spatial) mirrored along spatial axes."""
    return x.flip([axis + 2 for axis in axes]) if axes else x


@dataclass
class Teacher:
    """Answers of the dense network, without gradients.

    With mirror axes the answer is to a mirror image of the batch, turned back; which one is drawn for each step.
    Learned from over many steps this is the mean over all mirror images: what nnU-Net's test-time mirroring predicts,
    at the price of one forward pass.

    Attributes:
        dense: in eval mode.
        axes: spatial axes along which the model may be mirrored; none: it answers the batch as it is.
        half: compute in bfloat16. seed: decides the mirror image of each step.
    """

    dense: nn.Module
    axes: Sequence[int] = ()
    half: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        self._ways = mirrors(self.axes)
        self._device = next(self.dense.parameters()).device
        self._engines: dict[tuple[int, ...], nn.Module] = {}  # the faster engine of a CPU, where nothing is learned

    @torch.no_grad()
    def answer(self, batch: Tensor, step: int) -> Tensor:
        """Return logits (B, heads, *patch) for step number `step`."""
        drawn = np.random.default_rng((self.seed, step)).integers(len(self._ways))
        way = self._ways[int(drawn)]
        return flip(self._logits(flip(batch, way)), way)

    def _logits(self, batch: Tensor) -> Tensor:
        if self.half or self._device.type != "cpu":
            with torch.autocast(self._device.type, torch.bfloat16, enabled=self.half):
                return self.dense(batch).float()
        shape = tuple(batch.shape)
        if shape not in self._engines:
            self._engines[shape] = with_fallback(self.dense, shape, Settings("eager"))[0]
        return self._engines[shape](batch)
