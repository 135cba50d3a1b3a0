"""Measure several programs side by side: one process each, one pass at a time, in alternated rounds.

Other load on the machine then slows all of them alike, and the peak memory of one includes nothing of another.
"""

from __future__ import annotations

import multiprocessing
import signal
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any

from nnslim.errors import NNSlimError
from nnslim.running.machine import available_bytes, keep_heap, peak_bytes, refuse_beyond, reset_peak
from nnslim.running.timing import timed

Progress = Callable[[str, int, int], None]
_SPARE = 1.25  # times the largest peak so far must be free before the next process prepares
_OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "cannot allocate memory", "bad_alloc", "memoryerror")


@dataclass
class Candidate:
    """What a job makes in its own process.

    Attributes:
        run: one pass, finished when it returns; a dict that it returns is kept with the time.
        facts: what is known before the first pass, as JSON values.
        keep_heap: see `nnslim.running.machine`.
    """

    run: Callable[[], Any]
    facts: dict[str, Any] = field(default_factory=dict)
    keep_heap: bool = False


@dataclass(frozen=True)
class TimedJob:
    """A name, and a function that can be pickled (top level of a module, or a partial of one)."""

    name: str
    make: Callable[[], Candidate]


@dataclass
class Timing:
    """The result of a job.

    Attributes:
        seconds: duration of each counted pass. results: the dicts that passes returned.
        start_seconds: from starting the process to its first line of our code.
        prepare_seconds: until the first pass could begin, imports included.
        prepare_peak, peak_memory: bytes, high-water mark of resident memory while preparing, and over all passes;
            weights and libraries count.
        facts: see `Candidate`.
        error: why there is no (complete) result; "" if there is one.
    """

    name: str
    seconds: list[float] = field(default_factory=list)
    results: list[dict[str, Any]] = field(default_factory=list)
    start_seconds: float = 0.0
    prepare_seconds: float = 0.0
    prepare_peak: int = 0
    peak_memory: int = 0
    facts: dict[str, Any] = field(default_factory=dict)
    error: str = ""


def measure_rounds(
    jobs: Sequence[TimedJob],
    rounds: int,
    *,
    warmups: int = 1,
    limit_memory: bool = True,
    patience: float = 3600.0,
    progress: Progress | None = None,
) -> list[Timing]:
    """Prepare all jobs one after the other, then let them pass in turn: A B C A B C ...

    A job that fails is recorded and the others go on. Where memory is too short for all of them to keep their heaps,
    each gives back its heap after its turn, and begins its turn with a pass that is not counted.

    Args:
        jobs: at least one. rounds: counted passes of each.
        warmups: passes before the first counted one.
        limit_memory: let a job fail by itself rather than take more than is free.
        patience: seconds that a job may take to prepare, or for a pass.
        progress: called with (name of the job, turns done, turns in all).
    """
    tell, total, done = progress or (lambda *_: None), len(jobs) * (rounds + 1), 0
    frugal, workers = False, []
    try:
        for job in jobs:
            tell(job.name, done, total)
            largest = max((worker.timing.peak_memory for worker in workers), default=0)
            free = available_bytes()
            if workers and free is not None and free < _SPARE * largest and not frugal:
                frugal = True
                for worker in workers:
                    worker.ask("rest", patience)
            worker = _Worker(job, warmups, limit_memory)
            workers.append(worker)
            worker.wait(patience)
            if frugal:
                worker.ask("rest", patience)
            done += 1
        for _ in range(rounds):
            for worker in workers:
                tell(worker.timing.name, done, total)
                worker.ask("settled pass" if frugal else "pass", patience)
                done += 1
    finally:
        for worker in workers:
            worker.stop()
    return [worker.timing for worker in workers]


class _Worker:
    """The parent's end of a process."""

    def __init__(self, job: TimedJob, warmups: int, limit_memory: bool) -> None:
        context = multiprocessing.get_context("spawn")  # a fork would share pages, and torch's threads do not survive
        self.timing = Timing(job.name)
        self._channel, theirs = context.Pipe()
        arguments = (theirs, job.make, warmups, limit_memory, time.time())
        self._process = context.Process(target=_work, args=arguments, daemon=True)
        try:
            self._process.start()
        except Exception as error:  # pickle raises several kinds
            self.timing.error = f"cannot be sent to a process of its own: {error}"
        theirs.close()

    def ask(self, order: str, patience: float) -> None:
        """Give an order and wait for the answer."""
        if self.timing.error:
            return
        with suppress(OSError):  # it is gone; the wait says why
            self._channel.send(order)
        self.wait(patience)

    def wait(self, patience: float) -> None:
        """Take one answer into the timing."""
        timing = self.timing
        if timing.error:
            return
        try:
            if not self._channel.poll(patience):
                timing.error = f"no answer within {patience:.0f} s"
                self._process.kill()
                return
            answer = self._channel.recv()
        except (EOFError, OSError):
            self._process.join(10)
            timing.error = _end(self._process.exitcode)
            return
        timing.error = answer.get("error", "")
        timing.facts |= answer.get("facts", {})
        timing.peak_memory = max(timing.peak_memory, answer.get("peak", 0))
        for key in ("start_seconds", "prepare_seconds", "prepare_peak"):
            setattr(timing, key, answer.get(key, getattr(timing, key)))
        if "seconds" in answer:
            timing.seconds.append(answer["seconds"])
        if answer.get("result") is not None:
            timing.results.append(answer["result"])

    def stop(self) -> None:
        """End the process; closing the channel is the order to."""
        self._channel.close()
        if self._process.pid is None:
            return
        self._process.join(5)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()


def _end(code: int | None) -> str:
    if code is not None and code < 0:
        name = signal.Signals(-code).name
        return f"out of memory, probably: killed by {name}" if name == "SIGKILL" else f"its process ended by {name}"
    return f"its process ended with code {code}"


def _work(channel: Connection, make: Callable[[], Candidate], warmups: int, limit: bool, started: float) -> None:
    """Serve orders until the channel closes."""
    begun = time.time()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    if limit:
        refuse_beyond(available_bytes())
    try:
        with ExitStack() as heap:
            candidate = make()
            spent = {"start_seconds": begun - started, "prepare_seconds": time.time() - begun}
            spent["prepare_peak"] = peak_bytes()
            reset_peak()
            _hold_heap(candidate, heap)
            for _ in range(warmups):
                candidate.run()
            channel.send({"facts": candidate.facts, "peak": peak_bytes(), **spent})
            while True:
                channel.send(_obey(channel.recv(), candidate, heap))
    except EOFError:
        return
    except BaseException as error:  # compilers and plugins raise anything
        with suppress(OSError):
            channel.send({"error": reason(error)})


def _obey(order: str, candidate: Candidate, heap: ExitStack) -> dict[str, Any]:
    if order == "rest":
        heap.close()
        return {}
    if order == "settled pass":
        _hold_heap(candidate, heap)
        candidate.run()
    seconds, result = timed(candidate.run)
    if order == "settled pass":
        heap.close()
    return {"seconds": seconds, "peak": peak_bytes(), "result": result if isinstance(result, dict) else None}


def _hold_heap(candidate: Candidate, heap: ExitStack) -> None:
    if candidate.keep_heap:
        heap.enter_context(keep_heap())


def reason(error: BaseException) -> str:
    """Return why something failed, on one line; memory is named first."""
    text = " ".join(str(error).split())[:300]
    full = f"{type(error).__name__}: {text}"
    if any(mark in full.lower() for mark in _OUT_OF_MEMORY):
        return f"out of memory: {text or type(error).__name__}"
    return text if isinstance(error, NNSlimError) else full
