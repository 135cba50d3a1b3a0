"""Ranks from a budget, an energy, evbmf or a table: what is spent, what is predicted, what is read back."""

from __future__ import annotations

import csv
import itertools

import pydantic
import pytest
import torch
from helpers import smooth_tiles
from torch import nn

from nnslim.errors import ConfigError, RankError
from nnslim.maths.lowrank import evbmf_rank
from nnslim.methods.base import write_decisions
from nnslim.methods.tucker import TuckerConfig, latency, plan_tucker
from nnslim.methods.tucker.edit import TuckerConv, kernel_of
from nnslim.methods.tucker.latency import LatencyTable, measured_neighbours, measured_ranks
from nnslim.methods.tucker.ranks import read_ranks
from nnslim.methods.tucker.survey import answer_distance, survey
from nnslim.network.cost import measure_cost
from nnslim.network.spec import SlimSpec, apply_spec
from nnslim.network.walk import LayerIndex
from nnslim.surgery.streaming import following_norms

FEATURES = (16, 24, 32)
SHAPE = (1, 1, 8, 8, 8)
CONV = "encoder.stages.1.0.convs.0.conv"


@pytest.fixture(scope="module")
def net(tiny_net):
    return tiny_net("plain3d", features=FEATURES)


@pytest.fixture(scope="module")
def cost(net):
    return measure_cost(net, SHAPE)


@pytest.fixture(scope="module")
def tiles():
    return smooth_tiles(SHAPE, 2)


def planned(net, cost, tiles=None, **settings):
    if {"macs", "params", "milliseconds"} & set(settings):
        settings = {"rank_min": 8, **settings}  # the layers are narrow
    plan = plan_tucker(net, TuckerConfig(**settings), cost, tiles)
    return plan, {decision.layer: decision for decision in plan.decisions}


def slim_cost(net, plan):
    return measure_cost(apply_spec(SlimSpec(plan.edits), _copy(net)), SHAPE)


def _copy(net):
    import copy

    return copy.deepcopy(net)


def amount(measured, name):
    return measured.macs() if name == "macs" else measured.parameters


@pytest.mark.parametrize("name", ["macs", "params"])
@pytest.mark.parametrize("share", [0.95, 0.7, 0.45])
@pytest.mark.parametrize("data", [False, True], ids=["weights", "data"])
def test_plan_share_of_a_budget_is_kept_in_aligned_ranks(net, cost, tiles, name, share, data):
    plan, decisions = planned(net, cost, tiles if data else None, **{name: share})
    limit = share * amount(cost, name)
    spent = amount(slim_cost(net, plan), name)
    assert 0.7 * limit <= spent <= limit
    assert plan.edits
    for decision in decisions.values():
        for rank, channels in zip(decision.ranks or (), decision.shape, strict=False):
            assert rank == channels or rank % 8 == 0
        assert decision.action == "dense" or 0 < decision.error < 1


def test_plan_absolute_budget_equals_its_share(net, cost):
    for name in ("macs", "params"):
        share = planned(net, cost, **{name: 0.5})[0]
        assert planned(net, cost, **{name: 0.5 * amount(cost, name)})[0] == share


def test_plan_budget_above_the_dense_cost_leaves_all_dense(net, cost):
    plan, decisions = planned(net, cost, macs=1.0)
    assert not plan.edits
    assert decisions[CONV].reason == "costs least where it is"


def test_plan_mild_budget_leaves_some_layers_dense_and_some_sides_whole(net, cost, tiles):
    found = [planned(net, cost, tiles, macs=share)[0] for share in (0.95, 0.8, 0.6)]
    decisions = [decision for plan in found for decision in plan.decisions]
    assert any(decision.reason == "costs least where it is" for decision in decisions)
    assert any(None in (edit.rank_out, edit.rank_in) for plan in found for edit in plan.edits)


def test_plan_smaller_budget_never_costs_more(net, cost):
    spent = [planned(net, cost, macs=share)[0] for share in (0.9, 0.7, 0.5, 0.4)]
    macs = [slim_cost(net, plan).macs() for plan in spent]
    assert macs == sorted(macs, reverse=True)


