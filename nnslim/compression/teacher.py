"""The dense network as a teacher: its answers to patches, and to their mirror images."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

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


class Teacher:
    """Answers of the dense network, without gradients.

    With mirror axes the answer is to a mirror image of the batch, turned back; which one is drawn for each step.
    Learned from over many steps this is the mean over all mirror images: what nnU-Net's test-time mirroring predicts,
    at the price of one forward pass.
    """

    def __init__(self, dense: nn.Module, *, axes: Sequence[int] = (), half: bool = False, seed: int = 0) -> None:
        """Prepare.

        Args:
            dense: in eval mode.
            axes: spatial axes along which the model may be mirrored; none: it answers the batch as it is.
            half: compute in bfloat16.
            seed: decides the mirror image of each step.
        """
        self._dense, self._half, self._seed = dense, half, seed
        self._ways = mirrors(axes)
        self._device = next(dense.parameters()).device
        self._engines: dict[tuple[int, ...], nn.Module] = {}  # the faster engine of a CPU, where nothing is learned

    @torch.no_grad()
    def answer(self, batch: Tensor, step: int) -> Tensor:
        """Return logits (B, heads, *patch) for step number `step`."""
        drawn = np.random.default_rng((self._seed, step)).integers(len(self._ways))
        way = self._ways[int(drawn)]
        return flip(self._logits(flip(batch, way)), way)

    def _logits(self, batch: Tensor) -> Tensor:
        if self._half or self._device.type != "cpu":
            with torch.autocast(self._device.type, torch.bfloat16, enabled=self._half):
                return self._dense(batch).float()
        shape = tuple(batch.shape)
        if shape not in self._engines:
            self._engines[shape] = with_fallback(self._dense, shape, Settings("eager"))[0]
        return self._engines[shape](batch)
