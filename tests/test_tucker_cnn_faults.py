"""What tucker-cnn did wrong, by docstring, and a test that nnslim does not."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from nnslim.compression.cache import cache_key, recall_weights, store_weights
from nnslim.compression.compress_network import compress
from nnslim.compression.config import SlimConfig, load_config, tucker
from nnslim.maths.lowrank import partial_tucker
from nnslim.methods.tucker import TuckerConfig, TuckerEdit, plan_tucker
from nnslim.methods.tucker.edit import TuckerConv, is_transposed
from nnslim.network.cost import measure_cost
from nnslim.network.spec import SlimSpec, apply_spec
from nnslim.network.walk import LayerIndex

FULL = TuckerConfig.published(1.0)


def planned_and_applied(network, config, shape):
    plan = plan_tucker(network, config, measure_cost(network, shape))
    return apply_spec(SlimSpec(plan.edits), copy.deepcopy(network), fill=True), plan


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_cpu_forward_runs_the_chains_and_fewer_macs(tiny_net, tiny_shape):
    """CPU inference was silently not compressed."""
    network, shape = tiny_net("plain3d"), tiny_shape("plain3d")
    made = compress(network, [network.state_dict()], tucker(rank_factor=0.5, rank_min=2), shape)
    ran = []
    for module in made.network.modules():
        if isinstance(module, (nn.Conv3d, nn.ConvTranspose3d)):
            module.register_forward_hook(lambda m, i, o: ran.append((m, i[0].shape, o.shape)))
    with torch.no_grad():
        output = made.network(random(*shape))
    assert output.device.type == "cpu"
    cores = {id(module.core) for module in made.network.modules() if isinstance(module, TuckerConv)}
    assert len(cores) == len(made.spec.edits) > 0
    assert cores <= {id(module) for module, _, _ in ran}
    executed = sum(m.weight.numel() * (i if is_transposed(m) else o)[2:].numel() for m, i, o in ran)
    assert executed == made.slim.macs < made.dense.macs


def test_each_convolution_is_factored_once_and_every_parameter_gets_a_gradient(tiny_net, tiny_shape, monkeypatch):
    """Each convolution was factored twice, once per alias, and half of the new parameters were never used."""
    from nnslim.methods.tucker import edit

    calls = []

    def counted(kernel, ranks):
        calls.append(ranks)
        return partial_tucker(kernel, ranks)

    monkeypatch.setattr(edit, "partial_tucker", counted)
    network, shape = tiny_net("plain3d", deep_supervision=True), tiny_shape("plain3d")
    slim, plan = planned_and_applied(network, FULL, shape)
    chains = {id(module) for module in slim.modules() if isinstance(module, TuckerConv)}
    assert len(calls) == len(chains) == len(plan.edits) == len(plan.decisions)
    added = sum(d.parameters_after - d.parameters_before for d in plan.decisions)
    before = sum(p.numel() for p in network.parameters())
    assert sum(p.numel() for p in slim.parameters()) == before + added
    sum(output.square().sum() for output in slim(random(*shape))).backward()
    assert [name for name, p in slim.named_parameters() if p.grad is None] == []
    for layer in LayerIndex(slim).of_type(TuckerConv):
        assert all(slim.get_submodule(alias) is layer.module for alias in layer.aliases)


def test_residual_encoder_with_biasless_projections_is_factored(tiny_net, tiny_shape):
    """A convolution without bias crashed, and with it every residual encoder network."""
    network, shape = tiny_net("residual3d"), tiny_shape("residual3d")
    biasless = [n for n, m in network.named_modules() if isinstance(m, nn.Conv3d) and m.bias is None]
    assert biasless
    assert all(".skip." in name for name in biasless)
    slim, plan = planned_and_applied(network, FULL, shape)
    assert set(biasless) <= {edit.layer for edit in plan.edits}
    assert all(slim.get_submodule(f"{name}.last").bias is None for name in biasless)
    with torch.no_grad():
        torch.testing.assert_close(slim(random(*shape)), network(random(*shape)), rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv3d(4, 6, 3, padding=1, padding_mode="circular"),
        nn.Conv3d(4, 6, 3, padding=1, padding_mode="reflect"),
        nn.ConvTranspose3d(4, 6, 3, 2, 1, output_padding=1),
        nn.Conv3d(4, 6, 3, dilation=2),
        nn.Conv2d(4, 6, 3, padding=1),
        nn.ConvTranspose2d(4, 6, 2, 2),
    ],
    ids=repr,
)
def test_convolution_attributes_are_carried_over(conv):
    """Padding mode and output padding were dropped, and 2D convolutions ignored."""
    network = nn.Sequential(copy.deepcopy(conv))
    with torch.no_grad():
        for seed, parameter in enumerate(network.parameters()):
            parameter.copy_(random(*parameter.shape, seed=seed))
    slim = apply_spec(SlimSpec((TuckerEdit("0", 6, 4),)), copy.deepcopy(network), fill=True)
    x = random(1, 4, *[7] * (conv.weight.ndim - 2), seed=9)
    assert isinstance(slim[0], TuckerConv)
    torch.testing.assert_close(slim.double()(x.double()), network.double()(x.double()), rtol=0, atol=1e-4)


def test_grouped_convolution_is_kept_dense_and_named():
    """Grouped convolutions were factored wrongly, or raised."""
    network = nn.Sequential(nn.Conv3d(4, 8, 3, padding=1, groups=2))
    slim, plan = planned_and_applied(network, FULL, (1, 4, 6, 6, 6))
    assert plan.decisions[0].reason == "grouped convolution (groups=2)"
    x = random(1, 4, 6, 6, 6)
    assert torch.equal(slim(x), network(x))


def test_no_layer_gets_more_expensive_and_sensitive_ones_stay_dense(tiny_net, tiny_shape):
    """Everything was factored: first layer, heads, 1x1x1 layers, and layers that cost more afterwards."""
    network, shape = tiny_net("residual3d"), tiny_shape("residual3d")
    for factor in (0.9, 0.5, 0.1):
        slim, plan = planned_and_applied(network, TuckerConfig(rank_factor=factor, rank_min=4), shape)
        assert all(d.macs_after < d.macs_before for d in plan.decisions if d.action == "tucker")
        kept = {d.reason for d in plan.decisions if d.action == "dense"}
        assert {"first layer", "segmentation head", "1x1 kernel"} <= kept
        assert measure_cost(slim, shape).macs() <= measure_cost(network, shape).macs()
    _, plan = planned_and_applied(network, TuckerConfig(rank_factor=0.9, rank_min=None, transposed=True), shape)
    upsampling = next(d for d in plan.decisions if d.layer == "decoder.transpconvs.0")
    assert upsampling.reason == "would not get cheaper (53,504 MACs against 49,152)"


def test_cache_keeps_models_folds_and_settings_apart_for_any_shape(tiny_net, tiny_shape, tmp_path, monkeypatch):
    """Factors were recomputed for every case; one TorchScript file for one channel, 128^3 and all folds."""
    shape = tiny_shape("plain2d", channels=3)
    network = tiny_net("plain2d", channels=3)
    folds = [tiny_net("plain2d", channels=3, seed=seed).state_dict() for seed in (1, 2)]
    config = tucker(rank_factor=0.5, rank_min=2)
    keys = {
        cache_key(network, folds, config, shape),
        cache_key(network, folds[:1], config, shape),
        cache_key(network, folds[1:], config, shape),
        cache_key(network, folds, tucker(rank_factor=0.4, rank_min=2), shape),
        cache_key(network, folds, config, (1, 3, 32, 32)),
    }
    assert len(keys) == 5
    made = compress(network, folds, config, shape)
    key = cache_key(network, folds, config, shape)
    store_weights(made, key, tmp_path)
    monkeypatch.setattr("nnslim.methods.tucker.edit.partial_tucker", lambda *_: pytest.fail("decomposed again"))
    found = recall_weights(network, key, tmp_path)
    assert len(found.weights) == 2
    for ours, theirs in zip(found.weights, made.weights, strict=True):
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    larger = random(2, 3, 32, 24)
    assert torch.equal(found.network(larger), made.network(larger))


@pytest.mark.parametrize("ranks", [(12, 10), (12, 4), (5, 10), (6, 5), (1, 1)])
def test_core_norm_error_equals_the_true_one_at_every_rank(ranks):
    """The error grid never reached full rank, and took a slow norm of the difference."""
    kernel = random(12, 10, 3, 3, 3).double()
    factors = partial_tucker(kernel, ranks)
    true = float((kernel - factors.reconstruct()).norm() / kernel.norm())
    from_core = max(0.0, 1 - float(factors.core.square().sum() / kernel.square().sum())) ** 0.5
    assert factors.error == pytest.approx(true, abs=1e-7)
    assert factors.error == pytest.approx(from_core, abs=1e-7)
    assert (true < 1e-12) == (ranks == (12, 10))


def test_configurations_are_independent_objects():
    """The configuration lived in class attributes and a shared default dictionary, and was changed while used."""
    given = {"tucker_args": {"rank_factor": 0.3}, "ckpt_path": "models/total.pt", "save_model": True}
    kept = copy.deepcopy(given)
    first, second = load_config(given), load_config({"tucker_args": {"rank_factor": 0.7}})
    assert given == kept
    assert first == load_config(given)
    given["tucker_args"]["rank_factor"] = 0.9
    assert first.methods[0].settings.rank_factor == 0.3
    assert second.methods[0].settings.rank_factor == 0.7
    assert second.cache.folder is None
    assert TuckerConfig().overrides is not TuckerConfig().overrides
    for cls in (SlimConfig, TuckerConfig):
        assert cls.model_config["frozen"]


@pytest.mark.parametrize("kind", ["plain3d", "residual3d"])
def test_state_dict_keys_follow_a_stated_rule(tiny_net, tiny_shape, kind):
    """Alias attributes were deleted, so the keys no longer fitted stock networks."""
    network, shape = tiny_net(kind), tiny_shape(kind)
    slim, plan = planned_and_applied(network, TuckerConfig(rank_factor=0.5, rank_min=2, one_sided=False), shape)
    assert plan.edits
    expected = set(network.state_dict())
    index = LayerIndex(network)
    for edit in plan.edits:
        for alias in index[edit.layer].aliases:
            expected -= {f"{alias}.weight", f"{alias}.bias"}
            expected |= {f"{alias}.{piece}.weight" for piece in ("first", "core", "last")}
            if index[edit.layer].module.bias is not None:
                expected.add(f"{alias}.last.bias")
    assert set(slim.state_dict()) == expected
    again = apply_spec(SlimSpec(plan.edits), tiny_net(kind, seed=8))
    assert str(again.load_state_dict(slim.state_dict())) == "<All keys matched successfully>"
