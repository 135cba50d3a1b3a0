"""Choose one option for each item so that the cost stays within a budget and the loss is smallest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from operator import itemgetter

import numpy as np

from nnslim.errors import RankError


@dataclass(frozen=True)
class Choice:
    """One way to treat one item: what it costs, and what is lost by it."""

    cost: float
    loss: float


def choose(options: Sequence[Sequence[Choice]], budget: float, *, bins: int = 4000) -> list[int]:
    """Return the index of the chosen option for each item (multiple-choice knapsack, by dynamic programming).

    Costs are rounded up to `bins` equal parts of the budget, so the budget is never exceeded; what the rounding leaves
    over is spent afterwards, best gain per cost first.

    Args:
        options: for each item its options, at least one.
        budget: largest sum of costs.
        bins: resolution.
    Raises:
        RankError: even the cheapest options cost more than the budget.
    """
    least = sum(min(choice.cost for choice in item) for item in options)
    if least > budget * (1 + 1e-9):
        raise RankError(f"a budget of {budget:,.6g} cannot be met: the cheapest plan costs {least:,.6g}")
    unit = budget / bins if budget > 0 else 1.0
    best = np.zeros(bins + 1)
    picks: list[np.ndarray] = []
    for item in options:
        numbers = _undominated(item)
        values = np.full((len(numbers), bins + 1), np.inf)
        for value, number in zip(values, numbers, strict=True):
            size = int(np.ceil(item[number].cost / unit - 1e-9))
            value[size:] = best[: max(0, bins + 1 - size)] + item[number].loss
        picks.append(np.array(numbers)[values.argmin(0)])
        best = values.min(0)
    if not np.isfinite(best[bins]):  # rounding up made the cheapest plan too dear
        chosen = [_undominated(item)[0] for item in options]
    else:
        chosen, left = [], bins
        for item, pick in zip(reversed(options), reversed(picks), strict=True):
            number = int(pick[left])
            chosen.append(number)
            left -= int(np.ceil(item[number].cost / unit - 1e-9))
        chosen.reverse()
    return _spend_rest(options, chosen, budget)


def _undominated(item: Sequence[Choice]) -> list[int]:
    """Return the options that no other beats in both cost and loss, cheapest first."""
    kept: list[int] = []
    for number in sorted(range(len(item)), key=lambda n: (item[n].cost, item[n].loss)):
        if not kept or item[number].loss < item[kept[-1]].loss:
            kept.append(number)
    return kept


def _spend_rest(options: Sequence[Sequence[Choice]], chosen: list[int], budget: float) -> list[int]:
    left = budget - sum(item[number].cost for item, number in zip(options, chosen, strict=True))
    while True:
        steps = []
        for place, item in enumerate(options):
            now = item[chosen[place]]
            for number in _undominated(item):
                gain, extra = now.loss - item[number].loss, item[number].cost - now.cost
                if gain > 0 and extra <= left:
                    steps.append((gain / max(extra, 1e-12), extra, place, number))
        if not steps:
            return chosen
        _, extra, place, chosen[place] = max(steps, key=itemgetter(0))
        left -= extra
