"""Where the rows of a benchmark grid are measured: here, one after the other, or on the nodes of a Ray cluster."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any, Protocol

from nnslim.benchmark.alternated import Timing, reason
from nnslim.benchmark.grid_point import Point
from nnslim.benchmark.timings import Row, timed_row
from nnslim.optional import needed


class Pool(Protocol):
    """What runs rows: `submit` and, for every submitted one, a `wait` that returns a point and its row."""

    capacity: int

    def submit(self, point: Point) -> None: ...

    def wait(self) -> tuple[Point, Row]: ...


class HerePool:
    """One row at a time, on this machine."""

    capacity = 1

    def __init__(self, work: Callable[[Point], Row]) -> None:
        self._work = work
        self._points: deque[Point] = deque()

    def submit(self, point: Point) -> None:
        """Remember it."""
        self._points.append(point)

    def wait(self) -> tuple[Point, Row]:
        """Measure the oldest."""
        point = self._points.popleft()
        return point, self._work(point)


class RayPool:
    """One Ray task per row, so that rows spread over a cluster and none shares its processors."""

    capacity = 1_000_000

    def __init__(self, work: Callable[[Point], Row], cpus: int, address: str | None = None) -> None:
        """Connect to the cluster, or start one here.

        Ray gives its workers a low priority; in a cluster started here they keep ours, because their passes are timed.

        Args:
            work: can be pickled, and what it needs can be imported on the nodes. cpus: that one row keeps for itself.
            address: of the cluster.
        Raises:
            BackendError: Ray is missing.
        """
        ray = needed("ray", "nnslim[ray]", purpose="--ray")
        if not ray.is_initialized():
            own = {} if address else {"include_dashboard": False, "_system_config": {"worker_niceness": 0}}
            ray.init(address=address, log_to_driver=False, logging_level="ERROR", **own)
        self._ray = ray

        def task(point: Point) -> Row:  # Ray takes plain functions only
            return work(point)

        self._task = ray.remote(num_cpus=cpus, max_retries=0)(task)
        self._running: dict[Any, Point] = {}

    def submit(self, point: Point) -> None:
        """Hand it to Ray."""
        self._running[self._task.remote(point)] = point

    def wait(self) -> tuple[Point, Row]:
        """Return whichever is ready first."""
        ready, _ = self._ray.wait(list(self._running), num_returns=1)
        point = self._running.pop(ready[0])
        try:
            return point, self._ray.get(ready[0])
        except Exception as error:  # a node that died, among others
            return point, timed_row(Timing(point.name, error=reason(error)), point.columns())