@pytest.mark.parametrize("multiple", [8, 4])
def test_plan_rank_multiple_sets_the_alignment(net, cost, multiple):
    plan, _ = planned(net, cost, macs=0.45, rank_multiple=multiple, rank_min=1)
    ranks = {rank for edit in plan.edits for rank in (edit.rank_out, edit.rank_in) if rank is not None}
    assert ranks and all(rank % multiple == 0 for rank in ranks)
    assert multiple == 8 or any(rank % 8 for rank in ranks)


def test_plan_impossible_budget_names_the_cheapest(net, cost):
    with pytest.raises(RankError, match=r"macs=0.01 cannot be met: dense .* cheapest plan ([\d.e+,]+)") as caught:
        planned(net, cost, macs=0.01)
    share = float(str(caught.value).split("(")[1].split()[0])
    plan, _ = planned(net, cost, macs=share + 0.001)
    assert slim_cost(net, plan).macs() == pytest.approx(share * cost.macs(), rel=0.01)
    with pytest.raises(RankError, match="params=10 cannot be met"):
        planned(net, cost, params=10)


def uniform_rule(net, cost):
    """Plan of a rank factor, and a budget of its cost with a little slack, since the knapsack rounds costs up."""
    plan, decisions = planned(net, cost, rank_factor=0.5, rank_min=8, rank_multiple=8)
    return {name: d.ranks for name, d in decisions.items() if d.ranks}, 1.002 * slim_cost(net, plan).macs()


def test_plan_predicted_loss_is_at_most_that_of_the_uniform_rule(net, cost):
    uniform, spent = uniform_rule(net, cost)
    plan = {d.layer: d.ranks for d in planned(net, cost, macs=spent)[0].decisions if d.ranks}
    found = survey(net, list({*uniform, *plan}), None)
    by_budget, by_rule = (
        sum(found[name].outputs.error(*ranks) ** 2 for name, ranks in one.items()) for one in (plan, uniform)
    )
    assert 0 < by_budget <= by_rule * (1 + 1e-9)


def test_plan_with_data_moves_the_answer_at_most_as_far_as_the_uniform_rule(net, cost, tiles):
    uniform, spent = uniform_rule(net, cost)
    decisions = planned(net, cost, tiles, macs=spent)[1]
    plan = {name: d.ranks for name, d in decisions.items() if d.ranks}
    open_layers = [name for name in LayerIndex(net) if name in uniform or name in plan]
    judge = survey(net, open_layers, tiles, samples=TuckerConfig().fit.samples)
    assert judge.can_judge and not survey(net, open_layers, None).can_judge
    assert 0 < judge.distance(plan) <= judge.distance(uniform) * (1 + 1e-6)


def test_plan_budget_error_is_that_of_the_survey(net, cost, tiles):
    _, decisions = planned(net, cost, tiles, macs=0.5)
    names = [name for name, decision in decisions.items() if decision.error is not None]
    found = survey(net, names, tiles, samples=TuckerConfig().fit.samples, probe=False)
    for name in names:
        assert decisions[name].error == pytest.approx(found[name].outputs.error(*decisions[name].ranks), rel=1e-9)


def test_plan_transposed_layers_with_data_are_planned(net, cost, tiles):
    plan, decisions = planned(net, cost, tiles, macs=0.45, transposed=True, rank_multiple=4)
    assert slim_cost(net, plan).macs() <= 0.45 * cost.macs()
    assert decisions["decoder.transpconvs.0"].reason != "transposed convolution"


@pytest.mark.parametrize("data", [False, True], ids=["weights", "data"])
def test_plan_energy_keeps_that_share_on_each_side(net, cost, tiles, data):
    given = tiles if data else None
    _, decisions = planned(net, cost, given, energy=0.8, rank_min=1, only_if_cheaper=False)
    made = {name: decision for name, decision in decisions.items() if decision.ranks}
    found = survey(net, list(made), given, samples=TuckerConfig().fit.samples, probe=False)
    assert len(made) >= 3
    for name, decision in made.items():
        lost = found[name].outputs.squared_error
        out, in_ = decision.ranks
        assert lost[out, -1] <= 0.2 + 1e-9 < lost[out - 1, -1]
        assert lost[-1, in_] <= 0.2 + 1e-9 < lost[-1, in_ - 1]


