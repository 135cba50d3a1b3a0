"""What nnslim's trainers share: their settings, each epoch's random numbers, and checkpoints that are whole."""

from __future__ import annotations

import os
import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from nnslim.errors import ConfigError, ModelError, OutputError, first_line
from nnslim.files import output_error, read_json, unwritable, write_json
from nnslim.files import save_checkpoint as write_checkpoint
from nnslim.hosts.nnunet.model.checked_plans import LimitedBuild
from nnslim.hosts.nnunet.model.slim_plans import differences, in_run
from nnslim.hosts.nnunet.model.trained_model import allowed_globals, load_checkpoint, managers_of
from nnslim.hosts.nnunet.train.optimizer_steps import OptimizerSteps
from nnslim.hosts.nnunet.train.settings import TrainingSettings, settings_in_force
from nnslim.network.walk import unwrap
from nnslim.running.bfloat16 import bfloat16_is_safe, passes_in_bfloat16, wants_bfloat16

LATEST, FINAL, BEST = "checkpoint_latest.pth", "checkpoint_final.pth", "checkpoint_best.pth"
_CPU = torch.device("cpu")
# Setting -> attribute of nnU-Net's trainer.
_ATTRIBUTES = {
    "epochs": "num_epochs",
    "iterations": "num_iterations_per_epoch",
    "validation_iterations": "num_val_iterations_per_epoch",
    "learning_rate": "initial_lr",
    "weight_decay": "weight_decay",
}


def reseed(seed: int, epoch: int, rank: int) -> None:
    """Seed Python, numpy and torch for one epoch of one process."""
    value = (seed * 1_000_003 + (epoch + 1) * 1_009 + rank) % 2**32
    random.seed(value)
    np.random.seed(value)
    torch.manual_seed(value)


@contextmanager
def quiet_nnunet() -> Iterator[None]:
    """Silence what nnU-Net prints; it logs to a file, too."""
    with open(os.devnull, "w") as sink, redirect_stdout(sink):  # noqa: PTH123
        yield


