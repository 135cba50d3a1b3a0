"""`nnslim compress` writes folders that stock nnU-Net loads, for every kind of model; bad folders are named."""

from __future__ import annotations

import json
import shutil
import zipfile

import numpy as np
import pytest
import torch
from helpers import plant_bomb

from nnslim import NNSlimContext
from nnslim.compression.compress_network import compress
from nnslim.compression.config import RunConfig, tucker
from nnslim.errors import ModelError, OutputError, SpecError
from nnslim.hosts.nnunet.compress.compress_model import compress_model
from nnslim.hosts.nnunet.model.slim_network import NETWORK_CLASS_NAME, slim_network
from nnslim.hosts.nnunet.model.trained_model import build_network, input_shape, read_trained_model
from nnslim.hosts.nnunet.predict.load import load_predictor
from nnslim.hosts.nnunet.predict.predict_settings import PredictSettings
from nnslim.network.spec import spec_of
from nnslim.running import engine
from nnslim.running.rewrites import rewritten

UNTIMED = {"run": RunConfig(guard=False)}  # a guard decides by measured times, which depend on what else runs
HALF = tucker(rank_factor=0.5, rank_min=2).model_copy(update=UNTIMED)
reads_weights_alone = pytest.mark.skipif(
    not hasattr(torch.serialization, "safe_globals"), reason="torch before 2.4 reads everything or nothing"
)
KINDS = ("plain", "residual", "2d", "anisotropic", "regions", "cascade", "old plans")


@pytest.mark.parametrize("kind", KINDS)
def test_compress_folder_any_kind_stock_predictor_gives_logits_of_slim_network(
    kind, make_model, stock_logits, tmp_path
):
    model = read_trained_model(make_model(kind, folds=(0, 1)))
    slimmed = compress_model(model, tmp_path / "slim", HALF)
    assert slimmed.slim.macs < 0.8 * slimmed.dense.macs
    assert slimmed.slim.parameters < slimmed.dense.parameters
    got = stock_logits(tmp_path / "slim", folds=(0, 1))
    again = compress(build_network(model), model.weights, HALF, input_shape(model))
    from helpers import make_predictor, random_data

    predictor = make_predictor()
    predictor.initialize_from_trained_model_folder(str(model.path), (0, 1))
    predictor.network, predictor.list_of_parameters = again.network, list(again.weights)
    expected = predictor.predict_logits_from_preprocessed_data(random_data(predictor)).float()
    assert torch.equal(got, expected)
    dense = stock_logits(model.path, folds=(0, 1))
    assert dense.shape == got.shape and (dense - got).abs().max() > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_stock_predictor_gets_the_engine_with_a_slim_folder(kind, make_model, stock_logits, tmp_path, monkeypatch):
    """Outside of any context, for each fold in turn; a context takes the plain network out of it."""
    made = []
    monkeypatch.setattr(engine, "rewritten", lambda *given: made.append(rewritten(*given)) or made[-1])
    compress_model(read_trained_model(make_model(kind, folds=(0, 1))), tmp_path / "slim", HALF)
    expected = stock_logits(tmp_path / "slim", folds=(0, 1))
    assert not made
    monkeypatch.setenv("NNSLIM_BACKEND", "eager")
    found = stock_logits(tmp_path / "slim", folds=(0, 1))
    assert len(made) == 2, "an engine for each fold"
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-3 * float(expected.abs().max()))  # sums in half
    with NNSlimContext({"run": {"backend": "stock"}}):
        assert torch.equal(stock_logits(tmp_path / "slim", folds=(0, 1)), expected)
    assert len(made) == 2


@pytest.mark.parametrize("kind", KINDS)
def test_compress_folder_forced_full_rank_same_labels_as_dense(kind, make_model, stock_logits, tmp_path):
    everything = {"first_layer": True, "pointwise": True, "heads": True, "transposed": True}
    config = tucker(rank_factor=1.0, only_if_cheaper=False, one_sided=False, **everything).model_copy(update=UNTIMED)
    source = make_model(kind)
    slimmed = compress_model(read_trained_model(source), tmp_path / "slim", config)
    assert all(decision.action == "tucker" for decision in slimmed.decisions if decision.macs_before)
    dense, slim = stock_logits(source), stock_logits(tmp_path / "slim")
    # Both are summed in half precision by nnU-Net; labels can differ only where two logits are a rounding step apart.
    torch.testing.assert_close(slim, dense, rtol=0, atol=2e-3 * float(dense.abs().max()))


