"""Scorers: one number per token, high for tokens that should stay, which labels may teach."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

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


@dataclass(frozen=True)
class Scored:
    """The scores that a learned scorer gave to the patch tokens at its stage.

    Attributes:
        scores: (B, L), log-probabilities, at most 0.
        positions: (B, L), where each token belongs among all patch tokens.
        total: number of patch tokens of the complete sequence.
    """

    scores: Tensor
    positions: Tensor
    total: int


def image_content(image: Tensor, tokens: int | None) -> Tensor | None:
    """Return (B, tokens): the standard deviation inside each token's cube, mean over channels; 0 in uniform air."""
    if tokens is None:
        return None
    edge = token_edge(image, tokens)
    mean = functional.avg_pool3d(image, edge)
    square = functional.avg_pool3d(image * image, edge)
    return (square - mean * mean).clamp_min(0).sqrt().mean(dim=1).flatten(1)


def token_edge(image: Tensor, tokens: int) -> int:
    """Return the edge of each token's cube, voxels, where (B, C, *size) is cut into `tokens` cubes."""
    size = [int(edge) for edge in image.shape[2:]]
    return round((size[0] * size[1] * size[2] / tokens) ** (1 / 3))


class MlpScorer(nn.Module):
    """The published scorer: half of a token's features, compared with their mean over all tokens.

    It has 961,537 parameters for 768 features.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.input = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, dim), nn.GELU())
        half, quarter = nn.Linear(dim, dim // 2), nn.Linear(dim // 2, dim // 4)
        self.output = nn.Sequential(half, nn.GELU(), quarter, nn.GELU(), nn.Linear(dim // 4, 1), nn.LogSigmoid())

    def forward(self, stage: StageInput) -> Tensor:
        """Return (B, L) scores, at most 0."""
        hidden = self.input(stage.tokens)
        half = hidden.shape[-1] // 2
        overall = hidden[..., half:].mean(dim=1, keepdim=True).expand(-1, hidden.shape[1], -1)
        return self.output(torch.cat((hidden[..., :half], overall), dim=-1)).squeeze(-1)


class AttentionScorer(nn.Module):
    """The published alternative: similarity to the class token; without prefix tokens, to the mean token."""

    def __init__(self, dim: int, hidden: int = 128) -> None:
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
        return self.kind


def make_scorers(kinds: Sequence[Scorer], dim: int, *, shared: bool = False) -> nn.ModuleList:
    """Return one scorer per stage; with `shared`, stages of one kind hold the same object."""
    makers = {"mlp": partial(MlpScorer, dim), "att": partial(AttentionScorer, dim)}
    made: dict[str, nn.Module] = {}
    scorers = nn.ModuleList()
    for kind in kinds:
        if kind not in made or not shared:
            made[kind] = makers.get(kind, partial(FreeScorer, kind))()
        scorers.append(made[kind])
    return scorers


def scorer_loss(heard: Iterable[Scored], foreground: Tensor) -> Tensor:
    """Return the binary cross-entropy between scores and which tokens hold foreground, mean over stages.

    A learned score is a log-probability: exp(score) is read as the probability that the token's cube holds foreground.

    Args:
        heard: of one forward pass, see `TokenReduction.heard`; at least one.
        foreground: (B, 1, *size), 1 for labelled voxels, 0 elsewhere.
    """
    losses = []
    for said in heard:
        held = functional.max_pool3d(foreground, token_edge(foreground, said.total)).flatten(1)
        held = held.gather(1, said.positions)
        log_kept = said.scores.float().clamp_max(-1e-6)  # log(1 - p) is finite
        losses.append(-(held * log_kept + (1 - held) * torch.log(-torch.expm1(log_kept))).mean())
    return torch.stack(losses).mean()


class SupervisedLoss(nn.Module):
    """A training's loss, plus `weight` times `scorer_loss` where learned scorers ran since the last call.

    Only the last forward pass counts: a trainer may run its network more often, to look at it.
    """

    def __init__(
        self, loss: nn.Module, reductions: Sequence[nn.Module], weight: float, foreground: Callable[[Tensor], Tensor]
    ) -> None:
        """Start to listen to the scorers.

        Args:
            loss: of (output, target). reductions: `TokenReduction`s whose scorers are taught.
            weight: of the added loss. foreground: from the target to (B, 1, *size) as `scorer_loss` takes it.
        """
        super().__init__()
        self.loss = loss
        self.weight = weight
        self._foreground = foreground
        self._heard: dict[Any, Scored] = {}
        for reduction in reductions:
            reduction.listen(self._heard)

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        """Return the loss; nothing is added in evaluation, in which scorers are not listened to."""
        total = self.loss(output, target)
        if self._heard:
            total = total + self.weight * scorer_loss(self._heard.values(), self._foreground(target))
            self._heard.clear()
        return total
