"""Labels teach the scorers: tokens that hold foreground should stay."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from nnslim.methods.token_sparse.reduction import Scored, TokenReduction
from nnslim.methods.token_sparse.sparse_encoders import token_edge


def scorer_loss(heard: Sequence[Scored], foreground: Tensor) -> Tensor:
    """Return the binary cross-entropy between scores and which tokens hold foreground, mean over stages.

    A learned score is a log-probability: exp(score) is read as the probability that the token's cube holds foreground.

    Args:
        heard: see `TokenReduction.heard`; at least one. foreground: (B, 1, *size), 1 for labelled voxels, 0 elsewhere.
    """
    losses = []
    for said in heard:
        held = functional.max_pool3d(foreground, token_edge(foreground, said.total)).flatten(1)
        held = held.gather(1, said.positions)
        log_kept = said.scores.float().clamp_max(-1e-6)  # log(1 - p) is finite
        losses.append(-(held * log_kept + (1 - held) * torch.log(-torch.expm1(log_kept))).mean())
    return torch.stack(losses).mean()


class SupervisedLoss(nn.Module):
    """A training's loss, plus `weight` times `scorer_loss` where learned scorers ran since the last call."""

    def __init__(
        self,
        loss: nn.Module,
        reductions: Sequence[TokenReduction],
        weight: float,
        foreground: Callable[[Tensor], Tensor],
    ) -> None:
        """Start to listen to the scorers.

        Args:
            loss: of (output, target). reductions: whose scorers are taught. weight: of the added loss.
            foreground: from the target to (B, 1, *size) as `scorer_loss` takes it.
        """
        super().__init__()
        self.loss = loss
        self.weight = weight
        self._foreground = foreground
        self._heard: list[Scored] = []
        for reduction in reductions:
            reduction.listen(self._heard)

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        """Return the loss; nothing is added in evaluation, in which scorers are not listened to."""
        total = self.loss(output, target)
        if self._heard:
            total = total + self.weight * scorer_loss(self._heard, self._foreground(target))
            self._heard.clear()
        return total