class SteadyTraining:
    """A mixin of nnUNetTrainer that takes settings; a run that is killed at any moment can be resumed without a trace.

    Attributes:
        kind: section of the settings. given: settings; None reads those in force when a trainer is made.
        settings: those of this trainer.
        steps: how the optimiser steps, where the settings change that.
        after_epoch: called with (epochs done, epochs in all), in the first process only.
        own_folder: what to do where another training has the folder.
        in_bfloat16: whether the network computes in bfloat16 on the CPU; nnU-Net has mixed precision on GPUs only.
    """

    kind: str = ""
    given: TrainingSettings | None = None
    own_folder: str = "give this one a run_name (nnslim train --run-name, or in NNSLIM_TRAINING), or remove that folder"
    in_bfloat16: bool = False
    steps: OptimizerSteps | None = None
    after_epoch: Callable[[int, int], None] | None = None

    @classmethod
    def settings_now(cls) -> TrainingSettings:
        """Return the settings that a trainer made now would have."""
        if cls.given is None:
            return settings_in_force(cls.kind)
        return cls.given.for_kind(cls.kind) if cls.kind else cls.given

    def __init__(  # nnU-Net looks at the names of these parameters
        self, plans: dict, configuration: str, fold: int, dataset_json: dict, device: torch.device = _CPU
    ) -> None:
        self.settings = self.settings_now()
        plans = in_run(self.planned(plans, configuration), self.settings.run_name)
        managers_of(Path(str(plans.get("dataset_name"))), plans, dataset_json, configuration)  # refuses what is unsafe
        if self.settings.batch_size is not None:
            plans["configurations"][configuration]["batch_size"] = self.settings.batch_size
        super().__init__(plans, configuration, fold, dataset_json, device=device)
        self.plans_manager.plans.pop("continue_training", None)  # nnU-Net before 2.7 would keep it in plans.json
        for key, name in _ATTRIBUTES.items():
            if (value := getattr(self.settings, key)) is not None:
                setattr(self, name, value)
        self.settle()

    @property
    def section(self) -> Any:
        """The section of the settings that is this kind's own; None for fine-tuning, which has none."""
        return getattr(self.settings, self.kind) if self.kind else None

    def planned(self, plans: dict, configuration: str) -> dict:
        """Return the plans that the trainer is made with."""
        return plans

    def settle(self) -> None:
        """Do what is left to do once nnU-Net's constructor has run and the settings are taken over."""

    def keep_latest(self) -> None:
        """Let `write_latest` alone write checkpoint_latest.pth; nnU-Net's own is one epoch's best behind."""
        self.save_every = sys.maxsize

    def initialize(self) -> None:
        """Build the network, and decide in which precision it computes."""
        with LimitedBuild(self.plans_manager.dataset_name):
            super().initialize()
        self.claim_folder()
        shape = (self.batch_size, self.num_input_channels, *self.configuration_manager.patch_size)
        if wants_bfloat16(self.settings.precision or "f32", self.device):
            self.in_bfloat16 = all(bfloat16_is_safe(network, shape) for network in self.computing())
            if not self.in_bfloat16:
                self.print_to_log_file("float32: torch computes a layer of this network wrongly in bfloat16")

    def described_plans(self) -> dict[str, Any]:
        """Return what plans.json is to hold: from it stock nnU-Net builds the network of every fold."""
        return self.plans_manager.plans

    def claim_folder(self) -> None:
        """Write plans.json where there is none yet.

        Raises:
            ConfigError: it is there, and the folds that were trained with it would be predicted by another network.
        """
        path, plans = Path(self.output_folder_base) / "plans.json", self.described_plans()
        if path.is_file():
            if found := differences(read_json(path), plans, self.configuration_name):
                raise ConfigError(f"{path} is of a training with other settings ({found}); {self.own_folder}")
        elif self.local_rank == 0:
            write_json(path, plans)

    def on_train_start(self) -> None:
        """Let nnU-Net write the plans that describe the network."""
        if not self.was_initialized:
            self.initialize()
        own, self.plans_manager.plans = self.plans_manager.plans, self.described_plans()
        try:
            super().on_train_start()
        finally:
            self.plans_manager.plans = own

    def computing(self) -> list[nn.Module]:
        """Return the networks that compute in a training step."""
        return [unwrap(self.network)]

    def train_step(self, batch: dict) -> dict:
        """See nnU-Net's; in the precision of the training."""
        with passes_in_bfloat16(unwrap(self.network), self.in_bfloat16):
            return super().train_step(batch)

    def validation_step(self, batch: dict) -> dict:
        """See nnU-Net's; in the precision of the training."""
        with passes_in_bfloat16(unwrap(self.network), self.in_bfloat16):
            return super().validation_step(batch)

    def on_train_epoch_start(self) -> None:
        """Make each epoch's random numbers depend on its number only, so that a resumed run draws the same ones."""
        super().on_train_epoch_start()
        if self.settings.seed is not None:
            reseed(self.settings.seed, self.current_epoch, self.local_rank)
        self._control_steps()

    def _control_steps(self) -> None:
        accumulate, warmup, clip = self.settings.accumulate, self.settings.warmup_steps, self.settings.gradient_clip
        if accumulate == 1 and not warmup and clip is None:
            return
        if self.steps is None or self.steps.optimizer is not self.optimizer:
            self.steps = OptimizerSteps(self.optimizer, accumulate=accumulate, warmup=warmup, clip=clip)
        self.steps.taken = self.current_epoch * -(-self.num_iterations_per_epoch // accumulate)

    def on_train_epoch_end(self, train_outputs: list[dict]) -> None:
        """Let no gradients wait beyond the end of an epoch, where a training may be resumed."""
        if self.steps is not None:
            self.steps.finish()
        super().on_train_epoch_end(train_outputs)

    def load_all(self, weights: dict[str, Tensor], where: object) -> None:
        """Load all weights, segmentation heads included, which nnU-Net's -pretrained_weights leaves out.

        Raises:
            ModelError: they do not fit; the message says `where` they are from.
        """
        try:
            unwrap(self.network).load_state_dict({key: value.float() for key, value in weights.items()})
        except RuntimeError as error:
            lines = " ".join(line.strip() for line in str(error).splitlines()[:2])
            name = type(self).__name__
            raise ModelError(f"{where} does not fit the network that trainer {name} builds: {lines[:300]}") from error

    def load_checkpoint(self, filename_or_checkpoint: dict | str) -> None:
        """See nnU-Net's, which runs whatever code a file holds: a file with more than weights is refused before.

        Raises:
            ModelError: such a file, unless the settings trust it.
        """
        if not self.was_initialized:
            self.initialize()  # this may load a checkpoint, too, and leaving that would end what is allowed here
        if isinstance(filename_or_checkpoint, str):
            load_checkpoint(Path(filename_or_checkpoint), trust=self.settings.trust)
        with allowed_globals():  # nnU-Net's Primus trainers load without them, and torch >= 2.6 refuses its numbers
            super().load_checkpoint(filename_or_checkpoint)

    def train_on(self) -> None:
        """Train the epochs that are left and, where the settings say so, predict the validation cases."""
        try:
            if self.current_epoch < self.num_epochs:
                self.run_training()
            if self.settings.validation:
                self.perform_actual_validation()
        finally:
            for loader in (self.dataloader_train, self.dataloader_val):
                if hasattr(loader, "_finish"):  # processes that augment
                    loader._finish()

    def write_latest(self) -> None:
        """Write checkpoint_latest.pth, at the end of `on_epoch_end`: after nnU-Net has updated what it calls best."""
        if self.current_epoch < self.num_epochs:
            self.current_epoch -= 1  # as nnU-Net does around its last checkpoint: saving adds one
            self.save_checkpoint(str(Path(self.output_folder) / LATEST))
            self.current_epoch += 1
        if self.local_rank == 0 and self.after_epoch is not None:
            self.after_epoch(self.current_epoch, self.num_epochs)

    def save_checkpoint(self, filename: str) -> None:
        """Write beside, then rename: a run that is killed while it saves can still be resumed."""
        beside = Path(f"{filename}.part")
        try:
            super().save_checkpoint(str(beside))
            if beside.is_file() and self.local_rank == 0:
                if changed := self.changed_content():
                    content = torch.load(beside, map_location="cpu", weights_only=False)
                    write_checkpoint({**content, **changed}, beside)
                beside.replace(filename)
        except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
            cause = error if isinstance(error, OSError) else unwritable(beside.parent) or OSError(first_line(error))
            beside.unlink(missing_ok=True)
            raise OutputError(f"{output_error(Path(filename), cause)}; the previous checkpoint is kept") from error

    def changed_content(self) -> dict[str, Any]:
        """Return what a checkpoint holds in place of, or beside, what nnU-Net writes."""
        return {}
