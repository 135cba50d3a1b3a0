"""The Tucker method: parity with the dense layer over all convolution attributes, ranks, choice of layers, costs."""

from __future__ import annotations

import copy
import itertools
import logging

import pydantic
import pytest
import torch
from torch import nn

from nnslim.errors import ConfigError, RankError, SpecError
from nnslim.maths.lowrank import partial_tucker
from nnslim.methods.tucker import TuckerConfig, TuckerEdit, plan_tucker
from nnslim.methods.tucker.edit import TuckerConv, kernel_of
from nnslim.network.cost import measure_cost
from nnslim.network.spec import SlimSpec, apply_spec
from nnslim.network.walk import LayerIndex

KINDS = ["plain3d", "plain2d", "residual3d", "anisotropic"]
SIZES = {2: (9, 8), 3: (7, 9, 8)}
CLASSES = {2: (nn.Conv2d, nn.ConvTranspose2d), 3: (nn.Conv3d, nn.ConvTranspose3d)}
STRIDES = {2: (1, 2, (1, 2)), 3: (1, 2, (1, 2, 2))}


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def seeded(conv):
    """Give the layer fixed random weights, float64."""
    conv = conv.double()
    for seed, parameter in enumerate(conv.parameters()):
        parameter.data.copy_(random(*parameter.shape, seed=seed) / parameter[0].numel() ** 0.5)
    return conv


def chain_of(conv, rank_out, rank_in):
    """Return the chain that replaces the layer, and the dense layer that holds the reconstructed kernel."""
    network = apply_spec(SlimSpec((TuckerEdit("0", rank_out, rank_in),)), nn.Sequential(copy.deepcopy(conv)), fill=True)
    kernel = kernel_of(conv)
    factors = partial_tucker(kernel, (rank_out or kernel.shape[0], rank_in or kernel.shape[1]))
    twin = copy.deepcopy(conv)
    kernel_of(twin).data.copy_(factors.reconstruct())
    return network[0], twin


def check_parity(conv, dims):
    conv = seeded(conv)
    x = random(2, conv.in_channels, *SIZES[dims], seed=9)
    dense = conv(x)
    full, _ = chain_of(conv, conv.out_channels, conv.in_channels)
    torch.testing.assert_close(full(x), dense, rtol=0, atol=1e-10)
    single = full.float()(x.float())
    assert (single - dense).abs().max() <= 1e-4 * (dense.max() - dense.min())
    low, twin = chain_of(conv, 3, 2)
    torch.testing.assert_close(low(x), twin(x), rtol=0, atol=1e-10)
    assert not torch.allclose(low(x), dense, atol=1e-2)
    assert low.core.weight.shape[2:] == conv.weight.shape[2:]


@pytest.mark.parametrize(
    ("dims", "stride", "bias", "padding_mode", "dilation"),
    [
        (dims, stride, bias, mode, dilation)
        for dims in (2, 3)
        for stride, bias, mode, dilation in itertools.product(
            STRIDES[dims], (True, False), ("zeros", "reflect", "replicate", "circular"), (1, 2)
        )
    ],
)
def test_tucker_conv_equals_dense(dims, stride, bias, padding_mode, dilation):
    settings = {"stride": stride, "padding": dilation, "dilation": dilation, "padding_mode": padding_mode}
    check_parity(CLASSES[dims][0](4, 6, 3, bias=bias, **settings), dims)


@pytest.mark.parametrize(
    ("dims", "stride", "bias", "dilation", "output_padding"),
    [
        (dims, stride, bias, dilation, output_padding)
        for dims in (2, 3)
        for stride, bias, dilation, output_padding in itertools.product(STRIDES[dims], (True, False), (1, 2), (0, 1))
        if not output_padding or stride == 2 or dilation == 2  # torch wants it below stride or dilation
    ],
)
def test_tucker_transposed_conv_equals_dense(dims, stride, bias, dilation, output_padding):
    settings = {"stride": stride, "padding": 1, "dilation": dilation, "output_padding": output_padding}
    check_parity(CLASSES[dims][1](4, 6, 3, bias=bias, **settings), dims)


