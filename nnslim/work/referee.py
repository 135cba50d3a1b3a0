"""Judge a slim network without labels."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from nnslim.streaming import Tiles
from nnslim.work.expected import TEMPERATURE, expected_dices, harden


class Referee:
    """Measures, on held-out tiles, how much Dice a slim network is expected to lose against labels, without any.

    The dense network's own probabilities stand for the labels (`expected_dice`). Its logits are computed once for each
    tile and kept in half precision, as many as fit in 256 MB, so that measuring again only costs the slim network's
    pass.
    """

    def __init__(self, dense: nn.Module, tiles: Tiles, *, regions: bool = False) -> None:
        """Prepare.

        Args:
            dense: in eval mode.
            tiles: held-out tiles.
            regions: channels are independent.
        """
        self._dense, self._tiles, self._regions = dense, tiles, regions
        self._device = next(dense.parameters()).device
        self._kept: dict[int, Tensor] = {}
        self._budget = 256 * 2**20  # bytes of logits that are kept in memory

    @torch.inference_mode()
    def _reference(self, number: int, tile: Tensor) -> Tensor:
        if number in self._kept:
            return self._kept[number].float()
        logits = self._dense(tile)[0].float().cpu()
        size = logits.numel() * 2
        if size <= self._budget:
            self._budget -= size
            self._kept[number] = logits.half()
            return self._kept[number].float()  # the same numbers the next time
        return logits

    @torch.inference_mode()
    def drop(self, slim: nn.Module) -> float:
        """Return the estimated drop, mean over classes and tiles; NaN where no tile shows any class."""
        drops = []
        training = slim.training
        slim.eval()
        for number, tile in enumerate(self._tiles):
            tile = tile.to(self._device)
            logits = self._reference(number, tile)
            truth = logits.sigmoid() if self._regions else logits.softmax(0)
            answer = slim(tile)[0].float().cpu()
            answer = answer > 0 if self._regions else answer.argmax(0)
            both = [harden(truth, not self._regions), answer]
            wanted, found = (torch.as_tensor(d) for d in expected_dices(truth, both, not self._regions, TEMPERATURE))
            there = wanted.isfinite() & found.isfinite()
            if there.any():
                drops.append(float((wanted - found)[there].mean()))
        slim.train(training)
        return sum(drops) / len(drops) if drops else math.nan
