"""Where the rows of a benchmark grid are measured: here, one after the other, or on the nodes of a Ray cluster."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from nnslim.benchmark.alternated import Timing, reason
from nnslim.benchmark.grid_point import GridPoint
from nnslim.benchmark.timings import Row, timed_row
from nnslim.optional import needed

# Takes points, and gives each with its row as soon as it is measured.
Pool = Callable[[Iterable[GridPoint]], Iterator[tuple[GridPoint, Row]]]


def here_pool(work: Callable[[GridPoint], Row]) -> Pool:
    """Return a pool that measures one row at a time on this machine."""
    return lambda points: ((point, work(point)) for point in points)


def ray_pool(work: Callable[[GridPoint], Row], cpus: int, address: str | None = None) -> Pool:
    """Return a pool with one Ray task per row, so that rows spread over a cluster and none shares its processors.

    Connects to the cluster, or starts one here. Ray gives its workers a low priority; in a cluster started here they
    keep ours, because their passes are timed.

    Args:
        work: can be pickled, and what it needs can be imported on the nodes. cpus: processors reserved for each row.
        address: a running cluster.
    Raises:
        BackendError: Ray is missing.
    """
    ray = needed("ray", "nnslim[ray]", purpose="--ray")
    if not ray.is_initialized():
        own = {} if address else {"include_dashboard": False, "_system_config": {"worker_niceness": 0}}
        ray.init(address=address, log_to_driver=False, logging_level="ERROR", **own)

    @ray.remote(num_cpus=cpus, max_retries=0)
    def task(point: GridPoint) -> Row:  # Ray takes plain functions only
        return work(point)

    def measure(points: Iterable[GridPoint]) -> Iterator[tuple[GridPoint, Row]]:
        running = {task.remote(point): point for point in points}
        while running:
            (ready,), _ = ray.wait(list(running), num_returns=1)
            point = running.pop(ready)
            try:
                row = ray.get(ready)
            except Exception as error:  # a node that died, among others
                row = timed_row(Timing(point.name, error=reason(error)), point.columns())
            yield point, row

    return measure
