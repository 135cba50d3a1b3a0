"""nnU-Net's trainer with Sauron in it, and the patches by which trainers inside a context become that one."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from nnslim._version import __version__
from nnslim.compression.record import write_record
from nnslim.files import write_json
from nnslim.hosts.nnunet.model.slim_plans import with_architecture
from nnslim.hosts.nnunet.model.trained_model import load_checkpoint, read_trained_model, trainer_class
from nnslim.hosts.nnunet.train.settings import TrainingSettings, settings_in_force
from nnslim.hosts.nnunet.train.steady import SteadyTraining, reseed
from nnslim.methods.base import MethodConfig
from nnslim.methods.sauron import Pruner, SauronConfig
from nnslim.methods.sauron.feature_maps import feature_maps, save_maps
from nnslim.methods.sauron.pruning_history import PruningHistory
from nnslim.network.spec import Edit, SlimSpec, spec_of
from nnslim.network.walk import is_compiled, unwrap
from nnslim.patching import AttributePatch
from nnslim.surgery.narrow import ElasticEdit, fit_widths, narrow_edits, narrow_optimizer, widths_of

_log = logging.getLogger("nnslim")
STATE = "nnslim_sauron"
_FINDERS = ("recursive_find_trainer_class_by_name", "recursive_find_python_class")  # nnU-Net 2.8, and before


class SauronTraining(SteadyTraining):
    """What Sauron changes in the nnU-Net trainer that it is mixed into.

    Checkpoints name that trainer, so that stock nnU-Net loads them, and hold thresholds, history and widths beside the
    weights; plans.json names the network class and spec of nnslim.

    Attributes:
        pruner: made with the network. history: of the training. start_widths: (outputs, inputs) of the layers before.
        plain_name: name of the trainer that this one is built on.
    """

    kind = "sauron"
    plain_name: str
    pruner: Pruner

    def settle(self) -> None:
        """Begin the history."""
        self.history = PruningHistory()
        self._iteration = 0
        self._probe: Tensor | None = None  # patch whose feature maps are saved after the epoch
        self.keep_latest()

    def initialize(self) -> None:
        """Build the network, give it the weights to start from, and look at its channels."""
        reseed(self.settings.seed, -2, 0)  # the same first weights in every process
        super().initialize()
        plain = unwrap(self.network)
        self.start_widths = widths_of(plain)
        if self.section.start is not None:
            source = read_trained_model(Path(self.section.start))
            name = str(self.fold) if str(self.fold) in source.checkpoints else next(iter(source.checkpoints))
            weights = source.checkpoints[name]["network_weights"]
            self._fit(weights)
            self.load_all(weights, f"{source.path}/fold_{name}")
        shape = (1, self.num_input_channels, *self.configuration_manager.patch_size)
        self.pruner = Pruner(plain, shape, self.section, self.num_epochs)
        self.loss.pruner = self.pruner

    def configure_optimizers(self) -> tuple[torch.optim.Optimizer, Any]:
        """Return the trainer's own, or the Adam of the original's presets with the same decay of the rate."""
        if self.section.optimizer == "trainer":
            return super().configure_optimizers()
        from nnunetv2.training.lr_scheduler.polylr import PolyLRScheduler

        rate = self.section.learning_rate or 1e-3
        optimizer = torch.optim.Adam(self.network.parameters(), rate, weight_decay=self.weight_decay)
        return optimizer, PolyLRScheduler(optimizer, rate, self.num_epochs)

    def _build_loss(self) -> nn.Module:
        return SauronLoss(super()._build_loss(), self.section)

    def described_plans(self, edits: Sequence[Edit] = (ElasticEdit(),)) -> dict[str, Any]:
        """Return the plans with these edits after those that they have already; stock nnU-Net loads each checkpoint."""
        before = spec_of(unwrap(self.network))
        kept = [edit for edit in (before.edits if before else ()) if not isinstance(edit, ElasticEdit)]
        return with_architecture(self.plans_manager.plans, self.configuration_name, SlimSpec((*kept, *edits)))

    def on_train_epoch_start(self) -> None:
        """Choose the references of this epoch."""
        super().on_train_epoch_start()
        self._iteration = 0
        self.loss.begin()
        self.pruner.begin_epoch(self.current_epoch)

    def train_step(self, batch: dict) -> dict:
        """Let the last iterations of an epoch count for the criterion."""
        self._iteration += 1
        if self._iteration == 1 and self.section.save_maps and self.current_epoch % self.section.save_maps == 0:
            self._probe = batch["data"][:1].clone()
        self.loss.observes = self._iteration > self.num_iterations_per_epoch - self.section.batches
        result = super().train_step(batch)
        if self.loss.observes:
            self.pruner.observe_gradients()
        return result

    def on_epoch_end(self) -> None:
        """Remove filters once nnU-Net has logged the epoch and kept what it calls best."""
        epoch = self.current_epoch
        super().on_epoch_end()
        log = self.logger.get_checkpoint()
        losses = [[float(loss) for loss in log[key]] for key in ("train_losses", "val_losses")]
        # The criterion is the mean over the processes of a training; medoids and decision are the first one's.
        everyone = self._gathered(self.pruner.take())
        names, medoids, moments = everyone[0]
        scores = {name: np.mean([found[0][name] for found in everyone], axis=0).tolist() for name in names}
        moments = {name: sum((found[2][name] for found in everyone[1:]), start=moments[name]) for name in moments}
        decision = self._gathered(self.pruner.decide(epoch, scores, medoids, *losses))[0]
        cuts = self.pruner.act(decision, moments)
        if cuts:
            narrow_optimizer(self.optimizer, cuts)
            self._wrap_again()
        seconds = log["epoch_end_timestamps"][-1] - log["epoch_start_timestamps"][-1]
        self.history.add(
            self.pruner,
            scores,
            epoch=epoch,
            seconds=round(seconds, 3),
            train_loss=losses[0][-1],
            distance_loss=self.loss.mean_distance(),
            validation_loss=losses[1][-1],
            dice=float(log["mean_fg_dice"][-1]),
        )
        if self.local_rank == 0:
            self._report(epoch)
        self.write_latest()

    def _report(self, epoch: int) -> None:
        line = self.history.line()
        self.print_to_log_file(line)
        _log.info("fold %s: %s", self.fold, line)
        self.history.write(Path(self.output_folder))
        if self._probe is not None:
            maps = feature_maps(self.network, self._probe.to(self.device))
            save_maps(maps, Path(self.output_folder) / "fms" / str(epoch))
            self._probe = None

    def on_train_end(self) -> None:
        """Name the widths that are left in plans.json, and draw what happened."""
        super().on_train_end()
        if self.local_rank == 0:
            edits = narrow_edits(self.start_widths, unwrap(self.network))
            plans = self.described_plans((*edits, ElasticEdit()))
            write_json(Path(self.output_folder_base) / "plans.json", plans)
            self.history.draw(Path(self.output_folder))
            settings = self.section.model_dump(mode="json")
            record = {"nnslim": __version__, "trainer": type(self).__name__, "sauron": settings}
            record |= {"fold": self.fold, "spec": SlimSpec(edits).to_dict(), **self.history.summary(self.pruner)}
            if missed := self.pruner.missed():
                self.print_to_log_file(missed)
            for folder in (self.output_folder, self.output_folder_base):  # a fold's own, and the model's last
                write_record(Path(folder), record, missed=missed or None)

    def _gathered(self, value: Any) -> list[Any]:
        """Return what every process of a training has, in order."""
        if not self.is_ddp:
            return [value]
        everyone: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(everyone, value)
        return everyone

    def _wrap_again(self) -> None:
        """Put torch.compile's and DDP's wrappers around the changed network anew: both hold on to the old tensors."""
        inner = self.network.module if self.is_ddp else self.network
        network = unwrap(self.network)
        if is_compiled(inner):
            torch._dynamo.reset()  # else the changes add up to its limit of recompilations
            network = torch.compile(network)
        if self.is_ddp:
            from nnunetv2.training.nnUNetTrainer import nnUNetTrainer as module  # noqa: N813

            network = module.DDP(network, device_ids=[self.local_rank])
        self.network = network

    def _fit(self, weights: dict[str, Tensor]) -> None:
        """Give the network, and a new optimiser, the widths of some weights."""
        if fit_widths(unwrap(self.network), weights):
            self.optimizer, self.lr_scheduler = self.configure_optimizers()
            self._wrap_again()

    def changed_content(self) -> dict[str, Any]:
        """Name the trainer that stock nnU-Net knows, and add Sauron's own state."""
        state = {
            "pruner": self.pruner.state_dict(),
            "history": self.history.rows,
            "spec": SlimSpec(narrow_edits(self.start_widths, unwrap(self.network))).to_dict(),
            "settings": self.section.model_dump(mode="json"),
        }
        return {"trainer_name": self.plain_name, STATE: state}

    def load_checkpoint(self, filename_or_checkpoint: dict | str) -> None:
        """Take over widths, weights, moments, thresholds and history."""
        if not self.was_initialized:
            self.initialize()
        content = filename_or_checkpoint
        if isinstance(content, str):
            content = load_checkpoint(Path(content), trust=self.settings.trust)
        self._fit(content["network_weights"])
        super().load_checkpoint(filename_or_checkpoint)
        self.pruner.refit()
        if STATE in content:
            self.pruner.load_state_dict(content[STATE]["pruner"])
            self.history = PruningHistory(content[STATE]["history"])


