"""Counts against hand calculations and against the published table."""

from __future__ import annotations

import copy

import pytest
import torch
from dynamic_network_architectures.architectures.unet import PlainConvUNet
from torch import nn

from nnslim.errors import SpecError
from nnslim.methods.tucker import TuckerConfig, plan_tucker
from nnslim.network.cost import Cost, measure_cost
from nnslim.network.spec import SlimSpec, apply_spec


@pytest.mark.parametrize(
    ("layer", "shape", "macs", "parameters"),
    [
        (nn.Conv3d(4, 6, 3, padding=1), (1, 4, 5, 6, 7), 4 * 6 * 27 * 5 * 6 * 7, 4 * 6 * 27 + 6),
        (nn.Conv3d(4, 6, 3, bias=False), (1, 4, 5, 6, 7), 4 * 6 * 27 * 3 * 4 * 5, 4 * 6 * 27),
        (nn.Conv3d(4, 6, (1, 3, 3), (1, 2, 2), (0, 1, 1)), (1, 4, 5, 8, 6), 4 * 6 * 9 * 5 * 4 * 3, 4 * 6 * 9 + 6),
        (nn.Conv3d(4, 6, 3, groups=2, padding=1), (1, 4, 5, 5, 5), 2 * 6 * 27 * 125, 2 * 6 * 27 + 6),
        (nn.Conv2d(4, 6, 3, 2, 1), (2, 4, 8, 8), 2 * 4 * 6 * 9 * 16, 4 * 6 * 9 + 6),
        (nn.Conv2d(4, 6, 3, padding=2, dilation=2), (1, 4, 8, 8), 4 * 6 * 9 * 64, 4 * 6 * 9 + 6),
        (nn.Conv1d(4, 6, 5), (1, 4, 9), 4 * 6 * 5 * 5, 4 * 6 * 5 + 6),
        (nn.ConvTranspose3d(6, 4, 2, 2), (1, 6, 3, 4, 5), 6 * 4 * 8 * 3 * 4 * 5, 6 * 4 * 8 + 4),
        (nn.ConvTranspose2d(6, 4, 3, 2, 1, output_padding=1), (1, 6, 4, 4), 6 * 4 * 9 * 16, 6 * 4 * 9 + 4),
        (nn.ConvTranspose3d(6, 4, 2, 2, groups=2), (1, 6, 3, 3, 3), 6 * 2 * 8 * 27, 6 * 2 * 8 + 4),
        (nn.Linear(7, 5), (3, 7), 3 * 7 * 5, 7 * 5 + 5),
        (nn.Linear(7, 5), (2, 9, 7), 2 * 9 * 7 * 5, 7 * 5 + 5),
        (nn.ReLU(), (1, 4, 5), 0, 0),
    ],
    ids=lambda value: str(value).split("(")[0] if isinstance(value, nn.Module) else None,
)
def test_measure_cost_single_layer_equals_hand_count(layer, shape, macs, parameters):
    cost = measure_cost(nn.Sequential(layer), shape)
    assert cost.macs() == cost.macs("fvcore") == macs
    assert cost.parameters == cost.registered_parameters == parameters
    assert cost.layers["0"].input_shape == shape[1:]
    assert cost.layers["0"].output_shape == tuple(layer(torch.zeros(shape)).shape[1:])


def test_measure_cost_bare_layer_is_counted():
    cost = measure_cost(nn.Conv2d(4, 6, 3, padding=1), (1, 4, 8, 8))
    assert cost.macs() == 4 * 6 * 9 * 64
    assert cost.parameters == 4 * 6 * 9 + 6


@pytest.mark.parametrize(
    ("norm", "each"),
    [
        (nn.InstanceNorm2d(4, affine=True), 5),
        (nn.InstanceNorm2d(4), 4),
        (nn.GroupNorm(2, 4), 5),
        (nn.GroupNorm(2, 4, affine=False), 4),
        (nn.LayerNorm(8), 5),
    ],
)
def test_measure_cost_norms_count_in_fvcore_convention_only(norm, each):
    cost = measure_cost(nn.Sequential(norm), (1, 4, 8, 8))
    assert cost.macs("macs") == 0
    assert cost.macs("fvcore") == each * 4 * 8 * 8


