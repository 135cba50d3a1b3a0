"""Tables of timings: the columns, the comparison with the dense network, and the files."""

from __future__ import annotations

import csv
import io
import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from nnslim._version import __version__
from nnslim.benchmark.alternated import Timing
from nnslim.benchmark.roofline import Roofline
from nnslim.errors import InputError
from nnslim.files import write_bytes, write_json

Row = dict[str, Any]
REPORT = "benchmark.json"

# As the predecessor's benchmark has them, so that its plots read our tables. g_flops: 1e9 MACs of a pass in fvcore's
# convention; m_params: 1e6; exec_time_*: ms.
_PUBLISHED = """
    batch_size device load_params apply_tucker autocast compile eval_passes ckpt_path save_model load_model 3mm
    patch_size nnunet_path rank_mode rank_factor rank_min decompose verbose g_flops m_params exec_time_mean
    exec_time_std device_name
"""
_OWN = """
    name backend precision threads rule macs parameters time_median_ms time_q1_ms time_q3_ms prepare_s end_to_end_s
    peak_memory_mb prepare_memory_mb traffic_mb speedup_stock speedup_openvino mac_reduction merit dice torch nnslim
    status reason
"""
PUBLISHED_COLUMNS = tuple(_PUBLISHED.split())
COLUMNS = (*PUBLISHED_COLUMNS, *_OWN.split())
DENSE = "dense"


def timed_row(timing: Timing, columns: Row) -> Row:
    """Return one line of the table.

    Args:
        timing: of a job of `nnslim.benchmark.passes`. columns: what is known of the setting; facts of the timing win.
    """
    facts = timing.facts
    row: Row = {"verbose": False, "save_model": False, "load_model": False, "ckpt_path": "", **columns}
    row |= {key: facts[key] for key in ("backend", "threads", "device_name", "parameters", "macs") if key in facts}
    if "macs" in facts:
        row |= {
            "g_flops": facts["macs_fvcore"] / 1e9,
            "m_params": facts["parameters"] / 1e6,
            "traffic_mb": round(facts["traffic_bytes"] / 1e6, 3),
        }
    row |= {"eval_passes": len(timing.seconds), "torch": torch.__version__, "nnslim": __version__}
    row |= {"status": "failed" if timing.error else "done", "reason": timing.error}
    if timing.error or not timing.seconds:
        return row
    low, middle, high = quartiles(timing.seconds)
    return row | {
        "exec_time_mean": _ms(statistics.mean(timing.seconds)),
        "exec_time_std": _ms(statistics.pstdev(timing.seconds)),
        "time_median_ms": _ms(middle),
        "time_q1_ms": _ms(low),
        "time_q3_ms": _ms(high),
        "prepare_s": round(timing.prepare_seconds, 3),
        "peak_memory_mb": round(timing.peak_memory / 1e6, 1),
        "prepare_memory_mb": round(timing.prepare_peak / 1e6, 1),
    }


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Return the lower quartile, median and upper quartile, between the values where none lies there."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def _ms(seconds: float) -> float:
    return round(seconds * 1e3, 4)


def compare(rows: Sequence[Row], stock: Row | None = None, openvino: Row | None = None) -> None:
    """Add speed-up, MAC reduction and merit to rows of one run, in place.

    merit = speed-up over the dense network on plain OpenVINO / its MACs over this network's: 1 where time follows MACs.

    Args:
        stock, openvino: the references; rows named "dense" on the backends "stock" and "openvino-plain" if None.
    """
    stock = stock or find(rows, DENSE, "stock")
    openvino = openvino or find(rows, DENSE, "openvino-plain")
    for row in rows:
        if not row.get("time_median_ms"):
            continue
        for key, reference in (("speedup_stock", stock), ("speedup_openvino", openvino)):
            if reference is not None:
                row[key] = round(reference["time_median_ms"] / row["time_median_ms"], 4)
        dense = openvino or stock
        if dense is not None and row.get("macs"):
            row["mac_reduction"] = round(dense["macs"] / row["macs"], 4)
            if openvino is not None:
                row["merit"] = round(row["speedup_openvino"] / row["mac_reduction"], 4)


