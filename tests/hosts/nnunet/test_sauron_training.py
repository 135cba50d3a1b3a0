"""Sauron inside nnU-Net's trainer: what is written, resumed, predicted by stock nnU-Net, and found by name."""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import (
    final_of,
    offer_gloo_trainer,
    plant_bomb,
    spied,
    stock_prediction,
    train_sauron_rank,
    write_ball_dataset,
)

from nnslim.compression.record import SlimRecord
from nnslim.context import NNSlimContext
from nnslim.errors import ConfigError, InputError, ModelError, OutputError
from nnslim.hosts.nnunet.model.trained_model import build_network, read_trained_model, trainer_class
from nnslim.hosts.nnunet.train import train_dataset as train_module
from nnslim.hosts.nnunet.train.optimizer_steps import OptimizerSteps
from nnslim.hosts.nnunet.train.sauron_trainer import sauron_trainer_class
from nnslim.hosts.nnunet.train.settings import TrainingSettings
from nnslim.hosts.nnunet.train.train_dataset import train_dataset
from nnslim.methods.sauron import SauronConfig
from nnslim.network.spec import spec_of
from nnslim.surgery.narrow import widths_of
from studies.short_training import preprocess_once

# Thresholds that move and bite within four epochs
QUICK = {"epochs": 4, "iterations": 2, "validation_iterations": 1, "batch_size": 2, "batches": 2, "patience": 1}
BITES = SauronConfig(**QUICK, threshold_first=0.75, threshold_max=0.85, min_filters=4, settle=0.25)
NAME = "nnUNetTrainerSauron__nnUNetPlans__3d_fullres"


