"""Sauron inside nnU-Net's trainer."""

from nnslim.hosts.nnunet.sauron.train import TrainingRun, train_dataset
from nnslim.hosts.nnunet.sauron.trainer import sauron_trainer_class

__all__ = ["TrainingRun", "sauron_trainer_class", "train_dataset"]
