"""Judge a slim network without labels."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from nnslim.streaming import Tiles
from nnslim.work.calibration import Calibration
from nnslim.work.expected import TEMPERATURE, expected_dices, harden
from nnslim.work.teacher import flip, mirrors


class Referee:
    """Measures, on held-out tiles, how much Dice a slim network is expected to lose against labels, without any.

    The dense network's own probabilities stand for the labels (`expected_dice`); where the model may be mirrored, their
    mean over up to four mirror images, which are nearer to real labels. Either way the drop is that against the dense
    network's plain answer. What is known of the dense network is computed once for each tile and kept in half
    precision, as many as fit in 256 MB, so that measuring again only costs the slim network's pass.
    """

    def __init__(self, dense: nn.Module, tiles: Tiles, *, regions: bool = False, axes: Sequence[int] = ()) -> None:
        """Prepare.

        Args:
            dense: in eval mode.
            tiles: held-out tiles.
            regions: channels are independent.
            axes: spatial axes along which the model may be mirrored.
        """
        self._dense, self._tiles, self._regions = dense, tiles, regions
        self._ways = mirrors(axes, 4)
        self._device = next(dense.parameters()).device
        self._kept: dict[int, tuple[Tensor, Tensor]] = {}
        self._budget = 256 * 2**20  # bytes of logits that are kept in memory

    @classmethod
    def of(cls, dense: nn.Module, data: Calibration) -> Referee:
        """Return the referee of calibration data."""
        return cls(dense, data.held_out, regions=data.regions, axes=data.mirror_axes)

    @torch.inference_mode()
    def _reference(self, number: int, tile: Tensor) -> tuple[Tensor, Tensor]:
        """Return what stands for the labels, (C, *patch) probabilities, and the dense network's own answer."""
        if number not in self._kept:
            answers = [flip(self._dense(flip(tile, way)), way)[0].float().cpu() for way in self._ways]
            plain = answers[0]
            if len(answers) > 1:
                mean = torch.stack([self._likely(one) for one in answers]).mean(0)
                answers[0] = (
                    mean.logit(1e-7) if self._regions else mean.clamp_min(torch.finfo(torch.float32).tiny).log()
                )
            pair = answers[0].half(), harden(plain if not self._regions else plain.sigmoid(), not self._regions)
            size = pair[0].numel() * 2
            if size > self._budget:
                return self._likely(pair[0].float()), pair[1]
            self._budget -= size
            self._kept[number] = pair
        return self._likely(self._kept[number][0].float()), self._kept[number][1]

    def _likely(self, logits: Tensor) -> Tensor:
        return logits.sigmoid() if self._regions else logits.softmax(0)

    @torch.inference_mode()
    def drop(self, slim: nn.Module) -> float:
        """Return the estimated drop, mean over classes and tiles; NaN where no tile shows any class."""
        drops = []
        training = slim.training
        slim.eval()
        for number, tile in enumerate(self._tiles):
            tile = tile.to(self._device)
            truth, dense = self._reference(number, tile)
            answer = slim(tile)[0].float().cpu()
            answer = answer > 0 if self._regions else answer.argmax(0)
            both = [dense, answer]
            wanted, found = (torch.as_tensor(d) for d in expected_dices(truth, both, not self._regions, TEMPERATURE))
            there = wanted.isfinite() & found.isfinite()
            if there.any():
                drops.append(float((wanted - found)[there].mean()))
        slim.train(training)
        return sum(drops) / len(drops) if drops else math.nan