def test_measure_cost_reused_layer_counts_macs_per_call_and_parameters_once():
    conv = nn.Conv2d(4, 4, 3, padding=1)
    cost = measure_cost(nn.Sequential(conv, nn.ReLU(), conv), (1, 4, 8, 8))
    assert cost.macs() == 2 * 4 * 4 * 9 * 64
    assert cost.parameters == cost.registered_parameters == 4 * 4 * 9 + 4


def test_measure_cost_tied_weights_count_parameters_once():
    first, second = nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3)
    second.weight = first.weight
    cost = measure_cost(nn.Sequential(first, second), (1, 4, 8, 8))
    assert cost.parameters == cost.registered_parameters == 4 * 4 * 9 + 2 * 4


@pytest.mark.parametrize("kind", ["plain3d", "plain2d", "residual3d", "anisotropic"])
def test_measure_cost_with_deep_supervision_finds_all_heads(tiny_net, tiny_shape, kind):
    cost = measure_cost(tiny_net(kind, deep_supervision=True), tiny_shape(kind))
    assert set(cost.heads) == {"decoder.seg_layers.0", "decoder.seg_layers.1"}
    assert cost.heads[0] == "decoder.seg_layers.1"  # the full resolution comes first
    assert cost.parameters == cost.registered_parameters


@pytest.mark.parametrize("kind", ["plain3d", "plain2d", "residual3d", "anisotropic"])
def test_measure_cost_unused_heads_are_registered_but_not_in_parameters(tiny_net, tiny_shape, kind):
    network = tiny_net(kind)
    cost = measure_cost(network, tiny_shape(kind))
    unused = sum(p.numel() for p in network.decoder.seg_layers[0].parameters())
    assert cost.heads == ("decoder.seg_layers.1",)
    assert "decoder.seg_layers.0" not in cost.layers
    assert cost.registered_parameters == sum(p.numel() for p in network.parameters())
    assert cost.parameters == cost.registered_parameters - unused


def test_measure_cost_does_not_modify_the_network(tiny_net, tiny_shape):
    network = tiny_net("plain3d").train()
    state = {key: value.clone() for key, value in network.state_dict().items()}
    modules = dict(network.named_modules(remove_duplicate=False))
    measure_cost(network, tiny_shape("plain3d"))
    assert dict(network.named_modules(remove_duplicate=False)) == modules
    assert all(module.training for module in modules.values())
    assert not any(module._forward_hooks for module in modules.values())
    assert {p.device.type for p in network.parameters()} == {"cpu"}
    assert all(torch.equal(value, state[key]) for key, value in network.state_dict().items())


def test_measure_cost_runs_in_order_of_execution(tiny_net, tiny_shape):
    layers = list(measure_cost(tiny_net("plain3d"), tiny_shape("plain3d")).layers)
    assert layers[0] == "encoder.stages.0.0.convs.0.conv"
    assert layers[-1] == "decoder.seg_layers.1"
    assert layers.index("decoder.transpconvs.0") < layers.index("decoder.stages.0.convs.0.conv")


def test_measure_cost_wrapped_network_equals_the_plain_one(tiny_net, tiny_shape):
    class Wrapper(nn.Module):  # as torch.compile's, without its import time
        def __init__(self, inner):
            super().__init__()
            self._orig_mod = inner

    network = tiny_net("plain3d")
    assert measure_cost(Wrapper(network), tiny_shape("plain3d")) == measure_cost(network, tiny_shape("plain3d"))


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 2, 16, 16, 16), r"cannot run on an input of shape \(1, 2, 16, 16, 16\): .*channel"),
        ((1, 1, 15, 16, 16), r"cannot run on an input of shape \(1, 1, 15, 16, 16\): .*[Ss]izes"),
        ((1, 1, 16), r"cannot run on an input of shape \(1, 1, 16\)"),
    ],
)
def test_measure_cost_input_that_does_not_fit_raises(tiny_net, shape, message):
    with pytest.raises(SpecError, match=message):
        measure_cost(tiny_net("plain3d"), shape)


