"""Trainers of token-sparse Primus and UNETR, beside nnU-Net's own Primus trainers."""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nnslim.compression.config import load_config
from nnslim.errors import ConfigError, ModelError
from nnslim.hosts.nnunet.model.planned import PlannedUNETR, planned_architecture
from nnslim.hosts.nnunet.model.slim_plans import plans_with_architecture, with_spec
from nnslim.hosts.nnunet.model.trained_model import load_checkpoint
from nnslim.hosts.nnunet.train.described import DescribedTraining
from nnslim.hosts.nnunet.train.recipe import RateSchedule, parameter_groups
from nnslim.methods.token_sparse.config import RecipeConfig, TokenSparseConfig
from nnslim.methods.token_sparse.plan import token_sparse_edits
from nnslim.methods.token_sparse.reduction import TokenReduction
from nnslim.methods.token_sparse.supervision import SupervisedLoss
from nnslim.network.spec import SlimSpec, apply_spec, spec_of
from nnslim.network.walk import unwrap

SETTINGS = "NNSLIM_TOKEN_SPARSE"  # environment: a preset's name or a YAML file, for `nnUNetv2_train`
_CPU = torch.device("cpu")


def settings_in_force(settings: TokenSparseConfig | None = None) -> TokenSparseConfig:
    """Return the settings given, else those of the environment variable NNSLIM_TOKEN_SPARSE, else the preset's.

    Raises:
        ConfigError: the configuration that is named has no method token_sparse.
    """
    if settings is not None:
        return settings
    name = os.environ.get(SETTINGS, "token-sparse-train")
    for entry in load_config(name).methods:
        if isinstance(entry.settings, TokenSparseConfig):
            return entry.settings
    raise ConfigError(f"{SETTINGS}={name}: this configuration has no method 'token_sparse'")


class TokenSparseTraining(DescribedTraining):
    """What a token-sparse trainer does otherwise than the nnU-Net trainer that it is mixed into."""

    given: TokenSparseConfig | None

    def __init__(
        self, plans: dict, configuration: str, fold: int, dataset_json: dict, device: torch.device = _CPU
    ) -> None:
        self.sparse = settings_in_force(self.given)
        recipe = self.sparse.recipe
        if recipe.batch_size is not None:
            plans["configurations"][configuration]["batch_size"] = recipe.batch_size
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.num_epochs = recipe.epochs or self.num_epochs
        self.warmup_duration_whole_net = recipe.warmup_epochs or self.warmup_duration_whole_net
        self.weight_decay = recipe.weight_decay
        self.initial_lr = recipe.learning_rate or self.initial_lr
        if recipe.rate_per_256 is not None:
            self.initial_lr = recipe.rate_per_256 * self.configuration_manager.batch_size / 256

    def initialize(self) -> None:
        """Build the network; start from the dense one where the settings name its checkpoint."""
        super().initialize()
        if self.sparse.warm_start is not None:
            warm_start(unwrap(self.network), self.sparse.warm_start)
        found = reductions(unwrap(self.network))
        self.target = [module.ratios for module in found]
        if self.sparse.supervision:
            self.loss = SupervisedLoss(self.loss, found, self.sparse.supervision, self.foreground)

    def foreground(self, target: torch.Tensor) -> torch.Tensor:
        """Return (B, 1, *size): 1 where a target of nnU-Net's has a label or region other than background and ignore.

        Args:
            target: (B, 1, *size) of labels; (B, regions (+ 1 for ignore), *size) where regions are trained.
        """
        labels = self.label_manager
        if labels.has_regions:
            return target[:, : len(labels.foreground_regions)].amax(dim=1, keepdim=True).float()
        held = target > 0
        return (held & (target != labels.ignore_label) if labels.has_ignore_label else held).float()

    def configure_optimizers(self, stage: str = "warmup_all") -> tuple[Any, Any]:
        """Return nnU-Net's optimiser for Primus, or the recipe's own where it differs."""
        recipe, default = self.sparse.recipe, RecipeConfig()
        if all(getattr(recipe, key) == getattr(default, key) for key in ("betas", "layer_decay", "schedule")):
            return super().configure_optimizers(stage)
        if self.training_stage is None:
            groups = parameter_groups(unwrap(self.network), recipe)
            self.optimizer = torch.optim.AdamW(groups, self.initial_lr, betas=recipe.betas)
            warmup = self.warmup_duration_whole_net
            self.lr_scheduler = RateSchedule(self.optimizer, self.initial_lr, self.num_epochs, warmup, recipe.schedule)
        self.training_stage = stage
        return self.optimizer, self.lr_scheduler

    def described_plans(self) -> dict[str, Any]:
        """Return the plans with the sparse architecture in the configuration that is trained."""
        network = unwrap(self.network)
        architecture = dict(self.dense_architecture or planned_architecture(network, ()))
        spec = spec_of(network)
        if spec is not None:
            architecture = with_spec(architecture, spec)
        return plans_with_architecture(self.plans_manager.plans, self.configuration_name, architecture)

    @property
    def dense_architecture(self) -> dict[str, Any] | None:
        """What the plans say of the network before its edits."""
        return getattr(unwrap(self.network), "nnslim_dense_architecture", None)

    def on_train_epoch_start(self) -> None:
        """Raise the ratios where a schedule says so."""
        super().on_train_epoch_start()
        self.scale_ratios((self.current_epoch + 1) / max(1, self.sparse.schedule_epochs))

    def scale_ratios(self, share: float) -> None:
        """Set every ratio to a share of its target, at most to the target."""
        for module, ratios in zip(reductions(unwrap(self.network)), self.target, strict=True):
            wanted = tuple(ratio * min(1.0, share) for ratio in ratios)
            if wanted != module.ratios:
                module.set_ratio(wanted)

    def perform_actual_validation(self, save_probabilities: bool = False) -> None:
        """Validate with the ratios that the model will be used with."""
        self.scale_ratios(1.0)
        super().perform_actual_validation(save_probabilities)


