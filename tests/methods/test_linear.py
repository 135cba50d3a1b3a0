"""Low-rank linear layers: best for what the layer puts out, exact counts, composed with token sparsity."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import tiny_primus
from torch import nn

from nnslim.compression.calibration import Calibration
from nnslim.compression.compress_network import compress, rebuild
from nnslim.compression.config import from_dict
from nnslim.errors import ConfigError, RankError, SpecError
from nnslim.methods.linear import LinearConfig, LowRankLinear, fit_linear, plan_linear
from nnslim.methods.linear.plan import output_spectra, weight_spectrum
from nnslim.network.cost import measure_cost
from nnslim.network.spec import SlimSpec, apply_spec
from nnslim.network.walk import LayerIndex

SIZE = (32, 32, 24)
SHAPE = (1, 1, *SIZE)


class Pair(nn.Module):
    """Two layers; the first widens, the second narrows."""

    def __init__(self, inputs=12, hidden=40, outputs=9):
        super().__init__()
        torch.manual_seed(3)
        self.fc1, self.fc2 = nn.Linear(inputs, hidden), nn.Linear(hidden, outputs)
        self.unused = nn.Linear(5, 5)

    def forward(self, x):
        return self.fc2(torch.tanh(self.fc1(x)))


def correlated(seed, rows=400, inputs=12, rank=4):
    """Rows that lie near a plane, with a mean."""
    torch.manual_seed(99)
    plane, mean = torch.randn(rank, inputs), 2 * torch.randn(inputs)
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(1, rows, inputs, generator=generator)
    return torch.randn(1, rows, rank, generator=generator) @ plane + 0.05 * noise + mean


def slimmed(network, config, shape, tiles=None):
    cost = measure_cost(network, shape)
    plan = plan_linear(network, config, cost, tiles)
    slim = apply_spec(SlimSpec(plan.edits), copy.deepcopy(network), fill=True)
    if tiles is not None:
        fit_linear(network, slim, config, cost, tiles)
    return plan, slim


def test_spectra_are_those_of_the_outputs_whichever_side_is_narrower():
    network, tiles = Pair(), [correlated(seed) for seed in range(3)]
    layers = {"fc1": network.fc1, "fc2": network.fc2, "unused": network.unused}
    found = output_spectra(network, layers, tiles)
    rows = torch.cat(tiles, dim=1)[0].double()
    hidden = torch.tanh(rows @ network.fc1.weight.double().T + network.fc1.bias.double())
    for name, x in (("fc1", rows), ("fc2", hidden)):
        y = x @ layers[name].weight.detach().double().T
        variance = torch.linalg.eigvalsh(y.T.cov(correction=0)).flip(0)
        torch.testing.assert_close(found[name].energy, variance[: len(found[name].energy)], rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(found[name].mean, y.mean(0), rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(found["unused"].energy, weight_spectrum(network.unused).energy)


def test_no_other_layer_of_that_rank_is_nearer_to_the_outputs():
    """Against the solution for the weights, and against gradient descent that starts from ours."""
    network, tiles = Pair(), [correlated(seed) for seed in range(3)]
    config = LinearConfig(rank_factor=0.25, rank_min=1, rank_multiple=1, include=("fc1",))
    plan, slim = slimmed(network, config, (1, 50, 12), tiles)
    by_weights = slimmed(network, config, (1, 50, 12))[1]
    rows = torch.cat(tiles, dim=1).double()
    wanted = network.fc1.double()(rows).detach()

    def error(layer):
        return (
            float((layer.double()(rows).detach() - wanted).square().sum() / (wanted - wanted.mean(1)).square().sum())
            ** 0.5
        )

    assert slim.fc1.first.out_features == 3
    assert error(slim.fc1) == pytest.approx(plan.decisions[0].error, rel=1e-5)
    assert error(slim.fc1) < 0.8 * error(by_weights.fc1)
    tuned = copy.deepcopy(slim.fc1).double()
    optimiser = torch.optim.LBFGS(tuned.parameters(), max_iter=200, line_search_fn="strong_wolfe")

    def loss():
        optimiser.zero_grad()
        value = (tuned(rows) - wanted).square().mean()
        value.backward()
        return value

    optimiser.step(loss)
    assert error(slim.fc1) <= error(tuned) * (1 + 1e-4)


def test_the_mean_of_the_outputs_is_kept():
    network, tiles = Pair(), [correlated(0)]
    config = LinearConfig(rank_factor=0.2, rank_min=1, rank_multiple=1)
    slim = slimmed(network, config, (1, 50, 12), tiles)[1]
    torch.testing.assert_close(slim.fc1(tiles[0]).mean(1), network.fc1(tiles[0]).mean(1), rtol=1e-4, atol=1e-5)


def test_full_rank_is_the_layer_itself():
    network = Pair()
    pair = LowRankLinear(network.fc1, 12)
    left, _, _ = torch.linalg.svd(network.fc1.weight.detach(), full_matrices=False)
    pair.fill(network.fc1, left, torch.zeros(40))
    x = correlated(5)
    torch.testing.assert_close(pair(x), network.fc1(x), rtol=1e-4, atol=1e-5)
    for rank in (0, 13):
        with pytest.raises(SpecError, match=rf"rank {rank} is outside 1\.\.12"):
            LowRankLinear(network.fc1, rank)


def test_counts_are_exact_and_layers_that_save_nothing_stay_dense():
    network = tiny_primus(SIZE)
    cost = measure_cost(network, SHAPE)
    plan, slim = slimmed(network, LinearConfig(rank_factor=0.25), SHAPE)
    after = measure_cost(slim, SHAPE)
    saved = sum(each.macs_before - each.macs_after for each in plan.decisions)
    assert saved > 0 and cost.macs() - after.macs() == saved
    gone = sum(each.parameters_before - each.parameters_after for each in plan.decisions)
    assert cost.parameters - after.parameters == gone
    assert after.attention_macs == cost.attention_macs
    # 48 x 48: 16 ranks are two thirds of it; the smallest multiple of 8 from 0.49 * 48 on is 24, which saves nothing
    plan = slimmed(network, LinearConfig(rank_factor=0.49), SHAPE)[0]
    reasons = {each.layer: each.reason for each in plan.decisions if each.action == "dense"}
    assert reasons["eva.blocks.0.attn.proj"] == "would not get cheaper"


def test_a_budget_is_met_and_spent_where_errors_are_large():
    network, tiles = tiny_primus(SIZE), [torch.randn(SHAPE) for _ in range(2)]
    cost = measure_cost(network, SHAPE)
    plan, slim = slimmed(network, LinearConfig(macs=0.7, rank_multiple=4), SHAPE, tiles)
    share = measure_cost(slim, SHAPE).macs() / cost.macs()
    assert 0.6 < share <= 0.7
    assert len({each.ranks for each in plan.decisions}) > 2
    with pytest.raises(RankError, match="cannot be met"):
        slimmed(network, LinearConfig(macs=0.01), SHAPE)


def test_energy_keeps_what_it_says():
    network, tiles = tiny_primus(SIZE), [torch.randn(SHAPE) for _ in range(2)]
    plan = slimmed(network, LinearConfig(energy=0.8, rank_multiple=1, rank_min=1), SHAPE, tiles)[0]
    errors = [each.error for each in plan.decisions if each.ranks]
    assert errors and max(errors) ** 2 <= 0.2 + 1e-9


def test_settings_that_cannot_be_used_are_refused():
    with pytest.raises(ValueError, match="exactly one of rank_factor, energy, macs, found none"):
        LinearConfig()
    with pytest.raises(ValueError, match="found rank_factor, macs"):
        LinearConfig(rank_factor=0.2, macs=0.5)
    network = tiny_primus(SIZE)
    with pytest.raises(ConfigError, match=r"no linear layer matches exclude pattern 'evo\.\*'; nearest: eva"):
        slimmed(network, LinearConfig(rank_factor=0.2, exclude=("evo.*",)), SHAPE)
    with pytest.raises(ConfigError, match="none of the network's 0 linear layers"):
        slimmed(nn.Sequential(nn.Conv3d(1, 2, 3)), LinearConfig(rank_factor=0.2), SHAPE)


def test_on_top_of_token_sparsity_with_data_and_rebuilt_from_the_spec():
    network, tiles = tiny_primus(SIZE), [torch.randn(SHAPE) for _ in range(2)]
    methods = [
        {"method": "token_sparse", "ratio": 0.2, "scorer": "energy", "completion": "last"},
        {"method": "linear", "rank_factor": 0.25},
    ]
    config = from_dict({"methods": methods, "recovery": {"steps": 0}})
    data = Calibration(tiles, tiles, lambda count: None, fingerprint="x", images=2)
    slim = compress(network, [network.state_dict()], config, SHAPE, data=data)
    assert {edit.kind for edit in slim.spec.edits} == {"token_sparse", "low_rank"}
    assert slim.slim.macs < 0.8 * slim.dense.macs
    again = rebuild(network, SlimSpec.from_dict(slim.spec.to_dict()), slim.weights[0])
    x = torch.randn(SHAPE)
    with torch.no_grad():
        torch.testing.assert_close(again(x), slim.network(x))
    errors = [each.error for each in slim.decisions if each.action == "low_rank"]
    assert all(0 < error < 1 for error in errors)
    assert LayerIndex(slim.network).of_type(LowRankLinear)


def test_without_images_errors_are_those_of_the_weights():
    network = tiny_primus(SIZE)
    config = from_dict({"methods": [{"method": "linear", "rank_factor": 0.25, "include": ["*.mlp.*"]}]})
    slim = compress(network, [network.state_dict()], config, SHAPE)
    layers, made = LayerIndex(network), LayerIndex(slim.network)
    told = {each.layer: each.error for each in slim.decisions if each.action == "low_rank"}
    assert told
    for name, error in told.items():
        weight = layers[name].module.weight.detach()
        values = torch.linalg.svdvals(weight.double())
        rank = made[name].module.first.out_features
        assert error == pytest.approx(float(values[rank:].norm() / values.norm()), abs=1e-5)  # Eckart and Young
