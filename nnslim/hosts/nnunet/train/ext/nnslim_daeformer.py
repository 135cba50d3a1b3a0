"""nnUNetTrainerDAEFormer for `nnUNetv2_train`: name this file's folder in nnUNet_extTrainer; form: NNSLIM_DAEFORMER."""

from __future__ import annotations


def __getattr__(name: str) -> type:
    """Make the trainer when nnU-Net asks this module for it."""
    if name == "nnUNetTrainerDAEFormer":
        from nnslim.hosts.nnunet.train.daeformer_trainer import daeformer_trainer_class

        return daeformer_trainer_class()
    raise AttributeError(name)
