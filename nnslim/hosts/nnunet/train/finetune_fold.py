"""Train one fold, in this process or as one of several."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path

import torch
from torch import nn

from nnslim.errors import InputError, ModelError
from nnslim.hosts.nnunet.model.trained_model import build_network, read_trained_model, trainer_class
from nnslim.hosts.nnunet.train.finetune_settings import FoldJob
from nnslim.hosts.nnunet.train.finetune_trainer import finetune_trainer_class
from nnslim.network.walk import unwrap


def run_fold(job: FoldJob, device: torch.device, after_epoch: Callable[[int], None] = lambda _: None) -> None:
    """Train one fold in this process: from the model's weights, or from a checkpoint of the same training.

    Raises:
        ModelError: the weights do not fit the network that the trainer builds.
        InputError: a cascade's first stage is missing. OutputError: a checkpoint cannot be written.
    """
    torch.backends.cudnn.benchmark = device.type == "cuda"  # as nnUNetv2_train
    teacher = None if job.settings.teacher is None else load_teacher(job)
    cls = finetune_trainer_class(trainer_class(job.trainer_name), job, teacher, after_epoch)
    plans = {**copy.deepcopy(job.plans), "continue_training": job.resume_from is not None}
    with open(os.devnull, "w") as sink, redirect_stdout(sink):  # noqa: PTH123  nnU-Net prints; it logs to a file, too
        trainer = cls(plans, job.configuration, job.fold, job.dataset, device)
        stage = trainer.folder_with_segs_from_previous_stage
        if stage is not None and not Path(stage).is_dir():
            raise InputError(
                f"the cascade's first stage should have left its segmentations in {stage}, which is no folder"
            )
        try:
            trainer.initialize()
            if job.resume_from is not None:
                trainer.load_checkpoint(str(job.resume_from))
            else:
                _load_start(unwrap(trainer.network), job)
            if trainer.current_epoch < trainer.num_epochs:
                trainer.run_training()
            if job.settings.validate:
                trainer.perform_actual_validation()
        finally:
            for loader in (trainer.dataloader_train, trainer.dataloader_val):
                getattr(loader, "_finish", lambda: None)()  # processes that augment


def _load_start(network: nn.Module, job: FoldJob) -> None:
    """Load all weights, segmentation heads included, which nnU-Net's -pretrained_weights leaves out."""
    source = read_trained_model(job.model, [job.source_fold], job.checkpoint_name, trust=job.settings.trust)
    try:
        network.load_state_dict({key: value.float() for key, value in source.weights[0].items()})
    except RuntimeError as error:
        lines = [line.strip() for line in str(error).splitlines()[:2]]
        raise ModelError(
            f"{job.model}/fold_{job.source_fold}/{job.checkpoint_name} does not fit the network that trainer "
            f"{job.trainer_name} builds: {' '.join(lines)[:300]}"
        ) from error


def run_rank(rank: int, job: FoldJob, world_size: int, port: int, device: str = "cuda") -> None:
    """Train one fold as one of several processes; `torch.multiprocessing.spawn` calls this in each of them.

    Everything is made anew here, the trainer's class included, which could not be pickled.

    Args:
        rank: of this process. world_size: processes in all. port: free TCP port on this machine.
        device: nnU-Net's trainer takes the CUDA device of its rank whatever this says.
    """
    import torch.distributed as dist

    if device == "cuda":
        torch.cuda.set_device(rank)
    backend = "nccl" if device == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world_size)
    try:
        run_fold(job, torch.device(device, rank) if device == "cuda" else torch.device(device))
    finally:
        dist.destroy_process_group()


def load_teacher(job: FoldJob) -> nn.Module:
    """Return the teacher without deep supervision, frozen: the fold of the same number, where it has one."""
    path = Path(job.settings.teacher)
    same = (path / f"fold_{job.fold}").is_dir()
    teacher = read_trained_model(path, [job.fold] if same else None, trust=job.settings.trust)
    return build_network(teacher).requires_grad_(False)
