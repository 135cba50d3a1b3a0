"""nnU-Net's trainer for DAEFormer and its reduced forms, with the recipe that Embedded-ViT was published with."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor, nn

from nnslim.errors import ConfigError
from nnslim.hosts.nnunet.model.planned import daeformer_architecture
from nnslim.hosts.nnunet.model.slim_plans import plans_with_architecture
from nnslim.hosts.nnunet.train.described import DescribedTraining
from nnslim.network.daeformer import form_named

VARIABLE = "NNSLIM_DAEFORMER"  # environment: the form that `nnUNetv2_train` trains
_CPU = torch.device("cpu")
_DEFAULT = "224"


class CEAndSquaredDice(nn.Module):
    """0.4 cross-entropy + 0.6 Dice loss; the latter with squares, softmax, smooth 1e-5, over all classes."""

    def __init__(self, ignore: int | None = None) -> None:
        """Set up. ignore: label whose voxels count in neither."""
        super().__init__()
        self.ignore = ignore

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """Return the scalar loss of (B, C, *spatial) logits and (B, 1, *spatial) labels."""
        labels = target[:, 0].long()
        known = torch.ones_like(labels, dtype=torch.bool) if self.ignore is None else labels != self.ignore
        entropy = nn.functional.cross_entropy(logits, labels.masked_fill(~known, -100), ignore_index=-100)
        shares = logits.float().softmax(1) * known[:, None]
        truth = nn.functional.one_hot(labels.masked_fill(~known, 0), logits.shape[1]).movedim(-1, 1) * known[:, None]
        axes = (0, *range(2, logits.dim()))
        both = (shares * truth).sum(axes)
        dice = (2 * both + 1e-5) / ((shares**2).sum(axes) + (truth**2).sum(axes) + 1e-5)
        return 0.4 * entropy + 0.6 * (1 - dice).mean()


def daeformer_trainer_class(form: str | None = None, name: str = "nnUNetTrainerDAEFormer") -> type:
    """Return the trainer; its network is described in the plans that it writes, so that stock nnU-Net predicts with it.

    SGD, rate 0.05, momentum 0.9, weight decay 1e-4, poly rate, 400 epochs; the loss of `CEAndSquaredDice` where labels
    are no regions. Augmentation and patches are nnU-Net's.

    Args:
        form: see `nnslim.network.daeformer.FORMS`; None: the variable NNSLIM_DAEFORMER, else "224".
        name: of the class, and so of the results folder.
    Raises:
        ConfigError: when a trainer is made: no such form; a configuration that is not 2D; a patch it cannot halve.
    """
    from nnunetv2.training.lr_scheduler.polylr import PolyLRScheduler
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

    class DAEFormerTraining(DescribedTraining, nnUNetTrainer):
        def __init__(
            self, plans: dict, configuration: str, fold: int, dataset_json: dict, device: torch.device = _CPU
        ) -> None:
            chosen = form or os.environ.get(VARIABLE, _DEFAULT)
            plans = plans_with_architecture(plans, configuration, daeformer_architecture(chosen))
            patch = plans["configurations"][configuration]["patch_size"]
            step = 4 * 2 ** (len(form_named(chosen).dims) - 1)
            if len(patch) != 2 or any(edge % step for edge in patch):
                raise ConfigError(
                    f"DAEFormer '{chosen}' works on slices whose edges are multiples of {step}; configuration "
                    f"{configuration} has patches of {list(patch)}"
                )
            super().__init__(plans, configuration, fold, dataset_json, device)
            self.plans_manager.plans.pop("continue_training", None)
            self.enable_deep_supervision = False
            self.initial_lr, self.weight_decay, self.num_epochs = 0.05, 1e-4, 400

        def configure_optimizers(self) -> tuple[torch.optim.Optimizer, Any]:
            parameters = self.network.parameters()
            optimizer = torch.optim.SGD(parameters, self.initial_lr, momentum=0.9, weight_decay=self.weight_decay)
            return optimizer, PolyLRScheduler(optimizer, self.initial_lr, self.num_epochs)

        def _build_loss(self) -> nn.Module:
            if self.label_manager.has_regions:
                return super()._build_loss()
            return CEAndSquaredDice(self.label_manager.ignore_label)

        def described_plans(self) -> dict[str, Any]:
            return self.plans_manager.plans

    DAEFormerTraining.__name__ = DAEFormerTraining.__qualname__ = name
    return DAEFormerTraining
