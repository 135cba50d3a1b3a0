"""`nnslim train`: methods that work while a network trains."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nnslim.commands.common import AccumulateOption, ClipOption, QuietOption, WarmupOption, counting, start

_METHOD_OPTIONS = ("epochs", "iterations", "validation_iterations", "batch_size", "learning_rate", "precision", "seed")
_METHOD_OPTIONS += ("strength", "macs", "params", "reach")


def train(
    context: typer.Context,
    dataset: Annotated[str, typer.Option("-d", "--dataset", help="number or name, preprocessed by nnU-Net")],
    method: Annotated[str, typer.Option(help="sauron")] = "sauron",
    config: Annotated[str | None, typer.Option("-c", "--config", help="preset or YAML file; default: --method")] = None,
    configuration: Annotated[str, typer.Option(help="configuration of the plans")] = "3d_fullres",
    plans: Annotated[str, typer.Option("-p", "--plans", help="plans of the preprocessed dataset")] = "nnUNetPlans",
    run_name: Annotated[str | None, typer.Option(help="added to the plans' name in that of the results folder")] = None,
    fold: Annotated[str, typer.Option("-f", "--fold", help="number or all")] = "0",
    start_model: Annotated[Path | None, typer.Option("--start", help="trained model to start from")] = None,
    trainer: Annotated[str | None, typer.Option(help="nnU-Net's trainer to build on; default: nnUNetTrainer")] = None,
    epochs: Annotated[int | None, typer.Option(help="in all; default: the trainer's")] = None,
    iterations: Annotated[int | None, typer.Option(help="per epoch; default: the trainer's")] = None,
    validation_iterations: Annotated[int | None, typer.Option(help="per epoch; default: the trainer's")] = None,
    batch_size: Annotated[int | None, typer.Option(help="default: the plans'")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="in the first epoch; default: the trainer's")] = None,
    accumulate: AccumulateOption = 1,
    warmup_steps: WarmupOption = 0,
    gradient_clip: ClipOption = None,
    strength: Annotated[float | None, typer.Option(help="sauron: weight of the distance loss (lambda)")] = None,
    macs: Annotated[float | None, typer.Option(help="sauron: stop at this share of the MACs")] = None,
    params: Annotated[float | None, typer.Option(help="sauron: stop at this share of the parameters")] = None,
    reach: Annotated[float | None, typer.Option(help="sauron: share of the epochs by which that is reached")] = None,
    precision: Annotated[str | None, typer.Option(help="on a CPU: f32 (default), bf16; auto: bf16 where fast")] = None,
    seed: Annotated[int | None, typer.Option(help="seed of first weights, augmentation and references")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda or mps")] = "cpu",
    resume: Annotated[bool, typer.Option("--continue", help="continue where the training stopped")] = False,
    validate: Annotated[bool, typer.Option(help="then predict the validation cases, as nnUNetv2_train does")] = False,
    processes: Annotated[int, typer.Option(help="preprocessing processes, with --start where it is due")] = 2,
    quiet: QuietOption = False,
) -> None:
    """Train with a method that makes the network smaller as it learns; writes a results directory of nnU-Net.

    The trained model is an ordinary one: nnUNetv2_predict finds it by -tr nnUNetTrainerSauron. Where it misses --macs
    or --params, it is written, and the exit code is 1.

    Example: nnslim train -d 4 --method sauron --macs 0.5
    """
    from nnslim.compression.config import changed_settings, load_config, training_settings
    from nnslim.compression.record import read_record
    from nnslim.hosts.nnunet.train.settings import TrainingSettings
    from nnslim.hosts.nnunet.train.train_dataset import train_dataset

    start(quiet)
    chosen = training_settings(load_config(config or {"methods": [{"method": method}]}), method)
    options = {name: context.params[name] for name in _METHOD_OPTIONS} | {"start": start_model, "base": trainer}
    given = {key: value for key, value in options.items() if value is not None}
    section = changed_settings(chosen, given, "nnslim train")
    run = {"folds": [fold], "device": device, "resume": resume, "validation": validate, "processes": processes}
    run |= {
        "run_name": run_name,
        "accumulate": accumulate,
        "warmup_steps": warmup_steps,
        "gradient_clip": gradient_clip,
    }
    settings = changed_settings(TrainingSettings(), {**run, "sauron": section}, "nnslim train")
    with counting(quiet, "epochs") as count:
        folder = train_dataset(dataset, settings, count, configuration=configuration, plans_name=plans)
    typer.echo(f"written: {folder}")
    if missed := read_record(folder / f"fold_{fold}").get("missed"):
        typer.echo(f"nnslim: {missed}", err=True)
        raise typer.Exit(1)
