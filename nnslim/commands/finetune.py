"""`nnslim finetune`: training on a dataset with labels."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nnslim.commands.common import (
    AccumulateOption,
    CheckpointOption,
    ClipOption,
    FoldOption,
    PreviousStageOption,
    QuietOption,
    TrustOption,
    WarmupOption,
    counting,
    start,
)


def finetune(
    context: typer.Context,
    model: Annotated[Path, typer.Option("-m", "--model", help="model to start from, slim or dense")],
    dataset: Annotated[str, typer.Option("-d", "--dataset", help="number or name, raw or preprocessed")],
    output: Annotated[Path, typer.Option("-o", "--output", help="model directory to write")],
    fold: FoldOption = None,
    epochs: Annotated[int, typer.Option(help="epochs in all")] = 50,
    iterations: Annotated[int | None, typer.Option(help="per epoch; default: the trainer's")] = None,
    validation_iterations: Annotated[int | None, typer.Option(help="per epoch; default: the trainer's")] = None,
    batch_size: Annotated[int | None, typer.Option(help="default: the plans'")] = None,
    optimizer: Annotated[str, typer.Option(help="adamw or sgd")] = "adamw",
    learning_rate: Annotated[float, typer.Option(help="in the first epoch")] = 1e-4,
    schedule: Annotated[str, typer.Option(help="learning rate: constant or poly")] = "constant",
    weight_decay: Annotated[float | None, typer.Option(help="default: the trainer's")] = None,
    accumulate: AccumulateOption = 1,
    warmup_steps: WarmupOption = 0,
    gradient_clip: ClipOption = None,
    teacher: Annotated[Path | None, typer.Option(help="dense model to distil from as well")] = None,
    distill: Annotated[float, typer.Option(help="weight of the distillation term, with --teacher")] = 1.0,
    trainer: Annotated[str | None, typer.Option(help="class name; default: the one of the checkpoint")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda or mps")] = "cpu",
    precision: Annotated[str, typer.Option(help="on a CPU: f32, bf16; auto: bf16 where it is fast")] = "auto",
    num_gpus: Annotated[int, typer.Option(help="CUDA devices to train on together")] = 1,
    resume: Annotated[bool, typer.Option("--continue", help="continue where the output stopped")] = False,
    validate: Annotated[bool, typer.Option(help="then predict the validation cases, as nnUNetv2_train does")] = False,
    seed: Annotated[int, typer.Option(help="seed of the augmentation")] = 0,
    checkpoint: CheckpointOption = None,
    processes: Annotated[int, typer.Option(help="processes for preprocessing, where it has not been done")] = 2,
    previous_stage: PreviousStageOption = None,
    trust: TrustOption = False,
    quiet: QuietOption = False,
) -> None:
    """Train a slim model further on a dataset with labels, inside nnU-Net's own trainer.

    Example: nnslim finetune -m SLIM -d 4 -o TUNED --epochs 10
    """
    from nnslim.compression.config import changed_settings
    from nnslim.hosts.nnunet.train.finetune_model import finetune_model
    from nnslim.hosts.nnunet.train.settings import TrainingSettings

    start(quiet)
    given = {key: value for key, value in context.params.items() if key in TrainingSettings.model_fields}
    given |= {"folds": fold, "validation": validate}
    settings = changed_settings(TrainingSettings(), given, "nnslim finetune")
    with counting(quiet, "epochs") as count:
        finetune_model(model, output, dataset, settings, count)
    typer.echo(f"written: {output}")
