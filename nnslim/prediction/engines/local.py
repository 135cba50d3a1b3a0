"""Worker processes on this machine; one that is killed is replaced, and its cases are tried again."""

from __future__ import annotations

import ctypes
import logging
import multiprocessing
import os
import pickle
import signal
import sys
import threading
from contextlib import suppress
from dataclasses import replace
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from nnslim.errors import HostError, NNSlimError
from nnslim.prediction.case import Case, Place, PredictionJob, Report
from nnslim.prediction.engines import Crew
from nnslim.prediction.pipeline import Pipeline, one_line
from nnslim.prediction.schedule import Schedule, given_up

_BAD_STARTS = 3  # workers in a row that die before they have loaded the model
_PATIENCE = 10.0  # seconds, for a worker that has nothing to do any more
_PDEATHSIG = 1  # Linux: prctl.h
_log = logging.getLogger("nnslim")


def run(job: PredictionJob, schedule: Schedule, output: Path, crew: Crew, report: Report) -> None:
    """Predict in `crew.workers` processes of their own, which end with this one, however that ends."""
    team = _Team(job, schedule, output, crew, report)
    try:
        team.work()
    finally:
        team.stop()


class _Team:
    """All workers, from the parent's side."""

    def __init__(self, job: PredictionJob, schedule: Schedule, output: Path, crew: Crew, report: Report) -> None:
        self._payload = pickle.dumps(job)
        self._first_alone = job.first_alone
        self._schedule = schedule
        self._output = output
        self._crew = crew
        self._report = report
        self._workers: dict[int, _Worker] = {}
        self._bad_starts = 0
        self._why = ""

    def work(self) -> None:
        count = min(self._crew.workers, self._schedule.waiting)
        for index in range(min(count, 1) if self._first_alone else count):
            self._start(index)
        while self._schedule.waiting or any(worker.held for worker in self._workers.values()):
            if not self._workers:
                raise HostError(f"no worker can be started: the last {self._bad_starts} were {self._why}")
            channels = {worker.channel: index for index, worker in self._workers.items()}
            for channel in wait(list(channels)):
                self._hear(channels[channel])  # type: ignore[index]
            if self._first_alone and any(worker.ready for worker in self._workers.values()):
                self._first_alone = False
                for index in range(1, count):
                    self._start(index)
            for worker in self._workers.values():
                if worker.hungry and (case := self._schedule.take(tuple(worker.held.values()))) is not None:
                    worker.give(case)
        for worker in self._workers.values():
            if worker.hungry:
                worker.dismiss()

    def stop(self) -> None:
        for worker in self._workers.values():
            worker.process.kill()
        for worker in self._workers.values():
            worker.process.join()
            worker.channel.close()

    def _start(self, index: int) -> None:
        place = Place(index, self._crew.threads, self._crew.gpu(index))
        self._workers[index] = _Worker(self._payload, place, self._output, self._crew.overlap)

    def _hear(self, index: int) -> None:
        worker = self._workers[index]
        try:
            kind, content = worker.channel.recv()
        except (EOFError, OSError):
            worker.process.join()
            self._buried(index, worker.broken or _ending(worker.process.exitcode))
            return
        if kind == "refused":  # the model cannot be used, by nobody
            raise content
        if kind == "broken":
            worker.broken = content
        elif kind == "record":
            case = worker.held.pop(content.name)
            self._report(replace(content, attempts=self._schedule.attempts(case)))
        elif kind == "ready":
            worker.ready, self._bad_starts = True, 0
        else:
            worker.hungry = True

    def _buried(self, index: int, why: str) -> None:
        worker = self._workers.pop(index)
        self._why = why
        worker.channel.close()
        if worker.held:
            _log.warning("worker %d was %s; it had %s", index, why, ", ".join(worker.held))
        for case in self._schedule.died(worker.held.values()):
            attempts = self._schedule.attempts(case) - 1
            self._report(given_up(case, attempts, why))
        if not worker.ready:
            self._bad_starts += 1
            _log.warning("worker %d was %s before it had loaded the model", index, why)
        if self._schedule.waiting and self._bad_starts < _BAD_STARTS:
            self._start(index)


class _Worker:
    """The parent's end of a process."""

    def __init__(self, payload: bytes, place: Place, output: Path, overlap: bool) -> None:
        context = multiprocessing.get_context("spawn")  # torch's threads do not survive a fork
        self.channel, theirs = context.Pipe()
        arguments = (theirs, payload, place, output, overlap, os.getpid())
        self.process = context.Process(target=_serve, args=arguments, name=f"nnslim-{place.index}")
        self.process.start()
        theirs.close()
        self.ready = self.hungry = False
        self.broken = ""
        self.held: dict[str, Case] = {}

    def give(self, case: Case) -> None:
        self.hungry = False
        self.held[case.name] = case
        with suppress(OSError):  # it is dead; that is heard next
            self.channel.send(case)

    def dismiss(self) -> None:
        with suppress(OSError):
            self.channel.send(None)
        self.process.join(_PATIENCE)


def _ending(code: int | None) -> str:
    if code is None or code >= 0:
        return f"ended with exit code {code}"
    hint = " (often: out of memory)" if -code == signal.SIGKILL else ""
    return f"killed by {signal.Signals(-code).name}{hint}"


def _serve(channel: Connection, payload: bytes, place: Place, output: Path, overlap: bool, parent: int) -> None:
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
        with pickle.loads(payload).open(place) as model:
            say("ready")
            Pipeline(model, output, overlap=overlap).run(take, lambda record: say("record", record))
    except (EOFError, BrokenPipeError):
        return  # the parent is gone
    except NNSlimError as error:
        say("refused", error)
    except Exception as error:  # of this process perhaps only, such as a GPU without memory left
        say("broken", f"ended by {one_line(error)}")


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