@pytest.mark.parametrize(
    ("conv", "dims"),
    [
        (nn.Conv3d(4, 6, (1, 3, 3), (1, 2, 2), (0, 1, 1)), 3),
        (nn.Conv3d(4, 6, (3, 1, 5), padding=(2, 0, 1)), 3),
        (nn.Conv3d(4, 6, (3, 3, 1), padding="same"), 3),
        (nn.Conv2d(4, 6, (3, 5), padding="same", padding_mode="reflect"), 2),
        (nn.Conv2d(4, 6, 3, padding="valid"), 2),
        (nn.Conv2d(4, 6, 1, 2), 2),
        (nn.ConvTranspose3d(4, 6, (1, 2, 2), (1, 2, 2)), 3),
        (nn.ConvTranspose3d(4, 6, 4, (2, 2, 1), (1, 0, 2), (1, 0, 0)), 3),
        (nn.ConvTranspose2d(4, 6, 2, 2, bias=False), 2),
    ],
    ids=repr,
)
def test_tucker_uneven_settings_equal_dense(conv, dims):
    check_parity(conv, dims)


@pytest.mark.parametrize("made", [nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d, nn.ConvTranspose3d])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("rank_out", "rank_in"), [(3, None), (None, 2), (6, None), (None, 4)])
def test_tucker_one_sided_equals_dense_with_reconstructed_kernel(made, bias, rank_out, rank_in):
    conv = seeded(made(4, 6, 3, 2, 1, bias=bias))
    x = random(2, 4, *SIZES[conv.weight.ndim - 2], seed=5)
    chain, twin = chain_of(conv, rank_out, rank_in)
    assert (chain.first is None, chain.last is None) == (rank_in is None, rank_out is None)
    torch.testing.assert_close(chain(x), twin(x), rtol=0, atol=1e-10)
    last = chain.core if chain.last is None else chain.last
    assert (last.bias is not None) == bias
    assert sum(name.endswith("bias") for name, _ in chain.named_parameters()) == bias


def test_tucker_conv_structure_is_first_core_last():
    chain = TuckerConv(nn.Conv3d(4, 6, 3, 2, 1), 3, 2)
    assert [(name, tuple(part.weight.shape)) for name, part in chain.named_children()] == [
        ("first", (2, 4, 1, 1, 1)),
        ("core", (3, 2, 3, 3, 3)),
        ("last", (6, 3, 1, 1, 1)),
    ]
    assert (chain.first.stride, chain.core.stride, chain.last.stride) == ((1, 1, 1), (2, 2, 2), (1, 1, 1))


@pytest.mark.parametrize(
    ("layer", "ranks", "message"),
    [
        (nn.Conv3d(4, 6, 3, groups=2), (2, 2), "grouped convolutions stay dense, found groups=2"),
        (nn.Conv1d(4, 6, 3), (2, 2), "expected a 2D or 3D convolution, found Conv1d"),
        (nn.Conv2d(4, 6, 3), (7, 2), r"output rank 7 is outside 1\.\.6"),
        (nn.ConvTranspose2d(4, 6, 3), (2, 5), r"input rank 5 is outside 1\.\.4"),
        (nn.Conv2d(4, 6, 3), (None, None), "at least one rank"),
    ],
)
def test_tucker_conv_unusable_request_raises(layer, ranks, message):
    with pytest.raises(SpecError, match=message):
        TuckerConv(layer, *ranks)


