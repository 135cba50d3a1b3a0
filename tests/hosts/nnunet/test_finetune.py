"""Fine-tuning inside nnU-Net's trainer: what is written, what is resumed, what is refused."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from helpers import final_of, offer_gloo_trainer, plant_bomb, spied, stock_prediction, write_ball_dataset

from nnslim.cli import main
from nnslim.compression.config import RunConfig, changed_settings, tucker
from nnslim.compression.distillation import distillation_loss
from nnslim.errors import ConfigError, InputError, ModelError, OutputError
from nnslim.hosts.nnunet.cases.prepared_data import find_dataset, prepare_data
from nnslim.hosts.nnunet.compress.compress_model import compress_model
from nnslim.hosts.nnunet.model.trained_model import model_key, read_trained_model
from nnslim.hosts.nnunet.train.finetune_model import begin_record, finetune_model, fold_job, run_ranks
from nnslim.hosts.nnunet.train.finetune_trainer import DistilledLoss, fold_trainer
from nnslim.hosts.nnunet.train.optimizer_steps import OptimizerSteps
from nnslim.hosts.nnunet.train.settings import FINETUNING, TrainingSettings
from nnslim.network.spec import spec_of
from studies.short_training import ShortTraining, train_short

TINY = TrainingSettings(epochs=2, iterations=2, validation_iterations=1, batch_size=2, learning_rate=1e-3, processes=1)
STOCK = "nnUNetPlans_3d_fullres"


class Ball(NamedTuple):
    """A dense model trained for a moment, a slim one made from it, and the folder of preprocessed data."""

    dense: Path
    slim: Path
    preprocessed: Path


@pytest.fixture(scope="module")
def ball(tmp_path_factory):
    root = tmp_path_factory.mktemp("ball")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("raw", "preprocessed", "results"):
            patch.setenv(f"nnUNet_{name}", str(root / name))
        patch.setenv("nnUNet_n_proc_DA", "1")
        write_ball_dataset(root / "raw" / "Dataset998_Ball")
        dense = train_short(998, "3d_fullres", 0, ShortTraining(1, 2, 1, 2)).parent
        dense = Path(shutil.move(dense, root / "dense"))
        half = tucker(rank_factor=0.5, rank_min=4).model_copy(update={"run": RunConfig(guard=False)})
        compress_model(read_trained_model(dense), root / "slim", half)
        patch.setenv("nnUNet_n_proc_DA", "0")  # augmentation in this process: random numbers can be repeated
        yield Ball(dense, root / "slim", root / "preprocessed" / "Dataset998_Ball")


def settings_with(**changes) -> TrainingSettings:
    return changed_settings(TINY, changes, "test")


def make_trainer(ball, output, teacher=None, **changes):
    """Return the trainer of fold 0, initialised, with the slim weights."""
    source = read_trained_model(ball.slim)
    data = prepare_data(source, 998, 1)
    settings = settings_with(teacher=teacher, **changes).with_defaults(**FINETUNING)
    return fold_trainer(fold_job(source, output, data, "0", "nnUNetTrainer", settings), torch.device("cpu"))


def test_finetune_adamw_constant_gives_a_folder_that_stock_nnunet_loads(ball, tmp_path):
    seen = []
    output = finetune_model(ball.slim, tmp_path / "out", 998, TINY, lambda *counts: seen.append(counts))
    assert output == tmp_path / "out"
    assert seen[0] == (1, 2) and seen[-1] == (2, 2)
    assert not Path(os.environ["nnUNet_results"], "Dataset998_Ball", "nnUNetTrainer__nnUNetPlans__3d_fullres").exists()
    before = read_trained_model(ball.slim)
    final, best = final_of(output), final_of(output, name="checkpoint_best.pth")
    assert {p.name for p in (output / "fold_0").glob("*.pth*")} == {"checkpoint_final.pth", "checkpoint_best.pth"}
    assert final["trainer_name"] == "nnUNetTrainer" and final["current_epoch"] == 2
    assert final["logging"]["lrs"] == [1e-3, 1e-3]
    group = final["optimizer_state"]["param_groups"][0]
    assert "betas" in group and group["weight_decay"] == 3e-5  # AdamW, the trainer's decay
    assert final["init_args"]["plans"]["configurations"]["3d_fullres"]["data_identifier"] == STOCK
    for name in ("checkpoint_final.pth", "checkpoint_best.pth"):
        predictor, logits = stock_prediction(output, name=name)
        assert spec_of(predictor.network).to_dict() == json.loads((ball.slim / "nnslim.json").read_text())["spec"]
        assert torch.isfinite(logits).all()
    assert set(final["network_weights"]) == set(before.weights[0])
    changed = {k for k, v in final["network_weights"].items() if not torch.equal(v, before.weights[0][k])}
    cores = {k for k in before.weights[0] if k.endswith("core.weight")}
    assert cores and cores <= changed
    assert best["current_epoch"] in (1, 2)


def test_finetune_record_keeps_the_source_and_says_what_was_done(ball, tmp_path):
    output = finetune_model(ball.slim, tmp_path / "out", 998, TINY)
    source, record = (json.loads((p / "nnslim.json").read_text()) for p in (ball.slim, output))
    done = record.pop("finetune")
    assert {k: v for k, v in record.items() if k not in ("folds", "checkpoint")} == {
        k: v for k, v in source.items() if k not in ("folds", "checkpoint")
    }
    assert (done["dataset"], done["trainer"], done["source"]) == ("Dataset998_Ball", "nnUNetTrainer", "slim")
    assert done["settings"]["learning_rate"] == 1e-3
    fold, log = done["folds"]["0"], final_of(output)["logging"]
    assert fold["epochs"] == 2 and fold["seconds"] > 0
    assert fold["pseudo_dice"] == {"ball": pytest.approx(log["dice_per_class_or_region"][-1][0], abs=1e-4)}
    assert 0 <= fold["pseudo_dice_before"]["ball"] <= 1
    text = next((output / "fold_0").glob("training_log*.txt")).read_text()
    assert text.index("Validation before epoch 0") < text.index("Epoch 0")
    again = finetune_model(output, tmp_path / "again", 998, settings_with(epochs=1))
    assert json.loads((again / "nnslim.json").read_text())["finetune"]["earlier"] == done


def test_finetune_sgd_poly_decays_as_nnunet_does(ball, tmp_path):
    settings = settings_with(optimizer="sgd", schedule="poly", learning_rate=1e-2, weight_decay=1e-4)
    final = final_of(finetune_model(ball.slim, tmp_path / "out", "Dataset998_Ball", settings))
    assert final["logging"]["lrs"] == pytest.approx([1e-2, 1e-2 * 0.5**0.9])
    group = final["optimizer_state"]["param_groups"][0]
    assert (group["momentum"], group["nesterov"], group["weight_decay"]) == (0.99, True, 1e-4)
    assert final["init_args"]["plans"]["configurations"]["3d_fullres"]["batch_size"] == 2


class StoppedError(Exception):
    """Stands for a kill."""


def stop_after_first(done, total):
    if done == 1:
        raise StoppedError


def test_resumed_training_equals_an_uninterrupted_one(ball, tmp_path):
    """tucker-cnn wrote no .pth, could not resume, and let latest, best and final overwrite one file."""
    whole = final_of(finetune_model(ball.slim, tmp_path / "whole", 998, TINY))
    part = tmp_path / "part"
    with pytest.raises(StoppedError):
        finetune_model(ball.slim, part, 998, TINY, stop_after_first)
    files = {p.name for p in (part / "fold_0").glob("*.pth*")}
    assert files == {"checkpoint_latest.pth", "checkpoint_best.pth"}
    latest = final_of(part, name="checkpoint_latest.pth")
    assert latest["current_epoch"] == 1
    assert latest["_best_ema"] == latest["logging"]["ema_fg_dice"][-1]  # nnU-Net's own latest is one epoch behind
    resumed = final_of(finetune_model(ball.slim, part, 998, settings_with(resume=True)))
    assert resumed["current_epoch"] == whole["current_epoch"] == 2
    for key in ("lrs", "train_losses", "val_losses", "mean_fg_dice"):
        np.testing.assert_allclose(resumed["logging"][key], whole["logging"][key], rtol=1e-4, atol=1e-5)
    for key, value in whole["network_weights"].items():
        torch.testing.assert_close(resumed["network_weights"][key], value, rtol=1e-3, atol=1e-4)
    steps = {float(state["step"]) for state in resumed["optimizer_state"]["state"].values()}
    assert steps == {float(state["step"]) for state in whole["optimizer_state"]["state"].values()} == {4.0}
    assert not (part / "fold_0" / "checkpoint_latest.pth").exists()


def test_finetune_continue_runs_no_code_from_the_checkpoint(ball, tmp_path, capsys):
    with pytest.raises(StoppedError):
        finetune_model(ball.slim, tmp_path / "part", 998, TINY, stop_after_first)
    latest = tmp_path / "part" / "fold_0" / "checkpoint_latest.pth"
    plant_bomb(latest)
    with pytest.raises(ModelError, match=r"checkpoint_latest\.pth holds more than weights"):
        finetune_model(ball.slim, tmp_path / "part", 998, settings_with(resume=True))
    with pytest.raises(ModelError, match="holds more than weights"):
        make_trainer(ball, tmp_path / "other").load_checkpoint(str(latest))
    assert "code ran" not in capsys.readouterr().out


def test_finetune_continue_of_a_finished_run_trains_nothing_and_longer_goes_on(ball, tmp_path):
    output = finetune_model(ball.slim, tmp_path / "out", 998, settings_with(epochs=1))
    final = output / "fold_0" / "checkpoint_final.pth"
    stamp = final.stat().st_mtime_ns
    finetune_model(ball.slim, output, 998, settings_with(epochs=1, resume=True))
    assert final.stat().st_mtime_ns == stamp
    finetune_model(ball.slim, output, 998, settings_with(epochs=2, resume=True))
    log = final_of(output)["logging"]
    assert final_of(output)["current_epoch"] == 2 == len(log["train_losses"])


def test_finetune_existing_output_is_neither_overwritten_nor_resumed_with_other_settings(ball, tmp_path):
    output = finetune_model(ball.slim, tmp_path / "out", 998, settings_with(epochs=1))
    kept = {p: p.read_bytes() for p in output.rglob("*") if p.is_file()}
    with pytest.raises(OutputError, match=r"out exists and is not overwritten; continue it with --continue"):
        finetune_model(ball.slim, output, 998, TINY)
    with pytest.raises(ConfigError, match=r"begun with learning_rate = 0\.001, now it is 0\.01"):
        finetune_model(ball.slim, output, 998, settings_with(resume=True, learning_rate=1e-2))
    with pytest.raises(ConfigError, match=r"begun with source slim, now it is dense"):
        finetune_model(ball.dense, output, 998, settings_with(resume=True))
    with pytest.raises(OutputError, match=r"cannot be resumed: its nnslim.json"):
        finetune_model(ball.slim, ball.dense, 998, settings_with(resume=True))
    assert kept == {p: p.read_bytes() for p in output.rglob("*") if p.is_file()}


def test_trainer_teacher_adds_its_term_to_loss_and_gradient(ball, tmp_path):
    plain = make_trainer(ball, tmp_path / "a", precision="f32")
    taught = make_trainer(ball, tmp_path / "b", teacher=ball.dense, distill=0.5, precision="f32")
    generator = torch.Generator().manual_seed(3)
    size = plain.configuration_manager.patch_size
    data = torch.randn(2, 1, *size, generator=generator)
    scales = [[1.0] * 3] if plain._get_deep_supervision_scales() is None else plain._get_deep_supervision_scales()
    target = [torch.zeros(2, 1, *[round(n * s) for n, s in zip(size, scale, strict=True)]) for scale in scales]
    target[0][:, :, 4:9, 4:9, 4:9] = 1
    batch = {"data": data, "target": target}
    with torch.no_grad():
        student, teacher = plain.network(data)[0], taught.teacher(data)
        expected = float(plain.loss(plain.network(data), target) + 0.5 * distillation_loss(student, teacher))
    assert isinstance(taught.loss, DistilledLoss) and torch.is_tensor(teacher)
    assert taught.train_step(batch)["loss"] == pytest.approx(expected, rel=1e-5)
    assert plain.train_step(batch)["loss"] != pytest.approx(expected, rel=1e-3)
    # None: nnU-Net gives the lowest resolution's head no weight in its loss
    gradients = {name: p.grad for name, p in plain.network.named_parameters() if p.grad is not None}
    taught_ones = dict(taught.network.named_parameters())
    different = [name for name, theirs in gradients.items() if not torch.allclose(taught_ones[name].grad, theirs)]
    assert any(name.endswith("core.weight") for name in different)
    assert all(p.grad is None and not p.requires_grad for p in taught.teacher.parameters())
    assert taught.loss.teacher_logits is None  # validation takes nnU-Net's loss alone


def test_finetune_with_a_teacher_runs_through(ball, tmp_path):
    settings = settings_with(teacher=ball.dense, distill=1.0, epochs=1)
    with_it = final_of(finetune_model(ball.slim, tmp_path / "a", 998, settings))
    without = final_of(finetune_model(ball.slim, tmp_path / "b", 998, settings_with(epochs=1)))
    assert with_it["logging"]["train_losses"][0] > without["logging"]["train_losses"][0] + 1e-3
    assert set(with_it["network_weights"]) == set(without["network_weights"])


def test_command_takes_any_trainer_and_fold(ball, tmp_path, monkeypatch, capfd, caplog):
    """tucker-cnn's script knew fold 0, 3d_fullres and one trainer."""
    options = "-f 1 -f all --epochs 1 --iterations 2 --validation-iterations 1 --batch-size 2 --processes 1 -q"
    options += " --accumulate 2 --warmup-steps 3 --gradient-clip 1"
    steps = spied(OptimizerSteps, monkeypatch)
    named = "--trainer nnUNetTrainerNoMirroring"
    output = tmp_path / "nnUNetTrainerNoMirroring__SlimTuned__3d_fullres"
    command = f"nnslim finetune -m {ball.slim} -d 998 -o {output} {options} {named}"
    monkeypatch.setattr(sys, "argv", command.split())
    with pytest.raises(SystemExit) as end:
        main()
    out = capfd.readouterr().out
    assert not end.value.code and out.strip() == f"written: {output}", out
    assert "slim has no fold 1: it starts from fold 0" in caplog.text
    assert json.loads((output / "plans.json").read_text())["plans_name"] == "SlimTuned"
    for fold in (1, "all"):
        checkpoint = final_of(output, fold)
        assert checkpoint["trainer_name"] == "nnUNetTrainerNoMirroring"
        assert checkpoint["inference_allowed_mirroring_axes"] is None
        assert checkpoint["init_args"]["fold"] == fold
        assert torch.isfinite(stock_prediction(output, (fold,))[1]).all()
    record = json.loads((output / "nnslim.json").read_text())
    assert record["folds"] == ["1", "all"] == list(record["finetune"]["folds"])
    assert [(one.taken, one.accumulate, one.warmup, one.clip) for one in steps] == [(1, 2, 3, 1.0)] * 2


