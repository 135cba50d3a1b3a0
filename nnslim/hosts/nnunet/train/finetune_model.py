"""Fine-tune a model, slim or dense, with labels inside nnU-Net's trainer; the result is an ordinary model."""

from __future__ import annotations

import logging
import math
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from nnslim._version import __version__
from nnslim.compression.record import RECORD, read_record, write_record
from nnslim.errors import ConfigError, InputError, ModelError, OutputError
from nnslim.files import make_folder, read_json, temporary_folder
from nnslim.hosts.nnunet.cases.prepared_data import PreparedData, model_key, plans_on, prepare_data
from nnslim.hosts.nnunet.model.slim_plans import named_after
from nnslim.hosts.nnunet.model.trained_model import (
    TrainedModel,
    builds_from_plans,
    channels_and_heads,
    load_checkpoint,
    read_trained_model,
    trainer_class,
)
from nnslim.hosts.nnunet.train.finetune_trainer import BEFORE, FoldJob, fold_trainer
from nnslim.hosts.nnunet.train.settings import FINETUNING, KINDS, TrainingSettings
from nnslim.hosts.nnunet.train.steady import FINAL, LATEST, quiet_nnunet

_log = logging.getLogger("nnslim")
# A resumed run may differ in these: where it runs, how long, and what is done before and after.
_MAY_DIFFER = ("epochs", "device", "num_gpus", "resume", "validation", "processes", "folds", "trust", "previous_stage")


def finetune_model(
    model: Path,
    output: Path,
    dataset: int | str,
    settings: TrainingSettings | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Path:
    """Fine-tune the folds of a model and write a model that stock nnU-Net loads.

    The dataset is preprocessed with the model's own plans where that has not been done. A fold that the model lacks
    starts from its first fold. checkpoint_latest, _best and _final.pth are kept apart, as nnU-Net does.

    Args:
        output: directory to write, which is returned; must not exist or be empty, unless `settings.resume`.
        dataset: number or name of a raw or preprocessed dataset.
        settings: how; what is None is as in `FINETUNING`.
        progress: called with (epochs done, epochs in all), the folds together; on one device only.
    Raises:
        ModelError: the model or the teacher cannot be used. InputError: the dataset cannot.
        ConfigError: settings that cannot be met, or that are not those of the run to be resumed.
        OutputError: the output exists, or cannot be written.
    """
    settings = (settings or TrainingSettings()).with_defaults(**FINETUNING)
    model, output = Path(model), Path(output)
    if settings.device == "cuda" and torch.cuda.device_count() < settings.num_gpus:
        raise ConfigError(
            f"{settings.num_gpus} CUDA device(s) were asked for, torch finds {torch.cuda.device_count()}; "
            "use --device cpu or a smaller --num-gpus"
        )
    _check_output(output, settings)
    source = read_trained_model(model, None, settings.checkpoint, trust=settings.trust)
    trainer_name = _trainer_name(source, settings)
    if settings.teacher is not None:
        _check_teacher(source, settings)
    if (stage := source.configuration_manager.previous_stage_name) is not None:
        if not os.environ.get("nnUNet_results"):
            raise ConfigError(f"{source.path.name} is the second stage of a cascade; set the variable nnUNet_results")
        if settings.previous_stage is not None and not settings.previous_stage.is_dir():
            raise InputError(f"{settings.previous_stage} is not a directory; expected the segmentations of '{stage}'")
    data = prepare_data(source, dataset, settings.processes)
    folds = settings.folds or tuple(source.checkpoints)
    make_folder(output)
    record = begin_record(source, output, data, trainer_name, settings)
    total = settings.epochs * len(folds)
    for number, fold in enumerate(folds):
        before = number * settings.epochs
        job = fold_job(source, output, data, fold, trainer_name, settings)
        _train(job, lambda epochs, before=before: progress(before + epochs, total))
    results = record["finetune"]["folds"]
    results |= {fold: fold_result(output / f"fold_{fold}", data.dataset, trust=settings.trust) for fold in folds}
    write_record(output, record, checkpoint=FINAL, folds=sorted(results))
    return output


def _check_output(output: Path, settings: TrainingSettings) -> None:
    if output.exists() and not output.is_dir():
        raise OutputError(f"{output} is a file; expected a directory to write")
    if not output.is_dir() or not any(output.iterdir()):
        return
    if not settings.resume:
        raise OutputError(f"{output} exists and is not overwritten; continue it with --continue, or choose another")
    before = read_record(output, required=False).get("finetune", {}).get("settings")
    if before is None:
        raise OutputError(f"{output} cannot be resumed: its {RECORD} is missing or has no 'finetune' entry")
    for name, value in _plain(settings).items():
        if name not in _MAY_DIFFER and before.get(name) != value:
            raise ConfigError(
                f"{output} was begun with {name} = {before.get(name)}, now it is {value}; resume with the same"
            )


def _plain(settings: TrainingSettings) -> dict[str, Any]:
    return settings.model_dump(mode="json", exclude=set(KINDS))


def _trainer_name(source: TrainedModel, settings: TrainingSettings) -> str:
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


def _check_teacher(source: TrainedModel, settings: TrainingSettings) -> None:
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


def fold_job(
    source: TrainedModel, output: Path, data: PreparedData, fold: str, trainer_name: str, settings: TrainingSettings
) -> FoldJob:
    """Return what a process needs to train a fold."""
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
        plans=named_after(output.name, plans_on(source, data, start)),
        dataset=data.dataset,
        configuration=source.configuration,
        fold=int(fold) if fold.isdigit() else fold,
        trainer_name=trainer_name,
        output=output,
        settings=settings,
        resume_from=next((path for path in latest if path.is_file()), None),
    )


