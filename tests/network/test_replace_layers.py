"""Finding layers under all their names, replacing them, and patching attributes."""

from __future__ import annotations

import logging

import pytest
import torch
from dynamic_network_architectures.architectures.unet import PlainConvUNet
from torch import nn

from nnslim.errors import SpecError
from nnslim.network.walk import LayerIndex, replace_layer, unwrap
from nnslim.patching import AttributePatch

CONVS = (nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d, nn.ConvTranspose3d)
FIRST_CONV = "encoder.stages.0.0.convs.0.conv"


@pytest.fixture(scope="module")
def six_stages() -> nn.Module:
    with torch.device("meta"):
        return PlainConvUNet(
            1,
            6,
            [4] * 6,
            nn.Conv3d,
            3,
            [1, 2, 2, 2, 2, 2],
            2,
            3,
            2,
            conv_bias=True,
            norm_op=nn.InstanceNorm3d,
            norm_op_kwargs={"affine": True},
            nonlin=nn.LeakyReLU,
            deep_supervision=True,
        )


def test_layer_index_six_stage_net_has_32_convolutions_under_78_names(six_stages):
    convs = LayerIndex(six_stages).of_type(*CONVS)
    assert len(convs) == 32
    assert sum(len(layer.aliases) for layer in convs) == 78
    state = six_stages.state_dict(keep_vars=True)
    assert (len(state), len({id(tensor) for tensor in state.values()})) == (292, 108)


def test_layer_index_iteration_gives_each_object_once(six_stages):
    index = LayerIndex(six_stages)
    objects = [id(layer.module) for layer in index.values()]
    assert len(objects) == len(set(objects)) == len(index)
    assert set(objects) == {id(module) for module in six_stages.modules()} - {id(six_stages)}
    assert list(index) == [layer.name for layer in index.values()]


def test_layer_index_any_alias_gives_the_same_layer(six_stages):
    index = LayerIndex(six_stages)
    layer = index[FIRST_CONV]
    assert set(layer.aliases) == {
        FIRST_CONV,
        "encoder.stages.0.0.convs.0.all_modules.0",
        "decoder.encoder.stages.0.0.convs.0.conv",
        "decoder.encoder.stages.0.0.convs.0.all_modules.0",
    }
    for alias in layer.aliases:
        assert index[alias] is layer
        assert alias in index
        assert six_stages.get_submodule(alias) is layer.module


def test_layer_index_slots_are_all_parents_that_hold_the_object(six_stages):
    layer = LayerIndex(six_stages)[FIRST_CONV]
    block = six_stages.encoder.stages[0][0].convs[0]
    assert set(layer.slots) == {(block, "conv"), (block.all_modules, "0")}


def test_layer_index_unknown_name_names_the_nearest(tiny_net):
    index = LayerIndex(tiny_net("plain3d"))
    with pytest.raises(SpecError, match=r"no layer named 'decoder\.seg_layer\.0' .*nearest: decoder\.seg_layers\.0"):
        index["decoder.seg_layer.0"]
    assert "decoder.seg_layer.0" not in index


def test_layer_index_get_of_unknown_name_gives_the_default(tiny_net):
    index = LayerIndex(tiny_net("plain3d"))
    assert index.get("decoder.seg_layers.0").name == "decoder.seg_layers.0"
    assert index.get("nowhere") is None


def test_unwrap_compiled_network_gives_the_plain_one(tiny_net):
    plain = tiny_net("plain3d")
    assert unwrap(plain) is plain
    assert unwrap(torch.compile(plain)) is plain


def test_unwrap_ddp_around_compile_gives_the_plain_one(tiny_net):
    plain = tiny_net("plain3d")
    # A real wrapper needs a process group; only its class and its `module` matter here.
    wrapper = nn.parallel.DistributedDataParallel.__new__(nn.parallel.DistributedDataParallel)
    nn.Module.__init__(wrapper)
    wrapper.module = torch.compile(plain)
    assert unwrap(wrapper) is plain


