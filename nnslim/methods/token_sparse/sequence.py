"""A token sequence between blocks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

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
            if self.noise:
                gumbel = -torch.empty_like(scores).exponential_().log()
                scores = scores + torch.where(torch.isinf(gumbel), torch.zeros_like(gumbel), gumbel)
            soft = torch.softmax(scores / self.tau, dim=-1)
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


@dataclass
class Sequence3d:
    """A token sequence between blocks: P prefix tokens, then L patch tokens.

    Attributes:
        x: (B, P + L, D). prefix: P. length: L, a plain number also while a tracer makes tensors of shapes.
        rope: rotary embedding of the patch tokens, (L, E) while complete, then (B, 1, L, E); None without.
        content: (B, L), see `StageInput`.
        positions: (B, P + L), where each row belongs in the full sequence; None while it is complete.
        alive: (B, P + L, 1) ones, with the gradients of the choices so far.
        groups, group_positions, stages: what was dropped, where it belongs, and by which stage.
        assigned: (B, L_full), the current patch token that stands for each original one, where tokens were merged.
        sizes: (B, L, 1), how many tokens each merged one stands for.
    """

    x: Tensor
    length: int
    prefix: int = 0
    rope: Tensor | None = None
    content: Tensor | None = None
    positions: Tensor | None = None
    alive: Tensor | None = None
    groups: list[Tensor] = field(default_factory=list)
    group_positions: list[Tensor] = field(default_factory=list)
    stages: list[int] = field(default_factory=list)
    assigned: Tensor | None = None
    sizes: Tensor | None = None

    @property
    def complete(self) -> bool:
        """Whether nothing was dropped or merged."""
        return self.positions is None and self.assigned is None

    def parts(self) -> list[tuple[int, Tensor]]:
        """Return (stage, tokens) of every dropped group, then (-1, the current rows)."""
        return [*zip(self.stages, self.groups, strict=True), (-1, self.x)]

    def all_positions(self) -> Tensor:
        """Return (B, N), the positions of all dropped groups, then of the current rows."""
        return torch.cat((*self.group_positions, self.positions), dim=1)

    def last_values(self, parts: Sequence[Tensor] | None = None) -> Tensor:
        """Return the full sequence (B, P + L_full, D), each token as it was last computed.

        Args:
            parts: the dropped groups, then the current rows, in place of this sequence's own.
        """
        *groups, x = (*self.groups, self.x) if parts is None else parts
        if self.assigned is not None:
            return torch.cat((x[:, : self.prefix], take(x[:, self.prefix :], self.assigned)), dim=1)
        return x if self.positions is None else unshuffle(torch.cat((*groups, x), dim=1), self.all_positions())
