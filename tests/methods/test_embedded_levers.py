"""The levers for embedded boards on small networks: structure, weights, zeros, and what each plan says."""

from __future__ import annotations

import copy
import itertools
import math

import numpy as np
import pytest
import torch
from torch import nn

from nnslim.compression.compress_network import compress, rebuild
from nnslim.compression.config import from_dict, load_config
from nnslim.errors import ConfigError, SpecError
from nnslim.methods.embedded import DepthwiseEdit, DropStageEdit, EmbeddedConfig, SparseEdit, cubic_sparsity
from nnslim.methods.embedded.depthwise import SeparableConv, regrouped
from nnslim.methods.embedded.plan import coarser_settings
from nnslim.methods.embedded.unstructured import prune_globally, zero_share
from nnslim.network.spec import SlimSpec, apply_spec, extend_spec, held_by
from nnslim.network.walk import LayerIndex

KINDS = ["plain3d", "plain2d", "residual3d", "anisotropic"]


def slimmed(network, shape, *methods, **levers):
    listed = [{"method": "embedded", **levers}] if levers else []
    return compress(network, [network.state_dict()], from_dict({"methods": [*listed, *methods]}), shape)


@pytest.mark.parametrize("kind", KINDS)
def test_dropped_stage_leaves_every_other_weight_as_it_was(kind, tiny_net, tiny_shape):
    network, shape = tiny_net(kind), tiny_shape(kind)
    made = slimmed(network, shape, drop_stages=1)
    assert made.spec.edits == (DropStageEdit(1),)
    kept = [one.reason for one in made.decisions if one.action == "dense"]
    assert kept and set(kept) == {"as it was"}  # a report counted 14 layers for no reason: "kept dense 14 (: 14)"
    weights, before = made.network.state_dict(), network.state_dict()
    for name, value in weights.items():
        parts = name.split(".")
        if parts[0] == "decoder" and parts[1] in ("stages", "transpconvs", "seg_layers"):
            parts[2] = str(int(parts[2]) + 1)
        assert torch.equal(value, before[".".join(parts)]), name
    assert made.slim.macs < made.dense.macs and made.slim.parameters < made.dense.parameters
    assert made.network(torch.randn(shape)).shape == network(torch.randn(shape)).shape
    again = rebuild(network, made.spec, made.weights[0])
    image = torch.randn(shape)
    assert torch.equal(again(image), made.network(image))
    dropped = [one for one in made.decisions if one.action == "dropped"]
    assert dropped and sum(one.parameters_before for one in dropped) > 0
    assert sum(d.macs_after for d in made.decisions) == made.slim.macs


def test_dropping_too_many_stages_or_of_another_network_is_refused_and_nothing_changes(tiny_net):
    network = tiny_net("plain2d")
    keys = list(network.state_dict())
    with pytest.raises(SpecError, match="at least one goes and two stay"):
        apply_spec(SlimSpec((DropStageEdit(2),)), network)
    with pytest.raises(SpecError, match="no layer named 'x'"):
        apply_spec(SlimSpec((DropStageEdit(1), DepthwiseEdit("x"))), network)
    assert list(network.state_dict()) == keys  # the first edit was taken back
    assert network(torch.randn(1, 1, 16, 16)).shape == (1, 3, 16, 16)
    with pytest.raises(SpecError, match=r"has no encoder\.stages"):
        apply_spec(SlimSpec((DropStageEdit(1),)), nn.Conv2d(1, 1, 1))
    with pytest.raises(SpecError, match="cannot be dropped from an architecture of"):
        DropStageEdit(1).arguments({"embed_dim": 3})


