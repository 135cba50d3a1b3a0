"""nnU-Net's own training, cut to the length and batch that a small machine can afford."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

_CPU = torch.device("cpu")


@dataclass(frozen=True)
class ShortTraining:
    """Length of a training run. Everything else is nnU-Net's recipe (loss, augmentation, optimiser, poly rate)."""

    epochs: int = 20
    iterations: int = 50
    validation_iterations: int = 10
    batch_size: int = 2
    learning_rate: float = 1e-2


def short_trainer_class(length: ShortTraining, base: type | None = None) -> type:
    """Return a trainer class with the given length that keeps the *name* of its base.

    nnU-Net stores the class name in each checkpoint and looks it up at inference; since only the length differs,
    keeping the name lets stock nnU-Net load the result.

    Args:
        length: epochs, iterations per epoch, samples per batch, initial learning rate.
        base: an nnUNetTrainer class; nnU-Net's default trainer if None.
    """
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

    base = base or nnUNetTrainer

    class _Short(base):
        def __init__(
            self,
            plans: dict,
            configuration: str,
            fold: int,
            dataset_json: dict,
            device: torch.device = _CPU,
        ) -> None:
            plans["configurations"][configuration]["batch_size"] = length.batch_size
            super().__init__(plans, configuration, fold, dataset_json, device)
            self.num_epochs = length.epochs
            self.num_iterations_per_epoch = length.iterations
            self.num_val_iterations_per_epoch = length.validation_iterations
            self.initial_lr = length.learning_rate
            self.save_every = 1

    _Short.__name__ = _Short.__qualname__ = base.__name__
    return _Short


def preprocess_once(dataset_id: int, configuration: str, processes: int) -> Path:
    """Fingerprint, plan and preprocess a raw dataset unless that has been done; return the preprocessed folder."""
    from nnunetv2.experiment_planning import plan_and_preprocess_api as api
    from nnunetv2.utilities.dataset_name_id_conversion import convert_id_to_dataset_name

    folder = Path(os.environ["nnUNet_preprocessed"]) / convert_id_to_dataset_name(dataset_id)
    if not (folder / "nnUNetPlans.json").is_file():
        api.extract_fingerprints([dataset_id], num_processes=processes, show_progress_bar=False)
        api.plan_experiments([dataset_id])
    if not (folder / f"nnUNetPlans_{configuration}").is_dir():
        api.preprocess([dataset_id], configurations=(configuration,), num_processes=[processes])
    splits = Path(os.environ["nnUNet_raw"]) / folder.name / "splits_final.json"
    if splits.is_file():
        shutil.copyfile(splits, folder / "splits_final.json")
    return folder


def train_short(
    dataset_id: int,
    configuration: str,
    fold: int,
    length: ShortTraining,
    *,
    pretrained: Path | None = None,
    resume: bool = False,
    device: str = "cpu",
    on_start: Callable[[object], None] | None = None,
) -> Path:
    """Train with nnU-Net for a short time and return the fold's output folder.

    Args:
        dataset_id: number of a raw dataset under the environment variable nnUNet_raw.
        configuration: e.g. "3d_fullres".
        fold: fold of splits_final.json.
        length: how long.
        pretrained: checkpoint whose weights are the start (all of them, segmentation heads included).
        resume: go on from checkpoint_latest.pth of the same folder.
        device: "cpu" or "cuda".
        on_start: called with the trainer once the network exists.
    """
    from batchgenerators.utilities.file_and_folder_operations import load_json
    from nnunetv2.run.run_training import maybe_load_checkpoint

    folder = preprocess_once(dataset_id, configuration, processes=max(1, (os.cpu_count() or 2)))
    plans = load_json(str(folder / "nnUNetPlans.json"))
    plans["continue_training"] = resume
    trainer = short_trainer_class(length)(
        plans, configuration, fold, load_json(str(folder / "dataset.json")), torch.device(device)
    )
    maybe_load_checkpoint(trainer, resume, False)
    if not trainer.was_initialized:
        trainer.initialize()
    if pretrained is not None:
        weights = torch.load(pretrained, map_location="cpu", weights_only=False)["network_weights"]
        trainer.network.load_state_dict(weights)
    if on_start is not None:
        on_start(trainer)
    trainer.run_training()
    return Path(trainer.output_folder)
