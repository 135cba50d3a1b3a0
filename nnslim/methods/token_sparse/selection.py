"""Which tokens stay: counts that do not depend on data, indices instead of masks, gradients straight through."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn


def keep_count(length: int, ratio: float) -> int:
    """Return how many of `length` tokens stay when the share `ratio` is removed: as published, but at least one.

    The float arithmetic is the original's: 1 - 0.9 = 0.09999999999999998, so 1000 tokens leave 99.
    """
    return max(1, int(length * (1 - ratio)))


@dataclass(frozen=True)
class Split:
    """The two parts of a sequence of L tokens.

    Attributes:
        kept: (B, K) indices, ascending. dropped: (B, L - K) indices, ascending.
        policy: (B, L, 1): 1 for kept and 0 for dropped tokens; in training with the gradient of the soft choice.
    """

    kept: Tensor
    dropped: Tensor
    policy: Tensor


class TopK(nn.Module):
    """Soft top-k: Gumbel noise and straight-through gradients in training, plain top-k in evaluation.

    Everything has a fixed shape, so that the network compiles and exports.
    """

    def __init__(self, tau: float = 1.0, noise: bool = True) -> None:
        """Set the temperature of the soft choice, and whether training adds noise to the scores."""
        super().__init__()
        self.tau = tau
        self.noise = noise

    def forward(self, scores: Tensor, keep: int) -> Split:
        """Choose the `keep` tokens with the highest scores.

        Args:
            scores: (B, L). keep: 1..L.
        """
        soft = None
        if self.training:
            noisy = scores
            if self.noise:
                gumbel = -torch.empty_like(scores).exponential_().log()
                noisy = scores + torch.where(torch.isinf(gumbel), torch.zeros_like(gumbel), gumbel)
            soft = torch.softmax(noisy / self.tau, dim=-1)
            scores = soft.detach()
        order = torch.sort(scores, dim=-1, descending=True).indices
        kept = torch.sort(order[:, :keep], dim=-1).values
        dropped = torch.sort(order[:, keep:], dim=-1).values
        hard = torch.zeros_like(scores).scatter(1, kept, 1.0)
        # (1 - y) + y and (0 - y) + y are exactly 1 and 0 in floating point for y in 0..1
        policy = hard if soft is None else hard - soft.detach() + soft
        return Split(kept, dropped, policy.unsqueeze(-1))


def take(tokens: Tensor, index: Tensor) -> Tensor:
    """Return the rows of (B, L, D) named by (B, K): (B, K, D)."""
    return tokens.gather(1, index.unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))


def unshuffle(tokens: Tensor, positions: Tensor) -> Tensor:
    """Put (B, N, D) rows back to their `positions` (B, N), a permutation of 0..N-1 in each sample."""
    return take(tokens, positions.argsort(dim=1))