@pytest.mark.parametrize("axes", [2, 3])
@pytest.mark.parametrize(("stride", "bias", "mode"), [(1, True, "zeros"), (2, False, "zeros"), (1, True, "reflect")])
def test_separable_form_of_a_separable_kernel_is_exact_and_else_the_nearest(axes, stride, bias, mode):
    torch.manual_seed(axes)
    kind = {2: nn.Conv2d, 3: nn.Conv3d}[axes]
    dense = kind(6, 10, 3, stride, 1, bias=bias, padding_mode=mode)
    made = SeparableConv(dense)
    made.fill(dense)
    twin = copy.deepcopy(dense)
    twin.weight.data = torch.einsum("oi...,i...->oi...", made.point.weight.data, made.depth.weight.data[:, 0])
    image = torch.randn(2, 6, *[8] * axes)
    torch.testing.assert_close(made(image), twin(image), rtol=1e-4, atol=1e-5)
    again = SeparableConv(twin)
    again.fill(twin)
    torch.testing.assert_close(again(image), twin(image), rtol=1e-4, atol=1e-5)
    # Eckart-Young: no other separable kernel is nearer
    error = (dense.weight - twin.weight).norm()
    for _ in range(5):
        other = twin.weight + 0.01 * torch.einsum("oi,i...->oi...", torch.randn(10, 6), made.depth.weight.data[:, 0])
        assert (dense.weight - other).norm() > error


@pytest.mark.parametrize(("inputs", "outputs", "groups"), [(8, 8, 8), (8, 12, 4), (6, 12, 6)])
def test_grouped_form_keeps_the_weights_inside_groups_and_goes_back_exactly(inputs, outputs, groups):
    dense = nn.Conv2d(inputs, outputs, 3, padding=1)
    grouped = regrouped(dense, groups)
    back = regrouped(grouped, 1)
    image = torch.randn(1, inputs, 8, 8)
    torch.testing.assert_close(back(image), grouped(image), rtol=1e-5, atol=1e-6)
    assert torch.equal(back.weight[back.weight != 0], dense.weight[back.weight != 0])
    assert grouped.weight.numel() * groups == dense.weight.numel()


@pytest.mark.parametrize("form", ["separable", "grouped"])
def test_depthwise_network_has_fewer_macs_and_says_what_stays_dense(form, tiny_net, tiny_shape):
    network, shape = tiny_net("plain2d", features=(8, 16, 16)), tiny_shape("plain2d")
    made = slimmed(network, shape, depthwise=form, exclude=["decoder.stages.*"])
    reasons = {one.layer: one.reason for one in made.decisions}
    assert reasons["encoder.stages.0.0.convs.0.conv"] == "first layer"
    assert reasons["decoder.stages.0.convs.0.conv"] == "excluded"
    assert {one.action for one in made.decisions} == {"dense", "depthwise"}
    assert sum(one.macs_after for one in made.decisions) == made.slim.macs < 0.8 * made.dense.macs
    image = torch.randn(shape)
    assert torch.equal(rebuild(network, made.spec, made.weights[0])(image), made.network(image))
    if form == "grouped":
        dense = extend_spec(
            (DepthwiseEdit("encoder.stages.1.0.convs.0.conv", "dense"),), copy.deepcopy(made.network), fill=True
        )
        torch.testing.assert_close(dense(image), made.network(image), rtol=1e-4, atol=1e-5)


def test_depthwise_layer_that_cannot_change_is_refused_and_unknown_patterns_are_named(tiny_net, tiny_shape):
    network, shape = tiny_net("plain2d"), tiny_shape("plain2d")
    with pytest.raises(SpecError, match="cannot become dense: it is Conv2d, groups=1"):
        apply_spec(SlimSpec((DepthwiseEdit("encoder.stages.0.0.convs.0.conv", "dense"),)), network)
    with pytest.raises(ConfigError, match="no layer matches include pattern 'encodr"):
        slimmed(network, shape, depthwise="separable", include=["encodr.*"])


def test_cubic_schedule_is_monotone_with_exact_ends():
    values = [cubic_sparsity(t, 0.05, 0.5) for t in np.linspace(0, 1, 101)]
    assert (values[0], values[50], values[100]) == (0.05, 0.44375, 0.5)
    assert all(first < second for first, second in itertools.pairwise(values))
    assert cubic_sparsity(-1, 0.05, 0.5) == 0.05 and cubic_sparsity(2, 0.05, 0.5) == 0.5
    edit = SparseEdit([], 0.5, 0.05, begin=1 / 15, end=10 / 15)  # published: epochs 1 to 10 of 15
    assert edit.at(0) == edit.at(1 / 15) == 0.05
    assert edit.at(5.5 / 15) == pytest.approx(0.44375) and edit.at(10 / 15) == edit.at(1) == 0.5


