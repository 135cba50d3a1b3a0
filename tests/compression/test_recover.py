"""Recovery without labels: learning from the dense network, budgets of time and drop, interruption."""

from __future__ import annotations

import copy
import dataclasses
import io
import logging
import math

import numpy as np
import pytest
import torch
from calibration_images import SHAPE, make_data, smooth

from nnslim.caches import read_kept, write_kept
from nnslim.compression import recover as module
from nnslim.compression.cache import cache_key, recall_weights, store_weights
from nnslim.compression.compress_network import compress
from nnslim.compression.config import RecoveryConfig, from_dict
from nnslim.compression.distillation import recalibrate_norms, stage_ends, stage_loss
from nnslim.compression.recover import Recovery, recover, schedule
from nnslim.compression.referee import Judgement, Referee
from nnslim.files import checkpoint_bytes
from nnslim.methods.tucker import TuckerConfig, plan_tucker
from nnslim.network.cost import measure_cost
from nnslim.network.spec import SlimSpec, apply_spec, spec_of
from nnslim.network.walk import LayerIndex
from nnslim.surgery.streaming import hooked


@pytest.fixture
def dense(tiny_net):
    """A network that is sure of its answers."""
    network = tiny_net("plain2d", features=(8, 12, 16))
    head = LayerIndex(network)["decoder.seg_layers.1"].module
    head.weight.data *= 6
    return network


@pytest.fixture
def slim(dense):
    config = TuckerConfig(rank_factor=0.4, rank_min=2, only_if_cheaper=False)
    spec = SlimSpec(plan_tucker(dense, config, measure_cost(dense, SHAPE)).edits)
    return apply_spec(spec, copy.deepcopy(dense), fill=True)


def settings(**changes):
    return RecoveryConfig(**{"steps": 24, "every": 8, "batch_size": 2, "learning_rate": 3e-3, **changes})


@torch.no_grad()
def distance(dense, slim):
    """Relative distance of the logits on images that nothing learns from."""
    pairs = [(slim(x), dense(x)) for x in map(smooth, (200, 201, 202))]
    return (sum((a - b).square().sum() for a, b in pairs) / sum(b.square().sum() for _, b in pairs)).sqrt().item()


def same(first, second):
    one, other = first.state_dict(), second.state_dict()
    return all(torch.equal(value, other[key]) for key, value in one.items())


@pytest.fixture
def scripted(monkeypatch):
    """Let the referee give these drops, in order, the last one for ever."""

    def script(*drops):
        left = list(drops)

        def judge(self, slim):
            classes = left.pop(0) if len(left) > 1 else left[0]
            return Judgement(float(np.mean(classes)), np.atleast_1d(classes))

        monkeypatch.setattr(Referee, "judge", judge)

    return script


def test_recover_brings_the_slim_network_nearer_and_keeps_the_best(dense, slim, caplog):
    caplog.set_level(logging.INFO, "nnslim")
    data, before = make_data(), distance(dense, slim)
    steps = []
    recovery = recover(
        dense, slim, data, settings(steps=60, every=20), progress=lambda what, done, total: steps.append((done, total))
    )
    assert [step for step, _ in recovery.history] == [20, 40, 60] and recovery.stopped == "steps"
    assert steps == [(step, 60) for step in range(1, 61)]
    told = [record.getMessage() for record in caplog.records]
    for (step, drop), line in zip(recovery.history, told, strict=True):
        assert line.startswith(f"recovery: step {step} of 60, estimated drop {drop:.4f}, at most 0 min")
    assert recovery.after == min([recovery.before, *(drop for _, drop in recovery.history)]) < recovery.before
    assert Referee(dense, data.held_out).drop(slim) == pytest.approx(recovery.after, abs=1e-9)
    assert distance(dense, slim) < 0.9 * before
    assert not slim.training and all(p.grad is None for p in dense.parameters())


