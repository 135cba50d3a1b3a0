"""Which case is next, and what to do with the cases of a worker that died."""

from __future__ import annotations

import heapq
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping, Sequence

from nnslim.prediction.case import Case


def in_order(cases: Iterable[Case], begun: Mapping[str, int] | None = None) -> list[Case]:
    """Return the order of work: large cases first, so that no worker is left with a large one at the end.

    Args:
        begun: how often a case was begun by runs that were killed: the case may have killed them, so it comes last and
            cannot keep the others from being done.
    """
    begun = begun or {}
    return sorted(cases, key=lambda case: (begun.get(case.name, 0), -case.voxels, case.name))


def share(cases: Sequence[Case], index: int, count: int) -> list[Case]:
    """Return one of `count` shares of about as many voxels each, the same for everybody who asks.

    The largest case goes to the share that has least, and so on. Shares are numbered from 0.
    """
    loads = [(0, number) for number in range(count)]
    mine = []
    for case in in_order(cases):
        load, number = heapq.heappop(loads)
        heapq.heappush(loads, (load + max(case.voxels, 1), number))
        if number == index:
            mine.append(case)
    return mine


class Schedule:
    """The cases that are left, for any number of workers.

    A case that a worker held when it died is a suspect: it comes after all others, to a worker that holds nothing
    else, so that no other case dies with it, and the culprit is known. After `attempts` deaths it is given up.
    """

    def __init__(
        self, cases: Iterable[Case], attempts: int = 3, begin: Callable[[Case], None] = lambda case: None
    ) -> None:
        """Take the cases, see `in_order`; `begin` is called as one is taken."""
        self._begin = begin
        self._fresh = deque(cases)
        self._suspects: deque[Case] = deque()
        self._deaths: Counter[str] = Counter()
        self._limit = attempts

    @property
    def waiting(self) -> int:
        """Cases that nobody holds."""
        return len(self._fresh) + len(self._suspects)

    def take(self, held: Sequence[Case]) -> Case | None:
        """Return the next case for a worker that holds these, None if there is none for it now."""
        if any(self._deaths[case.name] for case in held):
            return None
        if self._fresh:
            case = self._fresh.popleft()
        elif self._suspects and not held:
            case = self._suspects.popleft()
        else:
            return None
        self._begin(case)
        return case

    def attempts(self, case: Case) -> int:
        """Return how many workers have had the case."""
        return self._deaths[case.name] + 1

    def died(self, held: Iterable[Case]) -> list[Case]:
        """Take back what a worker held when it died; return the cases that are given up."""
        lost = []
        for case in held:
            self._deaths[case.name] += 1
            if self._deaths[case.name] < self._limit:
                self._suspects.append(case)
            else:
                lost.append(case)
        return lost