def settings(config=BITES, **changes) -> TrainingSettings:
    return TrainingSettings(sauron=config, **changes)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Preprocessed data, an uninterrupted training of four epochs, and the folder for results."""
    root = tmp_path_factory.mktemp("sauron")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("raw", "preprocessed", "results"):
            patch.setenv(f"nnUNet_{name}", str(root / name))
        patch.setenv("nnUNet_n_proc_DA", "1")
        write_ball_dataset(root / "raw" / "Dataset998_Ball")
        folder = preprocess_once(998, "3d_fullres", 1)
        plans = json.loads((folder / "nnUNetPlans.json").read_text())
        kwargs = plans["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"]
        kwargs["features_per_stage"] = [8, 16, 24]
        (folder / "nnUNetPlans.json").write_text(json.dumps(plans))
        patch.setenv("nnUNet_n_proc_DA", "0")  # augmentation in this process: random numbers can be repeated
        whole = train_dataset(998, settings())
        kept = Path(shutil.move(whole, root / "whole"))
        yield SimpleNamespace(whole=kept, results=root / "results" / "Dataset998_Ball", preprocessed=folder)


@pytest.fixture
def results(world):
    shutil.rmtree(world.results, ignore_errors=True)
    yield world.results
    shutil.rmtree(world.results, ignore_errors=True)


def rows_of(folder, fold=0):
    with (folder / f"fold_{fold}" / "pruning.csv").open() as stream:
        return list(csv.DictReader(stream))


def test_training_narrows_the_network_and_stock_nnunet_predicts_with_every_checkpoint(world):
    final = final_of(world.whole)
    assert final["trainer_name"] == "nnUNetTrainer" and final["current_epoch"] == 4
    record = json.loads((world.whole / "fold_0" / "nnslim.json").read_text())
    slim = SlimRecord.from_dict(record)
    assert slim.slim.macs < 0.7 * slim.dense.macs and slim.slim.parameters < slim.dense.parameters
    for name in ("checkpoint_final.pth", "checkpoint_best.pth"):
        predictor, logits = stock_prediction(world.whole, name=name)
        assert torch.isfinite(logits).all()
        for key, value in final_of(world.whole, name=name)["network_weights"].items():
            assert predictor.network.state_dict()[key].shape == value.shape
    plans = json.loads((world.whole / "plans.json").read_text())
    spec = plans["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"]["nnslim_spec"]
    assert [edit["kind"] for edit in spec["edits"]][-1] == "elastic"
    assert spec["edits"][:-1] == record["spec"]["edits"] == final["nnslim_sauron"]["spec"]["edits"]
    model = read_trained_model(world.whole)  # without trust: only plain values were added
    network = build_network(model)
    widths = widths_of(network)
    assert {
        edit["layer"]: (edit["outputs"], edit["inputs"]) for edit in record["spec"]["edits"]
    }.items() <= widths.items()
    assert spec_of(network) is not None


def test_training_in_bfloat16_prunes_alike_and_leaves_float32_weights(world, results):
    folder = train_dataset(998, settings(precision="bf16"))
    exact, half = rows_of(world.whole), rows_of(folder)
    first = [float(rows[0]["train_loss"]) for rows in (exact, half)]
    assert first[0] != first[1] and first[0] == pytest.approx(first[1], abs=0.03)
    assert int(half[-1]["macs"]) < 0.7 * int(half[0]["macs"])
    assert all(value.dtype == torch.float32 for value in final_of(folder)["network_weights"].values())
    assert torch.isfinite(stock_prediction(folder)[1]).all()


def test_history_tables_and_pictures_agree_with_the_checkpoint(world):
    rows = rows_of(world.whole)
    epochs = sorted({int(row["epoch"]) for row in rows})
    assert epochs == [0, 1, 2, 3]
    macs = [int(next(row["macs"] for row in rows if row["epoch"] == str(epoch))) for epoch in epochs]
    assert macs[0] >= macs[1] >= macs[2] == macs[3]  # the last quarter settles
    weights = final_of(world.whole)["network_weights"]
    for row in (row for row in rows if row["epoch"] == "3"):
        shape = weights[f"{row['layer']}.weight"].shape
        assert int(row["filters"]) == shape[1 if "transpconvs" in row["layer"] else 0] >= 4
    log = final_of(world.whole)["logging"]
    assert [float(next(r["dice"] for r in rows if r["epoch"] == str(e))) for e in epochs] == pytest.approx(
        log["mean_fg_dice"]
    )
    for name, side in (("out_filters", 0), ("in_filters", 1)):
        lines = (world.whole / "fold_0" / name).read_text().splitlines()
        header, last = lines[0].split("\t"), lines[-1].split("\t")
        assert len(lines) == 5 and header == sorted(header)
        for layer, width in zip(header, last, strict=True):  # the last row defines the architecture
            axis = 1 - side if "transpconvs" in layer else side
            assert int(width) == weights[f"{layer}.weight"].shape[axis]
    from matplotlib.image import imread

    for name in ("pruning.png", "pruning_widths.png"):
        assert imread(world.whole / "fold_0" / name).std() > 0.01


class StoppedError(Exception):
    """Stands for a kill."""


@pytest.mark.parametrize("moment", [1, 2, 3])
def test_killed_and_resumed_training_is_the_same_curve(moment, world, results):
    """The original restarted Adam's moments and kept no threshold in its models."""

    def stop(done, total):
        if done == moment:
            raise StoppedError

    with pytest.raises(StoppedError):
        train_dataset(998, settings(), stop)
    with pytest.raises(OutputError, match=r"fold_0 has a checkpoint_latest.pth .*--continue"):
        train_dataset(998, settings())
    again = train_dataset(998, settings(resume=True))
    assert again == results / NAME
    whole, resumed = final_of(world.whole), final_of(again)
    for key in ("train_losses", "val_losses", "mean_fg_dice"):
        np.testing.assert_allclose(resumed["logging"][key], whole["logging"][key], rtol=1e-4, atol=1e-5)
    timeless = [[{k: v for k, v in row.items() if k != "seconds"} for row in rows_of(f)] for f in (world.whole, again)]
    for one, other in zip(*timeless, strict=True):
        for key in ("epoch", "layer", "filters", "removed", "threshold", "patience", "macs"):
            assert one[key] == other[key]
    for key, value in whole["network_weights"].items():
        torch.testing.assert_close(resumed["network_weights"][key], value, rtol=1e-3, atol=1e-4)
    states = [content["optimizer_state"]["state"] for content in (whole, resumed)]
    assert states[0].keys() == states[1].keys()
    for key, state in states[0].items():
        torch.testing.assert_close(states[1][key]["momentum_buffer"], state["momentum_buffer"], rtol=1e-2, atol=1e-3)


def test_continued_training_runs_no_code_from_its_checkpoint_or_plans(world, results, capsys):
    shutil.copytree(world.whole, results / NAME)
    plant_bomb(results / NAME / "fold_0" / "checkpoint_final.pth")
    with pytest.raises(ModelError, match="holds more than weights"):
        train_dataset(998, settings(resume=True))
    assert "code ran" not in capsys.readouterr().out
    plans = json.loads((world.preprocessed / "nnUNetPlans.json").read_text())
    plans["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"]["nonlin"] = "os.system"
    (world.preprocessed / "evil.json").write_text(json.dumps({**plans, "plans_name": "evil"}))
    with pytest.raises(ModelError, match=r"names 'os\.system'"):
        train_dataset(998, settings(), plans_name="evil")
    (world.preprocessed / "evil.json").unlink()


