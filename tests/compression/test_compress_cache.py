"""Compressing all folds of a model, keeping the result on disk, reporting, and comparing label maps."""

from __future__ import annotations

import copy
import io
import json
import logging
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import damages
from torch import nn

from nnslim.caches import read_kept, write_kept
from nnslim.compression.cache import cache_key, recall_weights, store_weights
from nnslim.compression.compress_network import compress
from nnslim.compression.config import SlimConfig, from_dict, tucker
from nnslim.compression.model_report import ModelReport, Report, times_fewer
from nnslim.errors import ConfigError, InputError, OutputError, SpecError
from nnslim.evaluation.overlap import dice_per_label
from nnslim.files import checkpoint_bytes
from nnslim.methods.tucker import TuckerConfig
from nnslim.methods.tucker.edit import TuckerConv
from nnslim.network.cost import measure_cost
from nnslim.network.spec import spec_of

CONFIG = tucker(rank_factor=0.5, rank_min=2)


def copied(state):
    return {key: value.clone() for key, value in state.items()}


def weights_of(network):
    return copied(network.state_dict())


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def saved_bytes(state):
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def model(tiny_net, tiny_shape):
    """Network, state dicts of two folds, input shape."""
    folds = [weights_of(tiny_net("plain3d", seed=seed)) for seed in (1, 2)]
    return tiny_net("plain3d"), folds, tiny_shape("plain3d")


@pytest.fixture(scope="module")
def slimmed(model):
    return compress(model[0], model[1], CONFIG, model[2])


def test_compress_two_folds_give_equal_shapes(slimmed):
    shapes = [{key: tuple(value.shape) for key, value in state.items()} for state in slimmed.weights]
    assert len(shapes) == 2
    assert shapes[0] == shapes[1]
    assert not same(*slimmed.weights)


def test_compress_each_fold_equals_compressing_it_alone(model, slimmed):
    network, folds, shape = model
    for fold, state in zip(folds, slimmed.weights, strict=True):
        alone = compress(network, [fold], CONFIG, shape)
        assert same(alone.weights[0], state)
        assert alone.spec == slimmed.spec


def test_compress_network_holds_the_first_fold_in_eval_mode(slimmed):
    assert same(slimmed.network.state_dict(), slimmed.weights[0])
    assert not any(module.training for module in slimmed.network.modules())
    assert spec_of(slimmed.network) == slimmed.spec
    assert sum(isinstance(module, TuckerConv) for module in slimmed.network.modules()) == len(slimmed.spec.edits) > 0


def test_compress_loading_another_fold_leaves_the_stored_weights_alone(model):
    made = compress(model[0], model[1], CONFIG, model[2])
    kept = copied(made.weights[0])
    made.network.load_state_dict(made.weights[1])
    assert same(made.weights[0], kept)


def test_compress_leaves_network_and_weights_untouched(tiny_net, model):
    network = tiny_net("plain3d").train()
    before, modules = weights_of(network), dict(network.named_modules(remove_duplicate=False))
    folds = [copied(fold) for fold in model[1]]
    compress(network, folds, CONFIG, model[2])
    assert same(network.state_dict(), before)
    assert dict(network.named_modules(remove_duplicate=False)) == modules
    assert all(module.training for module in modules.values())
    assert spec_of(network) is None
    assert all(same(fold, kept) for fold, kept in zip(folds, model[1], strict=True))


def test_compress_twice_gives_the_same_bytes(model, slimmed):
    again = compress(model[0], model[1], CONFIG, model[2])
    assert [saved_bytes(state) for state in again.weights] == [saved_bytes(state) for state in slimmed.weights]


