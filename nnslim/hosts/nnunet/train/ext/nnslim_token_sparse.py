"""nnslim's token-sparse trainers for `nnUNetv2_train`: name this file's folder in nnUNet_extTrainer."""

from __future__ import annotations

from nnslim.hosts.nnunet.train.trainer_names import trainer_named, trainer_names


def __getattr__(name: str) -> type:
    """Make a trainer when nnU-Net asks this module for it."""
    if name in trainer_names():
        return trainer_named(name)
    raise AttributeError(name)
