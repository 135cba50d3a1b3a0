"""A grid of settings, measured row by row into one table: it can be stopped, gone on with, and spread over machines."""

from __future__ import annotations

import tempfile
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

from torch import nn

from nnslim.errors import BackendError
from nnslim.work.alternate import Timing, measure, reason
from nnslim.work.benchmark import COLUMNS, Row, compare, read_table, timed_row, write_table
from nnslim.work.passes import Way, job_of, keep_network, way_columns

Build = Callable[["Point"], tuple[nn.Module, tuple[int, ...]]]
Report = Callable[[Row, int, int], None]


@dataclass(frozen=True)
class Point:
    """One setting of the grid.

    Attributes:
        way: backend, precision, threads, device, autocast.
        batch_size: patches per pass.
        apply_tucker: False: the dense network; the rank settings then mean nothing.
        rank_factor, rank_min: see `TuckerConfig`. rule: "published" (every layer, as the predecessor did) or "nnslim".
        low_resolution: the 3 mm architecture instead of the 1.5 mm one. decompose: False: random weights.
        patch: voxels; None: the network's own. model: folder of a trained model instead of an untrained architecture.
    """

    way: Way = field(default_factory=Way)
    batch_size: int = 1
    apply_tucker: bool = True
    rank_factor: float = 0.5
    rank_min: int = 8
    rule: str = "nnslim"
    low_resolution: bool = False
    decompose: bool = False
    patch: tuple[int, ...] | None = None
    model: str = ""

    @property
    def network(self) -> str:
        """A name for what is run, whatever it is run on."""
        base = self.model or ("3mm" if self.low_resolution else "1.5mm")
        base += "" if self.patch is None else f" patch {'x'.join(map(str, self.patch))}"
        if not self.apply_tucker:
            return f"{base} dense"
        weights = " decomposed" if self.decompose else ""
        return f"{base} tucker {self.rank_factor:g} min {self.rank_min} {self.rule}{weights}"

    @property
    def setting(self) -> str:
        """All but the batch size."""
        way = self.way
        threads = "" if way.threads is None else f" threads {way.threads}"
        autocast = " autocast" if way.autocast else ""
        return f"{self.network}, {way.backend} {way.precision} {way.device}{threads}{autocast}"

    @property
    def name(self) -> str:
        """Unique in the table: a row of this name is not measured again."""
        return f"{self.setting}, batch {self.batch_size}"

    def columns(self) -> Row:
        """Return what the table says about the setting."""
        values = asdict(self)
        columns = {key: values[key] for key in ("batch_size", "apply_tucker", "decompose")}
        columns |= way_columns(self.way)
        columns |= {"name": self.name, "3mm": self.low_resolution, "nnunet_path": self.model}
        columns |= {"load_params": bool(self.model), "patch_size": self.patch or ""}
        if self.apply_tucker:
            columns |= {"rank_mode": "relative", "rank_factor": self.rank_factor, "rank_min": self.rank_min}
            columns["rule"] = self.rule
        return columns


