"""The search for the smallest share of MACs that keeps an estimated drop."""

from __future__ import annotations

import logging
import math

import pytest
from calibration_images import SHAPE, make_data

from nnslim.compression import plan_and_fit as search
from nnslim.compression.compress_network import compress
from nnslim.compression.config import from_dict
from nnslim.compression.recover import Recovery
from nnslim.errors import ConfigError, RankError
from nnslim.network.walk import LayerIndex


def with_limit(limit, **recovery):
    return from_dict({"methods": [{"method": "tucker", "max_drop": limit}], "recovery": recovery})


@pytest.fixture
def wide(tiny_net):
    network = tiny_net("plain2d", features=(16, 24, 32))
    LayerIndex(network)["decoder.seg_layers.1"].module.weight.data *= 6
    return network


@pytest.mark.parametrize(
    ("drops", "tried", "found"),
    [
        ({}, [0, 1, 2, 3], 3),  # nothing is ever lost
        ({2: 0.02}, [0, 1, 2], 1),
        ({0: 0.02}, [0, -1], -1),
        ({0: 0.02, -1: math.nan}, [0, -1, -2], -2),
        ({0: 0.01, 1: 0.0101}, [0, 1], 0),
        ({0: RankError, -1: RankError}, [0, -1, -2], -2),
        ({1: RankError}, [0, 1], 0),
    ],
)
def test_find_budget_takes_the_smallest_share_within_the_limit(wide, monkeypatch, drops, tried, found):
    """Shares by their distance from the first one that is tried."""
    seen = []

    def plan(dense, config, *_):
        seen.append(search.SHARES.index(config.methods[0].settings.macs) - search.START)
        if drops.get(seen[-1]) is RankError:
            raise RankError("too small")
        return seen[-1]

    def fit(dense, config, plans, *_, target, **__):
        assert target == 0.01
        return plans, Recovery(after=drops.get(plans, 0.0)), {}

    monkeypatch.setattr(search, "plan_methods", plan)
    monkeypatch.setattr(search, "fit_plans", lambda *_: (wide, {}))
    monkeypatch.setattr(search, "fit_and_recover", fit)
    config, plans, slim, recovery = search.find_budget(wide, with_limit(0.01), 0, None, SHAPE, make_data(), None)
    assert seen == tried
    chosen = config.methods[0].settings
    assert chosen.budget == ("macs", search.SHARES[search.START + found])
    assert (plans, slim, recovery.after) == (found, found, drops.get(found, 0.0))
    assert type(chosen)(**chosen.model_dump()) == chosen


def test_find_budget_keeps_the_limit_of_the_worst_class(wide, monkeypatch, caplog):
    worst = {search.START: 0.02, search.START + 1: 0.04}
    monkeypatch.setattr(
        search, "plan_methods", lambda d, config, *_: search.SHARES.index(config.methods[0].settings.macs)
    )
    monkeypatch.setattr(search, "fit_plans", lambda *_: (wide, {}))

    def fit(dense, config, plans, *_, target, target_worst, **__):
        assert (target, target_worst) == (0.01, 0.03)
        return plans, Recovery(after=0.001, classes={"liver": 0.0, "vein": worst[plans]}), {}

    monkeypatch.setattr(search, "fit_and_recover", fit)
    config = with_limit(0.01)
    settings = config.methods[0].settings.model_copy(update={"max_drop_worst": 0.03})
    config = config.model_copy(update={"methods": (config.methods[0].model_copy(update={"settings": settings}),)})
    with caplog.at_level(logging.INFO, "nnslim"):
        _, plans, _, _ = search.find_budget(wide, config, 0, None, SHAPE, make_data(), None)
    assert plans == search.START and "0.0400 for vein" in caplog.text
    worst[search.START] = 0.04
    worst |= {step: 0.04 for step in range(search.START)}
    with pytest.raises(RankError, match=r"max_drop=0\.01 with max_drop_worst=0\.03 was not kept"):
        search.find_budget(wide, config, 0, None, SHAPE, make_data(), None)
    with pytest.raises(ConfigError, match="name max_drop, too"):
        from_dict({"methods": [{"method": "tucker", "max_drop_worst": 0.1}]})


@pytest.mark.parametrize(("learns", "recovered"), [(True, [0]), (False, [0, 1, 2, 3])])
def test_find_budget_leaves_out_what_recovery_cannot_win_back(wide, monkeypatch, learns, recovered):
    """The fit of the second share loses .021: learning is believed to leave half of it, more than the limit."""
    tried, fits = [], []
    monkeypatch.setattr(search, "plan_methods", lambda dense, config, *_: config.methods[0].settings.macs)
    monkeypatch.setattr(search, "fit_plans", lambda *given: fits.append(given[2]) or (given[2], {}))
    drops = {search.SHARES[search.START]: 0.019, search.SHARES[search.START + 1]: 0.021}
    monkeypatch.setattr(search.Referee, "drop", lambda self, share: drops.get(share, 0.0))

    def fit(dense, config, plans, *_, **__):
        tried.append(search.SHARES.index(plans) - search.START)
        return plans, Recovery(after=0.0), {}

    monkeypatch.setattr(search, "fit_and_recover", fit)
    limit = with_limit(0.01, steps=4) if learns else with_limit(0.01)
    _, _, slim, _ = search.find_budget(wide, limit, 0, None, SHAPE, make_data(), None)
    assert tried == recovered and slim == search.SHARES[search.START + recovered[-1]]
    assert len(fits) == (2 if learns else 4)


def test_find_budget_limit_never_kept_raises_and_names_the_trials(wide, monkeypatch):
    monkeypatch.setattr(search, "plan_methods", lambda *_: ())
    monkeypatch.setattr(search, "fit_plans", lambda *_: (wide, {}))
    monkeypatch.setattr(search, "fit_and_recover", lambda *_, **__: (None, Recovery(after=0.5), {}))
    with pytest.raises(RankError, match=r"max_drop=0\.01 was not kept .*0\.083: 0\.5000, .*0\.25: 0\.5000"):
        search.find_budget(wide, with_limit(0.01), 0, None, SHAPE, make_data(), None)


def test_compress_max_drop_keeps_the_limit(wide):
    config = with_limit(0.3, steps=8, every=4, batch_size=1)
    slimmed = compress(wide, [wide.state_dict()], config, SHAPE, data=make_data())
    assert slimmed.recovery[0]["estimated_drop_after"] <= 0.3
    assert slimmed.slim.macs < 0.72 * slimmed.dense.macs


def test_found_share_is_recovered_to_the_end(wide):
    config = with_limit(0.3, steps=8, every=4, batch_size=1)
    slimmed = compress(wide, [wide.state_dict()], config, SHAPE, data=make_data())
    (recovery,) = slimmed.recovery
    assert (recovery["stopped"], recovery["steps"]) == ("steps", 8)
    assert recovery["estimated_drop_after"] == min(drop for drop in [recovery["estimated_drop_before"]] + [
        drop for _, drop in recovery["history"]
    ])  # fmt: skip


def test_compress_max_drop_without_data_raises(wide):
    with pytest.raises(ConfigError, match=r"max_drop=0\.1 is measured on images: name their folder"):
        compress(wide, [wide.state_dict()], with_limit(0.1), SHAPE)
    two = from_dict({"methods": [{"method": "tucker", "max_drop": 0.1}] * 2})
    with pytest.raises(ConfigError, match="only one method"):
        compress(wide, [wide.state_dict()], two, SHAPE, data=make_data())
