"""Tables of timings: columns, the comparison with the dense network, files, and the same on the screen."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import torch
from rich.table import Table

from nnslim._version import __version__
from nnslim.benchmark.alternated import Timing
from nnslim.benchmark.roofline import Roofline
from nnslim.errors import InputError
from nnslim.files import write_json
from nnslim.network.cost import Cost
from nnslim.tables import markdown, read_table

Row = dict[str, Any]
REPORT = "benchmark.json"

# As tucker-cnn's benchmark has them, so that its plots read our tables. g_flops: 1e9 MACs of a pass in fvcore's
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
        timing: result of a job of `nnslim.benchmark.passes`. columns: what the setting says; measured facts win.
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
    milliseconds = np.array(timing.seconds) * 1e3
    times = dict(zip(("q1", "median", "q3"), quartiles(milliseconds), strict=True))
    return row | {
        "exec_time_mean": round(float(milliseconds.mean()), 4),
        "exec_time_std": round(float(milliseconds.std()), 4),
        **{f"time_{key}_ms": round(value, 4) for key, value in times.items()},
        "prepare_s": round(timing.prepare_seconds, 3),
        "peak_memory_mb": round(timing.peak_memory / 1e6, 1),
        "prepare_memory_mb": round(timing.prepare_peak / 1e6, 1),
    }


def quartiles(values: Sequence[float] | np.ndarray) -> tuple[float, ...]:
    """Return the lower quartile, median and upper quartile, interpolated between the values."""
    return tuple(np.quantile(values, (0.25, 0.5, 0.75)).tolist())


def number_in(row: Row, key: str) -> float:
    """Return a cell as a number, NaN where it is empty; rows may come from a CSV file."""
    value = row.get(key)
    return math.nan if value in (None, "") else float(value)


def compare(rows: Sequence[Row], dense: Container[str] = (DENSE,)) -> None:
    """Add speed-up, MAC reduction and merit to the measured rows, in place.

    The references are the dense network by stock nnU-Net and by plain OpenVINO, in float32, with the same input,
    device and threads; without autocast where both were measured.
    merit = speed-up over the dense network on plain OpenVINO / its MACs over this network's: 1 where time follows MACs.

    Args:
        dense: names of the rows of dense networks.
    """
    timed = [row for row in rows if number_in(row, "time_median_ms") > 0]
    references: dict[tuple[str, ...], Row] = {}
    for row in sorted(timed, key=lambda row: str(row.get("autocast")) == "True"):
        if row.get("name") in dense and row.get("precision") in (None, "", "f32"):
            references.setdefault((str(row.get("backend")), *_alike(row)), row)
    for row in timed:
        stock, openvino = (references.get((backend, *_alike(row))) for backend in ("stock", "openvino-plain"))
        for key, reference in (("speedup_stock", stock), ("speedup_openvino", openvino)):
            if reference is not None:
                row[key] = round(number_in(reference, "time_median_ms") / number_in(row, "time_median_ms"), 4)
        reference = openvino or stock
        if reference is not None and row.get("macs"):
            row["mac_reduction"] = round(number_in(reference, "macs") / number_in(row, "macs"), 4)
            if openvino is not None:
                row["merit"] = round(row["speedup_openvino"] / row["mac_reduction"], 4)


def _alike(row: Row) -> tuple[str, ...]:
    return tuple(
        str(row.get(key, "")) for key in ("batch_size", "3mm", "patch_size", "nnunet_path", "device", "threads")
    )


def read_timings(path: Path) -> list[Row]:
    """Return the rows of a table of timings, as text.

    Raises:
        InputError: it cannot be read, or has other columns.
    """
    return read_table(path, COLUMNS).to_dict("records")


def read_dice(path: Path) -> dict[str, float]:
    """Return the Dice of each name from a CSV file with the columns `name` (or `setting`) and `dice`.

    Raises:
        InputError: no such columns, or something that is not a number.
    """
    frame = read_table(path, ["dice"])
    names = frame.get("name", frame.get("setting"))
    values = pandas.to_numeric(frame["dice"], errors="coerce")
    if names is None or values.isna().any():
        raise InputError(f"{path} should have the columns 'name' (or 'setting') and 'dice', a number in each row")
    return dict(zip(names, values.tolist(), strict=True))


def add_dice(rows: Sequence[Row], known: Mapping[str, float], dense: Container[str] = (DENSE,)) -> None:
    """Add Dice to rows, in place: by the row's name, else by its setting: "dense", or "rank_factor=0.3".

    Args:
        known: see `read_dice`. dense: names of the rows of dense networks.
    """
    for row in rows:
        setting = DENSE if row["name"] in dense else f"rank_factor={number_in(row, 'rank_factor'):g}"
        if (dice := known.get(row["name"], known.get(setting))) is not None:
            row["dice"] = dice


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
    content["roofline"] = None if roofline is None else asdict(roofline)
    write_json(path, {**content, **(more or {})})


@dataclass(frozen=True)
class Benchmark:
    """A table of timings, read back.

    Attributes:
        name: its directory or file. rows: see `COLUMNS`; as text where they come from a CSV file.
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


