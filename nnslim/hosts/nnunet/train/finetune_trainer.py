"""nnU-Net's trainer made to fine-tune: a folder of its own, optimiser, rate, seed, and perhaps a teacher."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from nnslim.compression.distillation import distillation_loss
from nnslim.files import write_json
from nnslim.hosts.nnunet.train.finetune_settings import FoldJob
from nnslim.hosts.nnunet.train.steady import SteadyTraining, reseed
from nnslim.network.spec import Held, held_by
from nnslim.network.walk import unwrap
from nnslim.running.bfloat16 import bfloat16_is_safe, in_bfloat16, wants_bfloat16

_log = logging.getLogger("nnslim")
_CPU = torch.device("cpu")
BEFORE = "before.json"


class FineTuning(SteadyTraining):
    """What a fine-tuning trainer does otherwise than the nnU-Net trainer that it is mixed into."""

    job: FoldJob
    teacher: nn.Module | None
    after_epoch: Callable[[int], None]
    held: Sequence[Held] = ()
    step_of_epoch: int = 0

    def __init__(
        self, plans: dict, configuration: str, fold: int, dataset_json: dict, device: torch.device = _CPU
    ) -> None:
        super().__init__(plans, configuration, fold, dataset_json, device=device)
        settings = self.job.settings
        if len(self.configuration_manager.network_arch_init_kwargs.get("strides") or ()) == 2:
            # nnU-Net gives the last scale of deep supervision no weight: of a single one that is 0 / 0.
            self.enable_deep_supervision = False
        self.plans_manager.plans.pop("continue_training", None)  # nnU-Net before 2.7 would keep it in plans.json
        self.num_epochs = settings.epochs
        self.initial_lr = settings.learning_rate
        self.num_iterations_per_epoch = settings.iterations or self.num_iterations_per_epoch
        self.num_val_iterations_per_epoch = settings.validation_iterations or self.num_val_iterations_per_epoch
        if settings.weight_decay is not None:
            self.weight_decay = settings.weight_decay
        if settings.previous_stage is not None:
            self.folder_with_segs_from_previous_stage = str(settings.previous_stage)
        self.random_seed = settings.seed
        self.keep_latest()

    def initialize(self) -> None:
        """Let a CPU compute in bfloat16 where that is wanted; nnU-Net itself has mixed precision on GPUs only."""
        super().initialize()
        if not wants_bfloat16(self.job.settings.precision, self.device):
            return
        shape = (self.batch_size, self.num_input_channels, *self.configuration_manager.patch_size)
        networks = [network for network in (unwrap(self.network), self.teacher) if network is not None]
        if all(bfloat16_is_safe(network, shape) for network in networks):
            for network in networks:
                network.forward = in_bfloat16(network.forward)
        else:
            _log.warning("fine-tuning computes in float32: torch gets a layer of this network wrong in bfloat16")

    @property
    def output_folder_base(self) -> str:
        """The folder that the user chose."""
        return str(self.job.output)

    @output_folder_base.setter
    def output_folder_base(self, _: str | None) -> None:
        """Keep the user's folder: nnU-Net's constructor sets one under nnUNet_results and creates it at once."""

    def configure_optimizers(self, *_: Any, **__: Any) -> tuple[torch.optim.Optimizer, Any]:
        """Return the optimiser and schedule asked for; trainers that ask again in mid-training keep what they have."""
        from nnunetv2.training.lr_scheduler.polylr import PolyLRScheduler

        if self.optimizer is not None:
            return self.optimizer, self.lr_scheduler
        rate, parameters = self.initial_lr, self.network.parameters()
        if self.job.settings.optimizer == "adamw":
            optimizer = torch.optim.AdamW(parameters, rate, weight_decay=self.weight_decay)
        else:
            optimizer = torch.optim.SGD(parameters, rate, weight_decay=self.weight_decay, momentum=0.99, nesterov=True)
        exponent = 0.9 if self.job.settings.schedule == "poly" else 0.0  # x**0 = 1: constant
        return optimizer, PolyLRScheduler(optimizer, rate, self.num_epochs, exponent=exponent)

    def _build_loss(self) -> nn.Module:
        loss = super()._build_loss()
        if self.teacher is None:
            return loss
        self.teacher.to(self.device)
        return DistilledLoss(loss, self.job.settings.distill, regions=self.label_manager.has_regions)

    def train_step(self, batch: dict) -> dict:
        """Let the teacher see the same augmented patch first; its logits wait in the loss."""
        if self.teacher is not None:
            mixed = torch.autocast("cuda") if self.device.type == "cuda" else nullcontext()
            with torch.no_grad(), mixed:
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
        reseed(self.job.settings.seed, -1, self.local_rank)
        kept, self.logger = self.logger, _Notes()
        try:
            with torch.no_grad():
                self.on_validation_epoch_start()
                batches = range(self.num_val_iterations_per_epoch)
                self.on_validation_epoch_end([self.validation_step(next(self.dataloader_val)) for _ in batches])
            notes = self.logger.plain()
        finally:
            self.logger = kept
        self.print_to_log_file("Validation before epoch 0:", notes)
        if self.local_rank == 0:
            write_json(Path(self.output_folder) / BEFORE, notes)

    def on_epoch_end(self) -> None:
        """Write checkpoint_latest.pth after every epoch, and after nnU-Net has updated what it calls best."""
        super().on_epoch_end()
        self.write_latest()
        log = self.logger.get_checkpoint()
        _log.info(
            "fold %s, epoch %d of %d: rate %.3g, train loss %.4f, validation loss %.4f, pseudo-Dice %.4f",
            self.fold,
            self.current_epoch,
            self.num_epochs,
            *(log[key][-1] for key in ("lrs", "train_losses", "val_losses", "mean_fg_dice")),
        )
        if self.local_rank == 0:
            self.after_epoch(self.current_epoch)


class DistilledLoss(nn.Module):
    """nnU-Net's loss, plus `weight` times the distillation loss where a teacher's logits wait."""

    def __init__(self, loss: nn.Module, weight: float, *, regions: bool) -> None:
        super().__init__()
        self.loss, self.weight, self.regions = loss, weight, regions
        self.teacher_logits: Tensor | None = None

    def forward(self, output: Tensor | Sequence[Tensor], target: Tensor | Sequence[Tensor]) -> Tensor:
        """Return the scalar loss.

        Args:
            output: (B, C, *spatial) logits, or a list of them, highest resolution first (deep supervision).
            target: labels, in the same form.
        """
        loss = self.loss(output, target)
        if self.teacher_logits is None:  # validation
            return loss
        logits, self.teacher_logits = self.teacher_logits, None
        student = output[0] if isinstance(output, (list, tuple)) else output
        return loss + self.weight * distillation_loss(student, logits, regions=self.regions)


class _Notes(dict):
    """Takes the place of nnU-Net's logger, which holds exactly one value per epoch."""

    def log(self, key: str, value: Any, step: int) -> None:
        self[key] = value

    def plain(self) -> dict[str, Any]:
        return {key: np.asarray(value, dtype=float).tolist() for key, value in self.items()}


def finetune_trainer_class(
    base: type, job: FoldJob, teacher: nn.Module | None = None, after_epoch: Callable[[int], None] = lambda _: None
) -> type:
    """Return a trainer class for a job that keeps the *name* of its base.

    nnU-Net stores the class name in each checkpoint and looks it up at inference, where only the base is needed.

    Args:
        base: an nnUNetTrainer class.
        job: what to train.
        teacher: frozen network without deep supervision, for the distillation term.
        after_epoch: called with the epochs done, after each, in the first process only.
    """
    given = {"job": job, "teacher": teacher, "after_epoch": staticmethod(after_epoch)}
    return type(base.__name__, (FineTuning, base), given)