@pytest.mark.parametrize("regions", [False, True])
def test_recover_twice_gives_the_same_bytes(dense, slim, regions):
    results = []
    for _ in range(2):
        made = copy.deepcopy(slim)
        results.append((made, recover(dense, made, make_data(regions), settings(steps=6, every=3)).to_dict()))
    assert same(results[0][0], results[1][0]) and results[0][1] == results[1][1]
    assert not same(results[0][0], slim)


def test_recover_learning_that_does_harm_leaves_the_weights_as_they_were(dense, slim, scripted):
    scripted(0.1, 0.2)
    made = copy.deepcopy(slim)
    recovery = recover(dense, made, make_data(), settings(steps=8, every=4))
    assert same(made, slim) and recovery.after == 0.1


class Cut(Exception):  # noqa: N818  stands for Ctrl-C
    pass


def cut_at(step):
    def progress(what, done, total):
        if done == step:
            raise Cut

    return progress


@pytest.mark.parametrize(("step", "blocks"), [(13, 0), (9, 12), (20, 12)])
def test_recover_resumed_equals_the_uninterrupted_run(dense, slim, tmp_path, step, blocks):
    chosen = settings(steps=24 - blocks, block_steps=blocks)
    whole = copy.deepcopy(slim)
    wanted = recover(dense, whole, make_data(), chosen)
    path, cut = tmp_path / "state", copy.deepcopy(slim)
    with pytest.raises(Cut):
        recover(dense, cut, make_data(), chosen, checkpoint=path, identity="a", progress=cut_at(step))
    again, steps = copy.deepcopy(slim), []
    found = recover(
        dense, again, make_data(), chosen, checkpoint=path, identity="a", progress=lambda w, d, t: steps.append(d)
    )
    assert steps == list(range(8 * (step // 8) + 1, 25))
    assert found.to_dict() == wanted.to_dict() and same(again, whole)


def test_recover_goes_back_and_slows_down_where_learning_does_harm(dense, slim, tmp_path):
    settled = settings(steps=48, learning_rate=0.3)  # far too high
    start = copy.deepcopy(slim)
    recovery = recover(dense, slim, make_data(), settled)
    assert recovery.slowed >= 2 and recovery.history[0][1] > recovery.before + 0.02
    assert recovery.after < recovery.before and recovery.to_dict()["slowed"] == recovery.slowed
    assert distance(dense, slim) < distance(dense, start)
    for step in (9, 20):  # before and after the first of them
        again, path = copy.deepcopy(start), tmp_path / f"{step}"
        with pytest.raises(Cut):
            recover(dense, again, make_data(), settled, checkpoint=path, progress=cut_at(step))
        resumed = recover(dense, again, make_data(), settled, checkpoint=path)
        assert resumed.history == recovery.history and same(slim, again)


def test_recover_finished_run_is_only_read_back(dense, slim, tmp_path):
    path, first, second = tmp_path / "state", copy.deepcopy(slim), copy.deepcopy(slim)
    wanted = recover(dense, first, make_data(), settings(), checkpoint=path)
    found = recover(dense, second, make_data(), settings(), checkpoint=path, progress=cut_at(1))
    assert found.to_dict() == wanted.to_dict() and same(first, second)


def test_recover_run_that_ended_early_is_not_gone_on_with(dense, slim, tmp_path, scripted):
    path, first, second = tmp_path / "state", copy.deepcopy(slim), copy.deepcopy(slim)
    chosen = settings(every=2, patience=2)
    scripted(0.5, 0.3, 0.4)
    wanted = recover(dense, first, make_data(), chosen, checkpoint=path)
    assert (wanted.stopped, wanted.steps) == ("no gain", 6)
    scripted(0.1)  # whatever more steps would give
    found = recover(dense, second, make_data(), chosen, checkpoint=path)
    assert found.to_dict() == wanted.to_dict() and same(first, second)


def test_recover_checkpoint_of_another_run_is_ignored(dense, slim, tmp_path, caplog):
    path = tmp_path / "state"
    recover(dense, copy.deepcopy(slim), make_data(), settings(steps=8), checkpoint=path, identity="a")
    fresh, beside = copy.deepcopy(slim), copy.deepcopy(slim)
    wanted = recover(dense, fresh, make_data(), settings(steps=8, learning_rate=1e-4))
    with caplog.at_level(logging.WARNING, "nnslim"):
        found = recover(
            dense, beside, make_data(), settings(steps=8, learning_rate=1e-4), checkpoint=path, identity="b"
        )
    assert "belongs to another run" in caplog.text
    assert found.to_dict() == wanted.to_dict() and same(fresh, beside)


def _drop(key):
    def damage(path):
        content = torch.load(io.BytesIO(read_kept(path)), weights_only=True)
        del content[key]
        write_kept(path, checkpoint_bytes(content))

    return damage


def _make_old(path):
    """The state as it was before the running mean was torch's: its weights under their plain names, no version."""
    content = torch.load(io.BytesIO(read_kept(path)), weights_only=True)
    del content["version"], content["mean"]["n_averaged"]
    content["mean"] = {key.removeprefix("module."): value for key, value in content["mean"].items()}
    write_kept(path, checkpoint_bytes(content))


def _flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(b"no checkpoint"),
        lambda path: path.write_bytes(path.read_bytes()[:2000]),
        lambda path: path.write_bytes(b""),
        _flip,
        lambda path: write_kept(path, checkpoint_bytes({"identity": "a", "slim": {"a": torch.ones(1)}})),
        lambda path: write_kept(path, checkpoint_bytes([1, 2])),
        _make_old,
        _drop("mean"),
        _drop("optimiser"),
        _drop("best"),
        _drop("recovery"),
    ],
    ids=["text", "cut", "empty", "bit", "other", "list", "old", "no mean", "no optimiser", "no best", "no recovery"],
)
def test_recover_damaged_checkpoint_starts_afresh(dense, slim, tmp_path, caplog, damage):
    path, fresh, made = tmp_path / "state", copy.deepcopy(slim), copy.deepcopy(slim)
    chosen = settings(steps=4, every=2)
    wanted = recover(dense, fresh, make_data(), chosen)
    recover(dense, copy.deepcopy(slim), make_data(), chosen, checkpoint=path, identity="a")
    damage(path)
    with caplog.at_level(logging.WARNING, "nnslim"):
        found = recover(dense, made, make_data(), chosen, checkpoint=path, identity="a")
    assert len(caplog.records) == 1 and str(path) in caplog.text
    assert found.to_dict() == wanted.to_dict() and same(fresh, made)


def test_recover_target_ends_early(dense, slim, scripted):
    scripted(0.5, 0.3, 0.2, 0.1)
    recovery = recover(dense, slim, make_data(), settings(), target=0.25)
    assert (recovery.stopped, recovery.steps, recovery.after) == ("target", 16, 0.2)
    recovery = recover(dense, slim, make_data(), settings(), target=0.25, progress=cut_at(1))
    assert (recovery.stopped, recovery.steps, recovery.history) == ("target", 0, [])


def test_recover_target_of_the_worst_class(dense, slim, scripted):
    data = dataclasses.replace(make_data(), class_names=("liver", "spleen", "vein"))
    scripted([0.5, 0.5], [0.0, 0.3], [0.05, 0.2])
    recovery = recover(dense, slim, data, settings(), target=0.2, target_worst=0.25)
    assert (recovery.stopped, recovery.steps, recovery.after) == ("target", 16, 0.125)
    assert recovery.worst == ("spleen", 0.2)
    assert recovery.to_dict()["classes"] == {"liver": 0.05, "spleen": 0.2}


def test_judgement_means_tiles_that_show_the_class(dense, slim):
    referee = Referee(dense, make_data().held_out)
    judged, lost = referee.judge(slim), referee._lost(slim)
    assert judged.drop == pytest.approx(np.nanmean(np.nanmean(lost[:, 0], axis=1)))
    np.testing.assert_allclose(judged.classes, np.nanmean(lost[:, 0], axis=0))
    assert referee.drop(slim) == judged.drop and math.isnan(Referee(dense, []).drop(slim))


def test_classes_that_no_tile_shows_hide_nothing(dense, slim):
    """Softened probabilities expect a little of all 40 classes; a drop of 0 for each would make the mean a tenth."""

    def with_classes(network):
        made = copy.deepcopy(network)
        head = LayerIndex(made)["decoder.seg_layers.1"].module
        weight = torch.cat([head.weight.data, torch.zeros(37, *head.weight.shape[1:])])
        bias = torch.cat([head.bias.data, torch.full((37,), -6.0)])
        head.weight, head.bias = torch.nn.Parameter(weight), torch.nn.Parameter(bias)
        return made

    tiles = make_data().held_out
    few, many = Referee(dense, tiles), Referee(with_classes(dense), tiles)
    wanted, found = few.judge(slim), many.judge(with_classes(slim))
    assert wanted.drop > 0.001 and found.drop == pytest.approx(wanted.drop, rel=0.3)
    assert np.isnan(found.classes[3:]).all() and len(found.classes) == 39  # the first of them is found in a few voxels


@pytest.mark.parametrize(("patience", "steps"), [(1, 4), (2, 6), (3, 8), (0, 24)])
def test_recover_patience_ends_after_measurements_without_a_gain(dense, slim, scripted, patience, steps):
    scripted(0.5, 0.3, 0.4)
    recovery = recover(dense, slim, make_data(), settings(every=2, patience=patience))
    assert (recovery.steps, recovery.after) == (steps, 0.3)
    assert recovery.stopped == ("no gain" if patience else "steps")


def test_recover_time_budget_stops_and_still_measures(dense, slim, monkeypatch):
    clock = iter(range(10_000))
    monkeypatch.setattr(module.time, "perf_counter", lambda: float(next(clock)))
    recovery = recover(dense, slim, make_data(), settings(steps=1000, every=1000, seconds=20))
    assert recovery.stopped == "time" and 0 < recovery.steps < 20
    assert [step for step, _ in recovery.history] == [recovery.steps]
    assert recovery.after <= recovery.before


def test_recover_block_steps_bring_the_stages_nearer(dense, slim):
    ends = stage_ends(dense, smooth(0))

    @torch.no_grad()
    def stages(network):
        found = {}
        with hooked(network, {}, {n: lambda m, i, o, n=n: found.update({n: o.clone()}) for n in ends}):
            network(smooth(200))
        return torch.cat([found[n].flatten() for n in ends])

    made = copy.deepcopy(slim)
    recovery = recover(dense, made, make_data(), settings(steps=0, block_steps=40, every=40))
    assert recovery.steps == 40
    wanted = stages(dense)
    assert recovery.after <= recovery.before
    if recovery.after < recovery.before:
        assert (stages(made) - wanted).norm() < (stages(slim) - wanted).norm()


def test_stage_loss_is_zero_for_equal_networks_and_has_gradients(dense, slim):
    batch = torch.cat([smooth(1), smooth(2)])
    ends = stage_ends(dense, batch[:1])
    assert float(stage_loss(dense, copy.deepcopy(dense).requires_grad_(True), ends, batch)) == 0
    loss = stage_loss(dense, slim, ends, batch)
    loss.backward()
    assert float(loss.detach()) > 0
    core = LayerIndex(slim)["encoder.stages.1.0.convs.0.conv.core"].module
    assert core.weight.grad.abs().sum() > 0
    assert not any(m._forward_hooks for network in (dense, slim) for m in network.modules())


def test_schedule_warms_up_and_falls_to_zero_in_each_phase():
    chosen = settings(steps=100, block_steps=50, learning_rate=1.0)
    rates, blocks = zip(*[schedule(step, chosen) for step in range(150)], strict=True)
    assert blocks == (True,) * 50 + (False,) * 100
    assert rates[0] == pytest.approx(1 / 5) and rates[50] == pytest.approx(1 / 10)  # cosine of share 0
    assert rates[49] == pytest.approx(0.5 * (1 + math.cos(math.pi * 0.98)))
    assert rates[149] == pytest.approx(0.5 * (1 + math.cos(math.pi * 0.99)))
    assert schedule(30, chosen, spent=1.0)[0] == pytest.approx(0)


def test_what_is_kept_is_the_running_mean_of_the_weights(dense, slim, scripted):
    """The mean forgets 1 - min(0.97, (1 + n) / (10 + n)) of itself at step n, so that the start counts little."""
    scripted(0.5, 0.1)
    states, made = [copy.deepcopy(slim.state_dict())], copy.deepcopy(slim)
    recover(
        dense,
        made,
        make_data(),
        settings(steps=4, every=4),
        progress=lambda what, done, total: states.append(copy.deepcopy(made.state_dict())),
    )
    expected = states[0]
    for number, state in enumerate(states[1:], start=1):
        decay = min(0.97, (1 + number) / (10 + number))
        expected = {key: decay * value + (1 - decay) * state[key] for key, value in expected.items()}
    for key, value in made.state_dict().items():
        torch.testing.assert_close(value, expected[key])
    assert any(not torch.allclose(value, states[-1][key]) for key, value in made.state_dict().items())


def test_referee_equal_networks_drop_nothing_and_a_broken_one_much(dense, slim):
    tiles = [smooth(seed) for seed in range(4)]
    referee = Referee(dense, tiles)
    assert referee.drop(copy.deepcopy(dense)) == pytest.approx(0, abs=2e-3)  # the dense logits are kept in half
    first = referee.drop(slim)
    assert referee.drop(slim) == first
    broken = copy.deepcopy(dense)
    LayerIndex(broken)["decoder.seg_layers.1"].module.weight.data *= -1
    assert referee.drop(broken) > max(first, 0.1)


def test_referee_asks_the_dense_network_once_per_tile_and_leaves_the_mode_alone(dense, slim):
    calls = []
    handle = dense.register_forward_hook(lambda *_: calls.append(1))
    referee = Referee(dense, [smooth(seed) for seed in range(3)])
    slim.train()
    drops = [referee.drop(slim) for _ in range(3)]
    assert len(calls) == 3 and slim.training and len(set(drops)) == 1
    referee = Referee(dense, [smooth(seed) for seed in range(3)], budget=0)
    for asked in (6, 9):  # nothing is kept: asked again
        assert referee.drop(slim) == pytest.approx(drops[0], abs=2e-3) and len(calls) == asked
    handle.remove()


def test_referee_without_any_class_is_undecided(dense, slim):
    head = LayerIndex(dense)["decoder.seg_layers.1"].module
    head.bias.data = torch.tensor([500.0, -500.0, -500.0])
    assert math.isnan(Referee(dense, [smooth(0)]).drop(copy.deepcopy(dense)))
    assert Recovery(before=math.nan).to_dict()["estimated_drop_before"] is None


def test_recalibrate_norms_recovers_a_planted_scale_and_shift(dense):
    slim = copy.deepcopy(dense)
    last = stage_ends(dense, smooth(0))[-1]
    norm, wanted = LayerIndex(slim)[last].module, LayerIndex(dense)[last].module
    scale = torch.linspace(0.6, 3.0, len(norm.weight))
    norm.weight.data *= scale
    norm.bias.data = norm.bias.data * scale + torch.linspace(-1, 1, len(scale))
    assert distance(dense, slim) > 0.1
    recalibrate_norms(dense, slim, [smooth(seed) for seed in range(3)])
    torch.testing.assert_close(norm.weight, wanted.weight, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(norm.bias, wanted.bias, rtol=1e-4, atol=1e-4)
    assert distance(dense, slim) < 1e-3
    slim(smooth(1)).sum().backward()
    assert norm.weight.grad is not None


def test_recalibrate_norms_equal_networks_stay_equal(dense):
    slim = copy.deepcopy(dense)
    recalibrate_norms(dense, slim, [smooth(seed) for seed in range(2)])
    for one, other in zip(slim.parameters(), dense.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_recalibrate_norms_brings_each_norms_output_nearer(dense, slim):
    tiles, made = [smooth(seed) for seed in range(3)], copy.deepcopy(slim)
    recalibrate_norms(dense, made, tiles)
    assert not same(made, slim)
    first = "encoder.stages.1.0.convs.0.norm"  # the layers before it are dense

    @torch.no_grad()
    def lost(network):
        found = []
        for one in (network, dense):
            with hooked(one, {}, {first: lambda m, i, o: found.append(o.clone())}):
                one(tiles[0])
        return (found[0] - found[1]).norm()

    assert lost(made) < lost(slim)


def test_recover_norms_that_do_harm_are_taken_back(dense, slim, scripted):
    scripted(0.1, 0.2)
    made = copy.deepcopy(slim)
    recover(dense, made, make_data(), settings(steps=0, norms=True))
    assert same(made, slim)


def test_recover_without_steps_only_measures(dense, slim):
    made = copy.deepcopy(slim)
    recovery = recover(dense, made, make_data(), settings(steps=0))
    assert same(made, slim) and recovery.steps == 0
    assert recovery.before == recovery.after == Referee(dense, make_data().held_out).drop(slim)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("plain2d", [(16, 16), (8, 8), (4, 4), (8, 8), (16, 16)]),
        ("plain3d", [(16,) * 3, (8,) * 3, (4,) * 3, (8,) * 3, (16,) * 3]),
        ("residual3d", [(16,) * 3, (8,) * 3, (4,) * 3, (8,) * 3, (16,) * 3]),
        ("anisotropic", [(4, 16, 16), (4, 8, 8), (2, 4, 4), (4, 8, 8), (4, 16, 16)]),
    ],
)
def test_stage_ends_are_the_last_norms_of_each_resolution(tiny_net, tiny_shape, kind, expected):
    network, shape = tiny_net(kind), tiny_shape(kind)
    ends, cost = stage_ends(network, torch.ones(shape)), measure_cost(network, shape)
    assert [cost.layers[name].output_shape[1:] for name in ends] == expected
    order = [name for name in cost.layers if name.endswith("norm")]
    positions = [order.index(name) for name in ends]
    assert positions == sorted(positions) and positions[-1] == len(order) - 1
    assert all(
        cost.layers[order[p + 1]].output_shape[1:] != size
        for p, size in zip(positions[:-1], expected[:-1], strict=True)
    )


def test_recover_beyond_its_target_equals_the_run_without(dense, slim, tmp_path, scripted):
    path, whole, cut = tmp_path / "state", copy.deepcopy(slim), copy.deepcopy(slim)
    scripted(0.5, 0.4, 0.2, 0.1)
    wanted = recover(dense, whole, make_data(), settings())
    scripted(0.5, 0.4, 0.2, 0.1)
    early = recover(dense, cut, make_data(), settings(), checkpoint=path, target=0.25)
    assert (early.stopped, early.steps) == ("target", 16) and not same(cut, whole)
    found = recover(dense, cut, make_data(), settings(), checkpoint=path)
    assert found.to_dict() == wanted.to_dict() and same(cut, whole)


CONFIG = {
    "methods": [{"method": "tucker", "rank_factor": 0.5, "rank_min": 2}],
    "recovery": {"steps": 4, "every": 2, "batch_size": 1, "norms": True},
}


def test_compress_with_data_twice_gives_the_same_weights(dense, tiny_net):
    folds = [dense.state_dict(), tiny_net("plain2d", features=(8, 12, 16), seed=1).state_dict()]
    first, second = (compress(dense, folds, from_dict(CONFIG), SHAPE, data=make_data()) for _ in range(2))
    assert first.summary() == second.summary() and len(first.recovery) == len(first.weights) == 2
    for one, other in zip(first.weights, second.weights, strict=True):
        assert all(torch.equal(value, other[key]) for key, value in one.items())
    assert not all(torch.equal(v, first.weights[1][k]) for k, v in first.weights[0].items())
    assert first.recovery[0]["steps"] == 4 and [step for step, _ in first.recovery[0]["history"]] == [2, 4]
    plain = compress(dense, folds, from_dict(CONFIG), SHAPE)
    assert plain.recovery == () and plain.spec == first.spec
    assert not all(torch.equal(v, plain.weights[0][k]) for k, v in first.weights[0].items())
    assert distance(dense, first.network) < distance(dense, plain.network)
    assert spec_of(first.network) == first.spec and not first.network.training


def test_compress_state_of_another_models_interrupted_recovery_is_not_used(dense, tiny_net, tmp_path):
    other, config = tiny_net("plain2d", features=(8, 12, 16), seed=1), from_dict(CONFIG)
    wanted = compress(other, [other.state_dict()], config, SHAPE, data=make_data())
    with pytest.raises(Cut):  # the first model was under way when it was stopped
        compress(
            dense,
            [dense.state_dict()],
            config,
            SHAPE,
            data=make_data(),
            checkpoint=tmp_path / "state",
            progress=lambda what, done, total: cut_at(3)(what, done, total) if what == "recovery" else None,
        )
    assert (tmp_path / "state.fold0").is_file()
    found = compress(other, [other.state_dict()], config, SHAPE, data=make_data(), checkpoint=tmp_path / "state")
    assert all(torch.equal(value, found.weights[0][key]) for key, value in wanted.weights[0].items())


def test_cache_keeps_the_recovery(dense, tmp_path):
    slimmed = compress(dense, [dense.state_dict()], from_dict(CONFIG), SHAPE, data=make_data())
    store_weights(slimmed, "key", tmp_path)
    found = recall_weights(dense, "key", tmp_path)
    assert found.recovery == slimmed.recovery and found.decisions == slimmed.decisions
    assert torch.equal(found.network(smooth(7)), slimmed.network(smooth(7)))


def test_cache_key_changes_with_images_and_how_they_are_used(dense):
    def key(images="", recovery=None, calibration=None):
        config = from_dict({**CONFIG, "calibration": calibration or {}, "recovery": recovery or {}})
        return cache_key(dense, [dense.state_dict()], config, SHAPE, images)

    given = {"images": "/somewhere"}
    assert key() != key("a") != key("b")
    assert key("a", calibration=given) == key("a", calibration={"images": "/elsewhere"})
    keys = [key("a", calibration=given), key("a", calibration={**given, "seed": 1})]
    keys += [
        key("a", {"steps": 3}, given),
        key("a", {"norms": True}, given),
        key("a", calibration={**given, "count": 2}),
    ]
    assert len(set(keys)) == len(keys)
    assert key("a", {"workers": 3}, given) == keys[0]  # does not change the result
    assert key(recovery={"steps": 3}) == key()  # without images nothing is recovered


def test_cache_key_changes_with_the_content_of_the_plan(dense, tmp_path):
    path = tmp_path / "plan.csv"
    config = from_dict({"methods": [{"method": "tucker", "plan": str(path)}]})
    keys = []
    for rank in (3, 4):
        path.write_text(f"layer,action,rank_out,rank_in\nencoder.stages.1.0.convs.0.conv,tucker,{rank},3\n")
        keys.append(cache_key(dense, [dense.state_dict()], config, SHAPE))
    assert keys[0] != keys[1]