def reductions(network: nn.Module) -> list[TokenReduction]:
    """Return the token reductions of a network, in order."""
    return [module for module in network.modules() if isinstance(module, TokenReduction)]


def warm_start(network: nn.Module, checkpoint: Path) -> None:
    """Load the weights of the dense network; what only the sparse one has keeps its gentle start.

    Raises:
        ModelError: the checkpoint is missing, or is of another architecture.
    """
    weights = load_checkpoint(Path(checkpoint))["network_weights"]
    own = network.state_dict()
    fits = {key: value.float() for key, value in weights.items() if key in own and own[key].shape == value.shape}
    new = {key for key in own if ".reduction." in key or ".completion." in key or ".stage_norms." in key}
    new |= {"completion" + key[10:] for key in own if key.startswith("completion.")} | {"encoder.policy"}
    missing, foreign = sorted(set(own) - set(fits) - new), sorted(set(weights) - set(fits))
    if missing or foreign:
        raise ModelError(
            f"{checkpoint} is not of the dense network that this trainer makes sparse: "
            f"{len(missing)} tensors are missing or of another shape, {len(foreign)} do not belong: "
            f"{', '.join((missing + foreign)[:3])}"
        )
    network.load_state_dict(fits, strict=False)


def token_sparse_trainer_class(base: type, settings: TokenSparseConfig | None = None, name: str | None = None) -> type:
    """Return a trainer that makes the network of a Primus trainer token-sparse.

    Args:
        base: an nnU-Net trainer whose network holds an encoder that nnslim knows.
        settings: None to read them when the trainer is made, see `settings_in_force`.
        name: of the class, and so of the results folder; default: that of `base`.
    """
    build_dense = base.build_network_architecture

    @functools.wraps(build_dense)  # nnU-Net looks at the signature
    def build(*args: Any, **kwargs: Any) -> nn.Module:
        network = build_dense(*args, **kwargs)
        patch = next(each for each in (*args, *kwargs.values()) if hasattr(each, "patch_size")).patch_size
        architecture = planned_architecture(network, patch)
        network = apply_spec(SlimSpec(token_sparse_edits(network, settings_in_force(settings))), network, fill=True)
        network.nnslim_dense_architecture = architecture
        return network

    given = {"given": settings, "build_network_architecture": staticmethod(build)}
    return type(name or base.__name__, (TokenSparseTraining, base), given)


def unetr_trainer_class(
    settings: TokenSparseConfig | None = None, name: str = "nnUNet_UNETR_TokenSparse_Trainer"
) -> type:
    """Return a trainer of the published token-sparse UNETR, by nnU-Net's recipe for Primus; ratio 0 trains it dense."""
    from nnunetv2.training.nnUNetTrainer.primus.primus_trainers import AbstractPrimus

    def build(
        plans_manager: Any,
        configuration_manager: Any,
        num_input_channels: int,
        num_output_channels: int,
        enable_deep_supervision: bool = True,
    ) -> nn.Module:
        sparse = settings_in_force(settings)
        places, ratios, scorers = sparse.stages(sparse.unetr.depth)
        return PlannedUNETR(
            num_input_channels,
            num_output_channels,
            image_size=[int(size) for size in configuration_manager.patch_size],
            locations=places,
            ratios=ratios,
            scorer=scorers,
            noise=sparse.perturbation == "gumbel",
            completion_depth=max(1, sparse.completion_depth),
            **{key: getattr(sparse, key) for key in ("mode", "shared", "tau", "completion", "skips")},
            **sparse.unetr.model_dump(),
        )

    given = {"given": settings, "build_network_architecture": staticmethod(build)}
    return type(name, (TokenSparseTraining, AbstractPrimus), given)
