"""nnU-Net's trainer made to fine-tune: an output of its own, optimiser, rate, seed, and perhaps a teacher."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from nnslim.compression.distillation import distillation_loss
from nnslim.errors import InputError
from nnslim.files import write_json
from nnslim.hosts.nnunet.model.trained_model import build_network, read_trained_model, trainer_class
from nnslim.hosts.nnunet.train.settings import TrainingSettings
from nnslim.hosts.nnunet.train.steady import SteadyTraining, reseed
from nnslim.network.spec import Held, held_by
from nnslim.running.bfloat16 import passes_in_bfloat16

_log = logging.getLogger("nnslim")
BEFORE = "before.json"


@dataclass(frozen=True)
class FoldJob:
    """All that one process needs to train one fold; it can be pickled.

    Attributes:
        model, source_fold, checkpoint_name: where the first weights come from.
        plans, dataset, configuration, fold, trainer_name: what nnU-Net's trainer is made from.
        output: model directory to write into.
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
    settings: TrainingSettings
    resume_from: Path | None = None


class FineTuning(SteadyTraining):
    """What fine-tuning changes in the nnU-Net trainer that it is mixed into."""

    job: FoldJob
    teacher: nn.Module | None
    own_folder = "choose another output"
    held: Sequence[Held] = ()
    step_of_epoch: int = 0

    def settle(self) -> None:
        """Take over what only a fine-tuning has."""
        super().settle()
        if len(self.configuration_manager.network_arch_init_kwargs.get("strides") or ()) == 2:
            # nnU-Net gives the last scale of deep supervision no weight: of a single one that is 0 / 0.
            self.enable_deep_supervision = False
        if self.settings.previous_stage is not None:
            self.folder_with_segs_from_previous_stage = str(self.settings.previous_stage)
        self.keep_latest()

    def computing(self) -> list[nn.Module]:
        """Return the network, and the teacher where there is one."""
        return [*super().computing(), *([] if self.teacher is None else [self.teacher])]

    @property
    def output_folder_base(self) -> str:
        """The directory that the user chose."""
        return str(self.job.output)

    @output_folder_base.setter
    def output_folder_base(self, _: str | None) -> None:
        """Keep the user's: nnU-Net's constructor sets one under nnUNet_results and creates it at once."""

    def configure_optimizers(self, *_: Any, **__: Any) -> tuple[torch.optim.Optimizer, Any]:
        """Return the optimiser and schedule asked for; trainers that ask again in mid-training keep what they have."""
        from nnunetv2.training.lr_scheduler.polylr import PolyLRScheduler

        if self.optimizer is not None:
            return self.optimizer, self.lr_scheduler
        rate, parameters = self.initial_lr, self.network.parameters()
        if self.settings.optimizer == "adamw":
            optimizer = torch.optim.AdamW(parameters, rate, weight_decay=self.weight_decay)
        else:
            optimizer = torch.optim.SGD(parameters, rate, weight_decay=self.weight_decay, momentum=0.99, nesterov=True)
        exponent = 0.9 if self.settings.schedule == "poly" else 0.0  # x**0 = 1: constant
        return optimizer, PolyLRScheduler(optimizer, rate, self.num_epochs, exponent=exponent)

    def _build_loss(self) -> nn.Module:
        loss = super()._build_loss()
        if self.teacher is None:
            return loss
        self.teacher.to(self.device)
        return DistilledLoss(loss, self.settings.distill, regions=self.label_manager.has_regions)

    def train_step(self, batch: dict) -> dict:
        """Let the teacher see the same augmented patch first; its logits wait in the loss."""
        if self.teacher is not None:
            mixed = torch.autocast("cuda") if self.device.type == "cuda" else nullcontext()
            with torch.no_grad(), mixed, passes_in_bfloat16(self.teacher, self.in_bfloat16):
                self.loss.teacher_logits = self.teacher(batch["data"].to(self.device, non_blocking=True))
        steps = self.num_iterations_per_epoch
        if self.held and self.step_of_epoch in (0, steps // 2):  # twice an epoch, as published for zeros
            self.advance((self.current_epoch + self.step_of_epoch / steps) / self.num_epochs)
        self.step_of_epoch += 1
        result = super().train_step(batch)
        for held in self.held:
            held.hold()
        return result

    def advance(self, share: float) -> None:
        """Let the edits of a slim model do what is due after a share of the fine-tuning, such as more zeros."""
        for held in self.held:
            held.advance(share)

    def on_train_epoch_start(self) -> None:
        """Begin to count the steps of an epoch."""
        super().on_train_epoch_start()
        self.step_of_epoch = 0

    def on_train_epoch_end(self, train_outputs: list[dict]) -> None:
        """Advance before validation judges, so that the last epoch ends with all that is due."""
        super().on_train_epoch_end(train_outputs)
        self.advance((self.current_epoch + 1) / self.num_epochs)

    def on_train_start(self) -> None:
        """Validate once before the first epoch: what the training starts from."""
        self.held = held_by(self.network)  # the weights are loaded by now
        super().on_train_start()
        if self.current_epoch > 0:
            return
        reseed(self.settings.seed, -1, self.local_rank)
        kept, self.logger = self.logger, _Notes()
        try:
            with torch.no_grad():
                self.on_validation_epoch_start()
                batches = range(self.num_val_iterations_per_epoch)
                self.on_validation_epoch_end([self.validation_step(next(self.dataloader_val)) for _ in batches])
        finally:
            notes, self.logger = self.logger, kept
        self.print_to_log_file("Validation before epoch 0:", notes)
        if self.local_rank == 0:
            write_json(Path(self.output_folder) / BEFORE, notes)

    def on_epoch_end(self) -> None:
        """Write checkpoint_latest.pth after every epoch, and after nnU-Net has updated what it calls best."""
        super().on_epoch_end()
        log = self.logger.get_checkpoint()
        _log.info(
            "fold %s, epoch %d of %d: rate %.3g, train loss %.4f, validation loss %.4f, pseudo-Dice %.4f",
            self.fold,
            self.current_epoch,
            self.num_epochs,
            *(log[key][-1] for key in ("lrs", "train_losses", "val_losses", "mean_fg_dice")),
        )
        self.write_latest()


class DistilledLoss(nn.Module):
    """nnU-Net's loss, plus `weight` times the distillation loss where a teacher's logits wait."""

    def __init__(self, loss: nn.Module, weight: float, *, regions: bool) -> None:
        super().__init__()
        self.loss, self.weight, self.regions = loss, weight, regions
        self.teacher_logits: Tensor | None = None

    def forward(self, output: Tensor | Sequence[Tensor], target: Tensor | Sequence[Tensor]) -> Tensor:
        """Return the scalar loss of (B, C, *spatial) logits and labels, or lists of them, highest resolution first."""
        loss = self.loss(output, target)
        if self.teacher_logits is None:  # validation
            return loss
        logits, self.teacher_logits = self.teacher_logits, None
        student = output[0] if isinstance(output, (list, tuple)) else output
        return loss + self.weight * distillation_loss(student, logits, regions=self.regions)


class _Notes(dict):
    """Takes the place of nnU-Net's logger, which holds exactly one value per epoch."""

    def log(self, key: str, value: Any, step: int) -> None:
        self[key] = np.asarray(value, dtype=float).tolist()


def fold_trainer(
    job: FoldJob, device: torch.device, after_epoch: Callable[[int, int], None] | None = None
) -> FineTuning:
    """Return the trainer of a fold with the model's weights, or those of a checkpoint of the same training.

    Its class keeps the *name* of the trainer that the job asks for: nnU-Net stores it in each checkpoint and looks it
    up at inference, where only that trainer is needed.

    Raises:
        ModelError: the weights do not fit the network that the trainer builds.
        InputError: a cascade's first stage is missing. OutputError: a checkpoint cannot be written.
    """
    settings, teacher = job.settings, None
    if settings.teacher is not None:
        # Without deep supervision, frozen: the fold of the same number, where it has one.
        same = (Path(settings.teacher) / f"fold_{job.fold}").is_dir()
        found = read_trained_model(Path(settings.teacher), [job.fold] if same else None, trust=settings.trust)
        teacher = build_network(found).requires_grad_(False)
    given = {"job": job, "given": settings, "teacher": teacher}
    base = trainer_class(job.trainer_name)
    plans = {**copy.deepcopy(job.plans), "continue_training": job.resume_from is not None}
    trainer = type(base.__name__, (FineTuning, base), given)(plans, job.configuration, job.fold, job.dataset, device)
    trainer.after_epoch = after_epoch
    stage = trainer.folder_with_segs_from_previous_stage
    if stage is not None and not Path(stage).is_dir():
        raise InputError(f"the cascade's first stage should have left its segmentations in {stage}, which is missing")
    trainer.initialize()
    if job.resume_from is not None:
        trainer.load_checkpoint(str(job.resume_from))
    else:
        source = read_trained_model(job.model, [job.source_fold], job.checkpoint_name, trust=settings.trust)
        trainer.load_all(source.weights[0], f"{job.model}/fold_{job.source_fold}/{job.checkpoint_name}")
    return trainer