def test_compress_folder_checkpoint_best_and_fold_all_keep_their_names(make_model, stock_logits, tmp_path):
    source = make_model(folds=("all",), checkpoint="checkpoint_best.pth")
    compress_model(read_trained_model(source), tmp_path / "slim", HALF)
    assert sorted(
        p.relative_to(tmp_path / "slim").as_posix() for p in (tmp_path / "slim").rglob("*") if p.is_file()
    ) == [
        "dataset.json",
        "fold_all/checkpoint_best.pth",
        "nnslim.json",
        "plan.csv",
        "plans.json",
    ]
    logits = stock_logits(tmp_path / "slim", folds="all", checkpoint="checkpoint_best.pth")
    assert torch.isfinite(logits).all()


def test_compress_folder_one_fold_of_two_writes_that_fold(make_model, tmp_path):
    compress_model(read_trained_model(make_model(folds=(0, 3)), folds=[3]), tmp_path / "slim", HALF)
    assert [p.name for p in (tmp_path / "slim").glob("fold_*")] == ["fold_3"]


def test_compress_folder_twice_same_bytes_of_weights(make_model, tmp_path):
    model = read_trained_model(make_model())
    for name in ("one", "two"):
        compress_model(model, tmp_path / name, HALF)
    files = [tmp_path / name / "fold_0" / "checkpoint_final.pth" for name in ("one", "two")]
    first, second = (torch.load(file, weights_only=False)["network_weights"] for file in files)
    assert all(torch.equal(first[key], second[key]) for key in first) and list(first) == list(second)


def test_compress_folder_plans_keep_other_configurations_dense(make_model, tmp_path):
    model = read_trained_model(make_model("cascade"))
    compress_model(model, tmp_path / "slim", HALF)
    configurations = json.loads((tmp_path / "slim" / "plans.json").read_text())["configurations"]
    classes = {name: settings["architecture"]["network_class_name"] for name, settings in configurations.items()}
    assert classes.pop("3d_cascade_fullres") == NETWORK_CLASS_NAME
    assert set(classes.values()) == {"dynamic_network_architectures.architectures.unet.PlainConvUNet"}
    assert configurations["3d_cascade_fullres"]["previous_stage"] == "3d_lowres"


def test_compress_folder_child_of_slim_configuration_stays_dense(make_model, tmp_path):
    source = make_model("plain")
    plans = json.loads((source / "plans.json").read_text())
    plans["configurations"]["3d_child"] = {"inherits_from": "3d_fullres", "batch_size": 7}
    (source / "plans.json").write_text(json.dumps(plans))
    compress_model(read_trained_model(source), tmp_path / "slim", HALF)
    child = json.loads((tmp_path / "slim" / "plans.json").read_text())["configurations"]["3d_child"]
    assert child["architecture"]["network_class_name"].endswith("PlainConvUNet") and child["batch_size"] == 7


def test_compress_folder_named_like_nnunet_gives_plans_their_name(make_model, tmp_path):
    target = tmp_path / "nnUNetTrainer__nnUNetPlansTucker05__3d_fullres"
    compress_model(read_trained_model(make_model()), target, HALF)
    assert json.loads((target / "plans.json").read_text())["plans_name"] == "nnUNetPlansTucker05"


def test_compress_folder_record_tells_versions_spec_and_counts(make_model, tmp_path):
    slimmed = compress_model(read_trained_model(make_model()), tmp_path / "slim", HALF)
    record = json.loads((tmp_path / "slim" / "nnslim.json").read_text())
    assert record["spec"] == slimmed.spec.to_dict()
    assert record["slim"]["parameters"] == slimmed.slim.parameters
    assert record["config"]["methods"][0]["settings"]["rank_factor"] == 0.5
    assert {layer["reason"] for layer in record["layers"]} >= {"", "first layer", "segmentation head"}


def test_slim_network_untouched_layers_keep_stock_keys(make_model, tmp_path):
    model = read_trained_model(make_model())
    slimmed = compress_model(model, tmp_path / "slim", HALF)
    stock, slim = set(model.weights[0]), set(slimmed.weights[0])
    for decision in slimmed.decisions:
        weight = f"{decision.layer}.weight"
        assert (weight in slim) == (decision.action == "dense")
        assert (f"{decision.layer}.core.weight" in slim) == (decision.action == "tucker")
    assert all("norm" in key or "conv" in key or "all_modules" in key for key in stock - slim)


