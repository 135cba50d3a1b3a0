"""Ray: workers on the machines of a cluster; what a lost machine held is predicted by another one.

Images, model and output must lie at the same path on all machines (a shared file system), and nnslim must be installed
there.
"""

from __future__ import annotations

import logging
import math
import queue
import threading
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any

from nnslim.errors import HostError, NNSlimError, kind_and_line
from nnslim.patching import kept_sigterm
from nnslim.prediction.case import Case, Crew, Place, PredictionJob, Record, Report
from nnslim.prediction.engines.team import Member, Team, loaded
from nnslim.prediction.schedule import Schedule

_AHEAD = 2  # cases that an actor holds: one in its forward pass, and the next


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
        with kept_sigterm():
            ray.init(address=crew.address, log_to_driver=False, logging_level=logging.WARNING)
    try:
        _RayTeam(ray, job, schedule, output.absolute(), _sized(ray, crew), report).work()
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


class _RayWorker(Member):
    """An actor and the references to what it was asked: to open the model (None), and to predict cases."""

    def __init__(self, index: int, actor: Any, opening: Any) -> None:
        super().__init__(index)
        self.actor = actor
        self.asked: dict[Any, Case | None] = {opening: None}

    @property
    def wants(self) -> bool:
        return self.ready and len(self.held) < _AHEAD

    def give(self, case: Case) -> None:
        super().give(case)
        self.asked[self.actor.predict.remote(case)] = case


class _RayTeam(Team):
    members: list[_RayWorker]  # type: ignore[assignment]

    def __init__(self, ray: Any, *given: Any) -> None:
        super().__init__(*given)
        self._ray = ray
        # An actor class of its own on each run: it answers several calls at a time, one per case that it holds.
        resources = {"num_cpus": self.crew.threads or 1, "num_gpus": 1 if self.crew.gpus else 0}
        self._kind = ray.remote(_Actor).options(**resources, max_restarts=0, max_concurrency=_AHEAD + 1)

    def start(self, index: int) -> _RayWorker:
        actor, place = self._kind.remote(), Place(index, self.crew.threads, 0 if self.crew.gpus else None)
        return _RayWorker(index, actor, actor.open.remote(self.payload, place, self.output, self.crew))

    def listen(self) -> None:
        asked = {reference: worker for worker in self.members for reference in worker.asked}
        done, _ = self._ray.wait(list(asked), num_returns=1)
        for reference in done:
            self._hear(asked[reference], reference)

    def _hear(self, worker: _RayWorker, reference: Any) -> None:
        try:
            answer = self._ray.get(reference)
        except self._ray.exceptions.RayTaskError as error:
            cause = error.cause
            if isinstance(cause, NNSlimError):  # no worker can use the model
                raise cause from None
            self._bury(worker, f"ended by {kind_and_line(cause or error)}")
        except self._ray.exceptions.RayError as error:  # its process or its machine is gone
            self._bury(worker, f"lost ({type(error).__name__})")
        else:
            if worker.asked.pop(reference) is None:
                self.opened(worker)
            else:
                self.told(worker, answer)

    def _bury(self, worker: _RayWorker, why: str) -> None:
        self._ray.kill(worker.actor)  # what is left of it
        self.died(worker, why)


class _Actor:
    """A pipeline in a thread, fed by the calls."""

    def __init__(self) -> None:
        self._inbox: queue.Queue[Case | None] = queue.Queue()
        self._answers: dict[str, Future[Record]] = {}
        self._loaded: Future[None] = Future()

    def open(self, *given: Any) -> None:
        """Load the model; return when that is done, or raise what went wrong."""
        threading.Thread(target=self._work, args=given, daemon=True).start()
        self._loaded.result()

    def predict(self, case: Case) -> Record:
        """Return what came of a case."""
        answer: Future[Record] = Future()
        self._answers[case.name] = answer
        self._inbox.put(case)
        return answer.result()

    def _work(self, payload: bytes, place: Place, output: Path, crew: Crew) -> None:
        try:
            with loaded(payload, place, output, crew) as pipeline:
                self._loaded.set_result(None)
                pipeline.run(self._inbox.get, self._answer)
        except BaseException as error:
            if not self._loaded.done():
                self._loaded.set_exception(error)
            for answer in list(self._answers.values()):
                answer.set_exception(error)

    def _answer(self, record: Record) -> None:
        self._answers.pop(record.name).set_result(record)
