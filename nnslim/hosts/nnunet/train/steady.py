"""What nnslim's trainers do otherwise than nnU-Net's: each epoch's random numbers, and checkpoints that are whole."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import numpy as np
import torch

from nnslim.errors import OutputError

LATEST = "checkpoint_latest.pth"


def reseed(seed: int, epoch: int, rank: int) -> None:
    """Seed Python, numpy and torch for one epoch of one process."""
    value = (seed * 1_000_003 + (epoch + 1) * 1_009 + rank) % 2**32
    random.seed(value)
    np.random.seed(value)
    torch.manual_seed(value)


class SteadyTraining:
    """A mixin of nnUNetTrainer: a run that was killed at any moment goes on as if it had not been.

    Attributes:
        random_seed: of augmentation.
    """

    random_seed: int = 0

    def keep_latest(self) -> None:
        """Let `write_latest` alone write checkpoint_latest.pth; nnU-Net's own is one epoch's best behind."""
        self.save_every = sys.maxsize

    def on_train_epoch_start(self) -> None:
        """Make each epoch's random numbers depend on its number only, so that a resumed run draws the same ones."""
        super().on_train_epoch_start()
        reseed(self.random_seed, self.current_epoch, self.local_rank)

    def write_latest(self) -> None:
        """Write checkpoint_latest.pth, at the end of `on_epoch_end`: after nnU-Net has updated what it calls best."""
        if self.current_epoch < self.num_epochs:
            self.current_epoch -= 1  # as nnU-Net does around its last checkpoint: saving adds one
            self.save_checkpoint(str(Path(self.output_folder) / LATEST))
            self.current_epoch += 1

    def save_checkpoint(self, filename: str) -> None:
        """Write beside, then rename: a run that is killed while it saves can still be resumed."""
        beside = Path(f"{filename}.part")
        try:
            super().save_checkpoint(str(beside))
            if beside.is_file() and self.local_rank == 0:
                self.complete_checkpoint(beside)
                beside.replace(filename)
        except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
            beside.unlink(missing_ok=True)
            raise OutputError(f"cannot write {filename}: {error}; the checkpoint before it is kept") from error

    def complete_checkpoint(self, path: Path) -> None:
        """Change what nnU-Net has written before it gets its name; nothing, unless a trainer has more to keep."""