def test_prepare_data_other_preprocessing_gets_its_own_folder_once(ball, tmp_path, caplog):
    stock = {p: p.stat().st_mtime_ns for p in (ball.preprocessed / STOCK).iterdir()}
    other = tmp_path / "other"
    shutil.copytree(ball.slim, other)
    plans = json.loads((other / "plans.json").read_text())
    plans["configurations"]["3d_fullres"]["spacing"] = [1.0, 1.0, 0.8]
    (other / "plans.json").write_text(json.dumps(plans))
    model = read_trained_model(other)
    data = prepare_data(model, 998, 1)
    assert data.identifier == f"nnslim_{model_key(model)}_3d_fullres" != STOCK
    cases = sorted((ball.preprocessed / data.identifier).glob("*.pkl"))
    assert len(cases) == 6
    stamps = [p.stat().st_mtime_ns for p in cases]
    assert prepare_data(model, "Dataset998_Ball", 1) == data
    assert [p.stat().st_mtime_ns for p in cases] == stamps
    cases[0].unlink()  # as if the first run had been killed
    assert prepare_data(model, 998, 1) == data and cases[0].is_file()
    assert stock == {p: p.stat().st_mtime_ns for p in (ball.preprocessed / STOCK).iterdir()}
    assert prepare_data(read_trained_model(ball.slim), 998, 1).identifier == STOCK


