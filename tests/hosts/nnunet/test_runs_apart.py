"""Two trainings and one results folder: the folds that are there already are predicted as before."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import final_of, stock_prediction, write_ball_dataset

import nnslim.hosts.nnunet.train.ext as trainers
from nnslim.compression.config import from_dict
from nnslim.errors import ConfigError
from nnslim.hosts.nnunet.compress.compress_model import compress_model
from nnslim.hosts.nnunet.model.trained_model import read_trained_model
from nnslim.hosts.nnunet.train.ext.nnslim_trainers import trainer_named
from nnslim.hosts.nnunet.train.finetune_model import finetune_model
from nnslim.hosts.nnunet.train.settings import TrainingSettings
from nnslim.hosts.nnunet.train.train_dataset import train_dataset
from nnslim.methods.sauron import SauronConfig
from nnslim.network.daeformer import FORMS, DAEFormerForm
from studies.short_training import ShortTraining, preprocess_once, train_short

SHORT = {"epochs": 1, "iterations": 1, "validation_iterations": 1, "batch_size": 2}
UNETR = {"decoder": "x8", "dim": 24, "depth": 9, "heads": 2, "features": 4}
VIT = {"encoder": "vit", "options": {"embed_dim": 24, "depth": 2, "num_heads": 2, "patch_size": 4}}
# Trainer, configuration, its settings, and what of them another training has
KINDS = {
    "form": ("nnUNetTrainerDAEFormer", "2d", {"daeformer": {"form": "tiny"}}, {"form": "wide"}),
    "ratio of UNETR": (
        "nnUNet_UNETR_TokenSparse_Trainer",
        "3d_fullres",
        {"token_sparse": {"ratio": 0.25, "unetr": UNETR}},
        {"ratio": 0.75},
    ),
    "ratio of Primus": (
        "nnUNet_Primus_S_TokenSparse_Trainer",
        "3d_fullres",
        {"token_sparse": {"ratio": 0.25}},
        {"ratio": 0.75},
    ),
    "window": ("nnUNetTrainerWindow", "3d_fullres", {"window": {**VIT, "depth": 3}}, {"depth": 5}),
    "slices at prediction": ("nnUNetTrainerWindow", "3d_fullres", {"window": VIT}, {"predict_slices": 8}),
}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A made dataset, preprocessed in 2D and 3D."""
    root = tmp_path_factory.mktemp("apart")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("raw", "preprocessed"):
            patch.setenv(f"nnUNet_{name}", str(root / name))
        patch.setenv("nnUNet_n_proc_DA", "1")
        write_ball_dataset(root / "raw" / "Dataset998_Ball")
        preprocess_once(998, "2d", 1)
        folder = preprocess_once(998, "3d_fullres", 1)
    plans, dataset = (json.loads((folder / name).read_text()) for name in ("nnUNetPlans.json", "dataset.json"))
    return SimpleNamespace(root=root, folder=folder, plans=plans, dataset=dataset)


@pytest.fixture
def results(prepared, tmp_path, monkeypatch):
    """The variables of nnU-Net, with an empty folder of results."""
    for name in ("raw", "preprocessed"):
        monkeypatch.setenv(f"nnUNet_{name}", str(prepared.root / name))
    monkeypatch.setenv("nnUNet_results", str(tmp_path / "results"))
    monkeypatch.setenv("nnUNet_n_proc_DA", "0")
    monkeypatch.setenv("nnUNet_extTrainer", trainers.__path__[0])
    for name, dims in (("tiny", (16, 32)), ("wide", (16, 64))):
        monkeypatch.setitem(FORMS, name, DAEFormerForm(dims, (1, 1), edge=16))
    return tmp_path / "results" / "Dataset998_Ball"


def files_of(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.suffix != ".txt"}


@pytest.mark.parametrize("kind", KINDS)
def test_folder_of_another_setting_is_refused_and_left_as_it_was(kind, prepared, results, monkeypatch):
    name, configuration, settings, change = KINDS[kind]
    (section,) = settings

    def begin(fold, change, **shared):
        given = {**SHORT, **shared, section: {**settings[section], **change}}
        monkeypatch.setenv("NNSLIM_TRAINING", json.dumps(given))
        plans = {**json.loads(json.dumps(prepared.plans)), "continue_training": False}
        trainer = trainer_named(name)(plans, configuration, fold, prepared.dataset, torch.device("cpu"))
        trainer.initialize()
        return trainer

    begin(0, {}).on_train_start()
    folder = results / f"{name}__nnUNetPlans__{configuration}"
    before = files_of(folder)
    with pytest.raises(ConfigError) as error:
        begin(1, change)
    assert f"{folder}/plans.json is of a training with other settings (" in str(error.value)
    assert "; give this one a run_name (nnslim train --run-name, or in NNSLIM_TRAINING), or remove" in str(error.value)
    assert files_of(folder) == before
    begin(1, {}, batch_size=1, learning_rate=1e-3, epochs=3)  # which no prediction depends on
    other = begin(1, change, run_name="other")
    other.on_train_start()
    assert Path(other.output_folder_base).name == f"{name}__nnUNetPlans_other__{configuration}"
    assert json.loads((folder / "plans.json").read_bytes()) == json.loads(before[folder / "plans.json"])


