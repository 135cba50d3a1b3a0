"""nnU-Net's trainer for DAEFormer and its reduced forms, with the recipe that Embedded-ViT was published with."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from nnslim.errors import ConfigError
from nnslim.hosts.nnunet.model.planned import daeformer_architecture
from nnslim.hosts.nnunet.model.slim_plans import plans_with_architecture
from nnslim.hosts.nnunet.train.described import DescribedTraining
from nnslim.hosts.nnunet.train.settings import DAEFormerConfig, TrainingSettings
from nnslim.network.daeformer import form_named


class CEAndSquaredDice(nn.Module):
    """0.4 cross-entropy + 0.6 Dice loss; the latter with squares, softmax, smooth 1e-5, over all classes.

    Voxels with the label `ignore` count in neither.
    """

    def __init__(self, ignore: int | None = None) -> None:
        from monai.losses import DiceLoss  # by now monai is imported, see `name_and_home`

        super().__init__()
        self.ignore = ignore
        self.dice = DiceLoss(squared_pred=True, smooth_nr=1e-5, smooth_dr=1e-5, batch=True)

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """Return the scalar loss of (B, C, *spatial) logits and (B, 1, *spatial) labels."""
        labels = target[:, 0].long()
        known = torch.ones_like(labels, dtype=torch.bool) if self.ignore is None else labels != self.ignore
        entropy = nn.functional.cross_entropy(logits, labels.masked_fill(~known, -100), ignore_index=-100)
        shares = logits.float().softmax(1) * known[:, None]
        truth = nn.functional.one_hot(labels.masked_fill(~known, 0), logits.shape[1]).movedim(-1, 1) * known[:, None]
        return 0.4 * entropy + 0.6 * self.dice(shares, truth.float())


class DAEFormerTraining(DescribedTraining):
    """SGD with momentum 0.9, poly rate, the loss of `CEAndSquaredDice` where labels are no regions.

    Augmentation and patches are nnU-Net's.
    """

    kind = "daeformer"
    planned_patch: list[int]  # before that of the form took its place

    def planned(self, plans: dict, configuration: str) -> dict:
        """Name the network in the plans; ConfigError for an unknown form, or patches that are not 2D or do not fit."""
        form, size = self.section.form, self.section.patch_size
        plans = plans_with_architecture(plans, configuration, daeformer_architecture(form))
        settings, shape = plans["configurations"][configuration], form_named(form)
        self.planned_patch = patch = list(settings["patch_size"])
        if len(patch) == 2 and size != "plans":
            settings["patch_size"] = patch = [shape.edge] * 2 if size == "form" else list(size)
        step = 4 * 2 ** (len(shape.dims) - 1)
        if len(patch) != 2 or any(edge % step for edge in patch):
            raise ConfigError(
                f"DAEFormer '{form}' works on slices whose edges are multiples of {step}; configuration "
                f"{configuration} has patches of {list(patch)}"
            )
        return plans

    def settle(self) -> None:
        """Switch deep supervision off, and say which part of a slice the network sees."""
        self.enable_deep_supervision = False
        settings, form = self.configuration_manager.configuration, self.section.form
        self.print_to_log_file(
            f"DAEFormer '{form}' sees patches of {settings['patch_size']}, the plans say {self.planned_patch}; slices "
            f"have {settings.get('median_image_size_in_voxels')} pixels: smaller ones are padded, none is resized"
        )

    def configure_optimizers(self) -> tuple[torch.optim.Optimizer, Any]:
        """Return the optimiser and schedule of the recipe."""
        from nnunetv2.training.lr_scheduler.polylr import PolyLRScheduler

        parameters = self.network.parameters()
        optimizer = torch.optim.SGD(parameters, self.initial_lr, momentum=0.9, weight_decay=self.weight_decay)
        return optimizer, PolyLRScheduler(optimizer, self.initial_lr, self.num_epochs)

    def _build_loss(self) -> nn.Module:
        if self.label_manager.has_regions:
            return super()._build_loss()
        return CEAndSquaredDice(self.label_manager.ignore_label)


def daeformer_trainer_class(form: str | None = None, name: str = "nnUNetTrainerDAEFormer") -> type:
    """Return a trainer of DAEFormer; `name` is that of its class, and so of the results directory.

    Forms are those of `nnslim.network.daeformer.FORMS`; None is what NNSLIM_TRAINING says, else "224".
    """
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

    given = None if form is None else TrainingSettings(daeformer=DAEFormerConfig(form=form))
    return type(name, (DAEFormerTraining, nnUNetTrainer), {"given": given})