@pytest.mark.parametrize("kind", KINDS)
def test_half_of_the_reached_weights_are_zero_within_one_element(kind, tiny_net, tiny_shape):
    network, shape = tiny_net(kind), tiny_shape(kind)
    made = slimmed(network, shape, sparsity=0.5)
    (edit,) = made.spec.edits
    modules = edit.modules(LayerIndex(made.network))
    total = sum(module.weight.numel() for module in modules)
    assert abs(zero_share(modules) * total - total / 2) <= 1
    smallest_kept = min(float(m.weight[m.weight != 0].detach().abs().min()) for m in modules)
    old = LayerIndex(network)
    gone = torch.cat(
        [old[name].module.weight[m.weight == 0].abs() for name, m in zip(edit.layers, modules, strict=True)]
    )
    assert float(gone.max()) <= smallest_kept
    assert torch.isfinite(made.network(torch.randn(shape))).all()
    assert made.slim == made.dense  # zeros are no saving
    assert {one.reason for one in made.decisions if one.action == "sparse"} == {"dense kernels: zeros save no time"}
    assert "decoder.seg_layers.0" not in edit.layers  # a head of deep supervision: not reached in use


def test_pruning_leaves_out_dead_layers_and_says_so(tiny_net, tiny_shape, caplog):
    """The published list of 98 weights was hand-written, and 76 % of what it covered never ran."""
    network, shape = tiny_net("plain2d"), tiny_shape("plain2d")
    network.spare = nn.Conv2d(64, 64, 3)
    made = slimmed(network, shape, sparsity=0.5, strip=False)
    assert "spare" not in made.spec.edits[0].layers
    assert "1 layer(s) that the output does not depend on: ['spare']" in caplog.text
    stripped = slimmed(network, shape, sparsity=0.5)
    assert [edit.kind for edit in stripped.spec.edits] == ["strip", "sparse"]
    assert not any(name.startswith("spare") for name in stripped.weights[0])


def test_sparse_edit_takes_its_zeros_back(tiny_net):
    network = tiny_net("plain2d")
    before = copy.deepcopy(network.state_dict())
    name = "encoder.stages.0.0.convs.0.conv"
    with pytest.raises(SpecError, match="no layer named 'x'"):
        apply_spec(SlimSpec((SparseEdit([name], 0.5, 0.5), DepthwiseEdit("x"))), network, fill=True)
    assert all(torch.equal(before[key], value) for key, value in network.state_dict().items())


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
def test_zeros_stay_zero_while_a_network_learns_and_grow_on_the_curve(optimizer, tiny_net, tiny_shape):
    network, shape = tiny_net("plain2d"), tiny_shape("plain2d")
    made = slimmed(network, shape, sparsity=0.5, start_sparsity=0.05, begin=0.0, end=0.5)
    student = made.network.train()
    (held,) = held_by(student)
    assert held.share == pytest.approx(0.05, abs=0.01)
    options = {"momentum": 0.9} if optimizer is torch.optim.SGD else {}
    learner = optimizer(student.parameters(), 0.05, **options)
    shares = []
    for step in range(8):
        held.advance(step / 8)
        student(torch.randn(shape)).square().mean().backward()
        zero = [(~mask).clone() for mask in held.masks]
        learner.step()
        held.hold()
        assert all(not module.weight[gone].any() for module, gone in zip(held.modules, zero, strict=True))
        shares.append(held.share)
    assert shares == sorted(shares) and shares[-1] == pytest.approx(0.5, abs=0.005)
    held.advance(0.0)  # never gives back
    assert held.share == shares[-1]
    assert any(module.weight[mask].any() for module, mask in zip(held.modules, held.masks, strict=True))


def test_pruning_keeps_the_parameters_that_an_optimiser_holds():
    layers = [nn.Linear(8, 8), nn.Conv2d(3, 3, 3)]
    before = [id(layer.weight) for layer in layers]
    prune_globally(layers, 0.5)
    assert [id(layer.weight) for layer in layers] == before
    assert sorted(layers[0].state_dict()) == ["bias", "weight"]
    assert zero_share(layers) == pytest.approx(0.5, abs=0.01)