@pytest.mark.parametrize("kind", ["plain3d", "residual3d", "plain2d", "anisotropic"])
def test_replace_layer_fills_every_slot_and_undo_is_bit_exact(tiny_net, tiny_shape, kind):
    network = tiny_net(kind)
    x = torch.randn(tiny_shape(kind), generator=torch.Generator().manual_seed(1))
    before = network(x)
    modules = dict(network.named_modules(remove_duplicate=False))
    layer = LayerIndex(network).of_type(*CONVS)[1]
    new = type(layer.module)(
        layer.module.in_channels,
        layer.module.out_channels,
        layer.module.kernel_size,
        layer.module.stride,
        layer.module.padding,
    )
    undo = replace_layer(layer, new)
    assert all(network.get_submodule(alias) is new for alias in layer.aliases)
    assert all(module is not layer.module for module in network.modules())
    assert not torch.equal(network(x), before)
    undo()
    assert dict(network.named_modules(remove_duplicate=False)) == modules
    assert torch.equal(network(x), before)


class Parent:
    shared = "parent"

    def inherited(self, value):
        return ("inherited", value)

    @staticmethod
    def inherited_static(value):
        return ("inherited_static", value)

    @classmethod
    def inherited_class(cls, value):
        return ("inherited_class", cls.__name__, value)


class Owner(Parent):
    def plain(self, value):
        return ("plain", value)

    @staticmethod
    def static(value):
        return ("static", value)

    @classmethod
    def of_class(cls, value):
        return ("of_class", cls.__name__, value)


def traced(original):
    def replacement(*args):
        return ("patched", original(*args))

    return replacement


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("plain", ("plain", 7)),
        ("static", ("static", 7)),
        ("of_class", ("of_class", "Owner", 7)),
        ("inherited", ("inherited", 7)),
        ("inherited_static", ("inherited_static", 7)),
        ("inherited_class", ("inherited_class", "Owner", 7)),
    ],
)
def test_attribute_patch_each_kind_of_attribute_works_and_comes_back(name, expected):
    before, before_parent = dict(vars(Owner)), dict(vars(Parent))
    patch = AttributePatch(Owner, name, traced)
    assert dict(vars(Owner)) == before
    patch.apply()
    try:
        assert getattr(Owner(), name)(7) == ("patched", expected)
        assert dict(vars(Parent)) == before_parent
    finally:
        patch.undo()
    after = dict(vars(Owner))
    assert after.keys() == before.keys()
    assert all(after[key] is before[key] for key in before)
    assert getattr(Owner(), name)(7) == expected


@pytest.mark.parametrize("name", ["static", "of_class", "inherited_static", "inherited_class"])
def test_attribute_patch_static_and_class_methods_stay_callable_on_the_class(name):
    expected = getattr(Owner, name)(7)
    patch = AttributePatch(Owner, name, traced)
    patch.apply()
    try:
        assert getattr(Owner, name)(7) == ("patched", expected)
    finally:
        patch.undo()


def test_attribute_patch_replacement_carries_the_original():
    patch = AttributePatch(Owner, "plain", traced)
    original = Owner.plain
    patch.apply()
    try:
        assert Owner.plain.__nnslim_original__ is original
    finally:
        patch.undo()


def test_attribute_patch_nested_patches_come_back_in_reverse_order():
    before = dict(vars(Owner))
    outer, inner = AttributePatch(Owner, "plain", traced), AttributePatch(Owner, "plain", traced)
    outer.apply()
    inner.apply()
    assert Owner().plain(1) == ("patched", ("patched", ("plain", 1)))
    inner.undo()
    assert Owner().plain(1) == ("patched", ("plain", 1))
    outer.undo()
    assert dict(vars(Owner)) == before


def test_attribute_patch_failing_maker_changes_nothing():
    def make(original):
        raise RuntimeError("no replacement")

    before = dict(vars(Owner))
    with pytest.raises(RuntimeError, match="no replacement"):
        AttributePatch(Owner, "plain", make).apply()
    assert dict(vars(Owner)) == before


def test_attribute_patch_missing_attribute_changes_nothing():
    before = dict(vars(Owner))
    with pytest.raises(AttributeError, match="absent"):
        AttributePatch(Owner, "absent", traced).apply()
    assert dict(vars(Owner)) == before


def test_attribute_patch_somebody_elses_replacement_is_left_with_a_warning(caplog):
    patch = AttributePatch(Owner, "plain", traced)
    original = vars(Owner)["plain"]
    patch.apply()

    def theirs(self, value):
        return "theirs"

    Owner.plain = theirs
    try:
        with caplog.at_level(logging.WARNING, "nnslim"):
            patch.undo()
        assert vars(Owner)["plain"] is theirs
        assert "Owner.plain was replaced by somebody else" in caplog.text
    finally:
        Owner.plain = original
