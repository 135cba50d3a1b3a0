"""SlimSpec: its JSON form, and edits that are applied wholly or not at all."""

from __future__ import annotations

import copy
import dataclasses
import json
from typing import ClassVar

import pytest
import torch
from torch import nn

from nnslim.errors import SpecError
from nnslim.methods.tucker import TuckerEdit
from nnslim.methods.tucker.edit import TuckerConv
from nnslim.network.spec import Edit, SlimSpec, apply_spec, register_edit, spec_of

FIRST = "encoder.stages.1.0.convs.0.conv"
SECOND = "decoder.stages.0.convs.0.conv"


def spec() -> SlimSpec:
    return SlimSpec((TuckerEdit(FIRST, 3, 4), TuckerEdit(SECOND, None, 5, decompose=False)))


def test_spec_json_round_trip_gives_an_equal_spec():
    text = json.dumps(spec().to_dict())
    assert SlimSpec.from_dict(json.loads(text)) == spec()
    assert json.loads(text)["edits"][0] == {
        "kind": "tucker",
        "layer": FIRST,
        "rank_out": 3,
        "rank_in": 4,
        "decompose": True,
    }


def test_spec_empty_round_trip_gives_an_equal_spec():
    assert SlimSpec.from_dict({"version": 1, "edits": []}) == SlimSpec()


def edit(**changes) -> dict:
    return {"version": 1, "edits": [{"kind": "tucker", "layer": FIRST, "rank_out": 3, "rank_in": 4, **changes}]}


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (edit(kind="tuker"), r"spec edit 0: unknown kind 'tuker'; nearest: tucker"),
        (edit(kind=["tucker"]), r"spec edit 0: .*kind.*tucker"),
        (edit(rank_ouT=3), r"spec edit 0 \(tucker\): unknown field 'rank_ouT'; nearest: rank_out"),
        (edit(rank_out="3"), r"field 'rank_out': expected int \| None, found '3'"),
        (edit(rank_out=3.0), r"field 'rank_out': expected int \| None, found 3\.0"),
        (edit(rank_out=True), r"field 'rank_out': expected int \| None, found True"),
        (edit(layer=None), r"field 'layer': .*str.*found None"),
        (edit(decompose=1), r"field 'decompose': .*bool.*found 1"),
        ({"version": 1, "edits": [{"kind": "tucker", "layer": FIRST}]}, r"spec edit 0 \(tucker\): .*rank_out"),
        ({"version": 1, "edits": [{"layer": FIRST}]}, r"spec edit 0: expected an object with a 'kind'"),
        ({"version": 1, "edits": ["tucker"]}, r"spec edit 0: expected an object with a 'kind', found 'tucker'"),
        ({"version": 2, "edits": []}, r"spec version 2 found, this nnslim reads version 1; update nnslim"),
        ({"edits": []}, r"spec version None found"),
        ({"version": 1}, r"a spec is an object with 'version' and 'edits'"),
        ({"version": 1, "edits": "tucker"}, r"a spec is an object with 'version' and 'edits'"),
        ([], r"a spec is an object with 'version' and 'edits'"),
        (None, r"a spec is an object with 'version' and 'edits'"),
    ],
)
def test_spec_from_dict_unusable_raises(raw, message):
    with pytest.raises(SpecError, match=message):
        SlimSpec.from_dict(raw)


def test_register_edit_taken_kind_raises():
    @dataclasses.dataclass(frozen=True)
    class Other(Edit):
        kind: ClassVar[str] = "tucker"

    with pytest.raises(SpecError, match=r"'tucker' is already registered by nnslim\.methods\.tucker\.edit\.TuckerEdit"):
        register_edit(Other)
    assert register_edit(TuckerEdit) is TuckerEdit


def test_register_edit_without_dataclass_raises():
    class Bare(Edit):
        kind = "bare"

    with pytest.raises(SpecError, match="'bare' must be a dataclass"):
        register_edit(Bare)


def test_apply_spec_records_the_spec(tiny_net):
    network = tiny_net("plain3d")
    assert spec_of(network) is None
    assert apply_spec(spec(), network) is network
    assert spec_of(network) == spec()
    assert spec_of(copy.deepcopy(network)) == spec()
    assert "_nnslim_spec" not in "".join(network.state_dict())


def test_apply_spec_twice_is_refused(tiny_net):
    network = apply_spec(spec(), tiny_net("plain3d"))
    chain = network.get_submodule(FIRST)
    with pytest.raises(SpecError, match="already carries a SlimSpec; apply edits to its base network"):
        apply_spec(spec(), network)
    assert network.get_submodule(FIRST) is chain