def test_slim_network_is_instance_of_base_and_carries_spec(make_model, tmp_path):
    model = read_trained_model(make_model())
    compress_model(model, tmp_path / "slim", HALF)
    settings = read_trained_model(tmp_path / "slim").configuration_manager
    import pydoc

    kwargs = dict(settings.network_arch_init_kwargs)
    for key in settings.network_arch_init_kwargs_req_import:
        kwargs[key] = pydoc.locate(kwargs[key]) if kwargs[key] else None
    network = slim_network(1, 3, **{**kwargs, "deep_supervision": True})
    assert type(network).__name__ == "PlainConvUNet" and network.decoder.deep_supervision is True
    assert len(spec_of(network).edits) > 5
    assert len(network(torch.zeros(1, 1, 16, 16, 16))) == 2  # deep supervision still gives one output per stage


def test_compress_without_a_config_says_what_it_does(make_model, tmp_path, command, caplog):
    _, out, _ = command("compress", "-m", make_model(), "-o", tmp_path / "slim", "--allow-slower", expect=0)
    assert "no config is named: tucker-balanced" in caplog.text and "written" in out
    assert (tmp_path / "slim" / "plans.json").is_file()


def test_compress_folder_slim_source_is_refused(make_model, tmp_path):
    compress_model(read_trained_model(make_model()), tmp_path / "slim", HALF)
    with pytest.raises(ModelError, match="slim model already"):
        compress_model(read_trained_model(tmp_path / "slim"), tmp_path / "again", HALF)


def test_compress_folder_trainer_with_own_network_is_refused_with_the_way_out(make_model, tmp_path):
    source = make_model(trainer="nnUNetTrainerBN")
    with pytest.raises(ModelError, match=r"nnUNetTrainerBN builds its network itself.*NNSlimContext"):
        compress_model(read_trained_model(source), tmp_path / "slim", HALF)
    assert not (tmp_path / "slim").exists()


def test_compress_folder_existing_target_is_refused_and_untouched(make_model, tmp_path):
    (tmp_path / "slim").mkdir()
    (tmp_path / "slim" / "mine.txt").write_text("keep")
    with pytest.raises(OutputError, match="exists and is not overwritten"):
        compress_model(read_trained_model(make_model()), tmp_path / "slim", HALF)
    assert [p.name for p in (tmp_path / "slim").iterdir()] == ["mine.txt"]


def test_compress_folder_failure_midway_leaves_nothing(make_model, tmp_path):
    source = make_model(folds=(0, 1))
    path = source / "fold_1" / "checkpoint_final.pth"
    content = torch.load(path, weights_only=False)
    weights = content["network_weights"]
    key = next(iter(weights))
    weights[key] = torch.zeros(3)  # fold 0 fits, fold 1 does not
    torch.save(content, path)
    with pytest.raises((ModelError, SpecError), match=r"fold|size mismatch"):
        compress_model(read_trained_model(source), tmp_path / "out" / "slim", HALF)
    assert list((tmp_path / "out").iterdir()) == []


# --- bad folders -----------------------------------------------------------------------------------------------------


def test_read_not_a_folder_is_named(tmp_path):
    with pytest.raises(ModelError, match=r"nowhere is not a folder"):
        read_trained_model(tmp_path / "nowhere")


def test_read_folder_without_plans_is_named(tmp_path):
    with pytest.raises(ModelError, match=r"not an nnU-Net model folder: it has no plans\.json"):
        read_trained_model(tmp_path)


def test_read_missing_fold_names_those_that_are_there(make_model):
    with pytest.raises(ModelError, match=r"no checkpoint_final\.pth in .*fold_4.*folds in the model folder: fold_0"):
        read_trained_model(make_model(), folds=[4])


@pytest.mark.parametrize("keep", [0.0, 0.5, 0.99])
def test_read_truncated_checkpoint_is_named(make_model, keep):
    source = make_model()
    path = source / "fold_0" / "checkpoint_final.pth"
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * keep)])
    with pytest.raises(ModelError, match=r"checkpoint_final\.pth is (truncated or damaged|not a readable)"):
        read_trained_model(source)


def test_read_other_torch_file_is_named(make_model):
    source = make_model()
    torch.save({"model": 1}, source / "fold_0" / "checkpoint_final.pth")
    with pytest.raises(ModelError, match="not an nnU-Net v2 checkpoint: it lacks init_args, network_weights"):
        read_trained_model(source)


@reads_weights_alone
def test_read_checkpoint_with_code_is_refused_and_code_does_not_run(make_model, capsys):
    source = make_model()
    plant_bomb(source / "fold_0" / "checkpoint_final.pth")
    with pytest.raises(ModelError, match="holds more than weights and numbers"):
        read_trained_model(source)
    assert "code ran" not in capsys.readouterr().out
    assert read_trained_model(source, trust=True).trainer_name == "nnUNetTrainer"
    assert "code ran" in capsys.readouterr().out


