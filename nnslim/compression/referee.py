"""Judge a slim network without labels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from nnslim.compression.calibration import Calibration, Judged
from nnslim.compression.distillation import Axes, flip, mirrors
from nnslim.evaluation.expected import TEMPERATURE, expected_dices
from nnslim.surgery.streaming import Tiles

_TINY = torch.finfo(torch.float32).tiny


@dataclass(frozen=True)
class Judgement:
    """How much Dice a slim network is estimated to lose.

    Attributes:
        drop: mean over classes and tiles; of several judged answers the largest; NaN where no tile shows any class.
        classes: (classes,) mean over the tiles that show the class, of the same answer; NaN where none does.
    """

    drop: float
    classes: np.ndarray


@dataclass
class Referee:
    """Estimates, on held-out tiles and without labels, how much Dice against labels a slim network loses.

    The dense network's own probabilities stand for the labels (`expected_dice`); where the model may be mirrored, their
    mean over up to four mirror images, which are nearer to real labels. Compared are the answers that a user takes:
    "plain" ones of both networks; "mirrored" ones, which nnU-Net decides by the mean of the logits over mirror images;
    or, for "one pass", the plain answer of the slim network with the mirrored one of the dense network.
    What is known of the dense network is computed once for each tile and kept in half precision, for as many tiles as
    fit, so that measuring again only costs the slim network's passes.

    Attributes:
        dense: in eval mode. tiles: held-out ones. regions: channels are independent.
        axes: spatial axes along which the model may be mirrored.
        judged: what is compared; of several the largest drop counts.
        budget: bytes of memory for what is kept of the dense network.
    """

    dense: nn.Module
    tiles: Tiles
    regions: bool = False
    axes: Sequence[int] = ()
    judged: Sequence[Judged] = ("plain",)
    budget: int = 256 * 2**20

    def __post_init__(self) -> None:
        self._ways = mirrors(self.axes, 4)
        self._device = next(self.dense.parameters()).device
        self._kept: dict[int, tuple[Tensor, Tensor, Tensor]] = {}

    @classmethod
    def of(cls, dense: nn.Module, data: Calibration, *, tiles: Tiles | None = None, images: bool = True) -> Referee:
        """Return the referee of calibration data, on `tiles` in place of those held out.

        With `images`, mirror images count towards the truth; without, the plain answer alone, where that is learned.
        """
        axes = data.mirror_axes if images or data.judged != "plain" else ()
        return cls(dense, data.held_out if tiles is None else tiles, data.regions, axes, (data.judged,))

    @torch.inference_mode()
    def reference(self, number: int, tile: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return what stands for a tile's labels, (C, *patch) probabilities, and the dense network's two answers.

        The answers are the plain one and the mirrored one.
        """
        if number in self._kept:
            logits, *answers = self._kept[number]
        else:
            logits, mean, likely = self._answers(self.dense, tile, self._ways)
            answers = [self._decided(one) for one in (logits, mean)]
            answers = answers if self.regions else [one.to(torch.int16) for one in answers]
            if len(self._ways) > 1:
                logits = likely.logit(1e-7) if self.regions else likely.clamp_min(_TINY).log()
            logits = logits.half()
            if (size := logits.nbytes + sum(one.nbytes for one in answers)) <= self.budget:
                self.budget -= size
                self._kept[number] = (logits, *answers)
        return self._likely(logits.float()), *answers  # the same numbers each time

    def _answers(self, network: nn.Module, tile: Tensor, ways: Sequence[Axes]) -> tuple[Tensor, Tensor, Tensor]:
        """Return plain logits, and over mirror images the mean of logits and of probabilities, (C, *patch) each."""
        answers = [flip(network(flip(tile, way)), way)[0].float().cpu() for way in ways]
        return answers[0], torch.stack(answers).mean(0), torch.stack([self._likely(one) for one in answers]).mean(0)

    def _decided(self, logits: Tensor) -> Tensor:
        return logits > 0 if self.regions else logits.argmax(0)

    def _likely(self, logits: Tensor) -> Tensor:
        return logits.sigmoid() if self.regions else logits.softmax(0)

    def drop(self, slim: nn.Module) -> float:
        """Return the estimated drop, mean over classes and tiles; NaN where no tile shows any class."""
        return self.judge(slim).drop

    def judge(self, slim: nn.Module) -> Judgement:
        """Return the estimated drop and that of each class."""
        lost = self._lost(slim)
        if not len(lost):
            return Judgement(math.nan, np.array([]))
        means = [_mean(one) for one in np.moveaxis(_over_classes(lost), 1, 0)]
        chosen = int(np.argmax(np.nan_to_num(means, nan=-np.inf)))
        return Judgement(means[chosen], np.array([_mean(one) for one in lost[:, chosen].T]))

    def drops(self, slim: nn.Module) -> np.ndarray:
        """Return (tiles, judged answers) estimated drops, mean over classes; NaN: no class."""
        return _over_classes(self._lost(slim))

    @torch.inference_mode()
    def _lost(self, slim: nn.Module) -> np.ndarray:
        """Return (tiles, judged answers, classes) estimated drops; NaN where a tile does not show the class."""
        lost: list[list[np.ndarray]] = []
        training = slim.training
        slim.eval()
        ways = self._ways if "mirrored" in self.judged else [()]
        for number, tile in enumerate(self.tiles):
            tile = tile.to(self._device)
            truth, *dense = self.reference(number, tile)
            found = [self._decided(one) for one in self._answers(slim, tile, ways)[:2]]
            pairs = [(dense[judged != "plain"], found[judged == "mirrored"]) for judged in self.judged]
            made = [expected_dices(truth, pair, not self.regions, TEMPERATURE) for pair in pairs]
            # A class that neither finds says nothing, however much of it the softened probabilities expect.
            lost.append([np.where((wanted > 0) | (got > 0), wanted - got, np.nan) for wanted, got in made])
        slim.train(training)
        return np.array(lost)


def _over_classes(lost: np.ndarray) -> np.ndarray:
    return np.apply_along_axis(_mean, -1, lost)


def _mean(values: np.ndarray) -> float:
    seen = values[np.isfinite(values)]
    return float(seen.mean()) if len(seen) else math.nan
