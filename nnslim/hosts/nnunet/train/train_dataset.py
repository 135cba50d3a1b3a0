"""Train on a dataset with Sauron, as `nnUNetv2_train` does, without its command line."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from pathlib import Path

import torch

from nnslim.errors import ConfigError, InputError, OutputError
from nnslim.files import read_json
from nnslim.hosts.nnunet.cases.prepared_data import find_dataset, plans_on, prepare_data
from nnslim.hosts.nnunet.model.slim_plans import in_run
from nnslim.hosts.nnunet.model.trained_model import read_trained_model
from nnslim.hosts.nnunet.train.sauron_trainer import sauron_trainer_class
from nnslim.hosts.nnunet.train.settings import TrainingSettings
from nnslim.hosts.nnunet.train.steady import BEST, FINAL, LATEST, quiet_nnunet


def train_dataset(
    dataset: int | str,
    settings: TrainingSettings,
    progress: Callable[[int, int], None] = lambda done, total: None,
    *,
    configuration: str = "3d_fullres",
    plans_name: str = "nnUNetPlans",
) -> Path:
    """Train one fold (the first of the settings, else 0) and return the model directory, which lies in nnUNet_results.

    Args:
        dataset: number or name. progress: called with (epochs done, epochs in all).
        configuration, plans_name: what is trained; a model to start from (`sauron.start`) brings its own.
    Raises:
        ConfigError: one of nnU-Net's variables is not set. InputError: the dataset is missing or not preprocessed.
        OutputError: the directory has a training already, and `resume` is off.
    """
    settings = settings.for_kind("sauron")
    name = find_dataset(dataset)
    if not os.environ.get("nnUNet_results"):
        raise ConfigError("the environment variable nnUNet_results is not set; nnU-Net writes its models there")
    fold = settings.folds[0] if settings.folds else "0"
    preprocessed = Path(os.environ["nnUNet_preprocessed"]) / name
    content = read_json(preprocessed / "dataset.json")
    if settings.sauron.start is not None:
        source = read_trained_model(settings.sauron.start)
        data = prepare_data(source, name, settings.processes)
        plans = plans_on(source, data, fold if fold in source.checkpoints else next(iter(source.checkpoints)))
        configuration, content = source.configuration, data.dataset
    else:
        plans = read_json(preprocessed / f"{plans_name}.json")
        if configuration not in plans.get("configurations", {}):
            known = ", ".join(plans.get("configurations", {})) or "none"
            raise InputError(
                f"{preprocessed}/{plans_name}.json has no configuration '{configuration}', it has {known}; run "
                "nnUNetv2_plan_and_preprocess first"
            )
    torch.backends.cudnn.benchmark = settings.device == "cuda"  # as nnUNetv2_train
    with quiet_nnunet():
        cls = sauron_trainer_class(settings)
        identifier = in_run(plans, settings.run_name)["plans_name"]
        folder = Path(os.environ["nnUNet_results"]) / name / f"{cls.__name__}__{identifier}__{configuration}"
        found = [name for name in (FINAL, LATEST, BEST) if (folder / f"fold_{fold}" / name).is_file()]
        if found and not settings.resume:
            raise OutputError(
                f"{folder}/fold_{fold} has a {found[0]} and is not overwritten; continue it with --continue, or "
                "remove it"
            )
        plans = {**copy.deepcopy(plans), "continue_training": settings.resume}
        number = int(fold) if fold.isdigit() else fold
        trainer = cls(plans, configuration, number, content, torch.device(settings.device))
        from nnunetv2.run.run_training import maybe_load_checkpoint

        trainer.after_epoch = progress
        maybe_load_checkpoint(trainer, settings.resume, False)
        if not trainer.was_initialized:
            trainer.initialize()
        trainer.train_on()
    return folder