def test_plan_evbmf_finds_planted_ranks_and_respects_the_floor(net, cost):
    planted = _copy(net)
    kernel = kernel_of(LayerIndex(planted)[CONV].module).data  # (24, 16, 3, 3, 3)
    generator = torch.Generator().manual_seed(0)
    parts = [torch.randn(*size, generator=generator) for size in ((24, 5), (5, 4, 27), (16, 4))]
    kernel.copy_((torch.einsum("oa,abk,ib->oik", *parts)).reshape(kernel.shape))
    kernel += 0.05 * torch.randn(kernel.shape, generator=generator)
    decisions = planned(planted, cost, rank_mode="evbmf", rank_min=1)[1]
    assert (
        decisions[CONV].ranks
        == (5, 4)
        == (
            evbmf_rank(kernel.flatten(1)),
            evbmf_rank(kernel.transpose(0, 1).flatten(1)),
        )
    )
    assert planned(planted, cost, rank_mode="evbmf", rank_min=8)[1][CONV].ranks == (8, 8)
    assert planned(planted, cost, rank_mode="evbmf", rank_min=None, rank_multiple=4)[1][CONV].ranks == (4, 4)


def test_plan_table_round_trip_with_a_rank_edited_by_hand(net, cost, tmp_path):
    plan, decisions = planned(net, cost, macs=0.5)
    path = tmp_path / "plan.csv"
    write_decisions(plan.decisions, path)
    again, same = planned(net, cost, plan=path)
    assert again.edits == plan.edits
    assert {n: d.ranks for n, d in same.items()} == {n: d.ranks for n, d in decisions.items()}
    rows = list(csv.DictReader(path.open()))
    for row in rows:
        if row["layer"] == CONV:
            row |= {"action": "tucker", "rank_out": "7", "rank_in": "16"}
        elif row["action"] == "tucker":
            row["action"] = "dense"
    with path.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    edited, changed = planned(net, cost, plan=path)
    assert [(edit.layer, edit.rank_out, edit.rank_in) for edit in edited.edits] == [(CONV, 7, None)]
    assert changed[CONV].ranks == (7, 16)
    assert {d.reason for n, d in changed.items() if decisions[n].action == "tucker" and n != CONV} == {
        "dense in the plan"
    }


def test_plan_table_with_few_columns_leaves_other_layers_dense(net, cost, tmp_path):
    path = tmp_path / "plan.csv"
    alias = next(a for a in LayerIndex(net)[CONV].aliases if a != CONV)
    path.write_text(f"rank_in,layer,rank_out,action\n8,{alias},16,tucker\n,decoder.seg_layers.1,,dense\n")
    plan, decisions = planned(net, cost, plan=path)
    assert [(edit.layer, edit.rank_out, edit.rank_in) for edit in plan.edits] == [(CONV, 16, 8)]
    assert "not in the plan" in {decision.reason for decision in decisions.values()}


HEAD = "layer,action,rank_out,rank_in\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "cannot be read"),
        (b"layer,action\xff\n", "cannot be read"),
        ("", "cannot be read"),
        (HEAD, "lists no layer"),
        ("layer,action,rank_out\na,tucker,3\n", "no column rank_in; found layer, action, rank_out"),
        ("a;b\n1;2\n", "no column layer, action, rank_out, rank_in; found a;b"),
        (HEAD + "a,tucker,3,3\na,dense,,\n", r"line 3 \(a\): the layer is there twice"),
        (HEAD + "a,tuker,3,3\n", r"line 2 \(a\): action is 'tucker' or 'dense', found 'tuker'"),
        (HEAD + "a,tucker,3,\n", "ranks are positive numbers, found '3' and ''"),
        (HEAD + "a,tucker,3\n", "ranks are positive numbers, found '3' and ''"),
        (HEAD + "a,tucker,0,3\n", "found '0' and '3'"),
        (HEAD + "a,tucker,-1,3\n", "found '-1' and '3'"),
        (HEAD + "a,tucker,2.5,3\n", r"found '2\.5' and '3'"),
        (HEAD + "a,tucker,²,3\n", "found '²' and '3'"),
    ],
)
def test_read_ranks_unusable_table_raises(tmp_path, text, message):
    path = tmp_path / "plan.csv"
    if text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ConfigError, match=message):
        read_ranks(path)


