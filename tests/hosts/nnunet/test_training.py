"""nnU-Net's own training: short runs from a raw dataset, and fine-tuning of a slim model by stock means."""

from __future__ import annotations

import json
import shutil

import torch
from helpers import make_predictor, random_data, write_ball_dataset

from nnslim.compression.config import tucker
from nnslim.hosts.nnunet.compress.compress_model import compress_model
from nnslim.hosts.nnunet.model.trained_model import read_trained_model
from nnslim.network.spec import spec_of
from studies.short_training import ShortTraining, short_trainer_class, train_short

TINY = ShortTraining(epochs=1, iterations=2, validation_iterations=1, batch_size=2)


def test_train_short_then_compress_then_fine_tune_by_stock_nnunet(tmp_path, monkeypatch):
    for name in ("raw", "preprocessed", "results"):
        monkeypatch.setenv(f"nnUNet_{name}", str(tmp_path / name))
    monkeypatch.setenv("nnUNet_n_proc_DA", "1")
    write_ball_dataset(tmp_path / "raw" / "Dataset998_Ball")
    model = train_short(998, "3d_fullres", 0, TINY).parent
    assert model.name == "nnUNetTrainer__nnUNetPlans__3d_fullres"  # stock nnU-Net finds the trainer by this name
    checkpoint = read_trained_model(model).checkpoints["0"]
    assert checkpoint["trainer_name"] == "nnUNetTrainer" and checkpoint["current_epoch"] == 1

    slim = model.with_name("nnUNetTrainer__nnUNetPlansSlim__3d_fullres")
    slimmed = compress_model(read_trained_model(model), slim, tucker(rank_factor=0.5, rank_min=4))
    # As nnUNetv2_train -p nnUNetPlansSlim -pretrained_weights ... does, for one epoch.
    from nnunetv2.run.load_pretrained_weights import load_pretrained_weights

    preprocessed = tmp_path / "preprocessed" / "Dataset998_Ball"
    shutil.copy(slim / "plans.json", preprocessed / "nnUNetPlansSlim.json")
    plans = json.loads((preprocessed / "nnUNetPlansSlim.json").read_text()) | {"continue_training": False}
    dataset = json.loads((preprocessed / "dataset.json").read_text())
    shutil.rmtree(tmp_path / "results")
    trainer = short_trainer_class(TINY)(plans, "3d_fullres", 0, dataset)
    trainer.initialize()
    load_pretrained_weights(trainer.network, slim_checkpoint := _saved(slimmed, tmp_path))
    assert slim_checkpoint and spec_of(trainer.network) == slimmed.spec
    key = next(key for key in slimmed.weights[0] if key.endswith("core.weight"))
    torch.testing.assert_close(trainer.network.state_dict()[key], slimmed.weights[0][key])
    trainer.run_training()

    predictor = make_predictor()
    predictor.initialize_from_trained_model_folder(trainer.output_folder_base, (0,))
    assert spec_of(predictor.network) == slimmed.spec
    assert not torch.equal(predictor.list_of_parameters[0][key], slimmed.weights[0][key])
    assert torch.isfinite(predictor.predict_logits_from_preprocessed_data(random_data(predictor))).all()


def _saved(slimmed, folder) -> str:
    path = folder / "slim.pth"
    torch.save({"network_weights": slimmed.weights[0]}, path)
    return str(path)