class SauronLoss(nn.Module):
    """nnU-Net's loss plus, in training, `strength` times the mean distance of the maps from their references."""

    def __init__(self, loss: nn.Module, config: SauronConfig) -> None:
        super().__init__()
        self.loss, self.config = loss, config
        self.pruner: Pruner | None = None
        self.observes = False
        self.begin()

    def begin(self) -> None:
        """Start the mean of an epoch."""
        self._total, self._count = 0.0, 0

    def mean_distance(self) -> float:
        """Return the mean of the distance term over the epoch, without its weight."""
        return self._total / max(1, self._count)

    def forward(self, output: Tensor | Sequence[Tensor], target: Tensor | Sequence[Tensor]) -> Tensor:
        """Return the scalar loss; arguments as nnU-Net's."""
        loss = self.loss(output, target)
        if self.pruner is None or not torch.is_grad_enabled():
            return loss
        watch = self.pruner.watch
        if self.observes:
            watch.observe()
        if self.config.strength > 0 and self.config.delta_opt != "off" and (term := watch.loss()) is not None:
            self._total, self._count = self._total + float(term.detach()), self._count + 1
            loss = loss + self.config.strength * term
        watch.clear()
        return loss


def sauron_trainer_class(settings: SauronConfig | TrainingSettings | None = None, base: type | None = None) -> type:
    """Return a trainer class named after its base, with Sauron behind it: nnUNetTrainerSauron.

    Args:
        settings: None reads NNSLIM_TRAINING.
        base: an nnUNetTrainer class; None takes the one that the settings name.
    Raises:
        ModelError: there is no such trainer. ConfigError: NNSLIM_TRAINING cannot be read.
    """
    if isinstance(settings, SauronConfig):
        settings = TrainingSettings(sauron=settings, run_name=settings_in_force().run_name)
    settings = settings or settings_in_force("sauron")
    base = base or trainer_class(settings.sauron.base or "nnUNetTrainer")
    if issubclass(base, SauronTraining):
        base = next(cls for cls in base.__mro__ if not issubclass(cls, SteadyTraining))
    made = {"given": settings, "plain_name": base.__name__, "__module__": __name__}
    return type(f"{base.__name__}Sauron", (SauronTraining, base), made)


def training_patches(current: Callable[[], MethodConfig | None]) -> list[AttributePatch]:
    """Return the patches on nnU-Net's `run_training`, not yet applied.

    The look-up of the trainer class is replaced where `run_training` has it: whoever imported that function before
    gets the trainer, too. Processes that nnU-Net spawns for several GPUs do not; they find nnUNetTrainerSauron by name
    (nnUNet_extTrainer).

    Args:
        current: returns the settings of the training method in force for the calling thread, or None.
    """
    from nnunetv2.run import run_training as module

    def plain(argument: Any) -> Any:
        """nnU-Net may not know nnUNetTrainerSauron: it is looked up by the name that it is built on."""
        return argument.removesuffix("Sauron") if isinstance(argument, str) else argument

    def finding(original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def find(*arguments: Any, **options: Any) -> Any:
            if (config := current()) is None:
                return original(*arguments, **options)
            found = original(*map(plain, arguments), **{key: plain(value) for key, value in options.items()})
            return sauron_trainer_class(config, found) if found and isinstance(config, SauronConfig) else found

        return find

    return [AttributePatch(module, name, finding) for name in _FINDERS if hasattr(module, name)]