def test_folds_of_other_widths_predict_together(world, results):
    shutil.copytree(world.whole, results / NAME)
    other = BITES.model_copy(update={"threshold_first": 0.65, "threshold_max": 0.7})
    folder = train_dataset(998, settings(other, folds=["all"]))
    widths = [final_of(folder, fold)["nnslim_sauron"]["spec"] for fold in (0, "all")]
    assert widths[0] != widths[1]
    single = [stock_prediction(folder, (fold,))[1].float() for fold in (0, "all")]
    together = stock_prediction(folder, (0, "all"))[1].float()
    torch.testing.assert_close(together, sum(single) / 2, rtol=1e-2, atol=1e-2)


def test_adam_and_start_from_a_pruned_model_go_on_narrower(world, results):
    config = SauronConfig(
        **{**QUICK, "epochs": 2, "settle": 0, "start": world.whole, "optimizer": "adam", "fold": True},
        threshold_first=0.8,
        threshold_max=0.9,
    )
    folder = train_dataset(998, settings(config))
    before, after = final_of(world.whole), final_of(folder)
    record = json.loads((folder / "fold_0" / "nnslim.json").read_text())
    assert after["nnslim_sauron"]["history"][0]["filters_left"] < before["nnslim_sauron"]["history"][-1]["filters_left"]
    assert record["dense"]["macs"] == json.loads((world.whole / "fold_0" / "nnslim.json").read_text())["slim"]["macs"]
    assert {"exp_avg", "exp_avg_sq", "step"} <= set(after["optimizer_state"]["state"][0])
    assert torch.isfinite(stock_prediction(folder)[1]).all()


def test_loss_is_nnunets_own_plus_lambda_times_the_distance(world, results):
    plans = json.loads((world.preprocessed / "nnUNetPlans.json").read_text())
    dataset = json.loads((world.preprocessed / "dataset.json").read_text())
    found = {}
    for strength in (0.0, 0.5):
        cls = sauron_trainer_class(BITES.model_copy(update={"strength": strength}))
        trainer = cls({**plans, "continue_training": False}, "3d_fullres", 0, dataset, torch.device("cpu"))
        trainer.initialize()
        generator = torch.Generator().manual_seed(3)
        size = trainer.configuration_manager.patch_size
        data = torch.randn(2, 1, *size, generator=generator)
        scales = trainer._get_deep_supervision_scales()
        target = [torch.zeros(2, 1, *[round(n * s) for n, s in zip(size, scale, strict=True)]) for scale in scales]
        target[0][:, :, 4:9, 4:9, 4:9] = 1
        trainer.network.train()
        trainer.pruner.begin_epoch(0)
        plain = float(trainer.loss.loss(trainer.network(data), target))
        distance = float(trainer.pruner.watch.loss())
        found[strength] = (plain, distance, float(trainer.train_step({"data": data, "target": target})["loss"]))
        assert not trainer.pruner.watch.maps  # nothing is held until the next step
    assert found[0.0][2] == pytest.approx(found[0.0][0], rel=1e-5)
    assert found[0.5][:2] == pytest.approx(found[0.0][:2], rel=1e-5)  # the same first weights
    assert found[0.5][2] == pytest.approx(found[0.5][0] + 0.5 * found[0.5][1], rel=1e-5)


