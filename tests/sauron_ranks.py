"""What the processes of a test run; a module of its own, which imports nothing of the tests: they start afresh."""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch
import torch.distributed as dist

from nnslim.hosts.nnunet.model.trained_model import trainer_class
from nnslim.hosts.nnunet.train.sauron_trainer import sauron_trainer_class
from nnslim.surgery.narrow import widths_of


def train_rank(rank, port, config):
    """One of two processes of a training."""
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    folder = Path(os.environ["nnUNet_preprocessed"]) / "Dataset998_Ball"
    plans, dataset = (json.loads((folder / name).read_text()) for name in ("nnUNetPlans.json", "dataset.json"))
    cls = sauron_trainer_class(config, trainer_class("nnUNetTrainerGloo"))
    trainer = cls({**plans, "continue_training": False}, "3d_fullres", 0, dataset, torch.device("cpu"))
    trainer.run_training()
    widths = [None, None]
    dist.all_gather_object(widths, widths_of(trainer.pruner.network))
    assert widths[0] == widths[1] != trainer._widths
    mine = torch.cat([p.detach().flatten() for p in trainer.network.parameters()])
    theirs = [torch.zeros_like(mine), torch.zeros_like(mine)]
    dist.all_gather(theirs, mine)
    assert torch.equal(theirs[0], theirs[1])
    dist.destroy_process_group()
