"""Jobs that the tests send to processes of their own: a module without torch, which would take seconds to import."""

from __future__ import annotations

import os
import signal
from pathlib import Path

from nnslim.benchmark.alternated import Candidate
from nnslim.errors import ConfigError

MEGABYTE = 1 << 20


def noting(log: Path, name: str) -> Candidate:
    """A candidate that writes its name at each pass."""

    def run() -> dict:
        with log.open("a") as stream:
            stream.write(name)
        return {"name": name}

    return Candidate(run, {"name": name})


def holding(megabytes: int) -> Candidate:
    """A candidate that fills so much memory during a pass, and half of it before."""
    bytearray(b"x" * (megabytes // 2 * MEGABYTE))
    return Candidate(lambda: len(bytearray(b"x" * (megabytes * MEGABYTE))) and None)


def failing(when: str) -> Candidate:
    """A candidate that fails while it is made, at a pass, or with its whole process."""
    if when == "made":
        raise ConfigError("no such thing")
    passes = []

    def run() -> None:
        passes.append(0)
        if len(passes) > 1:
            if when == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes")

    return Candidate(run)
