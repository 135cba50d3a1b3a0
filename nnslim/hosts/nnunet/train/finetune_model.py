"""Fine-tune a model, slim or dense, with labels inside nnU-Net's trainer; the result is an ordinary model folder."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from nnslim.compression.record import RECORD, read_record
from nnslim.errors import ConfigError, InputError, ModelError, OutputError
from nnslim.files import make_folder
from nnslim.hosts.nnunet.model.pruned import plans_for_fold
from nnslim.hosts.nnunet.model.trained_model import (
    TrainedModel,
    builds_from_plans,
    channels_and_heads,
    load_checkpoint,
    model_key,
    read_trained_model,
    trainer_class,
)
from nnslim.hosts.nnunet.train.finetune_fold import run_fold, run_rank
from nnslim.hosts.nnunet.train.finetune_record import FINAL, begin_record, finish_record, plain_settings
from nnslim.hosts.nnunet.train.finetune_settings import FinetuneSettings, FoldJob
from nnslim.hosts.nnunet.train.prepared_data import PreparedData, prepare_data
from nnslim.hosts.nnunet.train.steady import LATEST

_log = logging.getLogger("nnslim")
# A resumed run may differ in these: where it runs, how long, and what is done before and after.
_MAY_DIFFER = ("epochs", "device", "num_gpus", "resume", "validate", "processes", "folds", "trust", "previous_stage")


def finetune_model(
    model: Path,
    output: Path,
    dataset: int | str,
    settings: FinetuneSettings | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Fine-tune the folds of a model and write a model folder that stock nnU-Net loads.

    The dataset is preprocessed with the model's own plans where that has not been done. A fold that the model lacks
    starts from its first fold. checkpoint_latest, _best and _final.pth are kept apart, as nnU-Net does.

    Args:
        model: trained model folder, slim or dense.
        output: folder to write; must not exist or be empty, unless `settings.resume`.
        dataset: number or name of a raw or preprocessed dataset.
        settings: how.
        progress: called with (epochs done, epochs in all), the folds together; on one device only.
    Returns:
        The output folder.
    Raises:
        ModelError: the model or the teacher cannot be used. InputError: the dataset cannot.
        ConfigError: settings that cannot be met, or that are not those of the run to be resumed.
        OutputError: the output exists, or cannot be written.
    """
    settings = settings or FinetuneSettings()
    model, output = Path(model), Path(output)
    _check_device(settings)
    _check_output(output, settings)
    source = read_trained_model(model, None, settings.checkpoint, trust=settings.trust)
    trainer_name = _trainer_name(source, settings)
    if settings.teacher is not None:
        _check_teacher(source, settings)
    _check_stage(source, settings)
    data = prepare_data(source, dataset, settings.processes)
    folds = [str(fold) for fold in settings.folds] if settings.folds else list(source.checkpoints)
    make_folder(output)
    started = begin_record(source, output, data, trainer_name, settings)
    jobs = [_job(source, output, data, fold, trainer_name, settings) for fold in folds]
    total = settings.epochs * len(jobs)
    for number, job in enumerate(jobs):
        _train(job, number * settings.epochs, total, progress or _ignore)
    finish_record(output, started, folds, data)
    return output


def _check_device(settings: FinetuneSettings) -> None:
    if settings.device == "cuda" and torch.cuda.device_count() < settings.num_gpus:
        raise ConfigError(
            f"{settings.num_gpus} CUDA device(s) were asked for, torch finds {torch.cuda.device_count()}; "
            "use --device cpu or a smaller --num-gpus"
        )


def _check_output(output: Path, settings: FinetuneSettings) -> None:
    if output.exists() and not output.is_dir():
        raise OutputError(f"{output} is a file; expected a folder to write")
    if not output.is_dir() or not any(output.iterdir()):
        return
    if not settings.resume:
        raise OutputError(
            f"{output} exists and is not overwritten; go on with it by --continue, or choose another folder"
        )
    before = read_record(output, required=False).get("finetune", {}).get("settings")
    if before is None:
        raise OutputError(f"{output} cannot be resumed: its {RECORD} is missing or has no 'finetune' entry")
    for name, value in plain_settings(settings).items():
        if name not in _MAY_DIFFER and before.get(name) != value:
            raise ConfigError(
                f"{output} was begun with {name} = {before.get(name)}, now it is {value}; resume with the same"
            )


def _trainer_name(source: TrainedModel, settings: FinetuneSettings) -> str:
    """Return the trainer's class name, after checking that nnU-Net has it and that it can build the network."""
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

    name = settings.trainer or source.trainer_name
    try:
        found = trainer_class(name)
    except ModelError as error:
        if settings.trainer is None:
            raise
        raise ConfigError(f"trainer = '{name}': nnU-Net has no trainer of that name (see nnUNet_extTrainer)") from error
    if not issubclass(found, nnUNetTrainer):
        raise ConfigError(f"trainer = '{name}': expected a class derived from nnUNetTrainer, found {found.__mro__[1]}")
    if source.is_slim and not builds_from_plans(found):
        raise ConfigError(
            f"trainer = '{name}' builds its own network instead of the slim one that {source.path}/plans.json describes"
        )
    return name