def test_read_ranks_table_from_a_spreadsheet_with_a_byte_order_mark(tmp_path):
    path = tmp_path / "plan.csv"
    path.write_bytes(b"\xef\xbb\xbf" + (HEAD + "a,tucker,3,4\r\nb,dense,,\r\n").replace("\n", "\r\n").encode())
    assert read_ranks(path) == {"a": (3, 4), "b": None}


@pytest.mark.parametrize(
    ("row", "error", "message"),
    [
        ("encoder.nothing,tucker,8,8", ConfigError, "no layer 'encoder.nothing' that may be factored"),
        ("decoder.seg_layers.1,tucker,2,8", ConfigError, "no layer 'decoder.seg_layers.1' that may be factored"),
        (f"{CONV},tucker,25,8", RankError, "output rank 25 at"),
        (f"{CONV},tucker,24,17", RankError, r"input rank 17 at .* use 1\.\.16"),
    ],
)
def test_plan_table_that_does_not_fit_the_network_raises(net, cost, tmp_path, row, error, message):
    path = tmp_path / "plan.csv"
    path.write_text(f"{HEAD}{row}\n")
    with pytest.raises(error, match=message):
        planned(net, cost, plan=path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"macs": 0.5, "params": 0.5}, "needs exactly one of .* found macs, params"),
        ({"rank_mode": "budget"}, "needs exactly one of .* found none"),
        ({"rank_mode": "relative", "macs": 0.5}, "needs exactly one of .* found macs"),
        ({"macs": 0.5, "energy": 0.9}, "'energy' belong together"),
        ({"rank_mode": "energy"}, "rank_mode 'energy' and the key 'energy' belong together"),
        ({"rank_mode": "plan"}, "'plan' belong together"),
        ({"rank_mode": "evbmf", "energy": 0.5}, "'energy' belong together"),
        ({"macs": 0}, "greater than 0"),
        ({"milliseconds": -1}, "greater than 0"),
        ({"max_drop": 1.0}, "less than 1"),
        ({"energy": 1.1}, "less than or equal to 1"),
        ({"fit": {"samples": 5}}, "greater than or equal to 100"),
        ({"fit": {"sample": 500}}, "sample"),
    ],
    ids=str,
)
def test_config_contradictory_budget_raises(settings, message):
    with pytest.raises(pydantic.ValidationError, match=message):
        TuckerConfig(**settings)


@pytest.mark.parametrize(
    ("settings", "mode", "budget"),
    [
        ({"macs": 0.5}, "budget", ("macs", 0.5)),
        ({"milliseconds": 20}, "budget", ("milliseconds", 20.0)),
        ({"max_drop": 0.01}, "budget", ("max_drop", 0.01)),
        ({"energy": 0.9}, "energy", None),
        ({"plan": "a.csv"}, "plan", None),
        ({"macs": None, "energy": 0.9}, "energy", None),
        ({}, "relative", None),
    ],
    ids=str,
)
def test_config_named_key_chooses_the_mode(settings, mode, budget):
    config = TuckerConfig(**settings)
    assert (config.rank_mode, config.budget) == (mode, budget)
    assert TuckerConfig(**config.model_dump()) == config


def test_plan_max_drop_alone_is_refused(net, cost):
    with pytest.raises(ConfigError, match="found by a search with calibration images"):
        planned(net, cost, max_drop=0.01)


