"""Token merging (ToMe): similar tokens become their mean, and every position gets its token's value back at the end.

Reference: Bolya et al., Token Merging: Your ViT But Faster, ICLR 2023.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from nnslim.methods.token_sparse.selection import take
from nnslim.methods.token_sparse.sequence import Sequence3d


def merge_steps(now: Sequence3d, keep: int) -> Sequence3d:
    """Merge until `keep` patch tokens are left; one step of the matching can at most halve their number."""
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
    if now.assigned is None:
        now.assigned = torch.arange(length, device=patches.device).expand(batch, -1)
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
    origin = torch.cat((_rows(batch, 0, length, patches), stays * 2 + 1), dim=1)  # old index of each new token
    now.rope = None if now.rope is None else _rope_of(now.rope, origin)
    now.content = None if now.content is None else now.content.gather(1, origin)
    now.assigned = _new_index(length, count, stays, joins, into).gather(1, now.assigned)


def _rows(batch: int, start: int, length: int, like: Tensor) -> Tensor:
    return torch.arange(start, length, 2, device=like.device).expand(batch, -1)


def _new_index(length: int, count: int, stays: Tensor, joins: Tensor, into: Tensor) -> Tensor:
    """Return (B, L): where each old token is after a merge: targets, then the sources that stay."""
    batch, half = stays.shape[0], (length + 1) // 2
    new = torch.arange(length, device=stays.device).expand(batch, -1) // 2  # right for the targets
    after = torch.arange(half, length - count, device=stays.device).expand(batch, -1)
    return new.scatter(1, stays * 2 + 1, after).scatter(1, joins * 2 + 1, into)


def _rope_of(rope: Tensor, origin: Tensor) -> Tensor:
    """Return the rotary embedding of merged tokens: that of the token which the others joined."""
    if rope.ndim == 2:
        return rope[origin].unsqueeze(1)
    return take(rope.squeeze(1), origin).unsqueeze(1)
