"""Engines: who runs the workers. Each is a file with one `run` of the same arguments."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from nnslim.errors import HostError
from nnslim.prediction.case import PredictionJob, Report
from nnslim.prediction.schedule import Schedule


@dataclass(frozen=True)
class Crew:
    """How many workers there are, and what each has.

    Attributes:
        workers: at least 1; 0 lets a cluster decide: one per GPU, else one per machine.
        threads: CPU threads of each; None: all that a worker's machine has.
        gpus: how many there are; worker i takes number i modulo this. 0: none is used.
        overlap: reading, forward pass and writing of neighbouring cases at the same time.
        address: of a Ray cluster; None: the running one, else one of its own.
    """

    workers: int = 1
    threads: int | None = None
    gpus: int = 0
    overlap: bool = True
    address: str | None = None

    def gpu(self, index: int) -> int | None:
        """Return the GPU of a worker."""
        return index % self.gpus if self.gpus else None


class Engine(Protocol):
    """Predicts the cases of a schedule and reports each once, in the calling thread or another one."""

    def __call__(self, job: PredictionJob, schedule: Schedule, output: Path, crew: Crew, report: Report) -> None:
        """Work until the schedule is empty.

        Raises:
            NNSlimError: the model cannot be loaded; workers die before they have loaded it.
        """
        ...


def crew_here(device: str, workers: int | None, threads: int | None, *, overlap: bool = True) -> tuple[str, Crew]:
    """Return the engine and the crew for this machine: one worker per GPU, or the CPUs divided between the workers.

    Args:
        device: cpu, cuda or mps.
        workers: None: one per GPU; without GPUs, or with one, this process alone.
        threads: of each worker; None: an equal share of the CPUs that this process may use.
        overlap: see `Crew`.
    Raises:
        HostError: cuda is asked for, and is not available.
    """
    gpus = 0
    if device == "cuda":
        import torch

        gpus = torch.cuda.device_count()
        if not gpus:
            raise HostError("device cuda was asked for, but torch finds no CUDA device; use --device cpu")
    count = workers or max(gpus, 1)
    if threads is None and count > 1:
        threads = max(len(os.sched_getaffinity(0)) // count, 1)
    engine = "local" if workers is not None or count > 1 else "here"
    return engine, Crew(count, threads, gpus, overlap)
