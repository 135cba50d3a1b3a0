"""Scorers: one number per token, high for tokens that should stay."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

Scorer = Literal["mlp", "att", "energy", "distance", "attention", "air", "random"]
LEARNED = ("mlp", "att")


@dataclass(frozen=True)
class StageInput:
    """What a scorer may look at.

    Attributes:
        tokens: (B, L, D) without prefix tokens. prefix: (B, P, D), class or register tokens, P may be 0.
        attention: gives (B, L), the attention that each token receives in the next block; None where unknown.
        content: (B, L), see `image_content`; None where it was not computed.
    """

    tokens: Tensor
    prefix: Tensor
    attention: Callable[[], Tensor] | None = None
    content: Tensor | None = None


class MlpScorer(nn.Module):
    """The published scorer: half of the features are compared with their mean over all tokens."""

    def __init__(self, dim: int) -> None:
        """Build for tokens of `dim` features (961,537 parameters for 768)."""
        super().__init__()
        self.input = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, dim), nn.GELU())
        self.output = nn.Sequential(
            nn.Linear(dim, dim // 2),
            nn.GELU(),
            nn.Linear(dim // 2, dim // 4),
            nn.GELU(),
            nn.Linear(dim // 4, 1),
            nn.LogSigmoid(),
        )

    def forward(self, stage: StageInput) -> Tensor:
        """Return (B, L) scores, at most 0."""
        hidden = self.input(stage.tokens)
        half = hidden.shape[-1] // 2
        overall = hidden[..., half:].mean(dim=1, keepdim=True).expand(-1, hidden.shape[1], -1)
        return self.output(torch.cat((hidden[..., :half], overall), dim=-1)).squeeze(-1)


class AttentionScorer(nn.Module):
    """The published alternative: similarity to the class token; without prefix tokens, to the mean token."""

    def __init__(self, dim: int, hidden: int = 128) -> None:
        """Build for tokens of `dim` features, compared in `hidden` features."""
        super().__init__()
        self.project = nn.Linear(dim, hidden)
        self.scale = nn.Parameter(torch.full((1,), hidden**-0.5))

    def forward(self, stage: StageInput) -> Tensor:
        """Return (B, L) scores, at most 0."""
        reference = stage.prefix[:, :1] if stage.prefix.shape[1] else stage.tokens.mean(dim=1, keepdim=True)
        tokens, reference = self.project(stage.tokens), self.project(reference)
        return functional.logsigmoid((tokens @ reference.transpose(1, 2)).squeeze(-1) * self.scale)


class FreeScorer(nn.Module):
    """Scores without weights, for trained dense networks.

    energy: norm of the token; distance: norm of its difference from the mean token; attention: what it receives in the
    next block; air: standard deviation of its part of the image, 0 where that is uniform; random: a fixed draw.
    """

    def __init__(self, kind: Scorer) -> None:
        """Choose the rule."""
        super().__init__()
        self.kind = kind

    def forward(self, stage: StageInput) -> Tensor:
        """Return (B, L) scores."""
        tokens = stage.tokens
        if self.kind == "attention" and stage.attention is not None:
            return stage.attention()
        if self.kind == "air" and stage.content is not None:
            return stage.content
        if self.kind == "random":
            # A fixed hash of the position: reproducible, and the same in every process and export.
            place = torch.arange(tokens.shape[1], device=tokens.device, dtype=torch.float32)
            return torch.frac(torch.sin(place * 12.9898) * 43758.547).abs().expand(tokens.shape[0], -1)
        if self.kind == "energy":
            return tokens.norm(dim=-1)
        return (tokens - tokens.mean(dim=1, keepdim=True)).norm(dim=-1)

    def extra_repr(self) -> str:
        """Name the rule."""
        return self.kind


def make_scorers(kinds: Sequence[Scorer], dim: int, *, shared: bool = False) -> nn.ModuleList:
    """Return one scorer per stage; with `shared`, stages of one kind hold the same object."""
    makers: dict[str, Callable[[], nn.Module]] = {"mlp": lambda: MlpScorer(dim), "att": lambda: AttentionScorer(dim)}
    made: dict[str, nn.Module] = {}
    scorers = nn.ModuleList()
    for kind in kinds:
        if kind not in made or not shared:
            made[kind] = makers.get(kind, lambda kind=kind: FreeScorer(kind))()
        scorers.append(made[kind])
    return scorers