@pytest.mark.parametrize(
    ("settings", "channels", "rank"),
    [
        ({}, 320, 107),  # ceil(320 / 3)
        ({}, 32, 16),  # floor of 16
        ({}, 8, 8),  # never above the channels
        ({"rank_min": None}, 32, 11),
        ({"rank_min": None, "rank_factor": 0.1}, 30, 3),  # not 4, as binary floats would have it
        ({"rank_min": None, "rank_factor": 0.01}, 5, 1),
        ({"rank_min": None, "rank_factor": 1.0}, 7, 7),
        ({"rank_factor": 0.4, "rank_min": 8}, 32, 13),
        ({"rank_factor": 0.4, "rank_min": 8}, 256, 103),
        ({"rank_factor": 0.5, "rank_min": 8}, 64, 32),
        ({"rank_mode": "fixed", "rank_min": 24}, 320, 24),
        ({"rank_mode": "fixed", "rank_min": 24}, 8, 8),
        ({"rank_factor": 0.4, "rank_min": 8, "rank_multiple": 8}, 32, 16),  # 13 -> 16
        ({"rank_factor": 0.3, "rank_min": 8, "rank_multiple": 8}, 64, 24),  # 20 -> 24
        ({"rank_factor": 0.3, "rank_min": 8, "rank_multiple": 8}, 32, 8),  # 10 -> 8
        ({"rank_factor": 0.1, "rank_min": None, "rank_multiple": 16}, 320, 32),
        ({"rank_factor": 0.1, "rank_min": None, "rank_multiple": 16}, 32, 16),  # at least one multiple
        ({"rank_factor": 0.5, "rank_min": None, "rank_multiple": 16}, 1, 1),
        ({"rank_mode": "fixed", "rank_min": 20, "rank_multiple": 8}, 64, 24),
    ],
)
def test_config_rank_follows_the_rule(settings, channels, rank):
    assert TuckerConfig(**settings).rank(channels) == rank


@pytest.mark.parametrize("factor", [0.9, 0.7, 0.5, 1 / 3, 0.3, 0.1, 0.05])
def test_config_rank_stays_within_channels_and_grows_with_them(factor):
    config = TuckerConfig(rank_factor=factor, rank_min=8, rank_multiple=8)
    ranks = [config.rank(channels) for channels in range(1, 400)]
    assert all(1 <= rank <= channels for channels, rank in enumerate(ranks, start=1))
    assert ranks == sorted(ranks)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank_factor": 0}, "greater than 0"),
        ({"rank_factor": 1.01}, "less than or equal to 1"),
        ({"rank_min": 0}, "greater than or equal to 1"),
        ({"rank_multiple": 0}, "greater than or equal to 1"),
        ({"rank_mode": "vmbf"}, "'relative', 'fixed'"),
        ({"rank_mode": "fixed", "rank_min": None}, "rank_mode 'fixed' needs rank_min"),
        ({"overrides": {"*": 0.0}}, "overrides"),
        ({"overrides": {"*": 1.5}}, "overrides"),
        ({"overrides": {"*": (1, 2, 3)}}, "overrides"),
        ({"rank_facto": 0.5}, "rank_facto"),
    ],
)
def test_config_unusable_value_raises(settings, message):
    with pytest.raises(pydantic.ValidationError, match=message):
        TuckerConfig(**settings)


def planned(network, shape, **settings):
    plan = plan_tucker(network, TuckerConfig(**settings), measure_cost(network, shape))
    return plan, {decision.layer: decision for decision in plan.decisions}


EVERYTHING = {
    "transposed": True,
    "first_layer": True,
    "pointwise": True,
    "heads": True,
    "only_if_cheaper": False,
    "one_sided": False,
}
ENCODER_CONV = "encoder.stages.1.0.convs.0.conv"


@pytest.mark.parametrize("kind", KINDS)
def test_plan_decides_every_convolution_once(tiny_net, tiny_shape, kind):
    network = tiny_net(kind)
    plan, decisions = planned(network, tiny_shape(kind), rank_factor=0.5, rank_min=2)
    convs = LayerIndex(network).of_type(nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d, nn.ConvTranspose3d)
    assert [decision.layer for decision in plan.decisions] == [layer.name for layer in convs]
    assert {edit.layer for edit in plan.edits} == {n for n, d in decisions.items() if d.action == "tucker"}
    assert len(plan.edits) >= 3
    assert all(bool(decision.reason) == (decision.action == "dense") for decision in plan.decisions)


