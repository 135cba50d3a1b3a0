"""Judge a slim network without labels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nnslim.compression.calibration import Calibration
from nnslim.compression.distillation import Axes, flip, mirrors
from nnslim.evaluation.expected import TEMPERATURE, expected_dices, harden
from nnslim.surgery.streaming import Tiles

_TINY = torch.finfo(torch.float32).tiny


@dataclass
class Referee:
    """Estimates, on held-out tiles and without labels, how much Dice against labels a slim network loses.

    The dense network's own probabilities stand for the labels (`expected_dice`); where the model may be mirrored, their
    mean over up to four mirror images, which are nearer to real labels. The drop is that of the plain answer against
    the dense network's plain one; where the model will predict mirrored, the larger of this and of that of the means.
    What is known of the dense network is computed once for each tile and kept in half precision, for as many tiles as
    fit, so that measuring again only costs the slim network's passes.

    Attributes:
        dense: in eval mode. tiles: held-out ones. regions: channels are independent.
        axes: spatial axes along which the model may be mirrored.
        mirrored: the model will predict with test-time mirroring.
        budget: bytes of memory for what is kept of the dense network.
    """

    dense: nn.Module
    tiles: Tiles
    regions: bool = False
    axes: Sequence[int] = ()
    mirrored: bool = False
    budget: int = 256 * 2**20

    def __post_init__(self) -> None:
        self._ways = mirrors(self.axes, 4)
        self._device = next(self.dense.parameters()).device
        self._kept: dict[int, tuple[Tensor, Tensor]] = {}

    @classmethod
    def of(cls, dense: nn.Module, data: Calibration, *, tiles: Tiles | None = None, images: bool = True) -> Referee:
        """Return the referee of calibration data, on `tiles` in place of those held out.

        With `images`, mirror images count towards the truth; without, the plain answer alone, where that is learned.
        """
        axes = data.mirror_axes if images or data.mirrored else ()
        return cls(dense, data.held_out if tiles is None else tiles, data.regions, axes, data.mirrored)

    @torch.inference_mode()
    def reference(self, number: int, tile: Tensor) -> tuple[Tensor, Tensor]:
        """Return what stands for a tile's labels, (C, *patch) probabilities, and the dense network's own answer."""
        if number in self._kept:
            logits, answer = self._kept[number]
        else:
            logits, mean = self._answers(self.dense, tile, self._ways)
            answer = self._decided(logits)
            answer = answer if self.regions else answer.to(torch.int16)
            if len(self._ways) > 1:
                logits = mean.logit(1e-7) if self.regions else mean.clamp_min(_TINY).log()
            logits = logits.half()
            if (size := logits.nbytes + answer.nbytes) <= self.budget:
                self.budget -= size
                self._kept[number] = (logits, answer)
        return self._likely(logits.float()), answer  # the same numbers each time

    def _answers(self, network: nn.Module, tile: Tensor, ways: Sequence[Axes]) -> tuple[Tensor, Tensor]:
        """Return plain logits and the mean of the probabilities over mirror images, (C, *patch) each."""
        answers = [flip(network(flip(tile, way)), way)[0].float().cpu() for way in ways]
        return answers[0], torch.stack([self._likely(one) for one in answers]).mean(0)

    def _decided(self, logits: Tensor) -> Tensor:
        return logits > 0 if self.regions else logits.argmax(0)

    def _likely(self, logits: Tensor) -> Tensor:
        return logits.sigmoid() if self.regions else logits.softmax(0)

    def drop(self, slim: nn.Module) -> float:
        """Return the estimated drop, mean over classes and tiles; NaN where no tile shows any class."""
        ways = [[drop for drop in way if not math.isnan(drop)] for way in zip(*self.drops(slim), strict=True)]
        return max((sum(way) / len(way) for way in ways if way), default=math.nan)

    @torch.inference_mode()
    def drops(self, slim: nn.Module) -> list[list[float]]:
        """Return the estimated drop of each tile, mean over classes; NaN where it shows none.

        A tile has the drop of the plain answer and, if the model predicts mirrored, of the mean over mirrored ones.
        """
        drops: list[list[float]] = []
        training = slim.training
        slim.eval()
        mirrored = self.mirrored and len(self._ways) > 1
        for number, tile in enumerate(self.tiles):
            tile = tile.to(self._device)
            truth, dense = self.reference(number, tile)
            logits, mean = self._answers(slim, tile, self._ways if mirrored else [()])
            pairs = [(dense, self._decided(logits))]
            if mirrored:
                pairs.append((harden(truth, not self.regions), harden(mean, not self.regions)))
            made = [expected_dices(truth, pair, not self.regions, TEMPERATURE) for pair in pairs]
            lost = [torch.as_tensor(wanted) - torch.as_tensor(found) for wanted, found in made]
            drops.append([float(one[one.isfinite()].mean()) for one in lost])  # NaN where there is none
        slim.train(training)
        return drops