def test_read_checkpoint_of_numpy_1_is_read_without_trust(make_model):
    """TotalSegmentator's weights were written with numpy 1, which names its scalars by another module."""
    source = make_model()
    path = source / "fold_0" / "checkpoint_final.pth"
    with zipfile.ZipFile(path) as archive:
        entries = {info.filename: archive.read(info) for info in archive.infolist()}
    name = next(name for name in entries if name.endswith("data.pkl"))
    for new in (b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n"):
        entries[name] = entries[name].replace(new, b"cnumpy.core.multiarray\n")
    assert b"cnumpy.core.multiarray\nscalar" in entries[name]
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for filename, content in entries.items():
            archive.writestr(filename, content)
    assert float(read_trained_model(source).checkpoints["0"]["_best_ema"]) == 0.5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"network_class_name": "os.system"}, r"names 'os\.system', which is not one of the classes"),
        ({"network_class_name": "torch.os.system"}, r"names 'torch\.os\.system', which is not one"),
        (
            {"network_class_name": "dynamic_network_architectures.architectures.unet.NoSuchNet"},
            r"NoSuchNet', which is not installed",
        ),
        ({"nonlin": "torch.os.system"}, r"nonlin, names 'torch\.os\.system'"),
    ],
)
def test_read_plans_with_unknown_or_foreign_class_is_refused(make_model, change, message):
    source = make_model()
    plans = json.loads((source / "plans.json").read_text())
    architecture = plans["configurations"]["3d_fullres"]["architecture"]
    for key, value in change.items():
        (architecture if key in architecture else architecture["arch_kwargs"])[key] = value
    (source / "plans.json").write_text(json.dumps(plans))
    with pytest.raises(ModelError, match=message):
        read_trained_model(source)


@reads_weights_alone
def test_predictor_reads_each_checkpoint_once_and_runs_no_code_from_it(make_model, stock_logits, monkeypatch):
    from helpers import random_data

    source, asked, load = make_model(folds=(0, 1)), [], torch.load

    def watched(file, *arguments, **options):
        asked.append((str(file).split("/")[-2], options.get("weights_only")))
        return load(file, *arguments, **options)

    expected = stock_logits(source, folds=(0, 1))
    monkeypatch.setattr(torch, "load", watched)
    predictor = load_predictor(source, None, PredictSettings(backend="stock", mirroring=False))
    assert asked == [("fold_0", True), ("fold_1", True)]
    assert torch.equal(predictor.predict_logits_from_preprocessed_data(random_data(predictor)).float(), expected)


def test_read_plans_that_are_no_json_are_named(make_model):
    source = make_model()
    (source / "plans.json").write_text('{"configurations": ')
    with pytest.raises(ModelError, match=r"plans\.json cannot be read as JSON"):
        read_trained_model(source)


def test_build_weights_of_another_network_are_named(make_model):
    plain, wide = make_model(), make_model(parent="other")
    plans = json.loads((wide / "plans.json").read_text())
    plans["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"]["features_per_stage"] = [8, 16, 64]
    (plain / "plans.json").write_text(json.dumps(plans))
    with pytest.raises(ModelError, match="cannot be built or does not fit its checkpoint"):
        build_network(read_trained_model(plain))


def test_read_unknown_trainer_names_the_way_out(make_model, monkeypatch):
    monkeypatch.delenv("nnUNet_extTrainer", raising=False)
    source = make_model(trainer="nnUNetTrainerOfMine")
    with pytest.raises(ModelError, match=r"nnUNetTrainerOfMine.*nnUNet_extTrainer"):
        build_network(read_trained_model(source))


def test_read_model_stored_in_half_precision_is_written_in_half_precision(make_model, tmp_path):
    from nnslim.hosts.nnunet.model.shipped import write_for_shipping

    source = make_model()
    write_for_shipping(source, tmp_path / "small")
    compress_model(read_trained_model(tmp_path / "small"), tmp_path / "slim", HALF)
    weights = read_trained_model(tmp_path / "slim").weights[0]
    assert {tensor.dtype for tensor in weights.values()} == {torch.float16}
    small = (tmp_path / "small" / "fold_0" / "checkpoint_final.pth").stat().st_size
    full = (source / "fold_0" / "checkpoint_final.pth").stat().st_size
    assert small < 0.7 * full
    assert np.isfinite(float(sum(tensor.float().sum() for tensor in weights.values())))
    shutil.rmtree(tmp_path / "slim")