@pytest.mark.parametrize("kind", KINDS)
def test_plan_default_keeps_first_layer_pointwise_and_heads_dense(tiny_net, tiny_shape, kind):
    network = tiny_net(kind)
    _, decisions = planned(network, tiny_shape(kind), rank_factor=0.5, rank_min=2)
    first = "encoder.stem.convs.0.conv" if kind == "residual3d" else "encoder.stages.0.0.convs.0.conv"
    assert decisions[first].reason == "first layer"
    assert decisions["decoder.seg_layers.1"].reason == "segmentation head"
    assert decisions["decoder.seg_layers.0"].reason == "not reached by the forward pass"
    for name, decision in decisions.items():
        if decision.reason == "1x1 kernel":
            assert ".skip." in name
            assert set(decision.shape[2:]) == {1}
    assert any(d.reason == "1x1 kernel" for d in decisions.values()) == (kind == "residual3d")
    for decision in decisions.values():
        if decision.action == "dense":
            assert decision.ranks is None
            assert decision.macs_after == decision.macs_before
            assert decision.parameters_after == decision.parameters_before


def test_plan_deep_supervision_keeps_all_heads(tiny_net, tiny_shape):
    _, decisions = planned(tiny_net("plain3d", deep_supervision=True), tiny_shape("plain3d"))
    assert decisions["decoder.seg_layers.0"].reason == "segmentation head"
    assert decisions["decoder.seg_layers.1"].reason == "segmentation head"


def test_plan_switches_let_first_layer_pointwise_and_heads_in(tiny_net, tiny_shape):
    _, decisions = planned(
        tiny_net("residual3d", deep_supervision=True), tiny_shape("residual3d"), rank_min=2, **EVERYTHING
    )
    assert {decision.action for decision in decisions.values()} == {"tucker"}
    assert decisions["encoder.stem.convs.0.conv"].ranks == (2, 1)


def test_plan_grouped_convolution_stays_dense_with_reason():
    network = nn.Sequential(nn.Conv3d(4, 8, 3, padding=1), nn.Conv3d(8, 8, 3, padding=1, groups=2))
    plan, decisions = planned(network, (1, 4, 8, 8, 8), rank_min=2, **EVERYTHING)
    assert decisions["1"].reason == "grouped convolution (groups=2)"
    assert [edit.layer for edit in plan.edits] == ["0"]


def test_plan_chain_that_saves_nothing_stays_dense_with_reason(tiny_net, tiny_shape):
    _, decisions = planned(tiny_net("plain3d"), tiny_shape("plain3d"), rank_factor=0.95, rank_min=None)
    # 8 channels on both sides: rank 8 is full; 6 -> 8 with ranks (8, 6) likewise.
    assert decisions[ENCODER_CONV].reason == "full rank"
    network = nn.Sequential(nn.Conv2d(16, 16, 1), nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1))
    _, decisions = planned(network, (1, 16, 8, 8), overrides={"1": (15, 15)})
    chain, dense = (16 * 15 * 2 + 15 * 15 * 9) * 64, 16 * 16 * 9 * 64
    assert chain > dense
    assert decisions["1"].reason == f"would not get cheaper ({chain:,} MACs against {dense:,})"
    _, decisions = planned(network, (1, 16, 8, 8), overrides={"1": (15, 15)}, only_if_cheaper=False)
    assert decisions["1"].macs_after == chain


def test_plan_reused_layer_counts_all_of_its_calls():
    conv = nn.Conv2d(16, 16, 3, padding=1)
    network = nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), conv, nn.ReLU(), conv, nn.ReLU())
    plan, decisions = planned(network, (1, 1, 8, 8), rank_factor=0.5, rank_min=2)
    slim = measure_cost(apply_spec(SlimSpec(plan.edits), network), (1, 1, 8, 8))
    assert decisions["1"].macs_before == 2 * 16 * 16 * 9 * 64
    assert sum(decision.macs_after for decision in decisions.values()) == slim.macs()


def test_plan_one_sided_leaves_out_the_factor_of_full_rank():
    network = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 16, 3, padding=1), nn.ReLU())
    plan, decisions = planned(network, (1, 1, 8, 8), rank_factor=0.25, rank_min=4)
    assert plan.edits == (TuckerEdit("1", 4, None),)
    assert decisions["1"].ranks == (4, 4)
    plan, _ = planned(network, (1, 1, 8, 8), rank_factor=0.25, rank_min=4, one_sided=False)
    assert plan.edits == (TuckerEdit("1", 4, 4),)


