"""What all engines with workers of their own do: hand out cases, report results, replace workers that die."""

from __future__ import annotations

import logging
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from nnslim.errors import HostError
from nnslim.prediction.case import Case, Crew, Place, PredictionJob, Record, Report, now
from nnslim.prediction.pipeline import Pipeline
from nnslim.prediction.schedule import Schedule

_BAD_STARTS = 3  # workers in a row that die before they have loaded the model
_log = logging.getLogger("nnslim")


class Member:
    """A worker, from the side of the run."""

    wants = False  # whether it takes another case

    def __init__(self, index: int) -> None:
        self.index = index
        self.ready = False
        self.held: dict[str, Case] = {}

    def give(self, case: Case) -> None:
        """Send it a case; if it is dead, that is noticed later."""
        self.held[case.name] = case


class Team:
    """All workers of a run."""

    def __init__(self, job: PredictionJob, schedule: Schedule, output: Path, crew: Crew, report: Report) -> None:
        self.payload = pickle.dumps(job)
        self.output = output
        self.crew = crew
        self.members: list[Member] = []
        self._first_alone = job.first_alone
        self._schedule = schedule
        self._report = report
        self._bad_starts = 0
        self._why = ""

    def start(self, index: int) -> Member:
        """Start a worker that loads the model."""
        raise NotImplementedError

    def listen(self) -> None:
        """Wait until workers have something to say, and call `opened`, `told` or `died` for each."""
        raise NotImplementedError

    def work(self) -> None:
        """Work until no case is left.

        Raises:
            HostError: workers die before they have loaded the model.
        """
        count = min(self.crew.workers, self._schedule.waiting)
        self.members += [self.start(index) for index in range(min(count, 1) if self._first_alone else count)]
        while self._schedule.waiting or any(member.held for member in self.members):
            if not self.members:
                raise HostError(f"no worker can be started: the last {self._bad_starts} were {self._why}")
            self.listen()
            if self._first_alone and any(member.ready for member in self.members):
                self._first_alone = False
                self.members += [self.start(index) for index in range(1, count)]
            for member in self.members:
                while member.wants and (case := self._schedule.take(tuple(member.held.values()))) is not None:
                    member.give(case)

    def opened(self, member: Member) -> None:
        """Note that a worker has loaded the model."""
        member.ready, self._bad_starts = True, 0

    def told(self, member: Member, record: Record) -> None:
        """Report a result."""
        case = member.held.pop(record.name)
        self._report(replace(record, attempts=self._schedule.attempts(case)))

    def died(self, member: Member, why: str) -> None:
        """Take back what a worker held, and start another in its place."""
        self.members.remove(member)
        self._why = why
        if member.held:
            _log.warning("worker %d was %s; it had %s", member.index, why, ", ".join(member.held))
        for case in self._schedule.died(member.held.values()):
            attempts = self._schedule.attempts(case) - 1
            error = f"{attempts} workers ended while they had it; the last one was {why}"
            rest = {"voxels": case.voxels, "target": case.target, "attempts": attempts, "time": now()}
            self._report(Record(case.name, "failed", error, **rest))
        if not member.ready:
            self._bad_starts += 1
            _log.warning("worker %d was %s before it had loaded the model", member.index, why)
        if self._schedule.waiting and self._bad_starts < _BAD_STARTS:
            self.members.append(self.start(member.index))


@contextmanager
def loaded(payload: bytes, place: Place, output: Path, crew: Crew) -> Iterator[Pipeline]:
    """Give the pipeline of a worker, in its own process; the model is loaded."""
    with pickle.loads(payload).open(place) as model:
        yield Pipeline(model, output, overlap=crew.overlap)
