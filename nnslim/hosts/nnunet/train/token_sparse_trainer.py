"""Trainers of token-sparse Primus and UNETR, beside nnU-Net's own Primus trainers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from nnslim.errors import ModelError
from nnslim.hosts.nnunet.model.planned import PlannedUNETR, planned_architecture
from nnslim.hosts.nnunet.model.slim_plans import plans_with_architecture, with_architecture
from nnslim.hosts.nnunet.model.trained_model import load_checkpoint
from nnslim.hosts.nnunet.train.described import DescribedTraining, RateSchedule, parameter_groups
from nnslim.hosts.nnunet.train.settings import TrainingSettings
from nnslim.methods.token_sparse.config import RecipeConfig, TokenSparseConfig
from nnslim.methods.token_sparse.plan import token_sparse_edits
from nnslim.methods.token_sparse.reduction import TokenReduction
from nnslim.methods.token_sparse.scorers import SupervisedLoss
from nnslim.network.spec import SlimSpec, apply_spec, spec_of
from nnslim.network.walk import unwrap


class TokenSparseTraining(DescribedTraining):
    """What token sparsity changes in the nnU-Net trainer that it is mixed into."""

    kind = "token_sparse"

    @classmethod
    def build_network_architecture(cls, plans_manager: Any, *given: Any, **options: Any) -> nn.Module:
        """Build the network of the trainer that this one is mixed into and make it token-sparse."""
        network = super().build_network_architecture(plans_manager, *given, **options)
        edits = token_sparse_edits(network, cls.settings_now().token_sparse)
        return apply_spec(SlimSpec(edits), network, fill=True)

    def settle(self) -> None:
        """Take over what the recipe has beside the shared settings."""
        super().settle()
        recipe = self.section.recipe
        self.warmup_duration_whole_net = recipe.warmup_epochs or self.warmup_duration_whole_net
        if recipe.rate_per_256 is not None:
            self.initial_lr = recipe.rate_per_256 * self.configuration_manager.batch_size / 256

    def initialize(self) -> None:
        """Build the network; start from the dense one where the settings name its checkpoint."""
        super().initialize()
        if self.section.warm_start is not None:
            warm_start(unwrap(self.network), self.section.warm_start)
        found = reductions(unwrap(self.network))
        self.target = [module.ratios for module in found]
        if self.section.supervision:
            self.loss = SupervisedLoss(self.loss, found, self.section.supervision, self.foreground)

    def foreground(self, target: torch.Tensor) -> torch.Tensor:
        """Return (B, 1, *size): 1 where a target of nnU-Net's has a label or region other than background and ignore.

        The target is (B, 1, *size) of labels; (B, regions (+ 1 for ignore), *size) where regions are trained.
        """
        labels = self.label_manager
        if labels.has_regions:
            return target[:, : len(labels.foreground_regions)].amax(dim=1, keepdim=True).float()
        held = target > 0
        return (held & (target != labels.ignore_label) if labels.has_ignore_label else held).float()

    def configure_optimizers(self, stage: str = "warmup_all") -> tuple[Any, Any]:
        """Return nnU-Net's optimiser for Primus, or the recipe's own where it differs."""
        recipe, default = self.section.recipe, RecipeConfig()
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
        network, name = unwrap(self.network), self.configuration_name
        architecture = planned_architecture(network, self.configuration_manager.patch_size)
        plans = plans_with_architecture(self.plans_manager.plans, name, architecture)
        return plans if (spec := spec_of(network)) is None else with_architecture(plans, name, spec)

    def on_train_epoch_start(self) -> None:
        """Raise the ratios where a schedule says so."""
        super().on_train_epoch_start()
        self.scale_ratios((self.current_epoch + 1) / max(1, self.section.schedule_epochs))

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
    """Load the dense network's weights, or raise a ModelError; what only the sparse one has keeps its gentle start."""
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
        settings: None: NNSLIM_TRAINING when the trainer is made, else the preset token-sparse-train.
        name: of the class, and so of the results directory; default: that of `base`.
    """
    given = None if settings is None else TrainingSettings(token_sparse=settings)
    return type(name or base.__name__, (TokenSparseTraining, base), {"given": given})


class UNETRTraining(TokenSparseTraining):
    """The same for the published token-sparse UNETR, which no trainer of nnU-Net builds."""

    @classmethod
    def build_network_architecture(
        cls, plans_manager: Any, configuration_manager: Any, inputs: int, heads: int, *_: Any, **__: Any
    ) -> nn.Module:
        """Build the network that the settings describe."""
        sparse = cls.settings_now().token_sparse
        places, ratios, scorers = sparse.stages(sparse.unetr.depth)
        return PlannedUNETR(
            inputs,
            heads,
            image_size=[int(size) for size in configuration_manager.patch_size],
            locations=places,
            ratios=ratios,
            scorer=scorers,
            noise=sparse.perturbation == "gumbel",
            completion_depth=max(1, sparse.completion_depth),
            **{key: getattr(sparse, key) for key in ("mode", "shared", "tau", "completion", "skips")},
            **sparse.unetr.model_dump(),
        )


def unetr_trainer_class(
    settings: TokenSparseConfig | None = None, name: str = "nnUNet_UNETR_TokenSparse_Trainer"
) -> type:
    """Return a trainer of the published token-sparse UNETR, by nnU-Net's recipe for Primus; ratio 0 trains it dense."""
    from nnunetv2.training.nnUNetTrainer.primus.primus_trainers import AbstractPrimus

    given = None if settings is None else TrainingSettings(token_sparse=settings)
    return type(name, (UNETRTraining, AbstractPrimus), {"given": given})
