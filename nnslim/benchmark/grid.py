"""Benchmark points, measured into one table: all in alternated rounds, or row by row in a grid that can be resumed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

from torch import nn

from nnslim.benchmark.alternated import Progress, Timing, measure_rounds, reason
from nnslim.benchmark.passes import Way, job_of, keep_network, way_columns
from nnslim.benchmark.roofline import measure_roofline
from nnslim.benchmark.timing_figures import save_timing_figures
from nnslim.benchmark.timings import COLUMNS, DENSE, Row, add_dice, compare, number_in, read_timings, timed_row
from nnslim.files import temporary_folder
from nnslim.optional import needed
from nnslim.patching import kept_sigterm
from nnslim.tables import write_table


@dataclass(frozen=True)
class GridPoint:
    """One setting of the grid.

    Attributes:
        way: backend, precision, threads, device, autocast.
        batch_size: patches per pass.
        apply_tucker: False: the dense network; the rank settings then mean nothing.
        rank_factor, rank_min: see `TuckerConfig`. rule: "published" (every layer, as tucker-cnn does) or "nnslim".
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
        """Name of the network, independent of how it is run."""
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


class BenchmarkPoint(Protocol):
    """A row to measure: a network (the same name, the same network), how it is run, and what the table says of it."""

    name: str
    network: str
    way: Way

    def columns(self) -> Row: ...


Build = Callable[[Any], tuple[nn.Module, tuple[int, ...]]]
# Takes points, and gives each with its row as soon as it is measured.
Pool = Callable[[Iterable[GridPoint]], Iterator[tuple[GridPoint, Row]]]


def measure_points(
    points: Sequence[BenchmarkPoint], build: Build, rounds: int, progress: Progress | None = None
) -> tuple[list[Row], list[Timing]]:
    """Build each network once, and time all points in alternated rounds, each in a process of its own.

    Args:
        points: all on one device. build: returns the network of a point and its input, (B, C, *patch).
        rounds: counted passes of each, after one that is not.
        progress: called with (what is built or measured, turns done, turns in all).
    Returns:
        A row and its passes for each point; what fails in its process is the reason in the row.
    """
    names = list(dict.fromkeys(point.network for point in points))
    kept: dict[str, tuple[Path, tuple[int, ...]]] = {}
    with temporary_folder() as directory:
        for point in points:
            if point.network in kept:
                continue
            if progress is not None:
                progress(f"building: {point.network}", len(kept), len(names))
            network, shape = build(point)
            kept[point.network] = directory / f"{len(kept)}.pt", shape
            keep_network(network, kept[point.network][0])
            del network
        jobs = [job_of(point.name, *kept[point.network], point.way) for point in points]
        on_cpu = all(point.way.device == "cpu" for point in points)
        timings = measure_rounds(jobs, rounds, limit_memory=on_cpu, progress=progress)
    rows = [
        timed_row(timing, {**point.columns(), "patch_size": kept[point.network][1][1:]})
        for point, timing in zip(points, timings, strict=True)
    ]
    return rows, timings


def measure_point(
    point: GridPoint, build: Build, rounds: int, end_to_end: Callable[[GridPoint], float | None] | None = None
) -> Row:
    """Return the row of one point of a grid; a failure is the reason in the row.

    Args:
        build, rounds: see `measure_points`.
        end_to_end: returns the seconds of a whole case; None leaves the column empty.
    """
    try:
        ((row,), _) = measure_points([point], build, rounds)
        if end_to_end is not None and row["status"] == "done":
            seconds = end_to_end(point)
            row["end_to_end_s"] = "" if seconds is None else round(seconds, 3)
    except Exception as error:  # one row must not end the others
        return _failed(point, error)
    return row


def _failed(point: GridPoint, error: Exception) -> Row:
    return timed_row(Timing(point.name, error=reason(error)), point.columns())


def run_grid(
    points: Sequence[GridPoint],
    table: Path,
    pool: Pool,
    *,
    retry: bool = False,
    report: Callable[[Row, int, int], None] | None = None,
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
    rows = read_timings(table) if table.exists() else []
    if retry:
        rows = [row for row in rows if row["status"] == "done"]
    there = {row["name"]: row for row in rows}
    names = {point.name for point in points}
    chains: dict[str, list[GridPoint]] = {point.setting: [] for point in points}
    for point in sorted(points, key=lambda point: point.batch_size):
        chains[point.setting].append(point)
    while wave := [point for chain in chains.values() if (point := _next_batch(chain, there)) is not None]:
        for point, row in pool(wave):
            rows.append(row)
            there[point.name] = row
            write_table(rows, table, COLUMNS)
            if report is not None:
                report(row, len(names & set(there)), len(names))
    return rows


def _next_batch(chain: Sequence[GridPoint], there: Mapping[str, Row]) -> GridPoint | None:
    """Return the first point that was not measured; None where there is none, or after one that ran out of memory."""
    for point in chain:
        if point.name not in there:
            return point
        if str(there[point.name].get("reason", "")).startswith("out of memory"):
            return None
    return None


def finish_grid(
    points: Sequence[GridPoint], rows: Sequence[Row], table: Path, dice: Mapping[str, float] | None = None
) -> None:
    """Compare the rows with the dense networks, write the table again, and draw the rows of batch size 1 beside it.

    Args:
        points: the grid. rows: its table, changed in place. dice: see `read_dice`.
    Raises:
        OutputError: a file cannot be written.
    """
    dense = {point.name for point in points if not point.apply_tucker}
    add_dice(rows, dice or {}, dense)
    compare(rows, dense)
    write_table(rows, table, COLUMNS)
    shown = [{**row, "label": _label(row)} for row in rows if str(row["batch_size"]) == "1"]
    threads = max((int(row["threads"]) for row in shown if row.get("threads") not in (None, "")), default=0)
    on_cpu = {row["device"] for row in shown} == {"cpu"}
    roofline = measure_roofline(threads) if on_cpu and threads else None
    save_timing_figures(shown, roofline, lambda kind: table.with_name(f"{table.stem}_{kind}.png"))


def _label(row: Row) -> str:
    return DENSE if row.get("rank_factor") in (None, "") else f"{number_in(row, 'rank_factor'):g}"


def short_names(rows: Sequence[Row]) -> list[Row]:
    """Return the rows with a label that leaves out what has a column of its own."""
    return [{**row, "label": f"{row['name'].partition(', ')[0]}, batch {row['batch_size']}"} for row in rows]


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
        with kept_sigterm():
            ray.init(address=address or "local", log_to_driver=False, logging_level="ERROR", **own)

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
                row = _failed(point, error)
            yield point, row

    return measure