def test_compress_counts_equal_measured_costs(model, slimmed):
    for counts, network in ((slimmed.dense, model[0]), (slimmed.slim, slimmed.network)):
        cost = measure_cost(network, model[2])
        assert (counts.parameters, counts.macs, counts.macs_fvcore) == (
            cost.parameters,
            cost.macs(),
            cost.macs("fvcore"),
        )
    assert slimmed.slim.macs < slimmed.dense.macs
    assert slimmed.slim.parameters < slimmed.dense.parameters


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_compress_half_precision_weights_are_computed_on_in_float32(model, dtype):
    network, folds, shape = model
    half = {key: value.to(dtype) for key, value in folds[0].items()}
    made = compress(network, [half], CONFIG, shape)
    rounded = compress(network, [{key: value.float() for key, value in half.items()}], CONFIG, shape)
    # float16 is a way to store models and is kept; other types are written in float32.
    kept = torch.float16 if dtype == torch.float16 else torch.float32
    assert {value.dtype for value in made.weights[0].values()} == {kept}
    assert same(made.weights[0], {key: value.to(kept) for key, value in rounded.weights[0].items()})
    assert same(made.network.state_dict(), {key: value.float() for key, value in made.weights[0].items()})


def test_compress_inactive_config_leaves_the_network_dense(model):
    network, folds, shape = model
    made = compress(network, folds, from_dict({"apply": False, "methods": [{"method": "tucker"}]}), shape)
    assert made.decisions == ()
    assert all(same(state, fold) for state, fold in zip(made.weights, folds, strict=True))
    assert made.slim == made.dense


def test_compress_two_methods_plan_on_what_the_first_one_left(model):
    network, folds, shape = model
    first = {"method": "tucker", "include": ["encoder.stages.1.*"], "rank_factor": 0.5, "rank_min": 2}
    second = {"method": "tucker", "include": ["encoder.stages.2.*"], "rank_factor": 0.5, "rank_min": 2}
    both = compress(network, folds, from_dict({"methods": [first, second]}), shape)
    assert [edit.layer.split(".")[2] for edit in both.spec.edits] == ["1", "1", "2"]
    assert len([d for d in both.decisions if d.layer.startswith("encoder.stages.1.0.convs.0.conv.")]) == 3
    once = compress(network, folds, tucker(include=("encoder.stages.[12].*",), rank_factor=0.5, rank_min=2), shape)
    assert both.slim == once.slim
    assert all(same(ours, theirs) for ours, theirs in zip(both.weights, once.weights, strict=True))


def test_compress_reports_progress_per_fold(model):
    seen = []
    compress(model[0], model[1], CONFIG, model[2], progress=lambda *step: seen.append(step))
    assert seen == [("folds", 1, 2), ("folds", 2, 2)]


def test_compress_wrapped_network_equals_the_plain_one(model, slimmed):
    class Wrapper(nn.Module):  # as torch.compile's, without its import time
        def __init__(self, inner):
            super().__init__()
            self._orig_mod = inner

    made = compress(Wrapper(model[0]), model[1], CONFIG, model[2])
    assert type(made.network) is type(model[0])
    assert same(made.weights[1], slimmed.weights[1])


def test_compress_slim_network_is_refused(slimmed, model):
    with pytest.raises(SpecError, match="already carries a SlimSpec"):
        compress(slimmed.network, slimmed.weights, CONFIG, model[2])


def test_compress_weights_of_another_network_raise(tiny_net, model):
    other = weights_of(tiny_net("plain3d", features=(6, 8, 10)))
    with pytest.raises(SpecError, match=r"weights of fold number 2 of 2 do not fit: .*PlainConvUNet"):
        compress(model[0], [model[1][0], other], CONFIG, model[2])


def test_compress_pattern_without_match_raises(model):
    with pytest.raises(ConfigError, match="no convolution matches exclude pattern 'bottleneck"):
        compress(model[0], model[1], tucker(exclude=("bottleneck.*",)), model[2])


def test_cache_key_is_stable(tiny_net, model):
    network, folds, shape = model
    key = cache_key(network, folds, CONFIG, shape)
    copies = [copied(fold) for fold in folds]
    assert cache_key(tiny_net("plain3d", seed=5), copies, tucker(rank_factor=0.5, rank_min=2), list(shape)) == key
    assert len(key) == 40
    assert set(key) <= set("0123456789abcdef")