@pytest.mark.parametrize(
    ("second", "message"),
    [
        (TuckerEdit("decoder.stages.0.convs.0.cov", 2, 2), r"no layer named 'decoder\.stages\.0\.convs\.0\.cov'"),
        (TuckerEdit(SECOND, 99, 2), rf"layer '{SECOND}': tucker: output rank 99 is outside 1\.\.8"),
        (TuckerEdit(SECOND, 2, 0), rf"layer '{SECOND}': tucker: input rank 0 is outside 1\.\.16"),
        (TuckerEdit(SECOND, None, None), "an edit needs at least one rank"),
        (TuckerEdit("decoder.stages.0.convs.0.norm", 2, 2), "expected a 2D or 3D convolution, found InstanceNorm3d"),
        (TuckerEdit(FIRST, 2, 2), "expected a 2D or 3D convolution, found TuckerConv"),
    ],
)
@pytest.mark.parametrize("fill", [False, True])
def test_apply_spec_failing_second_edit_leaves_the_network_as_it_was(tiny_net, second, message, fill):
    network = tiny_net("plain3d")
    modules = dict(network.named_modules(remove_duplicate=False))
    state = {key: value.clone() for key, value in network.state_dict().items()}
    with pytest.raises(SpecError, match=message):
        apply_spec(SlimSpec((TuckerEdit(FIRST, 3, 4), second)), network, fill=fill)
    after = dict(network.named_modules(remove_duplicate=False))
    assert after.keys() == modules.keys()
    assert all(after[name] is modules[name] for name in modules)
    assert spec_of(network) is None
    assert network.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[key]) for key, value in network.state_dict().items())


def test_apply_spec_untouched_layers_keep_keys_and_values(tiny_net):
    dense = tiny_net("plain3d")
    before = dense.state_dict()
    slim = apply_spec(spec(), copy.deepcopy(dense), fill=True)
    after = slim.state_dict()
    touched = ("encoder.stages.1.0.convs.0.", "decoder.stages.0.convs.0.")
    stock = {key for key in before if not any(part in key and "norm" not in key for part in touched)}
    assert stock < set(after)
    assert all(torch.equal(after[key], before[key]) for key in stock)
    for alias in (FIRST, "decoder.encoder.stages.1.0.convs.0.all_modules.0"):
        assert {f"{alias}.first.weight", f"{alias}.core.weight", f"{alias}.last.weight"} < set(after)
        assert f"{alias}.weight" not in after


def test_apply_spec_by_alias_replaces_the_same_layer(tiny_net):
    network = tiny_net("plain3d")
    alias = "decoder.encoder.stages.1.0.convs.0.all_modules.0"
    apply_spec(SlimSpec((TuckerEdit(alias, 3, 4),)), network)
    assert isinstance(network.get_submodule(FIRST), TuckerConv)
    assert network.get_submodule(FIRST) is network.get_submodule(alias)


def test_apply_spec_later_edit_may_name_a_layer_that_an_earlier_one_made(tiny_net, tiny_shape):
    dense = tiny_net("plain3d")
    chain = SlimSpec((TuckerEdit(FIRST, 6, 5), TuckerEdit(f"{FIRST}.core", 3, 2)))
    slim = apply_spec(chain, copy.deepcopy(dense), fill=True)
    core = slim.get_submodule(f"{FIRST}.core")
    assert isinstance(core, TuckerConv)
    assert core.core.weight.shape == (3, 2, 3, 3, 3)
    loaded = apply_spec(chain, copy.deepcopy(dense))
    loaded.load_state_dict(slim.state_dict())
    x = torch.randn(tiny_shape("plain3d"), generator=torch.Generator().manual_seed(2))
    assert torch.equal(loaded(x), slim(x))


def test_apply_spec_failing_edit_on_a_made_layer_undoes_both(tiny_net):
    network = tiny_net("plain3d")
    conv = network.get_submodule(FIRST)
    with pytest.raises(SpecError, match=r"output rank 7 is outside 1\.\.6"):
        apply_spec(SlimSpec((TuckerEdit(FIRST, 6, 5), TuckerEdit(f"{FIRST}.core", 7, 2))), network)
    assert network.get_submodule(FIRST) is conv
    assert not any(isinstance(module, TuckerConv) for module in network.modules())


def test_apply_spec_keeps_training_mode_and_dtype():
    network = nn.Sequential(nn.Conv2d(4, 6, 3), nn.Conv2d(6, 4, 3)).double().train()
    apply_spec(SlimSpec((TuckerEdit("1", 2, 2),)), network, fill=True)
    assert all(module.training for module in network.modules())
    assert {parameter.dtype for parameter in network.parameters()} == {torch.float64}
