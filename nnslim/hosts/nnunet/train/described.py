"""What trainers share whose networks nnU-Net's plans do not describe yet: the model that they leave is described."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nnslim.files import write_json
from nnslim.hosts.nnunet.model.planned import PLAIN_TRAINER
from nnslim.hosts.nnunet.model.trained_model import allowed_globals
from nnslim.hosts.nnunet.train.steady import SteadyTraining


class DescribedTraining(SteadyTraining):
    """Mixed into an nnU-Net trainer that builds its network itself.

    plans.json describes the network and the checkpoints name nnU-Net's default trainer, which builds from plans: so
    stock nnU-Net predicts with the model wherever nnslim is installed. There is no deep supervision.
    """

    def described_plans(self) -> dict[str, Any]:
        """Return the plans with the architecture that is trained."""
        raise NotImplementedError

    def on_train_start(self) -> None:
        """Replace the plans that nnU-Net has just written by those that describe the network."""
        super().on_train_start()
        if self.local_rank == 0:
            write_json(Path(self.output_folder_base) / "plans.json", self.described_plans())

    def changed_content(self) -> dict[str, Any]:
        """Name nnU-Net's default trainer, and the plans from which it builds the network."""
        arguments = {**self.my_init_kwargs, "plans": self.described_plans()}
        return {"trainer_name": PLAIN_TRAINER, "init_args": arguments}

    def load_checkpoint(self, filename_or_checkpoint: dict | str) -> None:
        """Resume; nnU-Net's Primus trainers cannot on torch >= 2.6, which refuses the numbers in their checkpoints."""
        if not self.was_initialized:
            self.initialize()  # this may load a checkpoint, too, and leaving that would end what is allowed here
        with allowed_globals():
            super().load_checkpoint(filename_or_checkpoint)

    def set_deep_supervision_enabled(self, enabled: bool) -> None:
        """There is none."""