def test_stock_command_finds_the_trainer_by_name(world, results, monkeypatch):
    pytest.importorskip("nnunetv2.utilities.find_objects", reason="nnUNet_extTrainer came with nnU-Net 2.8")
    import nnslim.hosts.nnunet.train.ext as trainers

    monkeypatch.setenv("nnUNet_extTrainer", trainers.__path__[0])
    section = BITES.model_copy(update={"settle": 0.0}).model_dump_json()
    monkeypatch.setenv("NNSLIM_TRAINING", f'{{"epochs": 2, "sauron": {section}}}')
    # In a process of its own: where TotalSegmentator is imported after nnU-Net's trainer, nnU-Net's validation cannot
    # send its export to other processes.
    code = "from nnunetv2.run.run_training import run_training_entry as run; run()"
    options = ["998", "3d_fullres", "0", "-tr", "nnUNetTrainerSauron", "-device", "cpu"]
    done = subprocess.run([sys.executable, "-c", code, *options], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    final = final_of(results / NAME)
    assert final["current_epoch"] == 2 and final["trainer_name"] == "nnUNetTrainer"
    assert (results / NAME / "fold_0" / "validation" / "summary.json").is_file()
    monkeypatch.delenv("nnUNet_extTrainer")
    assert torch.isfinite(stock_prediction(results / NAME)[1]).all()


def test_context_makes_sauron_of_any_training_in_it_and_takes_it_back(world, results):
    from nnunetv2.run import run_training as module

    before = dict(vars(module))
    config = BITES.model_copy(update={"epochs": 1, "settle": 0.0})
    with NNSlimContext(config) as slim:
        module.run_training("998", "3d_fullres", 0, "nnUNetTrainerNoMirroring", device=torch.device("cpu"))
    assert dict(vars(module)) == before
    folder = results / "nnUNetTrainerNoMirroringSauron__nnUNetPlans__3d_fullres"
    final = final_of(folder)
    assert final["trainer_name"] == "nnUNetTrainerNoMirroring" and "nnslim_sauron" in final
    assert slim.config.training is not None
    assert torch.isfinite(stock_prediction(folder)[1]).all()


def test_train_command_runs_and_its_options_reach_the_training(world, results, command, tmp_path, monkeypatch):
    """The original's --batch_size took the value of --epochs, and other options did nothing."""
    options = "--epochs 1 --iterations 2 --validation-iterations 1 --batch-size 3 --learning-rate 0.002 --strength 0"
    control = ["--accumulate", "2", "--warmup-steps", "3", "--gradient-clip", "1"]
    steps = spied(OptimizerSteps, monkeypatch)
    code, out, err = command("train", "-d", 998, "--method", "sauron", "-f", 1, *options.split(), *control, "-q")
    assert code == 0, err
    assert [(one.taken, one.accumulate, one.warmup, one.clip) for one in steps] == [(1, 2, 3, 1.0)]
    folder = results / NAME
    assert out.strip() == f"written: {folder}"
    final = final_of(folder, 1)
    assert final["init_args"]["plans"]["configurations"]["3d_fullres"]["batch_size"] == 3
    assert final["logging"]["lrs"] == [0.002] and final["nnslim_sauron"]["settings"]["strength"] == 0
    assert final["nnslim_sauron"]["settings"]["iterations"] == 2
    assert final["nnslim_sauron"]["settings"]["fold"] is None  # what -f means is the fold of the data
    again = command("train", "-d", 998, "-f", "all", "--macs", 0.6, *options.split())
    assert again[0] == 1 and again[1].strip() == f"written: {folder}" and final_of(folder, "all")
    assert "nnslim: the target macs 0.6 was not reached: 100.0% of the MACs are left after 1 epoch(s); set" in again[2]
    refused = command("train", "-d", 998, "--method", "tucker")
    assert refused[0] == 2 and "tucker needs no training" in refused[2]
    refused = command("train", "-d", 998, "--method", "sauron", "--configuration", "2d_x")
    assert refused[0] == 2 and "has no configuration '2d_x'" in refused[2]
    refused = command("compress", "-m", folder, "-o", tmp_path / "x", "-c", "sauron")
    assert refused[0] == 2 and "nnslim train --method sauron" in refused[2]


def test_feature_maps_are_saved_without_pruning(world, results, command, tmp_path):
    """As the settings in docs/sauron.md say; these thresholds would remove filters after the first epoch."""
    whole = json.loads((world.whole / "fold_0" / "nnslim.json").read_text())
    method = {"method": "sauron", "strength": 0, "macs": 1, "save_maps": 2, "threshold_first": 0.75}
    (tmp_path / "maps.yml").write_text(json.dumps({"methods": [{**method, "threshold_max": 0.85}]}))
    options = "--epochs 3 --iterations 2 --validation-iterations 1 --batch-size 2 -q"
    command("train", "-d", 998, "-c", tmp_path / "maps.yml", *options.split(), expect=0)
    record = json.loads((results / NAME / "fold_0" / "nnslim.json").read_text())
    assert record["slim"] == record["dense"] == whole["dense"]
    folders = sorted((results / NAME / "fold_0" / "fms").iterdir())
    assert [folder.name for folder in folders] == ["0", "2"]
    for folder in folders:
        maps = {path.stem: np.load(path) for path in folder.iterdir()}
        assert {name: len(values) for name, values in maps.items()} == {
            row["layer"]: int(row["filters"]) for row in rows_of(results / NAME)
        }
    assert not np.array_equal(*[np.load(folder / "encoder.stages.0.0.convs.0.conv.npy") for folder in folders])


def test_unusable_settings_are_named(world, results, monkeypatch, tmp_path):
    with pytest.raises(InputError, match="dataset '7': expected one dataset"):
        train_dataset(7, settings())
    monkeypatch.setenv("NNSLIM_SAURON", "tucker-balanced")
    with pytest.raises(ConfigError, match="'tucker-balanced': that configuration has no method sauron"):
        sauron_trainer_class()
    monkeypatch.delenv("nnUNet_results")
    with pytest.raises(ConfigError, match="nnUNet_results is not set"):
        train_dataset(998, settings())


def test_pruned_model_is_compressed_and_fine_tuned_like_any_other(world, results, tmp_path, monkeypatch):
    from nnslim.compression.config import RunConfig, tucker
    from nnslim.hosts.nnunet.compress.compress_model import compress_model
    from nnslim.hosts.nnunet.train.finetune_model import finetune_model

    pruned = read_trained_model(world.whole)
    untimed = {"run": RunConfig(guard=False)}
    half = tucker(rank_factor=0.5, rank_min=2).model_copy(update=untimed)
    slimmed = compress_model(pruned, tmp_path / "both", half, allow_slower=True)
    kinds = {edit.kind for edit in slimmed.spec.edits}
    assert kinds == {"narrow", "tucker"}
    predictor, logits = stock_prediction(tmp_path / "both")
    assert torch.isfinite(logits).all() and spec_of(predictor.network) == slimmed.spec
    full = tucker(rank_factor=1.0, only_if_cheaper=False, one_sided=False).model_copy(update=untimed)
    compress_model(pruned, tmp_path / "exact", full, allow_slower=True)
    exact, alone = stock_prediction(tmp_path / "exact")[1], stock_prediction(world.whole)[1]
    torch.testing.assert_close(exact, alone, rtol=1e-2, atol=2e-2)
    tuning = TrainingSettings(epochs=1, iterations=1, validation_iterations=1, batch_size=2, processes=1)
    tuned = finetune_model(world.whole, tmp_path / "tuned", 998, tuning)
    for key, value in final_of(tuned)["network_weights"].items():
        assert value.shape == final_of(world.whole)["network_weights"][key].shape
    assert len(final_of(tuned)["optimizer_state"]["state"]) > 10
    assert torch.isfinite(stock_prediction(tuned)[1]).all()


def test_two_processes_remove_the_same_filters(world, results, tmp_path, monkeypatch):
    pytest.importorskip("nnunetv2.utilities.find_objects", reason="nnUNet_extTrainer came with nnU-Net 2.8")
    offer_gloo_trainer(tmp_path / "trainers", monkeypatch)
    meeting = (tmp_path / "ranks").as_uri()
    config = BITES.model_copy(update={"fold": True})
    torch.multiprocessing.spawn(train_sauron_rank, args=(meeting, config), nprocs=2, join=True)
    (folder,) = results.iterdir()
    assert final_of(folder)["trainer_name"] == "nnUNetTrainerGloo"


def test_trainer_with_sauron_in_it_gets_it_once():
    plain = trainer_class("nnUNetTrainerNoMirroring")
    once = sauron_trainer_class(SauronConfig(), plain)
    twice = sauron_trainer_class(BITES, once)
    assert twice.__bases__ == once.__bases__ and twice.given.sauron is BITES
    assert twice.__name__ == "nnUNetTrainerNoMirroringSauron" and twice.plain_name == "nnUNetTrainerNoMirroring"


def test_compiled_network_is_unwrapped_narrowed_and_compiled_again(world, results, monkeypatch):
    compiled, compile_ = [], torch.compile

    def aot_eager(module):
        """As torch.compile traces and differentiates, without its minutes of code generation."""
        compiled.append(module)
        return compile_(module, backend="aot_eager")

    class Compiled(trainer_class("nnUNetTrainer")):
        def _do_i_compile(self):
            return True

    Compiled.__name__ = "nnUNetTrainer"
    monkeypatch.setattr(torch, "compile", aot_eager)
    monkeypatch.setattr(train_module, "sauron_trainer_class", lambda chosen: sauron_trainer_class(chosen, Compiled))
    folder = train_dataset(998, settings())
    rows, plain = rows_of(folder), rows_of(world.whole)
    assert [row["filters"] for row in rows] == [row["filters"] for row in plain]
    removals = sum(any(int(row["removed"]) for row in plain if row["epoch"] == str(epoch)) for epoch in range(4))
    assert removals
    assert sum(module is compiled[0] for module in compiled) == 1 + removals  # nnU-Net compiles a loss, too
    assert [float(row["train_loss"]) for row in rows] == pytest.approx(
        [float(row["train_loss"]) for row in plain], abs=1e-4
    )
    weights = final_of(folder)["network_weights"]
    assert not any("_orig_mod" in key for key in weights)
    assert {key: value.shape for key, value in weights.items()} == {
        key: value.shape for key, value in final_of(world.whole)["network_weights"].items()
    }