def test_levers_compose_with_each_other_and_with_filters(tiny_net, tiny_shape):
    network, shape = tiny_net("plain2d", features=(16, 24, 32)), tiny_shape("plain2d")
    filters = {"method": "filters", "macs": 0.6}
    all_levers = {"drop_stages": 1, "depthwise": "separable", "sparsity": 0.3}
    first = slimmed(network, shape, filters, drop_stages=1)
    assert first.spec.edits[0] == DropStageEdit(1) and {e.kind for e in first.spec.edits[1:]} == {"narrow"}
    made = slimmed(network, shape, **all_levers)
    kinds = list(dict.fromkeys(edit.kind for edit in made.spec.edits))
    assert kinds == ["drop_stage", "depthwise", "sparse"]
    assert SlimSpec.from_dict(made.spec.to_dict()) == made.spec
    image = torch.randn(shape)
    assert torch.equal(rebuild(network, made.spec, made.weights[0])(image), made.network(image))


def test_no_lever_and_impossible_settings_are_refused(tiny_net, tiny_shape):
    network, shape = tiny_net("plain2d"), tiny_shape("plain2d")
    with pytest.raises(ConfigError, match="no lever is named"):
        slimmed(network, shape, strip=False)
    for wrong, text in (
        ({"sparsity": 0.3, "start_sparsity": 0.5}, "start_sparsity is at most sparsity"),
        ({"sparsity": 0.3, "begin": 0.9, "end": 0.5}, "begin is before end"),
        ({"coarser": 0}, "between 0.25 and 8"),
    ):
        with pytest.raises(ConfigError, match=text):
            from_dict({"methods": [{"method": "embedded", **wrong}]})


@pytest.mark.parametrize(
    ("patch", "factors", "multiple", "expected"),
    [
        ([56, 40], (1.5, 1.5), (8, 8), [40, 32]),
        ([56, 40], (2.0, 1.0), (8, 8), [32, 40]),
        ([16, 16], (4.0, 4.0), (8, 8), [16, 8]),  # one voxel left would have no variance
        ([20, 256, 224], (1.0, 2.0, 2.0), (4, 32, 32), [20, 128, 128]),
    ],
)
def test_coarser_patch_covers_as_much_and_divides_by_the_strides(patch, factors, multiple, expected):
    axes = len(patch)
    settings = {"patch_size": patch, "spacing": [3.0] * (axes - 1) + [1.0], "median_image_size_in_voxels": patch}
    settings |= {"architecture": {"arch_kwargs": {"strides": [1, multiple]}}, "data_identifier": "there"}
    made = coarser_settings(settings, EmbeddedConfig(coarser=factors))
    assert made["patch_size"] == expected and made["data_identifier"].startswith("there_coarser")
    assert np.allclose(np.divide(made["spacing"], settings["spacing"]), factors)
    assert all(e * f >= p - 1e-9 and e % m == 0 for e, f, p, m in zip(expected, factors, patch, multiple, strict=True))
    assert math.prod(e // m for e, m in zip(expected, multiple, strict=True)) > 1
    assert settings["patch_size"] == patch


@pytest.mark.parametrize("name", ["embedded-depthwise", "embedded-pruned", "embedded-coarser", "embedded-composed"])
def test_presets_are_read_and_name_the_method(name):
    config = load_config(name)
    assert config.methods[0].method == "embedded" and config.active


def test_levers_fit_a_network_that_changes_its_input_first():
    """DAEFormer repeats one channel to three: its first layer does not see what the network is given."""
    from nnslim.network.daeformer import DAEFormer

    network, shape = DAEFormer(1, 2, (16, 32), (1, 1), grouped=False).eval(), (1, 1, 16, 16)
    made = slimmed(network, shape, depthwise="grouped", sparsity=0.3)
    assert {edit.kind for edit in made.spec.edits} == {"depthwise", "sparse"}
    grouped = DAEFormer(1, 2, (16, 32), (1, 1)).eval()
    mixing = [made.network.get_submodule(name).conv for name, m in grouped.named_modules() if hasattr(m, "fc1")]
    assert all(conv.groups == conv.in_channels for conv in mixing) and len(mixing) == 9
    assert torch.isfinite(made.network(torch.randn(shape))).all()
