"""Sauron: distances, thresholds and removal; many docstrings name what the original got wrong."""

from __future__ import annotations

import math

import numpy as np
import pydantic
import pytest
import torch
from torch import nn

from nnslim.compression.config import load_config
from nnslim.errors import ConfigError
from nnslim.methods.sauron import Pruner, Removal, SauronConfig
from nnslim.methods.sauron.feature_maps import delta_opt, delta_prune, distances, mean_distances, pooled
from nnslim.methods.sauron.pruner import LayerState, below, has_converged
from nnslim.network.walk import LayerIndex, deep_supervision
from nnslim.surgery.channels import channel_map
from nnslim.surgery.narrow import CostTable, narrow_layers, narrow_optimizer, widths_of

KINDS = ("euc_norm", "euc_norm_nonorm", "euc_norm_deltaprunenorm", "euc_rand")
FLAT = [1.0] * 20
QUICK = {"patience": 1, "batches": 1, "settle": 0.0}


def maps(*shape, seed=0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def by_formula(h: torch.Tensor, reference: int, normalise: bool) -> torch.Tensor:
    """The sheet's formula, loop by loop, for even sizes."""
    found = torch.zeros(h.shape[:2])
    for b in range(h.shape[0]):
        small = []
        for c in range(h.shape[1]):
            one = h[b, c]
            if normalise:
                one = (one - one.min()) / (one.max() - one.min())
            pool = nn.functional.avg_pool3d if h.dim() == 5 else nn.functional.avg_pool2d
            small.append(pool(one[None, None], 2)[0, 0])
        for c in range(h.shape[1]):
            found[b, c] = ((small[reference] - small[c]) ** 2).mean().sqrt()
    return found


@pytest.mark.parametrize("shape", [(2, 5, 8, 6), (2, 4, 4, 6, 8)])
def test_distances_follow_the_formula_in_2d_and_over_all_axes_in_3d(shape):
    """The original reduced 3D maps slice by slice along the last axis."""
    h = maps(*shape)
    torch.testing.assert_close(distances(h, 0, "euc_norm"), by_formula(h, 0, True))
    torch.testing.assert_close(distances(h, 2, "euc_norm_nonorm"), by_formula(h, 2, False))
    raw = by_formula(h, 1, False)
    expected = raw / raw.amax(1, keepdim=True)
    torch.testing.assert_close(distances(h, 1, "euc_rand"), expected)
    torch.testing.assert_close(delta_prune(h, 1, "euc_norm_deltaprunenorm"), expected.mean(0))
    torch.testing.assert_close(delta_opt(h, 0, "euc_norm"), by_formula(h, 0, True)[:, 1:].mean())
    assert float(delta_prune(h, 1, "euc_rand").max()) <= 1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", ["equal", "scaled equal", "constant", "zero", "one voxel", "thin"])
def test_value_and_gradient_are_finite_at_every_corner(kind, case):
    """Two equal normalised maps gave NaN gradients, a constant map a NaN loss; small maps crashed in the pool."""
    h = maps(2, 3, 4, 4, 4)
    if case == "equal":
        h[:, 1] = h[:, 0]
    elif case == "scaled equal":
        h[:, 1] = 3 * h[:, 0] + 2
    elif case == "constant":
        h[:, 1] = 7.0
    elif case == "zero":
        h = torch.zeros_like(h)
    elif case == "one voxel":
        h = h[:, :, :1, :1, :1]
    else:
        h = h[:, :, :1, :3, :2]
    h.requires_grad_(True)
    loss = delta_opt(h, 0, kind)
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(h.grad).all()
    assert float(h.grad.abs().max()) < 1e3
    assert torch.isfinite(mean_distances(h)).all()
    if case == "equal":
        assert distances(h, 0, kind)[:, 1].tolist() == [0, 0]
    if case == "scaled equal" and kind == "euc_norm":
        assert float(distances(h, 0, kind)[:, 1].detach().max()) < 1e-5


def test_pool_adapts_to_small_maps():
    assert pooled(torch.zeros(1, 1, 1, 5, 4)).shape == (1, 1, 1, 2, 2)
    assert pooled(torch.zeros(1, 1, 1, 1)).shape == (1, 1, 1, 1)


def test_distance_under_autocast_is_computed_in_float32():
    h = maps(1, 3, 8, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = distances(h.bfloat16(), 0, "euc_norm")
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, distances(h.bfloat16().float(), 0, "euc_norm"))


def test_grid_of_thresholds_has_16_values_from_0001_to_03():
    grid = SauronConfig().grid
    assert len(grid) == 16 and grid[0] == 0.001 and grid[-1] == 0.3
    np.testing.assert_allclose(grid, np.linspace(0.001, 0.3, 16))


def test_every_number_of_the_method_is_an_option_and_checked():
    config = SauronConfig(strength=0.1, threshold_max=0.5, steps=4, patience=2, few=0.1)
    assert config.grid[-1] == 0.5 and len(config.grid) == 5
    for wrong, message in (
        ({"threshold_max": 0.0005}, "must be below"),
        ({"strength": -1}, "greater than or equal to 0"),
        ({"macs": 0.2, "params": 0.2}, "not both"),
        ({"reach": 0.5}, "reach needs macs or params"),
        ({"delta_prune": "off"}, "would prune nothing"),
        ({"taumax": 1}, "Extra inputs"),
    ):
        with pytest.raises(pydantic.ValidationError, match=message):
            SauronConfig(**wrong)


def test_patience_after_a_raise_there_is_none_for_rho_epochs():
    state, config, steps = LayerState(), SauronConfig(), []
    for epoch in range(20):
        state.advance(config, 32, FLAT[: epoch + 1], FLAT[: epoch + 1])
        steps.append(state.step)
    raises = [epoch for epoch in range(20) if steps[epoch] > (steps[epoch - 1] if epoch else 0)]
    assert raises == [5, 11, 17]  # C1: rho + 1 losses; then five epochs of patience each
    state = LayerState(step=config.steps)
    state.advance(config, 32, FLAT, FLAT)
    assert state.step == config.steps  # the last threshold is the last


@pytest.mark.parametrize(
    ("training", "validation", "removed", "converged"),
    [
        ([1.0] * 6, [1.0] * 6, 0, True),
        ([1.0] * 5, [1.0] * 5, 0, False),  # C1
        ([1.0, 1, 1, 1, 1, 0.9], [1.0] * 6, 0, False),  # C2: still improving
        ([1.0, 1, 1, 1, 1, 1.1], [1.0] * 6, 0, False),  # C2: diverging
        ([1.0, 0.8, 1, 1, 1, 0.9], [1.0] * 6, 0, True),
        ([1.0] * 6, [1.0, 1, 1, 1, 1, 0.9], 0, False),  # C3
        ([1.0] * 6, [1.0, 0.8, 1, 1, 1, 0.9], 0, True),
        ([1.0] * 6, [1.0] * 6, 2, False),  # C4: 2 of 64 is not fewer than ceil(1.28)
        ([1.0] * 6, [1.0] * 6, 1, True),
        ([1.0, 1, 1, 1, 1, math.nan], [1.0] * 6, 0, False),
    ],
)
def test_convergence_conditions_one_by_one(training, validation, removed, converged):
    assert has_converged(SauronConfig(), 64, removed, training, validation) is converged


def test_a_new_minimum_of_the_validation_loss_delays_the_raise():
    """The original's minimum included the value itself, so that this condition never said no."""
    falling = [1 - 0.01 * epoch for epoch in range(20)]
    state = LayerState()
    for epoch in range(20):
        state.advance(SauronConfig(), 32, FLAT[: epoch + 1], falling[: epoch + 1])
    assert state.step == 0


def test_without_validation_the_training_losses_decide():
    """The original never pruned then, by its own README's command."""
    state = LayerState()
    for epoch in range(7):
        state.advance(SauronConfig(), 32, FLAT[: epoch + 1], [])
    assert state.step == 1
    nothing = [math.nan] * 6
    assert has_converged(SauronConfig(), 32, 0, FLAT[:6], nothing)
    assert not has_converged(SauronConfig(convergence="validation"), 32, 0, FLAT[:6], [])
    falling = [1 - 0.1 * epoch for epoch in range(6)]
    assert has_converged(SauronConfig(convergence="training"), 32, 0, FLAT[:6], falling)


def test_reference_is_never_removed_and_widths_are_kept():
    scores = np.zeros(16)
    assert below(scores, 0.3, 5, SauronConfig()).tolist() == [i for i in range(16) if i != 5]
    assert len(below(scores, 0.3, 5, SauronConfig(min_filters=4))) == 12
    scores[:6] = 1
    assert below(scores, 0.3, 0, SauronConfig(multiple=8)).tolist() == list(range(6, 14))  # 6 could stay: 8 do
    assert len(below(scores[:10], 0.3, 0, SauronConfig(multiple=8))) == 2
    assert below(np.zeros(1), 0.3, 0, SauronConfig()).size == 0
    assert below(np.zeros(6), 0.3, 0, SauronConfig(multiple=8)).size == 0  # narrower than a multiple from the start


def watched(tiny_net, tiny_shape, kind="plain3d", epochs=10, **settings):
    network = tiny_net(kind, deep_supervision=True)
    shape = tiny_shape(kind)
    return network, Pruner(network, shape, SauronConfig(**QUICK | settings), epochs), shape


def run_once(network, shape, seed=0):
    network.train()
    return network(maps(2, *shape[1:], seed=seed))


def test_loss_is_the_mean_over_groups_without_heads(tiny_net, tiny_shape):
    """In the original the heads' constant 1 diluted lambda."""
    network, pruner, shape = watched(tiny_net, tiny_shape)
    pruner.begin_epoch(0)
    seen = {}
    layers = LayerIndex(network)
    for group in pruner.channels.groups.values():
        tap = group.taps[0]
        layers[tap].module.register_forward_hook(lambda m, i, o, n=group.name: seen.__setitem__(n, o.detach().clone()))
    run_once(network, shape)
    loss = pruner.watch.loss()
    assert len(seen) == len(pruner.channels.groups) == 8
    assert not any("seg_layers" in name for name in seen)
    expected = np.mean([float(delta_opt(h, 0, "euc_norm")) for h in seen.values()])
    assert float(loss.detach()) == pytest.approx(expected, rel=1e-5)
    loss.backward()
    grads = [p.grad for n, p in network.named_parameters() if "seg_layers" not in n]
    assert all(g is not None and torch.isfinite(g).all() for g in grads)


def test_layers_with_one_channel_are_skipped(tiny_net, tiny_shape):
    """The original crashed, or gave a NaN mean."""
    network, pruner, shape = watched(tiny_net, tiny_shape)
    first = next(iter(pruner.channels.groups))
    pruner.watch.close()
    narrow_layers(LayerIndex(network), pruner.channels.narrowing({first: [0]}))
    pruner.refit()
    assert first not in pruner.watch.groups and pruner.channels.groups[first].channels == 1
    run_once(network, shape)
    assert torch.isfinite(pruner.watch.loss())
    pruner.watch.observe()
    scores, _ = pruner.watch.take()
    assert first not in scores
    assert first not in pruner.decide(0, scores, {}, FLAT, FLAT).keep


def test_criterion_is_the_mean_over_batches(tiny_net, tiny_shape):
    """The original judged by the very last forward: one batch, often an empty border of a validation case."""
    network, pruner, shape = watched(tiny_net, tiny_shape)
    single = []
    for seed in range(3):
        run_once(network, shape, seed)
        pruner.watch.observe()
        single.append(pruner.watch.take()[0])
    for seed in range(3):
        run_once(network, shape, seed)
        pruner.watch.observe()
    together = pruner.watch.take()[0]
    for name, scores in together.items():
        np.testing.assert_allclose(scores, np.mean([one[name] for one in single], axis=0), rtol=1e-5, atol=1e-7)
    network.eval()
    pruner.watch.clear()
    network(maps(1, *shape[1:]))
    assert not pruner.watch.maps  # validation is not looked at


@pytest.mark.parametrize("policy", ["published", "first", "random", "medoid"])
def test_one_reference_for_loss_and_criterion(policy, tiny_net, tiny_shape):
    """The original pulled towards channel 0, judged by the distance from a random one, and could remove channel 0."""
    network, pruner, shape = watched(tiny_net, tiny_shape, reference=policy, threshold_max=2.0, threshold_first=1.5)
    drawn = set()
    for epoch in range(5):
        pruner.begin_epoch(epoch)
        pairs = pruner.watch.references
        if policy != "published":
            assert all(loss == criterion for loss, criterion in pairs.values())
        drawn.add(tuple(pairs.values()))
        run_once(network, shape)
        pruner.watch.observe()
        scores, medoids = pruner.watch.take()
        decision = pruner.decide(epoch, scores, medoids, FLAT, FLAT)
        for name, kept in decision.keep.items():  # all are below the threshold: only the reference survives
            assert kept == [pairs[name][1]]
        assert bool(medoids) == (policy == "medoid")
        pruner.medoids = medoids
    assert len(drawn) == {"published": 5, "first": 1, "random": 5, "medoid": 2}[policy]
    again = Pruner(network, shape, pruner.config, 10)
    again.medoids = pruner.medoids
    again.begin_epoch(4)
    if policy != "medoid":
        assert again.watch.references == pruner.watch.references  # also in a resumed run


def test_medoid_is_the_map_nearest_to_all_others():
    h = torch.zeros(2, 4, 4, 4)
    for channel, value in enumerate((0.0, 10.0, 4.0, 5.0)):
        h[:, channel] = value
    assert mean_distances(h).tolist() == pytest.approx([19 / 4, 21 / 4, 11 / 4, 11 / 4])


@pytest.mark.parametrize("kind", ["plain3d", "plain2d", "residual3d", "anisotropic"])
def test_pruned_network_of_any_kind_trains_on(kind, tiny_net, tiny_shape):
    network, pruner, shape = watched(tiny_net, tiny_shape, kind)
    optimizer = torch.optim.SGD(network.parameters(), 1e-2, momentum=0.9)
    before = widths_of(network)
    for epoch in range(2):
        pruner.begin_epoch(epoch)
        loss = sum(out.square().mean() for out in run_once(network, shape)) + 0.5 * pruner.watch.loss()
        pruner.watch.observe()
        pruner.watch.clear()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scores, medoids = pruner.watch.take()
        scores = {name: [0.0 if i in (1, 3) else 1.0 for i in range(len(s))] for name, s in scores.items()}
        decision = pruner.decide(epoch, scores, medoids, FLAT[:3], FLAT[:3])
        narrow_optimizer(optimizer, pruner.act(decision))
        assert all(state.removed == 2 for state in pruner.states.values() if state.removed)
    after = widths_of(network)
    assert all(len(optimizer.state[p]) == 1 for p in network.parameters() if p in optimizer.state)
    assert {id(p) for p in optimizer.state} <= {id(p) for p in network.parameters()}
    shrunk = [name for name in before if after[name] != before[name]]
    heads = [name for name in before if "seg_layers" in name]
    assert len(shrunk) == len(before)  # heads lose inputs, the first layer outputs
    assert all(after[name][0] == before[name][0] for name in heads)
    table = CostTable(network, shape)
    assert (pruner.cost.macs, pruner.cost.parameters) == (table.macs, table.parameters)


def test_cost_table_predicts_what_is_then_counted(tiny_net, tiny_shape):
    for kind in ("plain3d", "residual3d"):
        network, shape = tiny_net(kind), tiny_shape(kind)
        channels, table = channel_map(network, shape), CostTable(network, shape)
        keep = {name: list(range(0, group.channels, 2)) for name, group in channels.groups.items()}
        kept = channels.narrowing(keep)
        predicted = table.after(kept)
        narrow_layers(LayerIndex(network), kept)
        counted = CostTable(network, shape)
        assert predicted == (counted.macs, counted.parameters)


def all_near(pruner, value=0.01):
    names = pruner.watch.groups
    return {n: [value + 1e-4 * i for i in range(g.channels)] for n, g in names.items()}


def test_target_stops_the_removal_at_once_when_it_is_met(tiny_net, tiny_shape):
    settings = {"threshold_first": 0.1, "macs": 0.6}
    _, pruner, _ = watched(tiny_net, tiny_shape, **settings)
    decision = pruner.decide(0, all_near(pruner), {}, FLAT[:1], FLAT[:1])
    pruner.act(decision)
    share = pruner.cost.macs / pruner.before.macs
    assert 0.5 < share <= 0.6  # without the target everything but the references would be gone
    decision = pruner.decide(1, all_near(pruner), {}, FLAT[:2], FLAT[:2])
    assert not decision.keep


def test_reach_brings_the_network_to_the_target_in_time_without_thresholds(tiny_net, tiny_shape):
    shares = reached(tiny_net, tiny_shape, params=0.3, reach=0.5)[1]
    assert all(share <= 0.3 ** ((epoch + 1) / 5) + 1e-9 for epoch, share in enumerate(shares[:5]))
    assert 0.2 < shares[4] <= 0.3 and len(set(shares[4:])) == 1


def test_reach_ends_before_the_network_settles_and_a_missed_target_is_told(tiny_net, tiny_shape):
    pruner, shares = reached(tiny_net, tiny_shape, macs=0.3, reach=1.0, settle=0.3)
    assert 0.2 < shares[-1] <= 0.3 and shares[5] == shares[-1] and pruner.missed() == ""
    pruner, shares = reached(tiny_net, tiny_shape, macs=0.3, min_filters=5, reach=0.5)
    assert shares[-1] > 0.3
    assert pruner.missed().endswith("are left after 10 epoch(s); lower min_filters or multiple, or train more epochs")
    pruner, _ = reached(tiny_net, tiny_shape, params=0.3)
    told = "the target params 0.3 was not reached: 100.0% of the parameters are left after 10 epoch(s); set reach (0.5)"
    assert pruner.missed().startswith(told)
    assert reached(tiny_net, tiny_shape)[0].missed() == ""


def reached(tiny_net, tiny_shape, **settings):
    """Train ten epochs in which no threshold bites; return the pruner and the share left after each."""
    _, pruner, _ = watched(tiny_net, tiny_shape, epochs=10, threshold_first=1e-6, **settings)
    shares = []
    for epoch in range(10):
        pruner.begin_epoch(epoch)
        scores = {n: [0.5 + 0.01 * i for i in range(g.channels)] for n, g in pruner.watch.groups.items()}
        pruner.act(pruner.decide(epoch, scores, {}, FLAT[: epoch + 1], FLAT[: epoch + 1]))
        shares.append(pruner.share({}))
    return pruner, shares


@pytest.mark.parametrize("ranking", ["uniform", "global"])
def test_ranking_decides_whether_one_layer_pays_for_all(ranking, tiny_net, tiny_shape):
    """One layer's filters are all nearer to their reference than any of the others."""
    settings = {"threshold_first": 1e-6, "params": 0.4, "reach": 0.5, "ranking": ranking}
    _, pruner, _ = watched(tiny_net, tiny_shape, epochs=10, **settings)
    near = max(pruner.channels.groups.values(), key=lambda group: group.channels).name
    full = {name: group.channels for name, group in pruner.channels.groups.items()}
    for epoch in range(5):
        pruner.begin_epoch(epoch)
        groups = pruner.watch.groups.items()
        scores = {n: [(0.1 if n == near else 0.5) + 0.01 * i for i in range(g.channels)] for n, g in groups}
        pruner.act(pruner.decide(epoch, scores, {}, FLAT[: epoch + 1], FLAT[: epoch + 1]))
    left = {name: group.channels / full[name] for name, group in pruner.channels.groups.items()}
    assert pruner.cost.parameters <= 0.4 * pruner.before.parameters
    if ranking == "global":
        assert pruner.channels.groups[near].channels == 1
    else:  # as even as whole filters allow
        assert max(left.values()) - min(left.values()) <= 1.01 / min(full.values())
        again = Pruner(pruner.network, pruner.shape, pruner.config, 10)
        again.load_state_dict(pruner.state_dict())
        assert again.full == full


@pytest.mark.parametrize("fold", [True, False])
def test_fold_removes_a_redundant_filter_without_a_trace(fold, tiny_net, tiny_shape):
    network, pruner, shape = watched(tiny_net, tiny_shape, fold=fold)
    name = "encoder.stages.0.0.convs.0.conv"
    block = network.encoder.stages[0][0].convs[0]
    with torch.no_grad():  # two filters that make the same map
        for parameter in (*block.conv.parameters(), *block.norm.parameters()):
            parameter[1] = parameter[0]
    pruner.begin_epoch(0)
    with torch.no_grad():
        before = run_once(network, shape)[0]
        pruner.watch.observe()
    moments = pruner.watch.take_moments()
    assert (set(moments) == set(pruner.watch.groups)) if fold else not moments
    assert pruner.watch.take_moments() == {}
    kept = [index for index in range(pruner.channels.groups[name].channels) if index != 1]
    pruner.act(Removal({name: kept}, pruner.states), moments)
    with torch.no_grad():
        error = float((run_once(network, shape)[0] - before).abs().max() / before.std())
    assert error < 0.01 if fold else error > 0.05


def test_settle_leaves_the_last_epochs_alone(tiny_net, tiny_shape):
    _, pruner, _ = watched(tiny_net, tiny_shape, threshold_first=0.2, settle=0.3)
    scores = all_near(pruner)
    assert [bool(pruner.decide(epoch, scores, {}, FLAT, FLAT).keep) for epoch in range(10)] == [True] * 6 + [False] * 4


def test_state_goes_round_as_json_and_gives_the_same_decisions(tiny_net, tiny_shape):
    import json

    _, pruner, shape = watched(tiny_net, tiny_shape)
    pruner.states[next(iter(pruner.states))].step = 3
    pruner.act(pruner.decide(0, all_near(pruner, 0.0), {}, FLAT[:3], FLAT[:3]))
    state = json.loads(json.dumps(pruner.state_dict()))
    again = Pruner(pruner.network, shape, pruner.config, 10)
    again.load_state_dict(state)
    assert again.states == pruner.states
    again.before = pruner.before
    scores = all_near(again)
    one, other = (p.decide(1, scores, {}, FLAT[:4], FLAT[:4]) for p in (pruner, again))
    assert one == other


def test_strength_0_is_pruning_alone_and_preset_reads(tiny_net, tiny_shape):
    assert load_config("sauron").methods[0].settings.strength == 0.5
    with pytest.raises(ConfigError, match="unknown key 'lambda'"):
        load_config({"methods": [{"method": "sauron", "lambda": 0}]})


def test_compiled_network_gives_the_same_maps_and_gradients(tiny_net, tiny_shape):
    """Surgery is done on the plain network inside torch.compile's wrapper; the hooks are compiled along."""
    network, pruner, shape = watched(tiny_net, tiny_shape, "plain2d")
    found = []
    for call in (network, torch.compile(network, backend="aot_eager")):
        network.train()
        network.zero_grad()
        call(maps(2, *shape[1:]))
        loss = pruner.watch.loss()
        loss.backward()
        found.append((loss.detach(), network.encoder.stages[0][0].convs[0].conv.weight.grad.clone()))
        pruner.watch.clear()
    torch.testing.assert_close(found[0], found[1])
    with deep_supervision(network, True):
        assert len(network(maps(1, *shape[1:]))) == 2


def test_filters_are_folded_by_default_where_a_trained_model_is_the_start(tmp_path):
    assert not SauronConfig().folds and SauronConfig(start=tmp_path).folds
    assert SauronConfig(fold=True).folds and not SauronConfig(start=tmp_path, fold=False).folds