def fake_time(conv, shape, ranks):
    """Time that grows with the MACs, and with the number of pieces."""
    layer = conv if ranks is None else TuckerConv(conv, *map(at_most, ranks, kernel_of(conv).shape))
    macs = measure_cost(layer, shape).macs()
    return macs / 1e6 + 0.001 * sum(rank is not None for rank in ranks or ())


def at_most(rank, channels):
    return None if rank is None else min(rank, channels)


@pytest.mark.parametrize("share", [0.8, 0.5])
def test_plan_milliseconds_budget_is_kept(net, cost, monkeypatch, share):
    monkeypatch.setattr(latency, "chain_milliseconds", fake_time)
    plan, decisions = planned(net, cost, milliseconds=share)
    index, table = LayerIndex(net), LatencyTable(cost)
    open_layers = {
        n: index[n] for n, d in decisions.items() if d.action == "tucker" or d.reason == "costs least where it is"
    }
    ranks = {edit.layer: (edit.rank_out, edit.rank_in) for edit in plan.edits}
    spent = sum(table.milliseconds(name, layer.module, ranks.get(name)) for name, layer in open_layers.items())
    dense = table.total(open_layers)
    assert plan.edits and 0.6 * share * dense < spent <= share * dense
    with pytest.raises(RankError, match="milliseconds=1e-06 cannot be met"):
        planned(net, cost, milliseconds=1e-6)


def test_latency_between_measured_ranks_is_interpolated(net, cost):
    asked = []

    def linear(conv, shape, ranks):
        asked.append(ranks)
        return 1.0 + (ranks[0] or 0) + 2.0 * (ranks[1] or 0)

    table, conv = LatencyTable(cost, linear), nn.Conv3d(320, 256, 3)
    for out, in_ in itertools.product((8, 40, 96, 248, None), (8, 104, 312, None)):
        if (out, in_) != (None, None):
            wanted = 1.0 + (out or 0) + 2.0 * (in_ or 0)
            assert table.milliseconds(CONV, conv, (out, in_)) == pytest.approx(wanted)
    measured = {rank for pair in asked for rank in pair if rank is not None}
    assert measured <= set(measured_ranks(256)) | set(measured_ranks(320)) and all(rank % 8 == 0 for rank in measured)


@pytest.mark.parametrize("channels", [6, 8, 12, 16, 24, 32, 40, 320])
def test_latency_neighbours_enclose_every_rank_that_is_offered(channels):
    for rank in range(8, channels, 8):
        pairs = measured_neighbours(rank, channels)
        assert sum(share for _, share in pairs) == pytest.approx(1)
        assert sum(share * point for point, share in pairs) == pytest.approx(rank)


def test_latency_is_measured_once_per_geometry(net, cost):
    asked = []

    def measure(conv, shape, ranks):
        asked.append(ranks)
        return latency.chain_milliseconds(conv, shape, ranks)

    table = LatencyTable(cost, measure)
    conv = LayerIndex(net)[CONV].module
    first = table.milliseconds(CONV, conv, (8, 8))
    assert 0 < first < 10_000 and table.milliseconds(CONV, conv, None) > 0
    assert table.milliseconds(CONV, conv, (8, 8)) == first  # remembered: a second measurement would differ
    assert asked == [(8, 8), None]


def test_following_norms_are_those_right_behind_the_convolutions(net, tiny_net):
    found = following_norms(net, torch.ones(SHAPE))
    assert found[CONV] == CONV.removesuffix("conv") + "norm"
    convs = {layer.name for layer in LayerIndex(net).of_type(nn.Conv3d)} - {"decoder.seg_layers.0"}
    assert set(found) == {name for name in convs if not name.startswith("decoder.seg_layers")}
    residual = following_norms(tiny_net("residual3d"), torch.ones(1, 1, 16, 16, 16))
    assert len(set(residual.values())) == len(residual) > 6
    index = LayerIndex(tiny_net("residual3d"))
    for conv, norm in residual.items():
        assert index[conv].module.out_channels == index[norm].module.num_features


