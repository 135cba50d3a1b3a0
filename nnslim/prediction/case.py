"""What a folder run is about: cases, what came of them, and who predicts them."""

from __future__ import annotations

import platform
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, field, fields
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Protocol

from nnslim._version import __version__
from nnslim.errors import HostError
from nnslim.running.machine import machine_threads


@dataclass(frozen=True)
class Case:
    """One thing to predict.

    Attributes:
        name: identifier, unique in the folder.
        files: the images, in the order of their channels.
        target: name of the file or folder that is written, in the output folder.
        voxels: of one image, for the order of work; bytes where the format does not tell.
        problem: why it cannot be predicted, where the listing shows that already; else "".
    """

    name: str
    files: tuple[Path, ...]
    target: str
    voxels: int = 0
    problem: str = ""


@dataclass(frozen=True)
class Record:
    """What came of a case: one line of manifest.jsonl.

    Attributes:
        name, target, voxels: see `Case`.
        status: "done", "failed", or "there" (predicted before; not written to the manifest).
        error: why it failed, one line.
        seconds: from the first byte read to the result in place.
        stages: seconds of "read" (and preprocess), "forward" and "write" (resample, label, compress).
        peak_mb: high-water mark of the worker's resident memory while it had the case, in 2^20 bytes; with overlapping
            stages its neighbours' share is in it.
        sha256: of the file; of a folder, see `checksum`.
        side_files: name -> SHA-256 of what the writer put beside it, as the spacing of a TIFF.
        input: bytes and latest modification time (Unix seconds) of the images.
        worker: host and process. attempts: workers that had it, itself included.
        model: 16 hexadecimal digits of weights and settings that decide the result.
        run: "backend", "precision" and "threads" that it was predicted with.
        versions: of nnslim, its hosts, torch and Python.
        time: when it ended, UTC, ISO 8601.
    """

    name: str
    status: str
    error: str = ""
    seconds: float = 0.0
    stages: dict[str, float] = field(default_factory=dict)
    voxels: int = 0
    peak_mb: float = 0.0
    target: str = ""
    sha256: str = ""
    side_files: dict[str, str] = field(default_factory=dict)
    input: dict[str, float] = field(default_factory=dict)
    worker: str = ""
    attempts: int = 1
    model: str = ""
    run: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    time: str = ""

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Record | None:
        """Return the record of a manifest line, None where it is none; keys of later versions are dropped."""
        if not {"name", "status"} <= values.keys():
            return None
        return cls(**{item.name: values[item.name] for item in fields(cls) if item.name in values})


def versions(*hosts: str) -> dict[str, str]:
    """Return the versions of nnslim, Python, torch and the hosts, where installed; imports none of them."""
    found = {"nnslim": __version__, "python": platform.python_version()}
    for name in ("torch", *hosts):
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def now() -> str:
    """Return the time, UTC, ISO 8601 with milliseconds."""
    return datetime.now(timezone.utc).isoformat(timespec="milliseconds")


class Model(Protocol):
    """A loaded model. Its three stages run in three threads, each on another case."""

    def read(self, case: Case) -> Any:
        """Return what `forward` needs."""

    def forward(self, case: Case, data: Any) -> Any:
        """Return what `write` needs."""

    def write(self, case: Case, result: Any, beside: Path) -> None:
        """Write the file or folder `beside`, alone in its folder, and whatever belongs to it into the same folder."""

    def run(self) -> dict[str, Any]:
        """Return how its networks run, after a forward pass; see `Record`."""


@dataclass(frozen=True)
class Place:
    """Where a worker runs: its number, its CPU threads (None: all), its GPU (None: the one that is visible)."""

    index: int = 0
    threads: int | None = None
    gpu: int | None = None


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


class PredictionJob(Protocol):
    """What is sent to a worker: small, can be pickled, and imports little before it is opened."""

    @property
    def first_alone(self) -> bool:
        """Whether one worker should load first because it leaves something on disk for the others."""

    def stamp(self) -> tuple[str, dict[str, str]]:
        """Return the identity of the model with its settings, and the versions; see `Record`."""

    def keeping(self, run: dict[str, Any]) -> PredictionJob:
        """Return the job as an earlier run of it began, whose records hold `run`."""

    def open(self, place: Place) -> AbstractContextManager[Model]:
        """Load the model.

        Raises:
            NNSlimError: it cannot be used; the whole run ends.
        """


Report = Callable[[Record], None]


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
        threads = max(machine_threads() // count, 1)
    engine = "local" if workers is not None or count > 1 else "here"
    return engine, Crew(count, threads, gpus, overlap)
