"""A grid of settings, measured row by row into one table: it can be stopped, gone on with, and spread over machines."""

from __future__ import annotations

import tempfile
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from nnslim.benchmark.alternated import Timing, measure_rounds, reason
from nnslim.benchmark.grid_point import Point
from nnslim.benchmark.passes import job_of, keep_network
from nnslim.benchmark.pools import Pool
from nnslim.benchmark.roofline import measure_roofline
from nnslim.benchmark.timing_figures import dice_figure, time_figure
from nnslim.benchmark.timings import COLUMNS, DENSE, Row, compare, read_dice, read_timings, timed_row, write_timings

Build = Callable[["Point"], tuple[nn.Module, tuple[int, ...]]]
Report = Callable[[Row, int, int], None]


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
            (timing,) = measure_rounds([job], rounds, limit_memory=point.way.device == "cpu")
        row = timed_row(timing, columns)
        if end_to_end is not None and not timing.error:
            seconds = end_to_end(point)
            row["end_to_end_s"] = "" if seconds is None else round(seconds, 3)
    except Exception as error:  # one row must not end the others
        row = timed_row(Timing(point.name, error=reason(error)), columns)
    return row


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
    rows = read_timings(table) if table.exists() else []
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
        write_timings(table, rows, COLUMNS)
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
    for key, kind in (("time_median_ms", float), ("macs", int)):
        if isinstance(made.get(key), str):
            made[key] = kind(made[key]) if made[key] else None
    return made


def add_dice(rows: Sequence[Row], table: Path | None) -> None:
    """Add Dice from a CSV file to rows, in place: by the row's name, or by a setting `rank_factor=0.3`.

    Raises:
        InputError: it cannot be read as such.
    """
    known = {} if table is None else read_dice(table)
    for row in rows:
        factor = row.get("rank_factor")
        setting = DENSE if factor in (None, "") else f"rank_factor={float(factor):g}"
        for key in (row["name"], setting):
            if key in known:
                row["dice"] = known[key]
                break


def draw_grid(rows: Sequence[Row], table: Path) -> None:
    """Draw time against MACs, and Dice against time where there is one, beside the table; one pass per batch of one.

    Raises:
        OutputError: one cannot be written.
    """
    shown = [{**row, "label": _label(row)} for row in rows if str(row["batch_size"]) == "1"]
    on_cpu = {row["device"] for row in shown} == {"cpu"}
    counts = [int(row["threads"]) for row in shown if row.get("threads") not in (None, "")]
    roofline = measure_roofline(max(counts)) if on_cpu and counts else None
    time_figure(shown, roofline, table.with_name(f"{table.stem}_time.png"))
    dice_figure(shown, table.with_name(f"{table.stem}_dice.png"))


def _label(row: Row) -> str:
    factor = row.get("rank_factor")
    return DENSE if factor in (None, "") else f"{float(factor):g}"


def short_names(rows: Sequence[Row]) -> list[Row]:
    """Return the rows with a label that leaves out what has a column of its own."""
    return [{**row, "label": f"{row['name'].partition(', ')[0]}, batch {row['batch_size']}"} for row in rows]