def changed_weights(folds):
    folds = [copied(fold) for fold in folds]
    folds[1]["decoder.seg_layers.1.bias"][0] += 1e-6
    return folds


@pytest.mark.parametrize(
    ("what", "change"),
    [
        ("one number", lambda n, f, c, s: (n, changed_weights(f), c, s)),
        ("precision", lambda n, f, c, s: (n, [{k: v.half() for k, v in fold.items()} for fold in f], c, s)),
        ("fewer folds", lambda n, f, c, s: (n, f[:1], c, s)),
        ("order of folds", lambda n, f, c, s: (n, f[::-1], c, s)),
        ("settings", lambda n, f, c, s: (n, f, tucker(rank_factor=0.5, rank_min=3), s)),
        ("no method", lambda n, f, c, s: (n, f, SlimConfig(), s)),
        ("patch", lambda n, f, c, s: (n, f, c, (1, 1, 16, 16, 32))),
    ],
)
def test_cache_key_changes_with(model, what, change):
    given = (*model[:2], CONFIG, model[2])
    assert cache_key(*change(*given)) != cache_key(*given), what


def test_cache_key_changes_with_the_architecture(model):
    network, folds, shape = model
    padded = copy.deepcopy(network)
    padded.encoder.stages[1][0].convs[0].conv.padding = (2, 2, 2)
    assert cache_key(padded, folds, CONFIG, shape) != cache_key(network, folds, CONFIG, shape)


def test_cache_key_changes_with_deep_supervision(tiny_net, model):
    # The same modules and weights, but other layers are reached, so other layers may be factored.
    _, folds, shape = model
    keys = {cache_key(tiny_net("plain3d", deep_supervision=on), folds, CONFIG, shape) for on in (False, True)}
    assert len(keys) == 2


def test_cache_key_does_not_change_with_run_and_cache_settings(model):
    network, folds, shape = model
    other = CONFIG.model_copy(update={"run": CONFIG.run.model_copy(update={"tile_batch": 4})})
    assert cache_key(network, folds, other, shape) == cache_key(network, folds, CONFIG, shape)


def test_cache_round_trip_is_bit_exact(model, slimmed, tmp_path):
    path = store_weights(slimmed, "key", tmp_path / "new" / "folder")
    assert path.parent == tmp_path / "new" / "folder"
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    found = recall_weights(model[0], "key", path.parent)
    assert len(found.weights) == 2
    assert all(same(ours, theirs) for ours, theirs in zip(found.weights, slimmed.weights, strict=True))
    assert (found.spec, found.decisions, found.dense, found.slim, found.input_shape) == (
        slimmed.spec,
        slimmed.decisions,
        slimmed.dense,
        slimmed.slim,
        slimmed.input_shape,
    )
    x = torch.ones(model[2])
    assert torch.equal(found.network(x), slimmed.network(x))
    assert spec_of(model[0]) is None


def test_cache_file_keeps_shared_tensors_shared(slimmed, tmp_path):
    size = store_weights(slimmed, "key", tmp_path).stat().st_size
    once = sum(4 * p.numel() for p in slimmed.network.parameters()) * len(slimmed.weights)
    assert size < 1.5 * once + 100_000


def test_recall_without_file_gives_none_without_warning(model, tmp_path, caplog):
    assert recall_weights(model[0], "absent", tmp_path) is None
    assert not caplog.records


def test_recall_file_with_any_bit_or_length_changed_warns_once_and_gives_none(model, slimmed, tmp_path, caplog):
    path = store_weights(slimmed, "key", tmp_path)
    for name in damages(path):
        caplog.clear()
        assert recall_weights(model[0], "key", tmp_path) is None, name
        assert [record.message.startswith(f"{path} cannot be used") for record in caplog.records] == [True], name
        store_weights(slimmed, "key", tmp_path)
        found = recall_weights(model[0], "key", tmp_path)
        assert all(same(ours, theirs) for ours, theirs in zip(found.weights, slimmed.weights, strict=True)), name


