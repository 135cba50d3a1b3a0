"""The window network inside nnU-Net: its trainer."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from nnslim.errors import ConfigError
from nnslim.hosts.nnunet.model.planned import PlannedWindowNet, architecture_entry
from nnslim.hosts.nnunet.model.slim_plans import plans_with_architecture
from nnslim.hosts.nnunet.train.described import DescribedTraining, RateSchedule, grouped
from nnslim.hosts.nnunet.train.settings import TrainingSettings
from nnslim.inflation.published_weights import load_encoder, read_weights
from nnslim.inflation.window_net import WindowConfig
from nnslim.network.walk import unwrap


class WindowLoss(nn.Module):
    """MONAI's Dice loss, its focal loss and torch's cross-entropy, on what nnU-Net's data loader gives.

    With regions, heads overlap (sigmoid, a target channel each) instead of excluding each other.
    """

    def __init__(self, kind: Literal["dicefocal", "dicece", "ce"], regions: bool) -> None:
        from monai.losses import DiceLoss, FocalLoss  # by now monai is imported, see `name_and_home`

        super().__init__()
        self.regions = regions
        dice = DiceLoss(sigmoid=regions, softmax=not regions, to_onehot_y=not regions, batch=True)
        self.dice = dice if kind != "ce" else None
        self.focal = FocalLoss(to_onehot_y=not regions) if kind == "dicefocal" else None

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """logits (B, K, D, H, W), target (B, 1, D, H, W) labels or (B, K, D, H, W) regions."""
        logits, target = logits.float(), target.float()
        if self.focal is not None:
            loss = self.focal(logits, target)
        elif self.regions:
            loss = nn.functional.binary_cross_entropy_with_logits(logits, target)
        else:
            loss = nn.functional.cross_entropy(logits, target[:, 0].long())
        return loss if self.dice is None else self.dice(logits, target) + loss


class WindowTraining(DescribedTraining):
    """What the window trainer changes in nnU-Net's: network, first weights, loss and optimiser."""

    kind = "window"
    changes: dict[str, Any]  # of the section

    @classmethod
    def settings_now(cls) -> TrainingSettings:
        """Return the settings, with the changes that this trainer stands for."""
        settings = super().settings_now()
        return settings.model_copy(update={"window": settings.window.model_copy(update=cls.changes)})

    def planned(self, plans: dict, configuration: str) -> dict:
        """Put the patch of the settings into the plans."""
        if self.section.patch_size is not None:
            plans["configurations"][configuration]["patch_size"] = list(self.section.patch_size)
        return plans

    @classmethod
    def build_network_architecture(
        cls, plans_manager: Any, configuration_manager: Any, inputs: int, heads: int, *_: Any, **__: Any
    ) -> nn.Module:
        """Build the window network; nnU-Net looks for the name plans_manager."""
        size = [int(edge) for edge in configuration_manager.patch_size[1:]]
        return PlannedWindowNet(inputs, heads, size=size, **cls.settings_now().window.network())

    def settle(self) -> None:
        """Refuse what the network cannot be trained on."""
        self.enable_deep_supervision = False
        if len(self.configuration_manager.patch_size) != 3:
            name = self.configuration_name
            raise ConfigError(f"the window network takes volumes: train a 3D configuration, not '{name}'")
        if self.label_manager.has_ignore_label:
            raise ConfigError("the window network's loss cannot leave out voxels, and this dataset has an ignore label")

    def initialize(self) -> None:
        """Build the network and put the 2D weights into its encoder."""
        super().initialize()
        place, depth = self.section.weights, self.section.depth
        apart = self.configuration_manager.spacing[0]
        self.print_to_log_file(f"a window of {depth} slices, {apart:g} mm apart, sees {depth * apart:g} mm of depth")
        if place is not None:
            load_encoder(unwrap(self.network).encoder, read_weights(place), self.section.mode)
            mode = "average" if self.section.encoder == "videoswin" else self.section.mode
            self.print_to_log_file(f"encoder from {place}, patch embedding inflated by {mode}")

    def _build_loss(self) -> nn.Module:
        return WindowLoss(self.section.loss, self.label_manager.has_regions)

    def configure_optimizers(self) -> tuple[torch.optim.Optimizer, RateSchedule]:
        """Return AdamW, decay for matrices only, and a rate that rises and then falls to 0."""

        def scale(name: str) -> float:
            return 1.0 if name.startswith("encoder.") else self.section.decoder_rate

        optimizer = torch.optim.AdamW(grouped(unwrap(self.network), scale, self.weight_decay), self.initial_lr)
        return optimizer, RateSchedule(optimizer, self.initial_lr, self.num_epochs, self.section.warmup_epochs, "poly")

    def described_plans(self) -> dict[str, Any]:
        """Return the plans with the window network in the configuration that is trained."""
        size = [int(edge) for edge in self.configuration_manager.patch_size[1:]]
        entry = architecture_entry(PlannedWindowNet, {**self.section.network(), "size": size})
        plans = plans_with_architecture(self.plans_manager.plans, self.configuration_name, entry)
        if self.section.predict_slices is not None:
            plans["configurations"][self.configuration_name]["patch_size"] = [self.section.predict_slices, *size]
        return plans


# Trainer -> changed settings: the whole, and the baseline without neighbours.
WINDOW_TRAINERS: dict[str, dict[str, Any]] = {"nnUNetTrainerWindow": {}, "nnUNetTrainerWindow2D": {"depth": 1}}


def window_trainer_class(settings: WindowConfig | None = None, name: str = "nnUNetTrainerWindow") -> type:
    """Return a trainer of the window network; without settings, NNSLIM_TRAINING is read when one is made.

    The `name` is that of the class, and so of the results directory; one of `WINDOW_TRAINERS` has its changes.
    """
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

    given = None if settings is None else TrainingSettings(window=settings)
    changes = WINDOW_TRAINERS.get(name, {})
    return type(name, (WindowTraining, nnUNetTrainer), {"given": given, "changes": changes})
