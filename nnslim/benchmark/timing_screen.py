"""Timings as tables on the screen and in Markdown."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich.table import Table

from nnslim.benchmark.timings import Row
from nnslim.network.cost import Cost

_REASON = "why not"  # too long for a screen
# title, how a row is shown
_Column = tuple[str, Callable[[Row], str]]


def _number(key: str, form: str, scale: float = 1.0) -> Callable[[Row], str]:
    def show(row: Row) -> str:
        value = row.get(key)
        return "" if value in (None, "") else format(float(value) * scale, form)

    return show


def _spread(row: Row) -> str:
    if not row.get("time_median_ms"):
        return "failed" if row.get("status") == "failed" else ""
    return f"{float(row['time_q1_ms']):.4g} to {float(row['time_q3_ms']):.4g}"


_COLUMNS: tuple[_Column, ...] = (
    ("network", lambda row: str(row.get("label") or row.get("name", ""))),
    ("backend", lambda row: str(row.get("backend", ""))),
    ("precision", lambda row: str(row.get("precision", ""))),
    ("threads", lambda row: str(row.get("threads", ""))),
    ("GMAC", _number("macs", ".4g", 1e-9)),
    ("M params", _number("parameters", ".4g", 1e-6)),
    ("ms, median", _number("time_median_ms", ".4g")),
    ("quartiles", _spread),
    ("peak MB", _number("peak_memory_mb", ".0f")),
    ("case, s", _number("end_to_end_s", ".3g")),
    ("x stock", _number("speedup_stock", ".2f")),
    ("x OpenVINO", _number("speedup_openvino", ".2f")),
    ("merit", _number("merit", ".2f")),
    ("Dice", _number("dice", ".4f")),
    (_REASON, lambda row: str(row.get("reason", ""))),
)


def screen_table(rows: Sequence[Row]) -> Table:
    """Return the table for a console; columns that nothing fills are left out."""
    table = Table(box=None, header_style="bold")
    columns = [column for column in _used(rows) if column[0] != _REASON]
    for number, (title, _) in enumerate(columns):
        table.add_column(title, justify="left" if number < 3 else "right", overflow="fold")
    for row in rows:
        table.add_row(*(show(row) for _, show in columns))
    return table


def markdown_table(rows: Sequence[Row]) -> str:
    """Return the same table as Markdown."""
    columns = _used(rows)
    lines = [[title for title, _ in columns], ["---"] * len(columns)]
    lines += [[show(row).replace("|", "/") for _, show in columns] for row in rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _used(rows: Sequence[Row]) -> list[_Column]:
    return [(title, show) for title, show in _COLUMNS if any(show(row) for row in rows)]


def stage_table(profiles: Mapping[str, Mapping[str, float]]) -> Table:
    """Return the seconds of each stage, one pipeline per row, for a console."""
    stages = list(dict.fromkeys(stage for profile in profiles.values() for stage in profile))
    table = Table(box=None, header_style="bold", title="seconds per case, median", title_justify="left")
    for title in ("pipeline", *stages, "sum"):
        table.add_column(title, justify="left" if title == "pipeline" else "right")
    for name, profile in profiles.items():
        cells: list[Any] = [f"{profile.get(stage, 0.0):.3f}" for stage in stages]
        table.add_row(name, *cells, f"{sum(profile.values()):.3f}")
    return table


def cost_table(cost: Cost) -> Table:
    """Return parameters and MACs of each layer of a pass that has any, in order of execution, for a console."""
    table = Table(box=None, header_style="bold")
    for title in ("layer", "output", "parameters", "MACs", "share"):
        table.add_column(title, justify="left" if title in ("layer", "output") else "right")
    total = cost.macs()
    for layer in cost.layers.values():
        if layer.macs:
            shape = "x".join(str(size) for size in layer.output_shape)
            share = f"{layer.macs / total:.1%}"
            table.add_row(layer.name, shape, f"{layer.parameters:,}", f"{layer.macs:,}", share)
    table.add_row("all", "", f"{cost.parameters:,}", f"{total:,}", f"{cost.macs('fvcore') / 1e9:.3f} G as fvcore")
    return table
