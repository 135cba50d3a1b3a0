"""The knapsack that spends a budget, against trying everything."""

from __future__ import annotations

import itertools
import random

import pytest

from nnslim.errors import RankError
from nnslim.maths.knapsack import Choice, choose


def problem(seed, *, whole, items=4, options=4):
    rng = random.Random(seed)
    draw = (lambda: float(rng.randint(0, 9))) if whole else (lambda: rng.uniform(0, 9))
    return [[Choice(draw(), rng.random()) for _ in range(rng.randint(1, options))] for _ in range(items)]


def total(options, picks, what):
    return sum(getattr(item[number], what) for item, number in zip(options, picks, strict=True))


def best_loss(options, budget):
    """Smallest loss within the budget by trying every combination, infinite where there is none."""
    every = itertools.product(*(range(len(item)) for item in options))
    return min((total(options, p, "loss") for p in every if total(options, p, "cost") <= budget), default=float("inf"))


@pytest.mark.parametrize("seed", range(40))
def test_choose_whole_costs_is_optimal(seed):
    options = problem(seed, whole=True)
    least = sum(min(choice.cost for choice in item) for item in options)
    most = sum(max(choice.cost for choice in item) for item in options)
    for budget in range(int(max(least, 1)), int(most) + 2):
        picks = choose(options, budget, bins=5 * budget)
        assert total(options, picks, "cost") <= budget
        assert total(options, picks, "loss") == pytest.approx(best_loss(options, budget), abs=1e-12)


@pytest.mark.parametrize("seed", range(40))
@pytest.mark.parametrize("bins", [20, 400])
def test_choose_any_costs_keep_the_budget_and_lose_what_the_rounding_allows(seed, bins):
    options = problem(seed, whole=False)
    least = sum(min(choice.cost for choice in item) for item in options)
    for share in (1.0, 1.1, 1.5, 2.0):
        budget = share * least + 1e-9
        picks = choose(options, budget, bins=bins)
        assert total(options, picks, "cost") <= budget
        rounding = len(options) * budget / bins  # each cost is rounded up by less than a bin
        assert total(options, picks, "loss") <= best_loss(options, budget - rounding) + 1e-12


def test_choose_coarse_bins_spend_what_is_left_over():
    options = [[Choice(1, 9.0), Choice(1.4, 1.0)], [Choice(1, 9.0), Choice(1.4, 2.0)]]
    assert choose(options, 2.8, bins=2) == [1, 1]  # rounded up, even the cheapest fill both bins
    assert choose(options, 2.5, bins=2) == [1, 0]


def test_choose_budget_for_everything_takes_the_smallest_losses():
    options = problem(3, whole=False)
    picks = choose(options, 1e6)
    assert picks == [min(range(len(item)), key=lambda n: item[n].loss) for item in options]


def test_choose_tight_budget_takes_the_cheapest():
    options = [[Choice(3, 0.0), Choice(1, 5.0)], [Choice(2, 0.0), Choice(1.5, 1.0)]]
    assert choose(options, 2.5) == [1, 1]
    assert choose(options, 3.0) == [1, 0]
    assert choose(options, 4.51) == [0, 1]  # a little above, for the rounding


def test_choose_dominated_option_is_never_taken():
    options = [[Choice(2, 1.0), Choice(1, 0.5), Choice(3, 0.5)]]
    for budget in (1, 2, 3, 100):
        assert choose(options, budget) == [1]


def test_choose_is_deterministic_and_takes_nothing_at_all():
    options = problem(5, whole=False)
    assert choose(options, 30.0) == choose(options, 30.0)
    assert choose([], 3.0) == []
    assert choose([[Choice(0, 1.0)]], 0.0) == [0]


@pytest.mark.parametrize("budget", [2.9, 0.0, -1.0])
def test_choose_impossible_budget_raises(budget):
    with pytest.raises(RankError, match=r"cannot be met: the cheapest plan costs 3"):
        choose([[Choice(2, 1.0), Choice(4, 0.0)], [Choice(1, 0.0)]], budget)