def test_plan_include_and_exclude_patterns_choose_by_any_name(tiny_net, tiny_shape):
    settings = {"rank_factor": 0.5, "rank_min": 2, "only_if_cheaper": False}
    plan, decisions = planned(tiny_net("plain3d"), tiny_shape("plain3d"), include=("encoder.stages.1.*",), **settings)
    assert {edit.layer for edit in plan.edits} == {ENCODER_CONV, "encoder.stages.1.0.convs.1.conv"}
    assert decisions["decoder.transpconvs.0"].reason == "not included"
    plan, decisions = planned(
        tiny_net("plain3d"), tiny_shape("plain3d"), exclude=("decoder.encoder.*all_modules.0", "*transp*"), **settings
    )
    assert {edit.layer for edit in plan.edits} == {"decoder.stages.0.convs.0.conv", "decoder.stages.1.convs.0.conv"}
    assert decisions[ENCODER_CONV].reason == decisions["decoder.transpconvs.0"].reason == "excluded"


@pytest.mark.parametrize("key", ["include", "exclude", "overrides"])
def test_plan_pattern_without_match_raises_with_the_nearest(tiny_net, tiny_shape, key):
    patterns = {"decoder.transpconv.0": 0.5} if key == "overrides" else ("decoder.transpconv.0",)
    message = rf"no convolution matches {key} pattern 'decoder\.transpconv\.0'; nearest: decoder\.transpconvs\.0"
    with pytest.raises(ConfigError, match=message):
        planned(tiny_net("plain3d"), tiny_shape("plain3d"), **{key: patterns})


def test_plan_overrides_set_ranks_or_a_factor(tiny_net, tiny_shape):
    overrides = {ENCODER_CONV: (5, 3), "encoder.stages.2.*": 0.25}
    _, decisions = planned(
        tiny_net("plain3d"),
        tiny_shape("plain3d"),
        rank_factor=0.5,
        rank_min=None,
        overrides=overrides,
        only_if_cheaper=False,
    )
    assert decisions[ENCODER_CONV].ranks == (5, 3)
    assert decisions["encoder.stages.2.0.convs.0.conv"].ranks == (3, 2)
    assert decisions["encoder.stages.1.0.convs.1.conv"].ranks == (4, 4)


def test_plan_override_beyond_the_channels_raises(tiny_net, tiny_shape):
    message = rf"override '{ENCODER_CONV}' asks for input rank 7 at '{ENCODER_CONV}', which has 6 input channels"
    with pytest.raises(RankError, match=message):
        planned(tiny_net("plain3d"), tiny_shape("plain3d"), overrides={ENCODER_CONV: (4, 7)})


@pytest.mark.parametrize(
    "settings",
    [
        {"rank_factor": 0.5, "rank_min": 2},
        {"rank_mode": "fixed", "rank_min": 3},
        {"rank_factor": 0.3, "rank_min": None, **EVERYTHING},
        {"rank_factor": 0.4, "rank_min": 6, "only_if_cheaper": False},
    ],
    ids=["guarded", "fixed", "everything", "one_sided"],
)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("deep_supervision", [False, True])
def test_plan_costs_equal_those_of_the_resulting_network(tiny_net, tiny_shape, kind, deep_supervision, settings):
    network, shape = tiny_net(kind, deep_supervision), tiny_shape(kind)
    dense = measure_cost(network, shape)
    plan, decisions = planned(network, shape, **settings)
    slim_network = apply_spec(SlimSpec(plan.edits), copy.deepcopy(network))
    slim, index, old = measure_cost(slim_network, shape), LayerIndex(slim_network), LayerIndex(network)
    for name, decision in decisions.items():
        pieces = [layer for key, layer in slim.layers.items() if key == name or key.startswith(f"{name}.")]
        assert sum(layer.macs for layer in pieces) == decision.macs_after, name
        assert sum(p.numel() for p in index[name].module.parameters()) == decision.parameters_after, name
        assert sum(p.numel() for p in old[name].module.parameters()) == decision.parameters_before, name
        assert (dense.layers[name].macs if name in dense.layers else 0) == decision.macs_before
    assert sum(d.macs_before for d in plan.decisions) == dense.macs()
    assert sum(d.macs_after for d in plan.decisions) == slim.macs()
    saved = sum(d.parameters_before - d.parameters_after for d in plan.decisions)
    assert slim.registered_parameters == dense.registered_parameters - saved
    assert slim.macs("fvcore") - slim.macs() == dense.macs("fvcore") - dense.macs()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("deep_supervision", [False, True])
