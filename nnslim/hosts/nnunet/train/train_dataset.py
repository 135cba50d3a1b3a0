"""Train on a dataset with Sauron, as `nnUNetv2_train` does, without its command line."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import torch

from nnslim.errors import ConfigError, InputError, OutputError
from nnslim.files import read_json
from nnslim.hosts.nnunet.model.trained_model import read_trained_model
from nnslim.hosts.nnunet.train.finetune_model import training_plans
from nnslim.hosts.nnunet.train.prepared_data import find_dataset, prepare_data
from nnslim.hosts.nnunet.train.sauron_trainer import sauron_trainer_class
from nnslim.hosts.nnunet.train.steady import LATEST
from nnslim.methods.sauron import SauronConfig

FINAL = "checkpoint_final.pth"


@dataclass(frozen=True)
class TrainingRun:
    """What is trained, and where.

    Attributes:
        dataset: number or name. configuration, plans: names; with a model to start from, that model's own count.
        fold: number or "all". device: cpu, cuda or mps.
        resume: go on from the last checkpoint. validate: afterwards, as nnUNetv2_train does.
        processes: that preprocess, where the data of a model to start from are not there yet.
    """

    dataset: int | str
    configuration: str = "3d_fullres"
    plans: str = "nnUNetPlans"
    fold: int | str = 0
    device: str = "cpu"
    resume: bool = False
    validate: bool = False
    processes: int = 2


def train_dataset(
    config: SauronConfig, run: TrainingRun, progress: Callable[[int, int], None] = lambda done, total: None
) -> Path:
    """Train one fold and return the model folder, which lies in nnUNet_results.

    Args:
        config: of the method. run: of the training. progress: called with (epochs done, epochs in all).
    Raises:
        ConfigError: one of nnU-Net's variables is not set. InputError: the dataset is not there, or not preprocessed.
        OutputError: the folder has a training already, and `resume` is off.
    """
    name = find_dataset(run.dataset)
    if not os.environ.get("nnUNet_results"):
        raise ConfigError("the environment variable nnUNet_results is not set; nnU-Net writes its models there")
    preprocessed = Path(os.environ["nnUNet_preprocessed"]) / name
    configuration, dataset = run.configuration, read_json(preprocessed / "dataset.json")
    if config.start is not None:
        source = read_trained_model(config.start)
        data = prepare_data(source, name, run.processes)
        start = str(run.fold) if str(run.fold) in source.checkpoints else next(iter(source.checkpoints))
        plans = training_plans(source, data, "", None, start)
        configuration, dataset = source.configuration, data.dataset
    else:
        plans = read_json(preprocessed / f"{run.plans}.json")
        if configuration not in plans.get("configurations", {}):
            known = ", ".join(plans.get("configurations", {})) or "none"
            raise InputError(
                f"{preprocessed}/{run.plans}.json has no configuration '{configuration}', it has {known}; run "
                "nnUNetv2_plan_and_preprocess first"
            )
    fold = int(run.fold) if str(run.fold).isdigit() else run.fold
    torch.backends.cudnn.benchmark = run.device == "cuda"  # as nnUNetv2_train
    with open(os.devnull, "w") as sink, redirect_stdout(sink):  # noqa: PTH123  nnU-Net prints; it logs to a file, too
        cls = _reporting(sauron_trainer_class(config), progress)
        folder = _folder(cls, plans, configuration, name)
        _check(folder / f"fold_{fold}", run)
        trainer = cls(
            {**copy.deepcopy(plans), "continue_training": run.resume},
            configuration,
            fold,
            dataset,
            torch.device(run.device),
        )
        from nnunetv2.run.run_training import maybe_load_checkpoint

        try:
            maybe_load_checkpoint(trainer, run.resume, False)
            if not trainer.was_initialized:
                trainer.initialize()
            if trainer.current_epoch < trainer.num_epochs:
                trainer.run_training()
            if run.validate:
                trainer.perform_actual_validation()
        finally:
            for loader in (trainer.dataloader_train, trainer.dataloader_val):
                getattr(loader, "_finish", lambda: None)()  # processes that augment
    return folder


def _folder(cls: type, plans: dict, configuration: str, dataset: str) -> Path:
    return Path(os.environ["nnUNet_results"]) / dataset / f"{cls.__name__}__{plans['plans_name']}__{configuration}"


def _check(folder: Path, run: TrainingRun) -> None:
    found = [name for name in (FINAL, LATEST, "checkpoint_best.pth") if (folder / name).is_file()]
    if found and not run.resume:
        raise OutputError(
            f"{folder} has a {found[0]} and is not overwritten; go on with it by --continue, or remove it"
        )


def _reporting(cls: type, progress: Callable[[int, int], None]) -> type:
    """Return the trainer class, under its name, with a call after each epoch."""

    def on_epoch_end(self: object) -> None:
        cls.on_epoch_end(self)
        progress(self.current_epoch, self.num_epochs)

    return type(cls.__name__, (cls,), {"on_epoch_end": on_epoch_end})