def test_prepare_data_without_raw_data_says_what_is_missing(ball, tmp_path, monkeypatch):
    monkeypatch.delenv("nnUNet_raw")
    assert prepare_data(read_trained_model(ball.slim), 998, 1).identifier == STOCK
    model = read_trained_model(ball.slim)
    model.configuration_manager.configuration["spacing"] = [3.0, 3.0, 3.0]
    with pytest.raises(InputError, match=r"no complete data preprocessed as slim expects \(spacing \[3\.0.*not set"):
        prepare_data(model, 998, 1)
    monkeypatch.delenv("nnUNet_preprocessed")
    with pytest.raises(ConfigError, match="nnUNet_preprocessed is not set"):
        find_dataset(998)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optimizer": "adam"}, "optimizer: Input should be 'adamw' or 'sgd', found 'adam'"),
        ({"schedule": "cosine"}, "schedule: Input should be 'constant' or 'poly', found 'cosine'"),
        ({"epochs": 0}, "epochs: Input should be greater than or equal to 1, found 0"),
        ({"learning_rate": float("nan")}, "learning_rate: Input should be a finite number, found nan"),
        ({"distill": -1.0}, "distill: Input should be greater than or equal to 0, found -1.0"),
        ({"epoch": 1}, "unknown key 'epoch'; nearest: epochs"),
        ({"num_gpus": 2}, "num_gpus = 2: nnU-Net trains on several devices with cuda only"),
        ({"folds": ["first"]}, "fold 'first': expected a number or 'all'"),
    ],
)
def test_settings_out_of_range_are_refused(changes, message):
    with pytest.raises(ConfigError) as error:
        settings_with(**changes)
    assert message in str(error.value)


