"""Ray: workers on the machines of a cluster; what a machine held that is lost, another one predicts.

Images, model and output must lie at the same path on all machines (a shared file system), and nnslim must be installed
there.
"""

from __future__ import annotations

import logging
import math
import pickle
import queue
import threading
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from nnslim.errors import HostError, NNSlimError
from nnslim.prediction.case import Case, Place, PredictionJob, Record, Report
from nnslim.prediction.engines import Crew
from nnslim.prediction.pipeline import Pipeline, one_line
from nnslim.prediction.schedule import Schedule, given_up

_BAD_STARTS = 3  # actors in a row that die before they have loaded the model
_AHEAD = 2  # cases that an actor holds: one in its forward pass, and the next
_log = logging.getLogger("nnslim")


def run(job: PredictionJob, schedule: Schedule, output: Path, crew: Crew, report: Report) -> None:
    """Predict in actors of a Ray cluster that hold the model.

    Raises:
        HostError: Ray is not installed, or no actor can load the model.
    """
    try:
        import ray
    except ImportError:
        raise HostError("the ray engine needs Ray: pip install 'nnslim[ray]'") from None
    own = not ray.is_initialized()
    if own:
        ray.init(address=crew.address, log_to_driver=False, logging_level=logging.WARNING)
    try:
        _Actors(ray, job, schedule, output.absolute(), _sized(ray, crew), report).work()
    finally:
        if own:
            ray.shutdown()


def _sized(ray: Any, crew: Crew) -> Crew:
    """Fill in what the crew leaves to the cluster."""
    machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    gpus = int(sum(resources.get("GPU", 0) for resources in machines))
    if crew.gpus and not gpus:
        raise HostError("device cuda was asked for, but no machine of the Ray cluster has a GPU; use --device cpu")
    workers = crew.workers or (gpus if crew.gpus else len(machines))
    cpus = int(min(resources.get("CPU", 1) for resources in machines))
    most = int(max(resources.get("CPU", 1) for resources in machines))
    if (crew.threads or 1) > most:  # Ray would wait for such a machine
        raise HostError(
            f"{crew.threads} threads were asked for, but the machines of the Ray cluster have at most {most} CPUs"
        )
    return replace(crew, workers=workers, threads=crew.threads or max(cpus // math.ceil(workers / len(machines)), 1))


@dataclass
class _Actor:
    """The driver's view of an actor."""

    handle: Any
    opening: Any
    ready: bool = False
    running: dict[Any, Case] = field(default_factory=dict)  # by the reference of the answer


class _Actors:
    """All actors, from the driver's side."""

    def __init__(
        self, ray: Any, job: PredictionJob, schedule: Schedule, output: Path, crew: Crew, report: Report
    ) -> None:
        self._ray = ray
        self._schedule = schedule
        self._crew = crew
        self._report = report
        self._payload = pickle.dumps(job)
        self._output = output
        self._first_alone = job.first_alone
        self._actors: list[_Actor] = []
        self._bad_starts = 0
        self._why = ""
        # An actor class of its own on each run: it answers several calls at a time, one per case that it holds.
        resources = {"num_cpus": crew.threads or 1, "num_gpus": 1 if crew.gpus else 0}
        self._kind = ray.remote(_Worker).options(**resources, max_restarts=0, max_concurrency=_AHEAD + 1)

    def work(self) -> None:
        count = min(self._crew.workers, self._schedule.waiting)
        for _ in range(min(count, 1) if self._first_alone else count):
            self._start()
        while self._schedule.waiting or any(actor.running for actor in self._actors):
            if not self._actors:
                raise HostError(f"no worker can be started: the last {self._bad_starts} were {self._why}")
            asked = {a.opening: a for a in self._actors if not a.ready}
            asked |= {reference: actor for actor in self._actors for reference in actor.running}
            done, _ = self._ray.wait(list(asked), num_returns=1)
            for reference in done:
                if asked[reference] in self._actors:
                    self._hear(asked[reference], reference)
            if self._first_alone and any(actor.ready for actor in self._actors):
                self._first_alone = False
                for _ in range(1, count):
                    self._start()
            for actor in self._actors:
                self._feed(actor)

    def _start(self) -> None:
        handle = self._kind.remote()
        place = Place(len(self._actors), self._crew.threads, 0 if self._crew.gpus else None)
        opening = handle.open.remote(self._payload, place, str(self._output), self._crew.overlap)
        self._actors.append(_Actor(handle, opening))

    def _feed(self, actor: _Actor) -> None:
        while actor.ready and len(actor.running) < _AHEAD:
            case = self._schedule.take(tuple(actor.running.values()))
            if case is None:
                return
            actor.running[actor.handle.predict.remote(case)] = case

    def _hear(self, actor: _Actor, reference: Any) -> None:
        try:
            answer = self._ray.get(reference)
        except self._ray.exceptions.RayTaskError as error:
            cause = error.cause
            if isinstance(cause, NNSlimError):  # the model cannot be used, by nobody
                raise cause from None
            self._buried(actor, f"ended by {one_line(cause or error)}")
        except self._ray.exceptions.RayError as error:  # its process or its machine is gone
            self._buried(actor, f"lost ({type(error).__name__})")
        else:
            if reference == actor.opening:
                actor.ready, self._bad_starts = True, 0
            else:
                case = actor.running.pop(reference)
                record: Record = answer
                self._report(replace(record, attempts=self._schedule.attempts(case)))

    def _buried(self, actor: _Actor, why: str) -> None:
        self._actors.remove(actor)
        self._why = why
        held = list(actor.running.values())
        if held:
            _log.warning("a worker was %s; it had %s", why, ", ".join(case.name for case in held))
        for case in self._schedule.died(held):
            self._report(given_up(case, self._schedule.attempts(case) - 1, why))
        if not actor.ready:
            self._bad_starts += 1
            _log.warning("a worker was %s before it had loaded the model", why)
        self._ray.kill(actor.handle)  # what is left of it
        if self._schedule.waiting and self._bad_starts < _BAD_STARTS:
            self._start()


class _Worker:
    """The actor: a pipeline in a thread, fed by the calls."""

    def __init__(self) -> None:
        self._inbox: queue.Queue[Case | None] = queue.Queue()
        self._answers: dict[str, Future[Record]] = {}
        self._loaded: Future[None] = Future()

    def open(self, payload: bytes, place: Place, output: str, overlap: bool) -> None:
        """Load the model; returns when that is done, or raises why not."""
        threading.Thread(target=self._work, args=(payload, place, Path(output), overlap), daemon=True).start()
        self._loaded.result()

    def predict(self, case: Case) -> Record:
        """Return what came of a case."""
        answer: Future[Record] = Future()
        self._answers[case.name] = answer
        self._inbox.put(case)
        return answer.result()

    def _work(self, payload: bytes, place: Place, output: Path, overlap: bool) -> None:
        try:
            with pickle.loads(payload).open(place) as model:
                self._loaded.set_result(None)
                Pipeline(model, output, overlap=overlap).run(self._inbox.get, self._answer)
        except BaseException as error:
            if not self._loaded.done():
                self._loaded.set_exception(error)
            for answer in list(self._answers.values()):
                answer.set_exception(error)

    def _answer(self, record: Record) -> None:
        self._answers.pop(record.name).set_result(record)
