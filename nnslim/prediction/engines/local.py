"""Worker processes on this machine; one that is killed is replaced, and its cases are tried again."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys
import threading
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from nnslim.errors import NNSlimError, kind_and_line
from nnslim.prediction.case import Case, Crew, Place, PredictionJob, Report
from nnslim.prediction.engines.team import Member, Team, loaded
from nnslim.prediction.schedule import Schedule

_PATIENCE = 10.0  # seconds, for a worker that has nothing left to do
_PDEATHSIG = 1  # Linux: prctl.h


def run(job: PredictionJob, schedule: Schedule, output: Path, crew: Crew, report: Report) -> None:
    """Predict in `crew.workers` processes of their own, which end with this one, however that ends."""
    team = _LocalTeam(job, schedule, output, crew, report)
    try:
        team.work()
        team.dismiss()
    finally:
        team.stop()


class _LocalWorker(Member):
    """A process and the channel to it."""

    def __init__(self, index: int, payload: bytes, output: Path, crew: Crew) -> None:
        super().__init__(index)
        context = multiprocessing.get_context("spawn")  # torch's threads do not survive a fork
        self.channel, theirs = context.Pipe()
        arguments = (theirs, payload, Place(index, crew.threads, crew.gpu(index)), output, crew, os.getpid())
        self.process = context.Process(target=_serve, args=arguments, name=f"nnslim-{index}")
        self.process.start()
        theirs.close()
        self.broken = ""

    def give(self, case: Case) -> None:
        super().give(case)
        self.wants = False
        with suppress(OSError):  # it is dead; that is heard next
            self.channel.send(case)


class _LocalTeam(Team):
    members: list[_LocalWorker]  # type: ignore[assignment]

    def start(self, index: int) -> _LocalWorker:
        return _LocalWorker(index, self.payload, self.output, self.crew)

    def listen(self) -> None:
        workers = {worker.channel: worker for worker in self.members}
        for channel in wait(list(workers)):
            worker = workers[channel]  # type: ignore[index]
            try:
                kind, content = worker.channel.recv()
            except (EOFError, OSError):
                worker.process.join()
                worker.channel.close()
                self.died(worker, worker.broken or _ending(worker.process.exitcode))
                continue
            if kind == "refused":  # no worker can use the model
                raise content
            if kind == "broken":
                worker.broken = content
            elif kind == "record":
                self.told(worker, content)
            elif kind == "ready":
                self.opened(worker)
            else:
                worker.wants = True

    def dismiss(self) -> None:
        """Let the workers end by themselves."""
        for worker in self.members:
            if worker.wants:
                with suppress(OSError):
                    worker.channel.send(None)
                worker.process.join(_PATIENCE)

    def stop(self) -> None:
        for worker in self.members:
            worker.process.kill()
        for worker in self.members:
            worker.process.join()
            worker.channel.close()


def _ending(code: int | None) -> str:
    if code is None or code >= 0:
        return f"ended with exit code {code}"
    hint = " (often: out of memory)" if -code == signal.SIGKILL else ""
    return f"killed by {signal.Signals(-code).name}{hint}"


def _serve(channel: Connection, payload: bytes, place: Place, output: Path, crew: Crew, parent: int) -> None:
    """Run one worker: everything that happens in the child process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    _end_with(parent)
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.__stdout__.fileno())  # type: ignore[union-attr]  # hosts print a lot
    speak = threading.Lock()

    def say(kind: str, content: Any = None) -> None:
        with speak:
            channel.send((kind, content))

    def take() -> Case | None:
        say("hungry")
        return channel.recv()

    try:
        with loaded(payload, place, output, crew) as pipeline:
            say("ready")
            pipeline.run(take, lambda record: say("record", record))
    except (EOFError, BrokenPipeError):
        return  # the parent is gone
    except NNSlimError as error:
        say("refused", error)
    except Exception as error:  # perhaps in this process only, such as a GPU without memory left
        say("broken", f"ended by {kind_and_line(error)}")


def _end_with(parent: int) -> None:
    """Let this process end when its parent does, whatever ends that."""

    def watch() -> None:
        process = multiprocessing.parent_process()
        if process is not None:
            process.join()
        os._exit(1)

    if sys.platform == "linux":  # at once, even while a library holds the interpreter
        ctypes.CDLL(None).prctl(_PDEATHSIG, signal.SIGKILL)
    threading.Thread(target=watch, daemon=True).start()
    if os.getppid() != parent:  # it died before we asked
        os._exit(1)
