"""What a fine-tuning is asked to do, and what one process needs to know to train one fold."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nnslim.errors import ConfigError

OPTIMIZERS, SCHEDULES, DEVICES = ("adamw", "sgd"), ("constant", "poly"), ("cpu", "cuda", "mps")
PRECISIONS = ("auto", "f32", "bf16")


@dataclass(frozen=True)
class FinetuneSettings:
    """How to fine-tune; None means what the trainer or the plans say.

    Attributes:
        epochs: in all. iterations, validation_iterations: per epoch. batch_size: patches per iteration, all GPUs.
        optimizer: adamw, or sgd (momentum 0.99, Nesterov: nnU-Net's own). learning_rate: the first epoch's.
        schedule: of the rate: constant, or poly (nnU-Net's decay to 0). weight_decay: factor per step.
        teacher: dense model folder. distill: weight of the distillation term; 0 without a teacher.
        trainer: class name; the one that the checkpoint names if None. folds: all of the model if None.
        device: cpu, cuda or mps. num_gpus: above 1 trains on that many CUDA devices. resume: go on where it stopped.
        precision: on a CPU: f32, bf16, or auto: bf16 where the processor is fast in it. On CUDA nnU-Net decides.
        validate: afterwards, predict the fold's validation cases as `nnUNetv2_train` does.
        seed: of augmentation; a run repeats bit by bit where the variable nnUNet_n_proc_DA is 0.
        checkpoint, trust: see `read_trained_model`. processes: that preprocess, where the data are not there yet.
        previous_stage: for a cascade: the folder of the stage before's segmentations, as nnU-Net writes them.
    """

    epochs: int = 50
    iterations: int | None = None
    validation_iterations: int | None = None
    batch_size: int | None = None
    optimizer: str = "adamw"
    learning_rate: float = 1e-4
    schedule: str = "constant"
    weight_decay: float | None = None
    teacher: Path | None = None
    distill: float = 1.0
    trainer: str | None = None
    folds: Sequence[int | str] | None = None
    device: str = "cpu"
    precision: str = "auto"
    num_gpus: int = 1
    resume: bool = False
    validate: bool = False
    seed: int = 0
    checkpoint: str | None = None
    trust: bool = False
    processes: int = 2
    previous_stage: Path | None = None

    def __post_init__(self) -> None:
        """Refuse what cannot be meant.

        Raises:
            ConfigError: names the setting, its value and what is allowed.
        """
        for name in ("epochs", "iterations", "validation_iterations", "batch_size", "num_gpus", "processes"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ConfigError(f"{name} = {value}: expected 1 or more")
        for name, known in (
            ("optimizer", OPTIMIZERS),
            ("schedule", SCHEDULES),
            ("device", DEVICES),
            ("precision", PRECISIONS),
        ):
            if getattr(self, name) not in known:
                raise ConfigError(f"{name} = '{getattr(self, name)}': expected one of {', '.join(known)}")
        if not (math.isfinite(self.learning_rate) and self.learning_rate > 0):
            raise ConfigError(f"learning_rate = {self.learning_rate}: expected a number above 0")
        for name in ("weight_decay", "distill"):
            if (value := getattr(self, name)) is not None and not (math.isfinite(value) and value >= 0):
                raise ConfigError(f"{name} = {value}: expected a number of at least 0")
        if self.num_gpus > 1 and self.device != "cuda":
            raise ConfigError(f"num_gpus = {self.num_gpus}: nnU-Net trains on several devices with cuda only")
        for fold in self.folds or ():
            if not (str(fold).isdigit() or fold == "all"):
                raise ConfigError(f"fold '{fold}': expected a number or 'all'")


@dataclass(frozen=True)
class FoldJob:
    """All that one process needs to train one fold; it can be pickled.

    Attributes:
        model, source_fold, checkpoint_name: where the first weights come from.
        plans, dataset, configuration, fold, trainer_name: what nnU-Net's trainer is made from.
        output: model folder to write into.
        resume_from: checkpoint to go on from.
    """

    model: Path
    source_fold: str
    checkpoint_name: str
    plans: dict[str, Any] = field(repr=False)
    dataset: dict[str, Any] = field(repr=False)
    configuration: str
    fold: int | str
    trainer_name: str
    output: Path
    settings: FinetuneSettings
    resume_from: Path | None = None
