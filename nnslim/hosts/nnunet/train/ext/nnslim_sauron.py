"""nnUNetTrainerSauron: `nnUNetv2_train ... -tr nnUNetTrainerSauron`; settings from the variable NNSLIM_SAURON."""

from nnslim.hosts.nnunet.train.sauron_trainer import sauron_trainer_class

nnUNetTrainerSauron = sauron_trainer_class()  # noqa: N816  nnU-Net's way to name trainers
