"""Never slower: which layers go back to dense, and what is kept of it. Times are made up: no clock decides."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from nnslim.compression.cache import recall_weights, store_weights
from nnslim.compression.compress_network import compress
from nnslim.compression.config import tucker
from nnslim.compression.guard import Guard
from nnslim.compression.plan_and_fit import plan_methods
from nnslim.methods.tucker.edit import TuckerConv
from nnslim.network.cost import measure_cost
from nnslim.network.walk import LayerIndex
from nnslim.running import speed as running
from nnslim.running.engine import Settings
from nnslim.running.speed import Speed, layer_gains

SHAPE = (1, 1, 16, 16, 16)
CONFIG = tucker(rank_factor=0.5, rank_min=2, transposed=True)
CPU = torch.device("cpu")
STOCK = Settings("stock")  # runs the network itself, so that a made-up timer sees what it is handed
ALL = {(6, 8), (8, 8), (8, 12), (16, 8), (12, 8), (12, 6), (8, 6)}
GOOD = {(8, 12): -0.2, (16, 8): -0.4, (12, 8): -0.1, (12, 6): -0.1, (8, 6): -0.1}


@pytest.fixture
def timer(monkeypatch):
    """Set the seconds that each factored layer adds, by its (inputs, outputs); a whole dense network takes 10 s."""
    passes = []

    def set_times(added: dict[tuple[int, int], float], overhead: float = 0.0) -> list:
        def measure(engines, shape):
            seconds = []
            for engine in engines:
                chains = [module for module in engine.modules() if isinstance(module, TuckerConv)]
                whole = not isinstance(engine, nn.Sequential)
                total = 10.0 + sum(added[chain.in_channels, chain.out_channels] for chain in chains)
                seconds.append(total + (overhead if whole and chains else 0))
            passes.append((list(engines), tuple(shape)))
            return seconds

        monkeypatch.setattr(running, "pass_seconds", measure)
        return passes

    return set_times


def layer_names(network: nn.Module, plans) -> dict[tuple[int, int], str]:
    index = LayerIndex(network)
    convs = {edit.layer: index[edit.layer].module for plan in plans for edit in plan.edits}
    return {(conv.in_channels, conv.out_channels): name for name, conv in convs.items()}


@pytest.fixture
def planned(tiny_net):
    """The network, its plans, and the layers that they factor, by (inputs, outputs)."""
    network = tiny_net("plain3d")
    plans = plan_methods(network, CONFIG, measure_cost(network, SHAPE), SHAPE, None)
    names = layer_names(network, plans)
    assert set(names) == ALL
    return network, plans, names


def test_plan_that_wins_is_left_alone_and_measured_once(planned, timer):
    network, plans, _ = planned
    passes = timer({**GOOD, (6, 8): -1.0, (8, 8): 0.5})
    kept, speed = Guard(STOCK, CPU).check(network, plans, SHAPE)
    assert kept == plans and len(passes) == 1
    assert speed.gains and speed.put_back == () and speed.planned is None and speed.dense == 10.0
    assert speed.slim == pytest.approx(8.6)


def test_layers_that_save_nothing_go_back_first(planned, timer):
    network, plans, names = planned
    timer({**GOOD, (6, 8): 3.0, (8, 8): 1.0})
    kept, speed = Guard(STOCK, CPU).check(network, plans, SHAPE)
    assert speed.put_back == (names[6, 8], names[8, 8]), "the worst first"
    assert speed.planned == pytest.approx(13.1) and speed.slim == pytest.approx(9.1) and speed.gains
    assert {edit.layer for edit in kept[0].edits} == {names[pair] for pair in GOOD}
    decisions = {decision.layer: decision for decision in kept[0].decisions}
    assert len(decisions) == len(plans[0].decisions)
    dense = decisions[names[6, 8]]
    assert dense.action == "dense" and dense.ranks is None and dense.macs_after == dense.macs_before
    assert dense.parameters_after == dense.parameters_before
    assert dense.reason == "not faster here (saves -3e+03 ms of a pass)"
    assert decisions[names[16, 8]] == next(d for d in plans[0].decisions if d.layer == names[16, 8])
    assert str(speed) == (
        f"9.1 s per patch, dense 10 s (1.10x, stock), 13.1 s before 2 layer(s) went back to dense: "
        f"{names[6, 8]}, {names[8, 8]}"
    )


def test_then_those_that_save_least_half_of_those_left_at_a_time(planned, timer):
    """Each layer saves time by itself, but the network as a whole has an overhead that they do not outweigh."""
    network, plans, names = planned
    added = {**GOOD, (6, 8): -0.3, (8, 8): -0.05}

    passes = timer(added, overhead=2.0)
    kept, speed = Guard(STOCK, CPU).check(network, plans, SHAPE)
    assert not speed.gains and not any(plan.edits for plan in kept), "the overhead is never outweighed"
    tried = [len(speed.put_back)]
    wholes = [engines[1] for engines, _ in passes if not isinstance(engines[0], nn.Sequential)]
    left = [sum(isinstance(module, TuckerConv) for module in whole.modules()) for whole in wholes]
    assert left == [7, 6, 3, 1] and tried == [6]
    last = next(module for module in wholes[-1].modules() if isinstance(module, TuckerConv))
    assert (last.in_channels, last.out_channels) == (16, 8), "the layer that saves most is given up last"
    assert all(decision.action == "dense" for decision in kept[0].decisions)
    assert names[16, 8] not in speed.put_back


def test_guard_that_only_measures_changes_nothing(planned, timer):
    network, plans, _ = planned
    passes = timer(dict.fromkeys(ALL, 1.0))
    kept, speed = Guard(STOCK, CPU, puts_back=False).check(network, plans, SHAPE)
    assert kept is plans and not speed.gains and speed.slim == pytest.approx(17.0) and len(passes) == 1


def test_short_passes_do_not_matter(planned, monkeypatch):
    network, plans, _ = planned
    monkeypatch.setattr(running, "pass_seconds", lambda engines, shape: [0.049, 0.3])
    kept, speed = Guard(STOCK, CPU).check(network, plans, SHAPE)
    assert kept == plans and speed.gains
    monkeypatch.setattr(running, "pass_seconds", lambda engines, shape: [0.051, 0.3])
    kept, speed = Guard(STOCK, CPU).check(network, plans, SHAPE)
    assert not speed.gains and kept[0].edits == ()


def test_layers_are_measured_with_the_norm_and_the_activation_behind_them(planned, timer):
    network, _, names = planned
    passes = timer(dict.fromkeys(names, 0.25))
    slim = compress(network, [network.state_dict()], CONFIG, SHAPE).network
    gains = layer_gains(network, slim, [names[6, 8], names[8, 6]], SHAPE, "stock")
    assert gains == {names[6, 8]: -0.25, names[8, 6]: -0.25}
    (dense, factored), shape = passes[0]
    kinds = [type(module) for module in dense]
    assert kinds == [nn.Conv3d, nn.InstanceNorm3d, nn.LeakyReLU] and isinstance(factored[0], TuckerConv)
    assert shape == (1, 6, 16, 16, 16)
    (dense, _), shape = passes[1]
    assert [type(module) for module in dense] == [nn.ConvTranspose3d], "only a concatenation follows"
    assert shape == (1, 8, 8, 8, 8)


@pytest.mark.parametrize("backend", ["stock", "eager"])
def test_layers_are_really_run_at_their_own_sizes(planned, backend):
    """With the real timer: whatever it measures, every layer runs alone, dense and factored."""
    network, _, names = planned
    slim = compress(network, [network.state_dict()], CONFIG, SHAPE).network
    gains = layer_gains(network, slim, names.values(), SHAPE, backend)
    assert set(gains) == set(names.values()) and all(isinstance(gain, float) for gain in gains.values())


# --- what is compressed -------------------------------------------------------------------------------------------


def test_compressed_network_has_the_dense_weights_where_layers_went_back(planned, timer):
    network, _, names = planned
    other = {key: value + 0.1 for key, value in network.state_dict().items()}
    timer({**GOOD, (6, 8): 3.0, (8, 8): 1.0})
    slimmed = compress(network, [network.state_dict(), other], CONFIG, SHAPE, guard=Guard(STOCK, CPU))
    assert len(slimmed.spec.edits) == 5 and not slimmed.refused and slimmed.speed.gains
    weight = f"{names[6, 8]}.weight"
    assert torch.equal(slimmed.weights[0][weight], network.state_dict()[weight])
    assert torch.equal(slimmed.weights[1][weight], other[weight])
    assert f"{names[16, 8]}.core.weight" in slimmed.weights[0]
    without = compress(network, [network.state_dict()], CONFIG, SHAPE)
    assert without.slim.macs < slimmed.slim.macs < slimmed.dense.macs and without.speed is None
    with torch.no_grad():
        assert slimmed.network(torch.randn(SHAPE)).shape == (1, 3, 16, 16, 16)


def test_refused_model_is_the_dense_one(planned, timer):
    network, _, _ = planned
    timer(dict.fromkeys(ALL, 1.0))
    slimmed = compress(network, [network.state_dict()], CONFIG, SHAPE, guard=Guard(STOCK, CPU))
    assert slimmed.refused and slimmed.spec.edits == () and slimmed.slim == slimmed.dense
    assert "dense 10 s (0.59x, stock), no factored layer saves time, of 7 measured: " in str(slimmed.speed)
    assert all(torch.equal(value, network.state_dict()[name]) for name, value in slimmed.weights[0].items())


def test_cache_keeps_the_measurement_and_is_believed_only_where_it_holds(planned, timer, tmp_path, monkeypatch):
    network, _, names = planned
    passes = timer({**GOOD, (6, 8): 3.0, (8, 8): 1.0})
    guard = Guard(STOCK, CPU)
    slimmed = compress(network, [network.state_dict()], CONFIG, SHAPE, guard=guard)
    store_weights(slimmed, "trimmed", tmp_path)
    store_weights(compress(network, [network.state_dict()], CONFIG, SHAPE), "whole", tmp_path)
    passes.clear()
    found = recall_weights(network, "trimmed", tmp_path, guard)
    assert found.speed == slimmed.speed and found.spec == slimmed.spec and not passes, "measured here before"
    assert recall_weights(network, "trimmed", tmp_path) is None, "without a guard, layers are not left dense for it"
    elsewhere = Guard(Settings("stock", threads=7), CPU)
    assert elsewhere.where != guard.where and "7 threads" in elsewhere.where
    assert recall_weights(network, "trimmed", tmp_path, elsewhere) is None and not passes
    assert recall_weights(network, "whole", tmp_path) is not None and not passes
    assert recall_weights(network, "whole", tmp_path, guard) is None and len(passes) == 1, (
        "it is slower here: made again"
    )
    timer(dict.fromkeys(names, -0.1))
    assert recall_weights(network, "whole", tmp_path, guard).speed.gains


def test_cache_remembers_a_refusal(planned, timer, tmp_path):
    network, _, names = planned
    passes = timer(dict.fromkeys(names, 1.0))
    guard = Guard(STOCK, CPU)
    store_weights(compress(network, [network.state_dict()], CONFIG, SHAPE, guard=guard), "refused", tmp_path)
    passes.clear()
    assert recall_weights(network, "refused", tmp_path, guard).refused and not passes
    assert recall_weights(network, "refused", tmp_path) is None


def test_speed_as_json():
    speed = Speed(0.5, 0.25, "eager", "a CPU", 0.75, ("a", "b"))
    values = speed.to_dict()
    assert values == {
        "dense_ms": 500.0,
        "slim_ms": 250.0,
        "backend": "eager",
        "where": "a CPU",
        "planned_ms": 750.0,
        "put_back": ["a", "b"],
        "device": "cpu",
    }
    assert Speed.from_dict(values) == speed
    assert Speed.from_dict({key: value for key, value in values.items() if key != "device"}) == speed, "older files"
    assert Speed.from_dict(Speed(0.5, 0.25, "eager").to_dict()) == Speed(0.5, 0.25, "eager")
    many = Speed(1.0, 2.0, "eager", planned=3.0, put_back=tuple("abcde"))
    assert str(many).endswith("3 s before 5 layer(s) went back to dense: a, b, c, ...")