def stage_names(profiles: Mapping[str, Mapping[str, float]]) -> list[str]:
    """Return the names of all stages, in order."""
    return list(dict.fromkeys(stage for profile in profiles.values() for stage in profile))


def way_of(row: Row) -> str:
    """Return backend and precision of a row: "openvino f32"."""
    return f"{str(row.get('backend', '')).partition(':')[0]} {row.get('precision') or 'f32'}"


def label_of(row: Row) -> str:
    """Return what a row is called: its label, else its name."""
    return str(row.get("label") or row.get("name", ""))


_REASON = "why not"  # too long for a screen


def _number(key: str, form: str, scale: float = 1.0) -> Callable[[Row], str]:
    return lambda row: "" if row.get(key) in (None, "") else format(number_in(row, key) * scale, form)


def _spread(row: Row) -> str:
    if row.get("time_median_ms"):
        return f"{number_in(row, 'time_q1_ms'):.4g} to {number_in(row, 'time_q3_ms'):.4g}"
    return "failed" if row.get("status") == "failed" else ""


_COLUMNS: dict[str, Callable[[Row], str]] = {
    "network": label_of,
    "backend": lambda row: str(row.get("backend", "")),
    "precision": lambda row: str(row.get("precision", "")),
    "threads": lambda row: str(row.get("threads", "")),
    "GMAC": _number("macs", ".4g", 1e-9),
    "M params": _number("parameters", ".4g", 1e-6),
    "ms, median": _number("time_median_ms", ".4g"),
    "quartiles": _spread,
    "peak MB": _number("peak_memory_mb", ".0f"),
    "case, s": _number("end_to_end_s", ".3g"),
    "x stock": _number("speedup_stock", ".2f"),
    "x OpenVINO": _number("speedup_openvino", ".2f"),
    "merit": _number("merit", ".2f"),
    "Dice": _number("dice", ".4f"),
    _REASON: lambda row: str(row.get("reason", "")),
}


def _used(rows: Sequence[Row]) -> dict[str, list[str]]:
    """Return title -> cells of the columns that a row fills."""
    cells = {title: [show(row) for row in rows] for title, show in _COLUMNS.items()}
    return {title: column for title, column in cells.items() if any(column)}


def screen_table(rows: Sequence[Row]) -> Table:
    """Return the table for a console; columns that nothing fills are left out."""
    columns = {title: column for title, column in _used(rows).items() if title != _REASON}
    return _console(list(columns), zip(*columns.values(), strict=True), left=3)


def markdown_table(rows: Sequence[Row]) -> str:
    """Return the same table as Markdown."""
    columns = _used(rows)
    return markdown(dict(zip(columns, line, strict=True)) for line in zip(*columns.values(), strict=True))


def stage_table(profiles: Mapping[str, Mapping[str, float]]) -> Table:
    """Return the seconds of each stage, one pipeline per row, for a console."""
    stages = stage_names(profiles)
    lines = [
        (name, *(f"{profile.get(stage, 0.0):.3f}" for stage in stages), f"{sum(profile.values()):.3f}")
        for name, profile in profiles.items()
    ]
    return _console(["pipeline", *stages, "sum"], lines, title="seconds per case, median")


def cost_table(cost: Cost) -> Table:
    """Return parameters and MACs of each layer of a pass that has any, in order of execution, for a console."""
    total = cost.macs()
    lines = []
    for layer in (layer for layer in cost.layers.values() if layer.macs):
        shape = "x".join(map(str, layer.output_shape))
        lines.append((layer.name, shape, f"{layer.parameters:,}", f"{layer.macs:,}", f"{layer.macs / total:.1%}"))
    lines.append(("all", "", f"{cost.parameters:,}", f"{total:,}", f"{cost.macs('fvcore') / 1e9:.3f} G as fvcore"))
    return _console(["layer", "output", "parameters", "MACs", "share"], lines, left=2)


def _console(
    titles: Sequence[str], lines: Iterable[Sequence[str]], *, left: int = 1, title: str | None = None
) -> Table:
    """Return a table without lines; the first `left` columns are text, the others numbers."""
    table = Table(box=None, header_style="bold", title=title, title_justify="left")
    for number, head in enumerate(titles):
        table.add_column(head, justify="left" if number < left else "right", overflow="fold")
    for line in lines:
        table.add_row(*line)
    return table