def test_fold_is_predicted_as_before_and_stock_nnunet_finds_runs_side_by_side(prepared, results, monkeypatch):
    from nnunetv2.run import run_training as module
    from nnunetv2.utilities.file_path_utilities import get_output_folder

    name = "nnUNet_UNETR_TokenSparse_Trainer"

    def train(fold, ratio, resume=False, **changes):
        """As nnUNetv2_train, without the validation at its end."""
        settings = {**SHORT, "token_sparse": {"ratio": ratio, "unetr": UNETR}, **changes}
        monkeypatch.setenv("NNSLIM_TRAINING", json.dumps(settings))
        options = {"continue_training": resume, "device": torch.device("cpu")}
        trainer = module.get_trainer_from_args("998", "3d_fullres", fold, name, **options)
        module.maybe_load_checkpoint(trainer, resume, validation_only=False)
        trainer.run_training()

    train(0, 0.25)
    folder = results / f"{name}__nnUNetPlans__3d_fullres"
    logits = stock_prediction(folder)[1]
    said = r"other settings \(.*ratios \[0.25, 0.25, 0.25\], now \[0.75, 0.75, 0.75\]\)"
    for fold, resume in ((1, False), (0, False), (0, True)):
        with pytest.raises(ConfigError, match=said):
            train(fold, 0.75, resume)
    with pytest.raises(ConfigError, match=said):  # --val
        module.run_training("998", "3d_fullres", 0, name, only_run_validation=True, device=torch.device("cpu"))
    assert torch.equal(stock_prediction(folder)[1], logits)
    train(0, 0.25, resume=True, epochs=2)
    assert final_of(folder)["current_epoch"] == 2

    train(0, 0.75, run_name="keep0.25")
    found = get_output_folder("Dataset998_Ball", name, "nnUNetPlans_keep0.25", "3d_fullres")  # nnUNetv2_predict -tr -p
    monkeypatch.delenv("nnUNet_extTrainer")
    assert torch.isfinite(stock_prediction(found)[1]).all()


def test_sauron_shares_a_folder_among_widths_not_among_networks(prepared, results, command):
    config = {**SHORT, "epochs": 2, "threshold_first": 0.7, "threshold_max": 0.8, "settle": 0.0, "batches": 1}
    folder = train_dataset(998, TrainingSettings(sauron=SauronConfig(**config)))
    logits = stock_prediction(folder)[1]
    wider = SauronConfig(**{**config, "threshold_first": 0.4, "threshold_max": 0.5})
    train_dataset(998, TrainingSettings(sauron=wider, folds=("1",)))
    widths = [final_of(folder, fold)["nnslim_sauron"]["spec"] for fold in (0, 1)]
    assert widths[0] != widths[1]
    assert torch.equal(stock_prediction(folder)[1], logits)

    plans = json.loads(json.dumps(prepared.plans)) | {"plans_name": "nnUNetPlans"}
    plans["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"]["features_per_stage"] = [8, 16, 24]
    (prepared.folder / "narrow.json").write_text(json.dumps(plans))
    short = ("--epochs", 1, "--iterations", 1, "--validation-iterations", 1)
    options = ("-d", 998, "-p", "narrow", "-f", 2, *short, "-q")
    code, _, err = command("train", *options)
    assert code == 2 and len(err.strip().splitlines()) == 1 and "features_per_stage" in err and "now [8, 16, 24]" in err
    assert torch.equal(stock_prediction(folder)[1], logits)
    code, out, err = command("train", *options, "--run-name", "narrow")
    assert code == 0, err
    assert out.strip() == f"written: {results}/nnUNetTrainerSauron__nnUNetPlans_narrow__3d_fullres"
    code, _, err = command("train", *options, "--run-name", "a__b")
    assert code == 2 and "run_name" in err


def test_fine_tuning_of_another_model_of_the_same_name_is_refused(prepared, results, tmp_path, monkeypatch):
    dense = train_short(998, "3d_fullres", 0, ShortTraining(1, 1, 1, 2)).parent
    settings = TrainingSettings(**SHORT, processes=1)
    for factor in (0.5, 0.25):
        methods = [{"method": "tucker", "rank_factor": factor, "rank_min": 2}]
        compress_model(
            read_trained_model(dense),
            tmp_path / str(factor) / "slim",
            from_dict({"methods": methods, "run": {"guard": False}}),
        )
    output = finetune_model(tmp_path / "0.5" / "slim", tmp_path / "tuned", 998, settings)
    logits = stock_prediction(output)[1]
    changes = {"resume": True, "folds": ("1",)}
    with pytest.raises(ConfigError, match=r"other settings \(.*rank.*; choose another output"):
        finetune_model(tmp_path / "0.25" / "slim", output, 998, settings.model_copy(update=changes))
    assert torch.equal(stock_prediction(output)[1], logits)
    finetune_model(tmp_path / "0.5" / "slim", output, 998, settings.model_copy(update=changes))
    assert torch.isfinite(stock_prediction(output, (0, 1))[1]).all()