def find(rows: Sequence[Row], name: str, backend: str) -> Row | None:
    """Return the measured row of that name and backend, or None."""
    found = (row for row in rows if row.get("name") == name and row.get("backend") == backend)
    return next((row for row in found if row.get("time_median_ms")), None)


def write_timings(path: Path, rows: Sequence[Row], columns: Sequence[str] = COLUMNS) -> None:
    """Write a CSV file, whole or not at all; what a row does not know stays empty.

    Raises:
        OutputError: it cannot be written; what was there is as it was.
    """
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns, extrasaction="ignore", restval="")
    writer.writeheader()
    writer.writerows(rows)
    write_bytes(path, text.getvalue().encode())


def read_timings(path: Path, columns: Sequence[str] = COLUMNS) -> list[Row]:
    """Return the rows of a table that `write_table` wrote, as text.

    Raises:
        InputError: it cannot be read, or has other columns.
    """
    try:
        with path.open(newline="", encoding="utf-8") as stream:
            reader = csv.DictReader(stream)
            rows = list(reader)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path} cannot be read as a table: {error}") from error
    if missing := set(columns) - set(reader.fieldnames or ()):
        names = ", ".join(sorted(missing))
        raise InputError(f"{path} is not a table of this benchmark: it lacks {names}; choose another file")
    return rows


def read_dice(path: Path) -> dict[str, float]:
    """Return the Dice of each name from a CSV file with the columns `name` (or `setting`) and `dice`.

    Raises:
        InputError: no such columns, or something that is not a number.
    """
    try:
        with path.open(newline="", encoding="utf-8") as stream:
            return {row.get("name") or row["setting"]: float(row["dice"]) for row in csv.DictReader(stream)}
    except (OSError, UnicodeDecodeError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path} should have the columns 'name' and 'dice' (a number): {error!r}") from error


def write_timing_report(
    path: Path, rows: Sequence[Row], timings: Sequence[Timing], roofline: Roofline | None, more: Row | None = None
) -> None:
    """Write all rows with each single pass, and what they mean, as JSON.

    Raises:
        OutputError: it cannot be written.
    """
    passes = [{"name": timing.name, "seconds": timing.seconds} for timing in timings]
    meaning = {
        "order": "one process per row; the rows pass in turn, round by round",
        "peak_memory_mb": "high-water mark of the process' resident memory over its passes, libraries and weights "
        "included (/proc/self/clear_refs resets it after preparing)",
        "merit": "speed-up over the dense network on plain OpenVINO / reduction of MACs",
    }
    content: Row = {"rows": list(rows), "passes": passes, "meaning": meaning}
    content["roofline"] = None if roofline is None else roofline.to_dict()
    write_json(path, {**content, **(more or {})})


@dataclass(frozen=True)
class Benchmark:
    """A table of timings, read back.

    Attributes:
        name: of its folder or file. rows: see `COLUMNS`; as text where they come from a CSV file.
        profiles: pipeline -> stage -> seconds per case. starts: what -> seconds to start it.
    """

    name: str
    rows: Sequence[Row]
    profiles: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    starts: Mapping[str, float] = field(default_factory=dict)


def read_benchmark(path: Path) -> Benchmark:
    """Read what `nnslim benchmark` wrote.

    Args:
        path: its folder, its benchmark.json, or a CSV file of it or of a grid (without stages).
    Raises:
        InputError: there is nothing of that kind, or it cannot be read.
    """
    if path.suffix == ".csv":
        return Benchmark(path.stem, read_timings(path))
    file = path / REPORT if path.is_dir() else path
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        profiles = {str(name): dict(stages) for name, stages in (content.get("stages") or {}).items()}
        rows = [dict(row) for row in content["rows"]]
        return Benchmark(file.resolve().parent.name, rows, profiles, dict(content.get("starts") or {}))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{file} is not what nnslim benchmark writes: {type(error).__name__}: {error}") from error