# The published experiments: PlainConvUNet, kernel 3, two convolutions per stage, affine InstanceNorm, one channel.
MODELS = {
    "1.5mm": ([32, 64, 128, 256, 320, 320], 25, (1, 1, 128, 128, 128)),
    "3mm": ([32, 64, 128, 256, 320], 118, (1, 1, 112, 112, 128)),
}


@pytest.fixture(scope="module")
def reference() -> dict[str, tuple[nn.Module, Cost]]:
    made = {}
    for name, (widths, classes, shape) in MODELS.items():
        with torch.device("meta"):
            network = PlainConvUNet(
                1,
                len(widths),
                widths,
                nn.Conv3d,
                3,
                [1] + [2] * (len(widths) - 1),
                2,
                classes,
                2,
                conv_bias=True,
                norm_op=nn.InstanceNorm3d,
                norm_op_kwargs={"eps": 1e-5, "affine": True},
                nonlin=nn.LeakyReLU,
                nonlin_kwargs={"inplace": True},
            )
        made[name] = network, measure_cost(network, shape)
    return made


def published(reference, model, config):
    network, cost = reference[model]
    plan = plan_tucker(network, config, cost)
    return measure_cost(apply_spec(SlimSpec(plan.edits), copy.deepcopy(network)), MODELS[model][2])


@pytest.mark.parametrize(
    ("model", "parameters", "fvcore", "norms"),
    [("1.5mm", 31_194_809, 480.561, 1_786_060_800), ("3mm", 16_550_518, 369.144, 1_366_041_600)],
)
def test_published_table_dense_networks(reference, model, parameters, fvcore, norms):
    cost = reference[model][1]
    assert cost.parameters == parameters
    assert cost.macs("fvcore") / 1e9 == pytest.approx(fvcore, abs=1e-3)
    assert cost.macs("fvcore") - cost.macs("macs") == norms


@pytest.mark.parametrize(
    ("model", "factor", "parameters", "fvcore", "tolerance"),
    [
        ("1.5mm", 0.9, 27_924_612, 444.0, 0.05),
        ("1.5mm", 0.7, 17_358_069, 281.5, 0.05),
        ("1.5mm", 0.5, 9_244_671, 149.2, 0.05),
        ("1.5mm", 0.4, 6_183_190, 103.1, 0.05),
        ("1.5mm", 0.3, 3_698_556, 65.0, 0.05),
        ("1.5mm", 0.2, 1_854_488, 37.8, 0.05),
        ("1.5mm", 0.1, 627_772, 25.720, 1e-3),
        ("1.5mm", 0.05, 257_926, 24.005, 1e-3),
        ("3mm", 0.9, 14_875_960, 360.0, 0.05),
        ("3mm", 0.7, 9_257_833, 230.9, 0.05),
        ("3mm", 0.5, 4_921_577, 125.0, 0.05),
        ("3mm", 0.4, 3_309_639, 87.7, 0.05),
        ("3mm", 0.3, 1_981_569, 56.3, 0.05),
        ("3mm", 0.2, 1_001_213, 33.2, 0.05),
        ("3mm", 0.1, 345_401, 21.620, 1e-3),
        ("3mm", 0.05, 151_435, 19.544, 1e-3),
    ],
)
def test_published_table_factored_networks(reference, model, factor, parameters, fvcore, tolerance):
    cost = published(reference, model, TuckerConfig.published(factor))
    assert cost.parameters == parameters
    assert cost.macs("fvcore") / 1e9 == pytest.approx(fvcore, abs=tolerance)


@pytest.mark.parametrize(("factor", "millions", "fvcore"), [(0.3, 3.72, 95.3), (1 / 3, 4.49, 103.2)])
def test_published_table_shipped_default_floor_of_16(reference, factor, millions, fvcore):
    cost = published(reference, "1.5mm", TuckerConfig.published(factor, rank_min=16))
    assert cost.parameters / 1e6 == pytest.approx(millions, abs=0.01)
    assert cost.macs("fvcore") / 1e9 == pytest.approx(fvcore, abs=0.05)