def damage(kind, path):
    """Write other content, as a version of nnslim with a fault, or somebody, would."""
    if kind == "text":
        write_kept(path, b"not a checkpoint\n")
    else:
        inside = torch.load(io.BytesIO(read_kept(path)), weights_only=True)
        if kind == "no weights":
            inside["weights"] = []
        elif kind == "no spec":
            del inside["spec"]
        elif kind == "other weights":
            inside["weights"][0].popitem()
        elif kind == "spec of another version":
            inside["spec"] = json.dumps({**json.loads(inside["spec"]), "version": 99})
        elif kind == "broken JSON":
            inside["summary"] = inside["summary"][:-1]
        elif kind == "tensor":
            inside = torch.zeros(3)
        write_kept(path, checkpoint_bytes(inside))


@pytest.mark.parametrize(
    "kind",
    [
        "text",
        "no weights",
        "no spec",
        "other weights",
        "spec of another version",
        "broken JSON",
        "tensor",
    ],
)
def test_recall_damaged_file_warns_and_gives_none(model, slimmed, tmp_path, caplog, kind):
    path = store_weights(slimmed, "key", tmp_path)
    damage(kind, path)
    with caplog.at_level(logging.WARNING, "nnslim"):
        assert recall_weights(model[0], "key", tmp_path) is None
    assert str(path) in caplog.text
    assert "compressing again" in caplog.text
    store_weights(slimmed, "key", tmp_path)
    assert same(recall_weights(model[0], "key", tmp_path).weights[0], slimmed.weights[0])


class Intruder:
    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return open, (self.mark, "w")


def test_recall_file_that_would_run_code_is_refused(model, tmp_path, caplog):
    mark = tmp_path / "ran"
    write_kept(tmp_path / "key.pt", checkpoint_bytes({"spec": Intruder(str(mark))}))
    with caplog.at_level(logging.WARNING, "nnslim"):
        assert recall_weights(model[0], "key", tmp_path) is None
    assert "cannot be read" in caplog.text
    assert not mark.exists()


def test_store_folder_that_cannot_be_made_raises(slimmed, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=r"cannot write .*file"):
        store_weights(slimmed, "key", tmp_path / "file" / "cache")


def test_report_text_states_counts_and_reasons(slimmed):
    text = str(Report([ModelReport("models/total", 2, slimmed, 1.25)]))
    assert text.startswith("models/total: 2 fold(s), compressed in 1.2 s")
    assert f"parameters {slimmed.dense.parameters:,} -> {slimmed.slim.parameters:,}" in text
    assert "MACs per 16x16x16 patch" in text
    changed = len(slimmed.spec.edits)
    assert f"layers changed {changed}, kept dense {len(slimmed.decisions) - changed}" in text
    assert "first layer: 1" in text
    assert "segmentation head: 1" in text
    assert "nothing changed" not in text


def test_report_text_of_special_cases(model, slimmed):
    assert str(Report()) == "no model was loaded inside the context"
    assert str(Report([ModelReport("a", 1, None, 0.0, note="already slim")])) == "a: left as it is (already slim)"
    assert "read from the cache in 0.1 s" in str(Report([ModelReport("a", 1, slimmed, 0.1, from_cache=True)]))
    nothing = compress(model[0], model[1][:1], tucker(rank_factor=1.0), model[2])
    assert "nothing changed: no layer would get cheaper" in str(Report([ModelReport("a", 1, nothing, 0.1)]))


