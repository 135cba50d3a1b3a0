"""A token sequence between blocks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from nnslim.methods.token_sparse.selection import take, unshuffle


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
