"""Judge a slim network without labels."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from nnslim.compression.calibration import Calibration
from nnslim.compression.teacher import Axes, flip, mirrors
from nnslim.evaluation.expected import TEMPERATURE, expected_dices, harden
from nnslim.surgery.streaming import Tiles

_TINY = torch.finfo(torch.float32).tiny


class Referee:
    """Measures, on held-out tiles, how much Dice a slim network is expected to lose against labels, without any.

    The dense network's own probabilities stand for the labels (`expected_dice`); where the model may be mirrored, their
    mean over up to four mirror images, which are nearer to real labels. The drop is that of the plain answer against
    the dense network's plain one; where the model will predict mirrored, the larger of this and of that of the means.
    What is known of the dense network is computed once for each tile and kept in half precision, as many as fit in
    256 MB, so that measuring again only costs the slim network's passes.
    """

    def __init__(
        self,
        dense: nn.Module,
        tiles: Tiles,
        *,
        regions: bool = False,
        axes: Sequence[int] = (),
        mirrored: bool = False,
    ) -> None:
        """Prepare.

        Args:
            dense: in eval mode.
            tiles: held-out tiles.
            regions: channels are independent.
            axes: spatial axes along which the model may be mirrored.
            mirrored: the model will predict with test-time mirroring.
        """
        self._dense, self._tiles, self._regions = dense, tiles, regions
        self._ways = mirrors(axes, 4)
        self._mirrored = mirrored and len(self._ways) > 1
        self._device = next(dense.parameters()).device
        self._kept: dict[int, tuple[Tensor, Tensor]] = {}
        self._budget = 256 * 2**20  # bytes that are kept in memory

    @classmethod
    def of(cls, dense: nn.Module, data: Calibration, *, tiles: Tiles | None = None, images: bool = True) -> Referee:
        """Return the referee of calibration data.

        Args:
            tiles: other ones than those held out.
            images: mirror images count towards the truth; they must not where the plain answer is learned.
        """
        axes, mirrored = data.mirror_axes if images or data.mirrored else (), data.mirrored
        judged = data.held_out if tiles is None else tiles
        return cls(dense, judged, regions=data.regions, axes=axes, mirrored=mirrored)

    @torch.inference_mode()
    def _reference(self, number: int, tile: Tensor) -> tuple[Tensor, Tensor]:
        """Return what stands for the labels, (C, *patch) probabilities, and the dense network's own answer."""
        if number in self._kept:
            logits, answer = self._kept[number]
        else:
            logits, mean = self._answers(self._dense, tile, self._ways)
            answer = self._decided(logits)
            answer = answer if self._regions else answer.to(torch.int16)
            if len(self._ways) > 1:
                logits = mean.logit(1e-7) if self._regions else mean.clamp_min(_TINY).log()
            logits = logits.half()
            if (size := logits.nbytes + answer.nbytes) <= self._budget:
                self._budget -= size
                self._kept[number] = (logits, answer)
        return self._likely(logits.float()), answer  # the same numbers each time

    def _answers(self, network: nn.Module, tile: Tensor, ways: Sequence[Axes]) -> tuple[Tensor, Tensor]:
        """Return plain logits and the mean of the probabilities over mirror images, (C, *patch) each."""
        answers = [flip(network(flip(tile, way)), way)[0].float().cpu() for way in ways]
        return answers[0], torch.stack([self._likely(one) for one in answers]).mean(0)

    def _decided(self, logits: Tensor) -> Tensor:
        return logits > 0 if self._regions else logits.argmax(0)

    def _likely(self, logits: Tensor) -> Tensor:
        return logits.sigmoid() if self._regions else logits.softmax(0)

    def drop(self, slim: nn.Module) -> float:
        """Return the estimated drop, mean over classes and tiles; NaN where no tile shows any class."""
        ways = [[drop for drop in way if not math.isnan(drop)] for way in zip(*self.drops(slim), strict=True)]
        return max((sum(way) / len(way) for way in ways if way), default=math.nan)

    @torch.inference_mode()
    def drops(self, slim: nn.Module) -> list[list[float]]:
        """Return the estimated drop of each tile, mean over classes; NaN where it shows none.

        One of the plain answer and, where the model predicts mirrored, one of the mean over mirror images.
        """
        drops: list[list[float]] = []
        training = slim.training
        slim.eval()
        for number, tile in enumerate(self._tiles):
            tile = tile.to(self._device)
            truth, dense = self._reference(number, tile)
            logits, mean = self._answers(slim, tile, self._ways if self._mirrored else [()])
            pairs = [(dense, self._decided(logits))]
            if self._mirrored:
                pairs.append((harden(truth, not self._regions), harden(mean, not self._regions)))
            drops.append([self._drop(truth, pair) for pair in pairs])
        slim.train(training)
        return drops

    def _drop(self, truth: Tensor, pair: tuple[Tensor, Tensor]) -> float:
        made = expected_dices(truth, pair, not self._regions, TEMPERATURE)
        wanted, found = (torch.as_tensor(dice) for dice in made)
        there = wanted.isfinite() & found.isfinite()
        return float((wanted - found)[there].mean()) if there.any() else math.nan
