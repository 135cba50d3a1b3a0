"""Filters removed by importance: which, how many, and with which weights in each fold."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from nnslim.compression.calibration import Calibration
from nnslim.compression.compress_network import compress
from nnslim.compression.config import from_dict
from nnslim.errors import ConfigError
from nnslim.methods.filters import FiltersConfig, fill_filters, plan_filters
from nnslim.network.cost import measure_cost
from nnslim.network.spec import spec_of
from nnslim.network.walk import LayerIndex
from nnslim.surgery.channels import channel_map
from nnslim.surgery.importance import weight_importance
from nnslim.surgery.narrow import CostTable, narrow_layers, widths_of

WIDE = (16, 24, 32)


@pytest.mark.parametrize("kind", ["plain3d", "plain2d", "residual3d", "anisotropic"])
@pytest.mark.parametrize("measure", ["l1", "fpgm", "random"])
def test_plan_meets_the_budget_closely_and_folds_keep_their_own_filters(kind, measure, tiny_net, tiny_shape):
    networks, shape = [tiny_net(kind, features=WIDE, seed=seed) for seed in (0, 1)], tiny_shape(kind)
    dense = CostTable(networks[0], shape).macs
    settings = {"method": "filters", "importance": measure, "macs": 0.4}
    slimmed = compress(networks[0], [n.state_dict() for n in networks], from_dict({"methods": [settings]}), shape)
    assert 0.3 < slimmed.slim.macs / dense <= 0.4
    assert [d.action for d in slimmed.decisions].count("narrow") > 5
    channels = channel_map(networks[0], shape)
    config = FiltersConfig(importance=measure, macs=0.4)
    for network, weights in zip(networks, slimmed.weights, strict=True):
        layers = LayerIndex(network)
        for name, group in channels.groups.items():
            width = widths_of(slimmed.network)[name][0]
            assert width >= 4
            best = weight_importance(layers, group, config.importance, config.seed).topk(width).indices.sort().values
            one = next(n for n in group.producers if layers[n].module.bias is not None)
            assert torch.equal(weights[f"{one}.bias"], layers[one].module.bias[best])
    slim = slimmed.network
    slim.load_state_dict(slimmed.weights[1])
    assert torch.isfinite(slim(torch.randn(*shape))).all()


def test_fill_equals_narrowing_by_hand(tiny_net, tiny_shape):
    network, shape = tiny_net("plain3d", features=WIDE), tiny_shape("plain3d")
    config = FiltersConfig(params=0.5, ranking="uniform")
    plan = plan_filters(network, config, measure_cost(network, shape))
    from nnslim.network.spec import extend_spec

    slim = extend_spec(plan.edits, copy.deepcopy(network))
    fill_filters(network, slim, config, shape)
    channels, layers = channel_map(network, shape), LayerIndex(network)
    shares = []
    keep = {}
    for name, group in channels.groups.items():
        width = widths_of(slim)[name][0]
        keep[name] = (
            weight_importance(layers, group, config.importance, config.seed).topk(width).indices.sort().values.tolist()
        )
        shares.append(width / group.channels)
    assert np.ptp(shares) < 0.1  # the same share of each layer, up to whole filters
    narrow_layers(layers, channels.narrowing(keep))
    x = torch.randn(*shape)
    assert torch.equal(network(x), slim(x))


def test_importance_of_a_doubled_or_small_filter_is_the_lowest(tiny_net, tiny_shape):
    network, shape = tiny_net("plain3d"), tiny_shape("plain3d")
    layers, channels = LayerIndex(network), channel_map(network, shape)
    up = "decoder.transpconvs.0"  # stored as (inputs, outputs)
    weight = layers[up].module.weight.data
    weight[:, 3] *= 0.01
    assert int(weight_importance(layers, channels.groups[up], "l1", 0).argmin()) == 3
    weight[:, 3] *= 100
    weight[:, 5] = weight.mean(1)  # near the geometric median of all
    config = FiltersConfig(macs=0.5, importance="fpgm")
    assert int(weight_importance(layers, channels.groups[up], config.importance, config.seed).argmin()) == 5


def test_budget_out_of_reach_and_both_budgets_are_refused(tiny_net, tiny_shape):
    network, shape = tiny_net("plain3d"), tiny_shape("plain3d")
    with pytest.raises(ConfigError, match=r"is the least that can be left, 0\.01 is asked"):
        plan_filters(network, FiltersConfig(macs=0.01), measure_cost(network, shape))
    for wrong in ({}, {"macs": 0.5, "params": 0.5}):
        with pytest.raises(ConfigError, match="give macs or params"):
            from_dict({"methods": [{"method": "filters", **wrong}]})


def test_filters_then_tucker_compose_in_one_spec(tiny_net, tiny_shape):
    network, shape = tiny_net("plain3d", features=WIDE), tiny_shape("plain3d")
    methods = [
        {"method": "filters", "macs": 0.6, "multiple": 4},
        {"method": "tucker", "rank_factor": 0.5, "rank_min": 2},
    ]
    slimmed = compress(network, [network.state_dict()], from_dict({"methods": methods}), shape)
    kinds = [edit.kind for edit in slimmed.spec.edits]
    assert kinds == sorted(kinds) and set(kinds) == {"narrow", "tucker"}
    first = compress(network, [network.state_dict()], from_dict({"methods": methods[:1]}), shape)
    assert slimmed.slim.macs < first.slim.macs < slimmed.dense.macs
    assert spec_of(slimmed.network) == slimmed.spec
    x = torch.randn(*shape)
    pruned, both = first.network(x), slimmed.network(x)
    full = [methods[0], methods[1] | {"rank_factor": 1.0, "only_if_cheaper": False, "one_sided": False}]
    exact = compress(network, [network.state_dict()], from_dict({"methods": full}), shape).network(x)
    torch.testing.assert_close(exact, pruned, rtol=1e-3, atol=1e-3)  # Tucker worked on the pruned weights
    assert not torch.allclose(both, pruned, atol=1e-3)


@pytest.mark.parametrize("kind", ["plain3d", "plain2d", "residual3d"])
def test_with_images_what_goes_is_folded_into_what_stays(kind, tiny_net, tiny_shape):
    dense, shape = tiny_net(kind, features=WIDE), tiny_shape(kind)
    torch.manual_seed(4)
    axes = {"size": shape[2:], "mode": "bilinear" if len(shape) == 4 else "trilinear"}
    tiles = [torch.nn.functional.interpolate(torch.randn(*shape[:2], *(4,) * len(shape[2:])), **axes) for _ in range(4)]
    data = Calibration(tiles[:3], tiles[3:], lambda count: None, fingerprint="x", images=3)
    made = {}
    for fold in (False, True):
        settings = {"method": "filters", "macs": 0.5}
        config = from_dict({"methods": [settings], "recovery": {"compensate": fold, "steps": 0}})
        made[fold] = compress(dense, [dense.state_dict()], config, shape, data=data)
    cut, folded = made[False], made[True]
    assert cut.spec == folded.spec and cut.slim == folded.slim
    with torch.no_grad():
        wanted = dense(tiles[3])
        errors = [float((one.network(tiles[3]) - wanted).square().mean()) for one in (cut, folded)]
    assert errors[1] < 0.8 * errors[0]
    kept = widths_of(folded.network)
    lost = {each.layer: each.error for each in folded.decisions if each.error is not None}
    assert lost and all(0 < error < 1 for error in lost.values())
    assert {name for name in lost if kept[name][0] < widths_of(dense)[name][0]} == set(lost)
