"""nnU-Net's own training, cut to the length and batch that a small machine can afford."""

from __future__ import annotations

import argparse
import copy
import json
import os
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nnslim.hosts.nnunet.model.trained_model import load_checkpoint
from nnslim.running.bfloat16 import bfloat16_is_safe, in_bfloat16

_CPU = torch.device("cpu")
DEFAULT_PLANS = "nnUNetPlans"


def add_training_options(parser: argparse.ArgumentParser, rate: float | None, rate_help: str) -> None:
    """Add the options of a training that has folders of its own; `use_folders` reads the folders and threads."""
    parser.add_argument("--raw", type=Path, required=True, help="folder of nnU-Net raw datasets")
    parser.add_argument("--work", type=Path, required=True, help="folder for preprocessed data and results")
    parser.add_argument("--fold", type=int, default=0, help="fold of splits_final.json (default: 0)")
    parser.add_argument("--epochs", type=int, default=20, help="epochs (default: 20)")
    parser.add_argument("--iterations", type=int, default=50, help="iterations per epoch (default: 50)")
    parser.add_argument("--batch-size", type=int, default=2, help="patches per iteration (default: 2)")
    parser.add_argument("--learning-rate", type=float, default=rate, help=f"initial rate, poly decay ({rate_help})")
    parser.add_argument("--resume", action="store_true", help="go on from checkpoint_latest.pth")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
    parser.add_argument("--threads", type=int, help="torch threads (default: all)")


def use_folders(args: argparse.Namespace) -> None:
    """Set nnU-Net's variables, some of which it reads when it is imported, and torch's threads."""
    work = args.work
    for name, path in (("raw", args.raw), ("preprocessed", work / "preprocessed"), ("results", work / "results")):
        os.environ[f"nnUNet_{name}"] = str(path.resolve())
    if args.threads:
        torch.set_num_threads(args.threads)


def seed_training(seed: int) -> None:
    """Fix first weights, patches and augmentation, which then runs in this process."""
    os.environ["nnUNet_n_proc_DA"] = "0"
    for seeded in (random.seed, np.random.seed, torch.manual_seed):
        seeded(seed)


@dataclass(frozen=True)
class ShortTraining:
    """Length of a training run. Everything else is nnU-Net's recipe (loss, augmentation, optimiser, poly rate).

    Attributes:
        epochs, iterations, validation_iterations, batch_size, learning_rate: as nnU-Net's trainer has them.
        bfloat16: mixed precision on the CPU too (nnU-Net has it on GPUs only); halves the time on processors with
            bfloat16 instructions, and only costs time on others. Not used for networks that it goes wrong for, see
            `nnslim.running.bfloat16`.
    """

    epochs: int = 20
    iterations: int = 50
    validation_iterations: int = 10
    batch_size: int = 2
    learning_rate: float = 1e-2
    bfloat16: bool = False


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

        def initialize(self) -> None:
            super().initialize()
            shape = (length.batch_size, self.num_input_channels, *self.configuration_manager.patch_size)
            if length.bfloat16 and self.device.type == "cpu" and bfloat16_is_safe(self.network, shape):
                self.network.forward = in_bfloat16(self.network.forward)

        def load_checkpoint(self, filename_or_checkpoint: str) -> None:
            load_checkpoint(Path(filename_or_checkpoint))  # refuses code, which nnU-Net would run
            super().load_checkpoint(filename_or_checkpoint)

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
    if not is_preprocessed(folder, f"nnUNetPlans_{configuration}"):
        api.preprocess([dataset_id], configurations=(configuration,), num_processes=[processes])
    splits = Path(os.environ["nnUNet_raw"]) / folder.name / "splits_final.json"
    if splits.is_file():
        shutil.copyfile(splits, folder / "splits_final.json")
    return folder


def is_preprocessed(folder: Path, identifier: str) -> bool:
    """Return whether every case of a preprocessed dataset is there; a stopped run leaves some, or an empty folder."""
    ending = json.loads((folder / "dataset.json").read_text(encoding="utf-8"))["file_ending"]
    cases = {path.name.removesuffix(ending) for path in (folder / "gt_segmentations").glob(f"*{ending}")}
    return bool(cases) and cases <= {path.stem for path in (folder / identifier).glob("*.pkl")}


def derive_plans(folder: Path, name: str, configuration: str, edit: Callable[[dict[str, Any]], None]) -> Path:
    """Write a variant of nnU-Net's default plans beside them and return its path; it reads the same preprocessed data.

    Args:
        folder: preprocessed dataset.
        name: of the variant. Stock nnU-Net takes it too: `nnUNetv2_train ... -p NAME`.
        configuration: the one that the variant keeps.
        edit: changes the configuration's settings in place.
    """
    if name == DEFAULT_PLANS:
        raise ValueError(f"a variant of the plans needs its own name, not {DEFAULT_PLANS}")
    plans = json.loads((folder / f"{DEFAULT_PLANS}.json").read_text(encoding="utf-8"))
    settings = copy.deepcopy(plans["configurations"][configuration])
    edit(settings)
    path = folder / f"{name}.json"
    variant = plans | {"plans_name": name, "configurations": {configuration: settings}}
    path.write_text(json.dumps(variant, indent=4), encoding="utf-8")
    return path


def train_short(
    dataset_id: int,
    configuration: str,
    fold: int,
    length: ShortTraining,
    *,
    plans_name: str = DEFAULT_PLANS,
    edit_plans: Callable[[dict[str, Any]], None] | None = None,
    trainer_base: type | None = None,
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
        plans_name: plans to train with, and a part of the model folder's name.
        edit_plans: see `derive_plans`; needed once for every name but the default one.
        trainer_base: an nnUNetTrainer class; nnU-Net's default trainer if None.
        pretrained: checkpoint whose weights are the start (all of them, segmentation heads included).
        resume: go on from checkpoint_latest.pth of the same folder.
        device: "cpu" or "cuda".
        on_start: called with the trainer once the network exists.
    """
    from batchgenerators.utilities.file_and_folder_operations import load_json
    from nnunetv2.run.run_training import maybe_load_checkpoint

    folder = preprocess_once(dataset_id, configuration, processes=max(1, (os.cpu_count() or 2)))
    if edit_plans is not None:
        derive_plans(folder, plans_name, configuration, edit_plans)
    plans = load_json(str(folder / f"{plans_name}.json"))
    plans["continue_training"] = resume
    trainer = short_trainer_class(length, trainer_base)(
        plans, configuration, fold, load_json(str(folder / "dataset.json")), torch.device(device)
    )
    maybe_load_checkpoint(trainer, resume, False)
    if not trainer.was_initialized:
        trainer.initialize()
    if pretrained is not None:
        weights = load_checkpoint(Path(pretrained))["network_weights"]
        trainer.network.load_state_dict(weights)
    if on_start is not None:
        on_start(trainer)
    trainer.run_training()
    return Path(trainer.output_folder)


def copy_weights(fold: Path, target: Path) -> Path:
    """Copy a trained fold to a new model folder without the optimiser's state, a half of the file, and return it.

    Args:
        fold: what `train_short` returned.
        target: new model folder; gets plans.json, dataset.json and the fold's checkpoint_final.pth.
    """
    (target / fold.name).mkdir(parents=True)
    for name in ("plans.json", "dataset.json"):
        shutil.copyfile(fold.parent / name, target / name)
    checkpoint = load_checkpoint(fold / "checkpoint_final.pth")
    kept = checkpoint | {"optimizer_state": None, "grad_scaler_state": None, "logging": {}}
    torch.save(kept, target / fold.name / "checkpoint_final.pth")
    return target
