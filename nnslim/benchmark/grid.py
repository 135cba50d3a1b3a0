"""Benchmark points, measured into one table: all in alternated rounds, or row by row in a grid that can be resumed."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from torch import nn

from nnslim.benchmark.alternated import Progress, Timing, measure_rounds, reason
from nnslim.benchmark.grid_point import GridPoint
from nnslim.benchmark.passes import Way, job_of, keep_network
from nnslim.benchmark.pools import Pool
from nnslim.benchmark.roofline import measure_roofline
from nnslim.benchmark.timing_figures import save_timing_figures
from nnslim.benchmark.timings import DENSE, Row, add_dice, compare, number_in, read_timings, timed_row, write_timings


class BenchmarkPoint(Protocol):
    """A row to measure: a network (the same name, the same network), how it is run, and what the table says of it."""

    name: str
    network: str
    way: Way

    def columns(self) -> Row: ...


Build = Callable[[Any], tuple[nn.Module, tuple[int, ...]]]


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
    with tempfile.TemporaryDirectory(prefix="nnslim-") as directory:
        for point in points:
            if point.network in kept:
                continue
            if progress is not None:
                progress(f"building: {point.network}", len(kept), len(names))
            network, shape = build(point)
            kept[point.network] = Path(directory) / f"{len(kept)}.pt", shape
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
        row = timed_row(Timing(point.name, error=reason(error)), point.columns())
    return row


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
            write_timings(table, rows)
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
    write_timings(table, rows)
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