def test_following_norms_look_through_dropout_and_stop_at_activations():
    layers = [nn.Conv2d(1, 2, 1), nn.Dropout2d(), nn.InstanceNorm2d(2), nn.Conv2d(2, 2, 1), nn.ReLU()]
    network = nn.Sequential(*layers, nn.InstanceNorm2d(2)).eval()
    found = following_norms(network, torch.ones(1, 1, 4, 4))
    assert found["0"] == "2" and "1" not in found and "3" not in found


def test_survey_leaves_the_network_as_it_was_and_repeats_itself(net, tiles):
    state = {key: value.clone() for key, value in net.state_dict().items()}
    first, second = (survey(net, [CONV], tiles, samples=500)[CONV] for _ in range(2))
    assert first.sensitivity == second.sensitivity > 0
    assert torch.equal(first.outputs.squared_error, second.outputs.squared_error)
    assert not torch.allclose(first.outputs.squared_error, first.weights.squared_error, atol=1e-3)
    assert all(torch.equal(value, state[key]) for key, value in net.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in net.modules())


class Remembered(list):
    """Tiles that keep what is known from them."""

    def __init__(self, tiles):
        super().__init__(tiles)
        self.known = {}


def test_a_search_over_budgets_surveys_the_same_weights_once(net, cost, tiles):
    runs, kept = [], Remembered(tiles)
    LayerIndex(net)[CONV].module.register_forward_hook(lambda *_: runs.append(1))
    plans, counts = [], []
    for macs in (0.5, 0.4, 0.4):
        plans.append(plan_tucker(net, TuckerConfig(macs=macs, rank_min=2), cost, kept))
        counts.append(len(runs) - sum(counts))
    assert counts[0] > 3 * counts[1] == 3 * counts[2]  # what is left judges the plans that compete
    assert plans[1] == plans[2] == plan_tucker(net, TuckerConfig(macs=0.4, rank_min=2), cost, tiles) != plans[0]
    runs.clear()
    LayerIndex(net)[CONV].module.weight.data.mul_(1.5)  # such as the next fold's
    plan_tucker(net, TuckerConfig(macs=0.4, rank_min=2), cost, kept)
    assert len(runs) == counts[0]


def test_survey_dead_layer_is_worth_less_than_one_that_counts(net, tiles):
    muted = _copy(net)
    norm = LayerIndex(muted)["encoder.stages.2.0.convs.0.norm"].module
    norm.weight.data.zero_()  # nothing of the deepest stage reaches the answer but its bias
    deep = "encoder.stages.2.0.convs.0.conv"
    found, usual = survey(muted, [deep, CONV], tiles, samples=500), survey(net, [deep], tiles, samples=500)
    assert found[deep].sensitivity < 1e-3 * min(found[CONV].sensitivity, usual[deep].sensitivity)


def test_answer_distance_is_zero_for_equal_and_symmetric():
    generator = torch.Generator().manual_seed(0)
    p, q = (torch.randn(1, 3, 5, 5, generator=generator) for _ in range(2))
    assert answer_distance(p, p) == 0
    assert answer_distance(p, q) == pytest.approx(answer_distance(q, p)) and 0 < answer_distance(p, q) < 1
    far = torch.zeros_like(p)
    far[:, 0], near = 50, far.flip(1)
    assert answer_distance(far, far) == 0 and answer_distance(far, near) > 0.6  # two of three classes lie elsewhere


def test_plan_table_with_transposed_layers_is_read_back_without_the_switch(tiny_net, tiny_shape, tmp_path):
    network = tiny_net("plain3d", features=(16, 24, 32))
    cost = measure_cost(network, tiny_shape("plain3d"))
    first = plan_tucker(network, TuckerConfig(rank_factor=0.25, rank_min=4, transposed=True), cost)
    assert any("transpconvs" in edit.layer for edit in first.edits)
    write_decisions(first.decisions, tmp_path / "plan.csv")
    assert plan_tucker(network, TuckerConfig(plan=tmp_path / "plan.csv"), cost).edits == first.edits
