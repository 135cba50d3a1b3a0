"""Shortening a token sequence between transformer blocks, and bringing every position back at the end."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from nnslim.errors import ConfigError
from nnslim.methods.token_sparse.scorers import LEARNED, Scored, Scorer, StageInput, make_scorers
from nnslim.methods.token_sparse.sequence import Sequence3d, TopK, keep_count, take

Mode = Literal["drop", "merge"]
FLOOR = 8  # fewer tokens than this in the last blocks are not worth the parameters that work on them
_log = logging.getLogger("nnslim")
Attention = Callable[[Tensor, Tensor | None], Tensor]  # (tokens, rope) -> (B, L), attention received by each token


def merge_steps(now: Sequence3d, keep: int) -> Sequence3d:
    """Merge until `keep` patch tokens are left; one step of the matching can at most halve their number.

    Reference: Bolya et al., Token Merging: Your ViT But Faster (ToMe), ICLR 2023.
    """
    while now.length > keep:
        _merge(now, now.length - max(keep, (now.length + 1) // 2))
    return now


def _merge(now: Sequence3d, count: int) -> None:
    """Merge `count` patch tokens into their most similar partners, in place.

    The tokens alternate between two sets; the `count` members of the second set that are most similar to one of the
    first set join it.
    """
    prefix, patches = now.x[:, : now.prefix], now.x[:, now.prefix :]
    batch, length, dim = patches.shape[0], now.length, patches.shape[-1]
    index = torch.arange(length, device=patches.device).expand(batch, -1)
    if now.assigned is None:
        now.assigned = index
        now.sizes = patches.new_ones(batch, length, 1)
    targets, sources = patches[:, 0::2], patches[:, 1::2]
    metric = functional.normalize(patches.detach(), dim=-1)
    best, partner = (metric[:, 1::2] @ metric[:, 0::2].transpose(1, 2)).max(dim=-1)  # (B, L // 2)
    order = torch.sort(best, dim=-1, descending=True).indices
    joins, stays = order[:, :count], torch.sort(order[:, count:], dim=-1).values
    into = partner.gather(1, joins)
    sizes = now.sizes
    weighted, joining = targets * sizes[:, 0::2], take(sources * sizes[:, 1::2], joins)
    total = sizes[:, 0::2].scatter_add(1, into.unsqueeze(-1), take(sizes[:, 1::2], joins))
    merged = weighted.scatter_add(1, into.unsqueeze(-1).expand(-1, -1, dim), joining) / total
    now.x = torch.cat((prefix, merged, take(sources, stays)), dim=1)
    now.length = length - count
    now.sizes = torch.cat((total, take(sizes[:, 1::2], stays)), dim=1)
    origin = torch.cat((index[:, 0::2], stays * 2 + 1), dim=1)  # old index of each new token
    now.rope = take_rope(now.rope, origin)  # that of the token which the others joined
    now.content = None if now.content is None else now.content.gather(1, origin)
    after = index[:, (length + 1) // 2 : now.length]  # new index of the sources that stay, behind the targets
    new = (index // 2).scatter(1, stays * 2 + 1, after).scatter(1, joins * 2 + 1, into)  # new index of each old token
    now.assigned = new.gather(1, now.assigned)


class TokenReduction(nn.Module):
    """Drops or merges tokens after chosen blocks.

    Attributes:
        locations: number of blocks that have run before each stage; 0 is right after the embedding.
        ratios: share of the patch tokens removed at each stage; no weights: `set_ratio` changes them at any time, and a
            stage whose ratio is 0 does nothing.
        learned: for each stage, whether its scorer has weights.
    """

    def __init__(
        self,
        dim: int,
        locations: Sequence[int],
        ratios: Sequence[float],
        *,
        mode: Mode = "drop",
        scorer: Scorer | Sequence[Scorer] = "mlp",
        shared: bool = False,
        tau: float = 1.0,
        noise: bool = True,
    ) -> None:
        """Build the scorers.

        Args:
            dim: features of a token.
            locations, ratios: see the class; of equal length, locations ascending.
            mode: drop tokens, or merge similar ones (ToMe, which needs no scorer).
            scorer, shared: kind, for all stages or each, and whether stages of one kind share one.
            tau, noise: of the soft choice in training.
        Raises:
            ConfigError: locations and ratios do not fit each other or their bounds.
        """
        super().__init__()
        self.locations = tuple(locations)
        if list(self.locations) != sorted(set(self.locations)) or min(self.locations, default=0) < 0:
            raise ConfigError(f"token_sparse: locations are ascending numbers of blocks, found {locations}")
        self.mode = mode
        kinds = [scorer] * len(self.locations) if isinstance(scorer, str) else list(scorer)
        if len(kinds) != len(self.locations):
            raise ConfigError(f"token_sparse: {len(kinds)} scorers for {len(self.locations)} locations")
        self.learned = [kind in LEARNED for kind in kinds]
        self.scorers = make_scorers(kinds, dim, shared=shared) if mode == "drop" else None
        self.topk = TopK(tau, noise)
        self.set_ratio(ratios)
        self.heard: dict[Any, Scored] | None = None

    def listen(self, heard: dict[Any, Scored]) -> None:
        """Keep there, in training, what learned scorers say in the last forward pass; see `SupervisedLoss`."""
        self.heard = heard

    def set_ratio(self, ratio: float | Sequence[float]) -> None:
        """Set the share of tokens to remove, for all stages or for each.

        Raises:
            ConfigError: another number of ratios than stages, or one outside 0 <= ratio < 1.
        """
        ratios = [ratio] * len(self.locations) if isinstance(ratio, (int, float)) else list(ratio)
        if len(ratios) != len(self.locations) or not all(0 <= each < 1 for each in ratios):
            raise ConfigError(
                f"token_sparse: ratios are {len(self.locations)} numbers, one per location, 0 <= ratio < 1; "
                f"found {ratio}"
            )
        self.ratios = tuple(float(each) for each in ratios)

    @property
    def active(self) -> bool:
        """Whether any stage takes tokens away."""
        return any(self.ratios)

    def kept_counts(self, length: int) -> list[int]:
        """Return the number of patch tokens after each stage, and warn where few are left (see FLOOR)."""
        counts = list(itertools.accumulate(self.ratios, keep_count, initial=length))[1:]
        if counts and counts[-1] < FLOOR and self.active:
            _log.warning(
                "token_sparse: only %d token(s) reach the last blocks, whose parameters then do almost nothing; "
                "use a smaller ratio or fewer locations",
                counts[-1],
            )
        return counts

    def forward(self, sequence: Sequence3d, blocks_done: int, attention: Attention | None = None) -> Sequence3d:
        """Shorten the sequence if a stage lies here; changes and returns it.

        Args:
            sequence: the tokens. blocks_done: blocks that have run.
            attention: gives the attention that tokens receive in the next block.
        """
        if blocks_done not in self.locations:
            return sequence
        stage = self.locations.index(blocks_done)
        keep = keep_count(sequence.length, self.ratios[stage])
        if keep == sequence.length:
            return sequence
        if self.mode == "merge":
            return merge_steps(sequence, keep)
        return self._drop(sequence, stage, keep, attention)

    def _drop(self, now: Sequence3d, stage: int, keep: int, attention: Attention | None) -> Sequence3d:
        batch, rows = now.x.shape[0], now.prefix + now.length
        prefix, patches = now.x[:, : now.prefix], now.x[:, now.prefix :]
        if now.positions is None:
            now.positions = torch.arange(rows, device=now.x.device).expand(batch, -1)
            now.alive = torch.ones(batch, rows, 1, dtype=now.x.dtype, device=now.x.device)
        received = None if attention is None else lambda: attention(now.x, now.rope)
        scores = self.scorers[stage](StageInput(patches, prefix, received, now.content))
        if self.training and self.heard is not None and self.learned[stage]:
            total = now.length + sum(group.shape[1] for group in now.groups)
            self.heard[id(self), stage] = Scored(scores, now.positions[:, now.prefix :] - now.prefix, total)
        split = self.topk(scores, keep)
        policy = torch.cat((now.alive.new_ones(batch, now.prefix, 1), split.policy.to(now.x.dtype)), dim=1)
        stays, goes = policy * now.alive, (1 - policy) * now.alive
        first = torch.arange(now.prefix, device=now.x.device).expand(batch, -1)
        kept, dropped = torch.cat((first, split.kept + now.prefix), dim=1), split.dropped + now.prefix
        gone, left = take(now.x, dropped), take(now.x, kept)
        if self.training:  # factors of 1 that carry the gradients of the soft choice
            gone, left = gone * take(goes, dropped), left * take(stays, kept)
        now.groups.append(gone)
        now.stages.append(stage)
        now.group_positions.append(now.positions.gather(1, dropped))
        now.x, now.positions, now.alive = left, now.positions.gather(1, kept), take(stays, kept)
        now.length = keep
        now.rope = take_rope(now.rope, split.kept)
        now.content = None if now.content is None else now.content.gather(1, split.kept)
        return now

    def extra_repr(self) -> str:
        return f"{self.mode} at {self.locations}, ratios {self.ratios}"


def take_rope(rope: Tensor | None, index: Tensor) -> Tensor | None:
    """Return the rows `index` (B, K) of a rotary embedding as (B, 1, K, E).

    The axis for heads is explicit: timm before 1.0.19 adds one to three axes, later versions do not.
    """
    if rope is None:
        return None
    if rope.ndim == 2:
        return rope[index].unsqueeze(1)
    return take(rope.squeeze(1), index).unsqueeze(1)


def set_ratio(network: nn.Module, ratio: float | Sequence[float]) -> int:
    """Set the ratio of every token reduction in a network; return how many there are."""
    found = [module for module in network.modules() if isinstance(module, TokenReduction)]
    for module in found:
        module.set_ratio(ratio)
    return len(found)