def _check_teacher(source: TrainedModel, settings: FinetuneSettings) -> None:
    """Refuse a teacher that sees other voxels, or has other channels or heads, than the model."""
    teacher = read_trained_model(Path(settings.teacher), None, trust=settings.trust)
    ours, theirs = channels_and_heads(source), channels_and_heads(teacher)
    if ours != theirs:
        raise ModelError(
            f"teacher {teacher.path} has {theirs[0]} input channel(s) and {theirs[1]} head(s), the model "
            f"{source.path} has {ours[0]} and {ours[1]}; expected the model that the slim one was made from"
        )
    if model_key(teacher) != model_key(source):
        raise ModelError(
            f"teacher {teacher.path} (configuration {teacher.configuration}, spacing "
            f"{teacher.configuration_manager.spacing}) is preprocessed differently from {source.path} "
            f"({source.configuration}, {source.configuration_manager.spacing}); both must see the same voxels"
        )


def _check_stage(source: TrainedModel, settings: FinetuneSettings) -> None:
    stage = source.configuration_manager.previous_stage_name
    if stage is None:
        return
    if not os.environ.get("nnUNet_results"):
        raise ConfigError(f"{source.path.name} is the second stage of a cascade; set the variable nnUNet_results")
    if settings.previous_stage is not None and not settings.previous_stage.is_dir():
        raise InputError(f"{settings.previous_stage} is no folder; expected the segmentations of '{stage}'")


def _job(
    source: TrainedModel,
    output: Path,
    data: PreparedData,
    fold: str,
    trainer_name: str,
    settings: FinetuneSettings,
) -> FoldJob:
    start = fold if fold in source.checkpoints else next(iter(source.checkpoints))
    if start != fold:
        text = "%s has no fold %s: it starts from fold %s, which may have seen its validation cases"
        _log.warning(text, source.path.name, fold, start)
    # nnU-Net removes the latest once it has written the final one: where both exist, a finished run was made longer.
    latest = [output / f"fold_{fold}" / name for name in (LATEST, FINAL)] if settings.resume else []
    return FoldJob(
        model=source.path,
        source_fold=start,
        checkpoint_name=source.checkpoint_name,
        plans=training_plans(source, data, output.name, settings.batch_size, start),
        dataset=data.dataset,
        configuration=source.configuration,
        fold=int(fold) if fold.isdigit() else fold,
        trainer_name=trainer_name,
        output=output,
        settings=settings,
        resume_from=next((path for path in latest if path.is_file()), None),
    )


def training_plans(
    source: TrainedModel, data: PreparedData, folder_name: str, batch_size: int | None, fold: str
) -> dict[str, Any]:
    """Return the model's plans, pointed at the prepared data; of a pruned model with the widths of the fold.

    An output folder named trainer__plans__configuration gives the plans their name, so that `nnUNetv2_predict -p`
    finds it.
    """
    plans = plans_for_fold(source, fold)
    settings = plans["configurations"][source.configuration]
    settings["data_identifier"] = data.identifier
    if batch_size is not None:
        settings["batch_size"] = batch_size
    plans["dataset_name"] = data.name
    parts = folder_name.split("__")
    if len(parts) == 3 and parts[1]:
        plans["plans_name"] = parts[1]
    return plans


def _train(job: FoldJob, before: int, total: int, progress: Callable[[int, int], None]) -> None:
    """Train one fold; one that is finished already costs nothing, unless it is to be validated.

    Args:
        job: what to train.
        before: epochs of the folds before this one. total: epochs of all.
        progress: called with (epochs done, total).
    """
    settings, trained = job.settings, 0
    if job.resume_from is not None:
        trained = int(load_checkpoint(job.resume_from, trust=True)["current_epoch"])
        _log.info("fold %s: %d of %d epochs are done", job.fold, min(trained, settings.epochs), settings.epochs)
        if trained >= settings.epochs and job.resume_from.name == FINAL and not settings.validate:
            progress(before + settings.epochs, total)
            return
    if settings.num_gpus > 1:
        arguments = (job, settings.num_gpus, _free_port())
        torch.multiprocessing.spawn(run_rank, args=arguments, nprocs=settings.num_gpus, join=True)
    else:
        run_fold(job, torch.device(settings.device), lambda epochs: progress(before + epochs, total))
    progress(before + settings.epochs, total)


def _ignore(done: int, total: int) -> None:
    pass


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