def measure_point(
    point: Point, build: Build, rounds: int, end_to_end: Callable[[Point], float | None] | None = None
) -> Row:
    """Build the network of a point and time it in a process of its own; whatever fails is the reason in the row.

    Args:
        point: the setting. build: returns its network and (B, C, *patch).
        rounds: counted passes, after one that is not.
        end_to_end: returns the seconds of a whole case; None leaves the column empty.
    """
    columns = point.columns()
    try:
        with tempfile.TemporaryDirectory(prefix="nnslim-") as folder:
            network, shape = build(point)
            columns["patch_size"] = shape[1:]
            keep_network(network, Path(folder) / "network.pt")
            del network
            job = job_of(point.name, Path(folder) / "network.pt", shape, point.way)
            (timing,) = measure([job], rounds, limit_memory=point.way.device == "cpu")
        row = timed_row(timing, columns)
        if end_to_end is not None and not timing.error:
            seconds = end_to_end(point)
            row["end_to_end_s"] = "" if seconds is None else round(seconds, 3)
    except Exception as error:  # one row must not end the others
        row = timed_row(Timing(point.name, error=reason(error)), columns)
    return row


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

        Args:
            work: can be pickled. cpus: that one row keeps for itself. address: of the cluster.
        Raises:
            BackendError: Ray is missing.
        """
        try:
            import ray
        except ImportError as error:
            raise BackendError(
                f"--ray needs Ray ({error}); run pip install nnslim[ray], or go without --ray"
            ) from error
        if not ray.is_initialized():
            ray.init(address=address, log_to_driver=False, logging_level="ERROR", include_dashboard=None)
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


def run_grid(
    points: Sequence[Point], table: Path, pool: Pool, *, retry: bool = False, report: Report | None = None
) -> list[Row]:
    """Measure what the table does not have yet; the table is rewritten whole after every row.

    Of points that differ in batch size alone, smaller batches come first, and none is tried after one that ran out of
    memory.

    Args:
        points: in the order of measuring. table: CSV file, old rows are kept.
        pool: where rows are measured. retry: measure failed rows again.
        report: called after each row with (row, rows done, rows in all).
    Raises:
        InputError: the table is not one of ours. OutputError: it cannot be written.
    """
    rows = read_table(table) if table.exists() else []
    if retry:
        rows = [row for row in rows if row["status"] == "done"]
    there = {row["name"]: row for row in rows}
    chains: dict[str, deque[Point]] = {}
    for point in sorted(points, key=lambda point: point.batch_size):
        chains.setdefault(point.setting, deque()).append(point)
    waiting = deque(dict.fromkeys(point.setting for point in points))
    names, running = {point.name for point in points}, 0
    while waiting or running:
        while waiting and running < pool.capacity:
            chain = chains[waiting.popleft()]
            while chain and chain[0].name in there and not _full(there[chain[0].name]):
                chain.popleft()
            if chain and chain[0].name not in there:
                pool.submit(chain[0])
                running += 1
        if not running:
            break
        point, row = pool.wait()
        running -= 1
        rows.append(row)
        there[point.name] = row
        write_table(table, rows, COLUMNS)
        waiting.append(point.setting)
        if report is not None:
            report(row, len(names & set(there)), len(names))
    return rows


def _full(row: Row) -> bool:
    return str(row.get("reason", "")).startswith("out of memory")


def compare_grid(points: Sequence[Point], rows: Sequence[Row]) -> None:
    """Add speed-up and merit to the rows, in place: against the dense rows of the same architecture and batch size."""
    measured = {row["name"]: _numbers(row) for row in rows}
    for point in points:
        row = measured.get(point.name)
        if row is None or not row.get("time_median_ms"):
            continue
        compare([row], *(_reference(point, backend, points, measured) for backend in ("stock", "openvino-plain")))
    for row in rows:
        row.update(measured[row["name"]])


def _reference(point: Point, backend: str, points: Sequence[Point], measured: dict[str, Row]) -> Row | None:
    """Return the dense float32 row with the same input, device and threads."""

    def alike(other: Point) -> tuple[Any, ...]:
        way = other.way
        return other.batch_size, other.low_resolution, other.patch, other.model, way.device, way.threads

    for other in points:
        plain = not other.apply_tucker and other.way.backend == backend and not other.way.autocast
        row = measured.get(other.name)
        if plain and alike(other) == alike(point) and row is not None and row.get("time_median_ms"):
            return row
    return None


def _numbers(row: Row) -> Row:
    """Return the row with the numbers that `compare` reads as numbers; rows from a file are text."""
    made = dict(row)
    for key in ("time_median_ms", "macs"):
        if isinstance(made.get(key), str):
            made[key] = float(made[key]) if made[key] else None
    return made