def test_finetune_unusable_model_dataset_trainer_or_teacher_is_named(ball, tmp_path, make_model):
    def refused(kind, match, model=ball.slim, dataset=998, **changes):
        with pytest.raises(kind, match=match):
            finetune_model(model, tmp_path / "out", dataset, settings_with(**changes))
        assert not (tmp_path / "out").exists()

    other = make_model()
    refused(ModelError, "is not a folder", model=tmp_path / "none")
    refused(InputError, "dataset '7': expected one dataset.*found Dataset998_Ball", dataset=7)
    refused(InputError, r"Dataset998_Ball does not fit .*labels \[0, 1\].*model's has labels \[0, 1, 2\]", model=other)
    refused(ConfigError, "trainer = 'NoSuchTrainer': nnU-Net has no trainer of that name", trainer="NoSuchTrainer")
    refused(ModelError, "teacher .* 3 head.*has 1 and 2", teacher=other)
    if not torch.cuda.is_available():
        refused(ConfigError, "2 CUDA device.*torch finds 0", device="cuda", num_gpus=2)


def test_save_checkpoint_failure_keeps_the_checkpoint_before(ball, tmp_path, monkeypatch):
    trainer = make_trainer(ball, tmp_path / "out")
    path = tmp_path / "out" / "fold_0" / "checkpoint_latest.pth"
    trainer.save_checkpoint(str(path))
    kept = path.read_bytes()

    def half(content, filename):
        Path(filename).write_bytes(b"half")
        raise RuntimeError("PytorchStreamWriter failed writing file")

    monkeypatch.setattr("torch.save", half)
    with pytest.raises(OutputError, match=r"cannot write .*checkpoint_latest\.pth.*PytorchStreamWriter"):
        trainer.save_checkpoint(str(path))
    assert path.read_bytes() == kept and [p.name for p in path.parent.glob("*.pth*")] == [path.name]


def test_two_processes_train_one_model(ball, tmp_path, monkeypatch):
    pytest.importorskip("nnunetv2.utilities.find_objects", reason="nnUNet_extTrainer came with nnU-Net 2.8")
    offer_gloo_trainer(tmp_path / "trainers", monkeypatch)
    settings = settings_with(teacher=ball.dense, epochs=1).with_defaults(**FINETUNING)
    source, output = read_trained_model(ball.slim), tmp_path / "out"
    data = prepare_data(source, 998, 1)
    output.mkdir()
    begin_record(source, output, data, "nnUNetTrainerGloo", settings)
    run_ranks(fold_job(source, output, data, "0", "nnUNetTrainerGloo", settings), 2, "cpu")
    final = final_of(output)
    assert final["trainer_name"] == "nnUNetTrainerGloo" and final["current_epoch"] == 1
    assert set(final["network_weights"]) == set(source.weights[0])  # no "module." from the wrapper
    assert len(list((output / "fold_0").glob("checkpoint_*"))) == 2  # one process writes
    assert torch.isfinite(stock_prediction(output)[1]).all()
