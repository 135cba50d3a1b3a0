"""A model without a network, for the engines that run folders: it copies a file's text, and misbehaves on request."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from nnslim.errors import InputError, ModelError
from nnslim.prediction.case import Case, Place

IDENTITY = "0123456789abcdef"


def write_cases(folder: Path, texts: dict[str, str]) -> list[Case]:
    """Write one file per case; its size in letters stands for voxels."""
    folder.mkdir(parents=True, exist_ok=True)
    cases = []
    for name, text in texts.items():
        path = folder / f"{name}.txt"
        if not path.exists():
            path.write_text(text)
        cases.append(Case(name, (path,), f"{name}.out", len(text)))
    return cases


@dataclass(frozen=True)
class CopyJob:
    """Writes the text of a case in capitals.

    Attributes:
        notes: folder in which each stage leaves a file, so that a test sees what ran, how often, and where.
        seconds: of a forward pass.
        kill: case -> how many times the worker is killed in its forward pass.
        refuse: every worker says that the model cannot be used.
        die_opening: workers that are killed while they load.
        loaded: workers that must have begun to load before the first forward pass ends.
    """

    notes: Path
    seconds: float = 0.0
    kill: tuple[tuple[str, int], ...] = ()
    refuse: bool = False
    die_opening: int = 0
    first_alone: bool = False
    loaded: int = 0

    def stamp(self) -> tuple[str, dict[str, str]]:
        return IDENTITY, {"copy": "1"}

    def keeping(self, run: dict) -> CopyJob:
        return self

    @contextmanager
    def open(self, place: Place) -> Iterator[CopyModel]:
        if self.refuse:
            raise ModelError("no such model")
        if _note(self.notes, "open") <= self.die_opening:
            os.kill(os.getpid(), signal.SIGKILL)
        _note(self.notes, "loaded")
        yield CopyModel(self)


class CopyModel:
    """See `CopyJob`."""

    def __init__(self, job: CopyJob) -> None:
        self._job = job

    def run(self) -> dict:
        return {"backend": "copy"}

    def read(self, case: Case) -> str:
        text = case.files[0].read_text()
        if text.startswith("bad"):
            raise InputError(f"{case.files[0].name} holds '{text}'; expected anything else")
        return text

    def forward(self, case: Case, data: str) -> str:
        count = _note(self._job.notes, f"forward-{case.name}")
        if count <= dict(self._job.kill).get(case.name, 0):
            os.kill(os.getpid(), signal.SIGKILL)
        if data.startswith("exit"):
            raise SystemExit("the host gave up")
        time.sleep(self._job.seconds)
        end = time.monotonic() + 60
        while times(self._job.notes, "open") < self._job.loaded:
            assert time.monotonic() < end
            time.sleep(0.02)
        return data.upper()

    def write(self, case: Case, result: str, beside: Path) -> None:
        beside.write_text(result)


def _note(folder: Path, what: str) -> int:
    """Leave a file and return how many of its kind there are."""
    for number in range(1, 1000):
        try:
            (folder / f"{what}.{number}").touch(exist_ok=False)
            return number
        except FileExistsError:
            continue
    raise AssertionError(what)


def times(folder: Path, what: str) -> int:
    """Return how often something was noted."""
    return len(list(folder.glob(f"{what}.*")))
