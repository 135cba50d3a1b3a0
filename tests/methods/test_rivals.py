"""Plans of one budget that compete once they are fitted: what they cost, what lies between them, which one is taken."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
from helpers import smooth_tiles

from nnslim.compression.calibration import Calibration
from nnslim.compression.config import from_dict
from nnslim.compression.plan_and_fit import settle
from nnslim.compression.referee import Referee
from nnslim.methods.base import Plan
from nnslim.methods.tucker import TuckerConfig, plan_tucker
from nnslim.methods.tucker.edit import TuckerEdit
from nnslim.network.cost import measure_cost
from nnslim.network.spec import SlimSpec, apply_spec

SHAPE = (1, 1, 8, 8, 8)
CONV = "encoder.stages.1.0.convs.0.conv"


@pytest.fixture(scope="module")
def net(tiny_net):
    return tiny_net("plain3d", features=(16, 24, 40))


@pytest.fixture(scope="module")
def tiles():
    return smooth_tiles(SHAPE, 3)


@pytest.fixture(scope="module")
def plans(net, tiles):
    config = TuckerConfig(macs=0.5, rank_min=8)
    plan = plan_tucker(net, config, measure_cost(net, SHAPE), tiles)
    return (replace(plan, rivals=()), *plan.rivals)


def config_of(**settings):
    return from_dict({"methods": [{"method": "tucker", "macs": 0.5, "rank_min": 8}], **settings})


def data_of(tiles, **more):
    return Calibration(tiles[:1], tiles[1:2], lambda count: None, **more)


def macs(net, plan):
    return measure_cost(apply_spec(SlimSpec(plan.edits), copy.deepcopy(net)), SHAPE).macs()


def ranks(net, plan):
    """(R_out, R_in) of each layer that one of the plans changes; a side that stays whole counts with its channels."""
    return {decision.layer: decision.ranks or decision.shape[:2] for decision in plan.decisions if decision.shape}


def test_rivals_keep_the_budget_and_differ(net, plans):
    assert len(plans) == 3 and len({plan.edits for plan in plans}) == 3
    dense = measure_cost(net, SHAPE).macs()
    assert all(0.35 * dense <= macs(net, plan) <= 0.5 * dense for plan in plans)


def test_third_plan_lies_between_the_other_two(net, plans):
    first, uniform, between = (ranks(net, plan) for plan in plans)
    changed = {edit.layer for plan in plans for edit in plan.edits}
    step = 8 + 8  # rounded to multiples of 8, and scaled so that the budget is spent
    for layer in changed:
        for one, other, found in zip(first[layer], uniform[layer], between[layer], strict=True):
            assert min(one, other) - step <= found <= max(one, other) + step
    distance = {
        name: sum(abs(a - b) for layer in changed for a, b in zip(one[layer], other[layer], strict=True))
        for name, one, other in (
            ("ends", first, uniform), ("first", first, between), ("uniform", uniform, between)
        )
    }  # fmt: skip
    assert distance["first"] < distance["ends"] and distance["uniform"] < distance["ends"]


def test_uniform_rival_is_the_rank_factor_rule(net, tiles, plans):
    """Its transposed convolutions stay dense; where the budget is too small for that, they do not."""
    factored = {edit.layer: (edit.rank_out, edit.rank_in) for edit in plans[1].edits}
    assert factored and not any("transp" in layer for layer in factored)
    cost = measure_cost(net, SHAPE)
    rules = (
        plan_tucker(net, TuckerConfig(rank_factor=n / 100, rank_min=8, rank_multiple=8), cost) for n in range(99, 0, -1)
    )
    rule = next(plan for plan in rules if macs(net, plan) <= 0.5 * cost.macs())
    assert factored == {edit.layer: (edit.rank_out, edit.rank_in) for edit in rule.edits}


def test_without_images_there_are_no_rivals(net):
    assert plan_tucker(net, TuckerConfig(macs=0.5, rank_min=8), measure_cost(net, SHAPE)).rivals == ()


@pytest.mark.parametrize("best_first", [True, False])
def test_plan_with_the_smaller_drop_is_taken_and_comes_fitted(net, tiles, best_first):
    mild, harsh = (Plan((TuckerEdit(CONV, rank, rank),), ()) for rank in (16, 1))
    ordered = (mild, harsh) if best_first else (harsh, mild)
    given = (replace(ordered[0], rivals=ordered[1:]),)
    taken, (slim, errors) = settle(net, config_of(), given, SHAPE, data_of(tiles))
    assert taken[0].edits == mild.edits
    assert (
        dict(slim.named_parameters()).keys()
        == dict(apply_spec(SlimSpec(mild.edits), copy.deepcopy(net)).named_parameters()).keys()
    )
    assert set(errors) == {CONV} and 0 < errors[CONV] < 1


def test_single_plan_is_not_fitted(net, tiles, plans):
    assert settle(net, config_of(), plans[:1], SHAPE, data_of(tiles)) == (plans[:1], None)
    assert settle(net, config_of(), (), SHAPE, data_of(tiles)) == ((), None)


def judged(monkeypatch, drops_of):
    """Let made-up drops, by the rank of the one layer, stand for those of the fitted networks."""
    monkeypatch.setattr(Referee, "drops", lambda self, slim: drops_of(self, slim.get_submodule(CONV).core.out_channels))


def settled(net, tiles, ranks, **more):
    first, *others = (Plan((TuckerEdit(CONV, rank, rank),), ()) for rank in ranks)
    (taken,), _ = settle(net, config_of(), (replace(first, rivals=tuple(others)),), SHAPE, data_of(tiles, **more))
    return taken.edits[0].rank_out


def test_plans_are_compared_on_fresh_images_where_there_are_some(net, tiles, monkeypatch):
    seen = []
    judged(monkeypatch, lambda self, rank: seen.append([tile.sum().item() for tile in self.tiles]) or [[0.0]])
    for fresh, expected in ((None, tiles[1:2]), (tiles[1:], tiles[1:])):
        seen.clear()
        assert settled(net, tiles, (8, 16), fresh=fresh) == 16  # of equals the simplest
        assert seen == [[tile.sum().item() for tile in expected]] * 2


@pytest.mark.parametrize(
    ("gains", "taken"),
    [
        ([0.01, 0.01, 0.01, 0.01], 8),  # better on every tile
        ([0.05, -0.01, 0.04, 0.0], 16),  # .02 on average, the standard error is .0147
        ([0.05, 0.01, 0.04, 0.02], 8),  # .03 against .0091
        ([0.0009, 0.0009, 0.0009, 0.0009], 16),  # less than estimates can tell
        ([0.0011, 0.0011, 0.0011, 0.0011], 8),
        ([-0.01, -0.01, -0.01, -0.01], 16),
        ([float("nan"), 0.01, float("nan"), 0.01], 8),  # a tile without any class does not count
        ([float("nan")] * 4, 16),
    ],
)
def test_simplest_plan_is_taken_unless_another_is_clearly_better(net, tiles, monkeypatch, gains, taken):
    judged(monkeypatch, lambda self, rank: [[0.1 - (gain if rank == 8 else 0.0)] * 2 for gain in gains])
    assert settled(net, tiles, (8, 16)) == taken
    judged(monkeypatch, lambda self, rank: [[0.1 - (gain if rank == 8 else 0.0)] * 2 for gain in gains])
    assert settled(net, tiles, (12, 16, 8)) == taken