def test_slim_network_forward_is_finite_and_of_the_dense_shape(tiny_net, tiny_shape, kind, deep_supervision):
    network, shape = tiny_net(kind, deep_supervision), tiny_shape(kind)
    x = random(*shape, seed=3).float()
    plan, _ = planned(network, shape, rank_factor=0.4, rank_min=2)
    slim = apply_spec(SlimSpec(plan.edits), copy.deepcopy(network), fill=True)
    with torch.no_grad():
        dense_out, slim_out = network(x), slim(x)
    if not deep_supervision:
        dense_out, slim_out = [dense_out], [slim_out]
    assert len(slim_out) == len(dense_out) == (2 if deep_supervision else 1)
    for ours, theirs in zip(slim_out, dense_out, strict=True):
        assert ours.shape == theirs.shape
        assert torch.isfinite(ours).all()
        assert not torch.equal(ours, theirs)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("deep_supervision", [False, True])
def test_slim_network_full_rank_logits_equal_dense(tiny_net, tiny_shape, kind, deep_supervision):
    network, shape = tiny_net(kind, deep_supervision, classes=4), tiny_shape(kind)
    x = random(*shape, seed=4).float()
    plan, decisions = planned(network, shape, rank_factor=1, **EVERYTHING)
    dense = [name for name, decision in decisions.items() if decision.action == "dense"]
    assert dense == ([] if deep_supervision else ["decoder.seg_layers.0"])
    slim = apply_spec(SlimSpec(plan.edits), copy.deepcopy(network), fill=True)
    with torch.no_grad():
        torch.testing.assert_close(slim(x), network(x), rtol=0, atol=1e-4)


def test_plan_leaves_the_network_untouched(tiny_net, tiny_shape):
    network = tiny_net("residual3d")
    state = {key: value.clone() for key, value in network.state_dict().items()}
    modules = dict(network.named_modules(remove_duplicate=False))
    planned(network, tiny_shape("residual3d"), rank_factor=0.5, rank_min=2, **EVERYTHING)
    assert dict(network.named_modules(remove_duplicate=False)) == modules
    assert network.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[key]) for key, value in network.state_dict().items())


def test_plan_ranks_follow_from_shapes_not_from_weights(tiny_net, tiny_shape):
    plans = [planned(tiny_net("plain3d", seed=seed), tiny_shape("plain3d"), rank_min=2)[0] for seed in (0, 1)]
    assert plans[0] == plans[1]


def test_plan_without_decompose_gives_the_structure_with_random_weights(tiny_net, tiny_shape, monkeypatch):
    from nnslim.methods.tucker import edit

    monkeypatch.setattr(edit, "partial_tucker", lambda *_: pytest.fail("decomposed"))
    network, shape = tiny_net("plain3d"), tiny_shape("plain3d")
    random_plan, decisions = planned(network, shape, rank_min=2, decompose=False)
    plan, same = planned(network, shape, rank_min=2)
    assert decisions == same
    assert [(e.layer, e.rank_out, e.rank_in) for e in random_plan.edits] == [
        (e.layer, e.rank_out, e.rank_in) for e in plan.edits
    ]
    slim = apply_spec(SlimSpec(random_plan.edits), copy.deepcopy(network), fill=True)
    assert torch.isfinite(slim(torch.ones(shape))).all()


def test_plan_verbose_logs_one_line_per_layer(tiny_net, tiny_shape, caplog):
    with caplog.at_level(logging.INFO, "nnslim"):
        plan, _ = planned(tiny_net("plain3d"), tiny_shape("plain3d"), rank_min=2, verbose=True)
    assert [record.getMessage().split()[0] for record in caplog.records] == [d.layer for d in plan.decisions]
    assert "first layer" in caplog.records[0].getMessage()
