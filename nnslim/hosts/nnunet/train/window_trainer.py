"""The window network inside nnU-Net: a trainer, and the class that plans name so that stock nnU-Net predicts."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml
from monai.losses import DiceFocalLoss
from torch import Tensor, nn

from nnslim.compression.config import changed_settings
from nnslim.errors import ConfigError
from nnslim.hosts.nnunet.model.planned import PlannedWindowNet, architecture_entry
from nnslim.hosts.nnunet.model.slim_plans import plans_with_architecture
from nnslim.hosts.nnunet.train.described import DescribedTraining
from nnslim.hosts.nnunet.train.recipe import RateSchedule
from nnslim.inflation.published_weights import load_encoder, read_weights
from nnslim.inflation.window_net import WindowConfig
from nnslim.network.walk import unwrap

SETTINGS = "NNSLIM_WINDOW"  # environment: a YAML file, or YAML in one line, for `nnUNetv2_train`
_CPU = torch.device("cpu")
_UNDECAYED = ("pos_embed", "cls_token", "relative_position_bias_table")


def window_settings(given: WindowConfig | str | None = None, **changes: Any) -> WindowConfig:
    """Return settings: those given, else of the variable NNSLIM_WINDOW, else the defaults, with some changed.

    Args:
        given: settings, a YAML file, or YAML in one line as `{encoder: beit, weights: beit.pth}`.
    Raises:
        ConfigError: unreadable YAML, an unknown key, or a value out of bounds.
    """
    if isinstance(given, WindowConfig):
        return changed_settings(given, changes, "window network")
    text = given if given is not None else os.environ.get(SETTINGS, "")
    where = text or "window network"
    try:
        if text.endswith((".yml", ".yaml")):
            text = Path(text).read_text(encoding="utf-8")
        raw = yaml.safe_load(text) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{where}: not readable YAML: {str(error).splitlines()[0]}") from error
    if not isinstance(raw, dict):
        raise ConfigError(f"{where}: expected a YAML file or keys and values, found {raw!r}")
    return changed_settings(WindowConfig(), {**raw, **changes}, where)


class DiceFocal(nn.Module):
    """MONAI's Dice plus focal loss on what nnU-Net's data loader gives."""

    def __init__(self, regions: bool) -> None:
        """Build. regions: heads overlap (sigmoid, a target channel each) instead of excluding each other."""
        super().__init__()
        self.loss = DiceFocalLoss(sigmoid=regions, softmax=not regions, to_onehot_y=not regions, batch=True)

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """logits (B, K, D, H, W), target (B, 1, D, H, W) labels or (B, K, D, H, W) regions."""
        return self.loss(logits.float(), target.float())


class WindowTraining(DescribedTraining):
    """What the window trainer does otherwise than nnU-Net's: network, first weights, loss and optimiser."""

    given: Callable[[], WindowConfig]

    def __init__(
        self, plans: dict, configuration: str, fold: int, dataset_json: dict, device: torch.device = _CPU
    ) -> None:
        self.window = type(self).given()
        settings = plans["configurations"][configuration]
        for key in ("patch_size", "batch_size"):
            if (value := getattr(self.window, key)) is not None:
                settings[key] = list(value) if key == "patch_size" else value
        super().__init__(plans, configuration, fold, dataset_json, device)
        patch = self.configuration_manager.patch_size
        if len(patch) != 3:
            raise ConfigError(f"the window network takes volumes: train a 3D configuration, not '{configuration}'")
        if self.label_manager.has_ignore_label:
            raise ConfigError("the window network's Dice and focal loss knows no ignore label, which this dataset has")
        self.enable_deep_supervision = False
        self.num_epochs = self.window.epochs or self.num_epochs
        self.num_iterations_per_epoch = self.window.iterations or self.num_iterations_per_epoch
        self.initial_lr, self.weight_decay = self.window.learning_rate, self.window.weight_decay

    def initialize(self) -> None:
        """Build the network and put the 2D weights into its encoder."""
        super().initialize()
        place, depth = self.window.weights, self.window.depth
        apart = self.configuration_manager.spacing[0]
        self.print_to_log_file(f"a window of {depth} slices, {apart:g} mm apart, sees {depth * apart:g} mm of depth")
        if place is not None:
            load_encoder(unwrap(self.network).encoder, read_weights(place), self.window.mode)
            self.print_to_log_file(f"encoder from {place}, patch embedding inflated by {self.window.mode}")

    def _build_loss(self) -> nn.Module:
        return DiceFocal(self.label_manager.has_regions)

    def configure_optimizers(self) -> tuple[torch.optim.Optimizer, RateSchedule]:
        """Return AdamW, decay for matrices only, and a rate that rises and then falls to 0."""
        groups: dict[tuple[float, float], dict[str, Any]] = {}
        for name, parameter in unwrap(self.network).named_parameters():
            plain = parameter.ndim < 2 or name.rsplit(".", 1)[-1] in _UNDECAYED
            scale = 1.0 if name.startswith("encoder.") else self.window.decoder_rate
            decay = 0.0 if plain else self.weight_decay
            group = groups.setdefault((scale, decay), {"params": [], "scale": scale, "weight_decay": decay})
            group["params"].append(parameter)
        optimizer = torch.optim.AdamW(list(groups.values()), self.initial_lr)
        return optimizer, RateSchedule(optimizer, self.initial_lr, self.num_epochs, self.window.warmup_epochs, "poly")

    def described_plans(self) -> dict[str, Any]:
        """Return the plans with the window network in the configuration that is trained."""
        size = [int(edge) for edge in self.configuration_manager.patch_size[1:]]
        kwargs = {**self.window.network(), "size": size}
        entry = architecture_entry(PlannedWindowNet, kwargs)
        plans = plans_with_architecture(self.plans_manager.plans, self.configuration_name, entry)
        if self.window.predict_slices is not None:
            plans["configurations"][self.configuration_name]["patch_size"] = [self.window.predict_slices, *size]
        return plans


# Trainer -> changed settings: the whole, and the baseline without neighbours.
TRAINERS: dict[str, dict[str, Any]] = {"nnUNetTrainerWindow": {}, "nnUNetTrainerWindow2D": {"depth": 1}}


def window_trainer_class(settings: WindowConfig | None = None, name: str = "nnUNetTrainerWindow") -> type:
    """Return a trainer of the window network.

    Args:
        settings: None to read them when a trainer is made, see `window_settings`.
        name: of the class, and so of the results folder; one of `TRAINERS` has its changes.
    """
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

    def read() -> WindowConfig:
        return window_settings(settings, **TRAINERS.get(name, {}))

    def build(
        plans_manager: Any,
        configuration_manager: Any,
        num_input_channels: int,
        num_output_channels: int,
        enable_deep_supervision: bool = True,
    ) -> nn.Module:
        size = [int(edge) for edge in configuration_manager.patch_size[1:]]
        return PlannedWindowNet(num_input_channels, num_output_channels, size=size, **read().network())

    given = {"given": staticmethod(read), "build_network_architecture": staticmethod(build)}
    return type(name, (WindowTraining, nnUNetTrainer), given)
