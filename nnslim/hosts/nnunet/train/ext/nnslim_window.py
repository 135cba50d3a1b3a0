"""nnslim's window trainers for `nnUNetv2_train`: name this file's folder in nnUNet_extTrainer."""

from __future__ import annotations

from nnslim.hosts.nnunet.train.window_trainer import TRAINERS, window_trainer_class


def __getattr__(name: str) -> type:
    """Make a trainer when nnU-Net asks this module for it."""
    if name in TRAINERS:
        return window_trainer_class(name=name)
    raise AttributeError(name)