def test_report_counts_no_layer_under_an_empty_reason_and_compares_weights_not_files(model):
    nothing = compress(model[0], model[1][:1], tucker(rank_factor=1.0), model[2])
    silent = replace(nothing, decisions=tuple(replace(one, reason="") for one in nothing.decisions))
    silent = replace(silent, weight_bytes=(4_000_000, 2_000_000), file_bytes=(4_000_000, 6_000_000))
    text = str(Report([ModelReport("a", 1, silent, 0.1)]))
    assert f"(no reason recorded: {len(silent.decisions)})" in text
    assert "weights 4.0 MB -> 2.0 MB (2.00x less)" in text and "6.0 MB" not in text
    coarser = replace(nothing, slim=replace(nothing.slim, macs=nothing.dense.macs // 8))
    assert "nothing changed" not in str(Report([ModelReport("a", 1, coarser, 0.1)]))


def test_change_is_said_in_one_word_and_in_the_right_direction():
    assert [times_fewer(*pair, fewer="less") for pair in ((10, 9), (9, 10))] == ["1.11x less", "1.11x more"]
    assert [times_fewer(*pair) for pair in ((10, 10), (1000, 1001), (1001, 1000))] == ["unchanged"] * 3


def test_report_dictionary_is_json_and_complete(slimmed):
    report = Report([ModelReport("a", 2, slimmed, 0.12345), ModelReport("b", 1, None, 0.0, note="already slim")])
    first, second = json.loads(json.dumps(report.to_dict()))["models"]
    assert first["seconds"] == 0.123
    assert first["spec"] == json.loads(json.dumps(slimmed.spec.to_dict()))
    assert first["slim"] == {
        "parameters": slimmed.slim.parameters,
        "macs": slimmed.slim.macs,
        "macs_fvcore": slimmed.slim.macs_fvcore,
    }
    assert [layer["layer"] for layer in first["layers"]] == [decision.layer for decision in slimmed.decisions]
    assert first["input_shape"] == [1, 1, 16, 16, 16]
    assert second == {
        "source": "b",
        "folds": 1,
        "seconds": 0.0,
        "from_cache": False,
        "note": "already slim",
        "speed": None,
        "spec": None,
    }


def test_published_rule_compresses_through_the_whole_path(model):
    made = compress(model[0], model[1], SlimConfig(methods=(TuckerConfig.published(0.5, rank_min=2),)), model[2])
    reasons = {decision.reason for decision in made.decisions if decision.action == "dense"}
    assert reasons == {"not reached by the forward pass"}
    assert len(made.spec.edits) == len(made.decisions) - 1


def naive_dice(first, second, label):
    ours, theirs = first == label, second == label
    total = ours.sum() + theirs.sum()
    return 2 * (ours & theirs).sum() / total if total else math.nan


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.int64, np.uint64])
@pytest.mark.parametrize("shape", [(7, 8, 9), (11, 5), (40,)])
def test_dice_per_label_equals_the_naive_version(dtype, shape):
    generator = np.random.default_rng(0)
    first, second = (generator.integers(0, 6, shape).astype(dtype) for _ in range(2))
    second[first == 3] = 0  # label 3: no overlap
    second[second == 5] = 1  # label 5: in the first map only
    labels = [0, 1, 2, 3, 4, 5, 9]  # label 9: in neither
    result = dice_per_label(first, second, labels)
    assert list(result) == labels
    for label in labels:
        assert result[label] == pytest.approx(naive_dice(first, second, label), nan_ok=True)
    assert result[5] == 0
    assert math.isnan(result[9])


def test_dice_per_label_different_maximum_labels_do_not_mix():
    first, second = np.array([1, 1, 7, 0]), np.array([1, 2, 7, 300])
    assert dice_per_label(first, second, [1, 2, 7, 300]) == {1: pytest.approx(2 / 3), 2: 0.0, 7: 1.0, 300: 0.0}


def test_dice_per_label_same_map_gives_one_and_no_labels_gives_nothing():
    labels = np.arange(8).reshape(2, 2, 2) % 3
    assert dice_per_label(labels, labels, [0, 1, 2]) == {0: 1.0, 1: 1.0, 2: 1.0}
    assert dice_per_label(labels, labels, []) == {}


def test_dice_per_label_different_shapes_raise():
    with pytest.raises(InputError, match=r"different shapes cannot be compared: \(2, 3\) and \(3, 2\)"):
        dice_per_label(np.zeros((2, 3), int), np.zeros((3, 2), int), [1])