def _train(job: FoldJob, progress: Callable[[int], None]) -> None:
    """Train one fold; one that is finished already costs nothing, unless its cases are to be predicted."""
    settings = job.settings
    if job.resume_from is not None:
        trained = int(load_checkpoint(job.resume_from, trust=settings.trust)["current_epoch"])
        _log.info("fold %s: %d of %d epochs are done", job.fold, min(trained, settings.epochs), settings.epochs)
        if trained >= settings.epochs and job.resume_from.name == FINAL and not settings.validation:
            progress(settings.epochs)
            return
    if settings.num_gpus > 1:
        run_ranks(job, settings.num_gpus)
    else:
        run_fold(job, torch.device(settings.device), lambda epochs, _: progress(epochs))
    progress(settings.epochs)


def run_fold(job: FoldJob, device: torch.device, after_epoch: Callable[[int, int], None] | None = None) -> None:
    """Train one fold in this process, see `fold_trainer`."""
    torch.backends.cudnn.benchmark = device.type == "cuda"  # as nnUNetv2_train
    with quiet_nnunet():
        fold_trainer(job, device, after_epoch).train_on()


def run_ranks(job: FoldJob, count: int, device: str = "cuda") -> None:
    """Train one fold in several processes of this machine; each makes its trainer anew, which cannot be pickled.

    nnU-Net's trainer takes the CUDA device of its rank whatever `device` says.
    """
    with temporary_folder() as place:
        meeting = (place / "ranks").as_uri()
        ranks = torch.multiprocessing.spawn(_run_rank, args=(job, count, meeting, device), nprocs=count, join=False)
        try:
            while not ranks.join():
                pass
        finally:  # if this process is told to end, they are, and end their own processes
            for process in ranks.processes:
                if process.is_alive():
                    os.kill(process.pid, signal.SIGINT)


def _run_rank(rank: int, job: FoldJob, count: int, meeting: str, device: str) -> None:
    import torch.distributed as dist

    if device == "cuda":
        torch.cuda.set_device(rank)
    dist.init_process_group("nccl" if device == "cuda" else "gloo", init_method=meeting, rank=rank, world_size=count)
    try:
        run_fold(job, torch.device(device, rank) if device == "cuda" else torch.device(device))
    finally:
        dist.destroy_process_group()


def begin_record(
    source: TrainedModel, output: Path, data: PreparedData, trainer_name: str, settings: TrainingSettings
) -> dict[str, Any]:
    """Write nnslim.json: the source's, if it has one, with what this run is asked to do.

    Raises:
        ConfigError: the output was begun from another model, dataset or trainer.
    """
    begun = read_record(output, required=False).get("finetune", {})
    before = read_record(source.path, required=False) or {"nnslim": __version__, "source": source.path.name}
    entry = {
        "nnslim": __version__,
        "source": source.path.name,
        "dataset": data.name,
        "trainer": trainer_name,
        "settings": _plain(settings),
        "folds": begun.get("folds", {}),
    }
    for name in ("source", "dataset", "trainer"):
        if begun and begun.get(name) != entry[name]:
            raise ConfigError(f"{output} was begun with {name} {begun.get(name)}, now it is {entry[name]}")
    if "finetune" in before:
        entry["earlier"] = before["finetune"]
    return write_record(output, before, finetune=entry)


def fold_result(folder: Path, dataset: dict[str, Any], *, trust: bool = False) -> dict[str, Any]:
    """Return epochs, seconds and pseudo-Dice (nnU-Net's, on random validation patches) of a finished fold."""
    checkpoint = load_checkpoint(folder / FINAL, trust=trust)
    log, before = checkpoint["logging"], read_json(folder / BEFORE)
    spans = zip(log["epoch_start_timestamps"], log["epoch_end_timestamps"], strict=True)
    return {
        "epochs": int(checkpoint["current_epoch"]),
        "seconds": round(sum(end - start for start, end in spans), 1),
        "pseudo_dice_before": _by_class(before.get("dice_per_class_or_region", []), dataset),
        "pseudo_dice": _by_class(log["dice_per_class_or_region"][-1], dataset),
        "best_mean_pseudo_dice": float(max(log["mean_fg_dice"])),
    }


def _by_class(values: list[float], dataset: dict[str, Any]) -> dict[str, float | None]:
    """Name nnU-Net's list: regions in the order of dataset.json, labels in the order of their numbers."""
    named = [(name, value) for name, value in dataset["labels"].items() if name != "ignore" and value not in (0, [0])]
    if not any(isinstance(value, list) for _, value in named):
        named.sort(key=lambda pair: pair[1])
    # NaN, where no patch showed the class, is no JSON
    return {
        name: None if math.isnan(dice) else round(float(dice), 4)
        for (name, _), dice in zip(named, values, strict=False)
    }
