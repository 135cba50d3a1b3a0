"""Timings as tables on the screen and in Markdown."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from rich.table import Table

from nnslim.benchmark.timing_figures import stage_names
from nnslim.benchmark.timings import Row, number_in
from nnslim.network.cost import Cost

_REASON = "why not"  # too long for a screen


def _number(key: str, form: str, scale: float = 1.0) -> Callable[[Row], str]:
    return lambda row: "" if row.get(key) in (None, "") else format(number_in(row, key) * scale, form)


def _spread(row: Row) -> str:
    if row.get("time_median_ms"):
        return f"{number_in(row, 'time_q1_ms'):.4g} to {number_in(row, 'time_q3_ms'):.4g}"
    return "failed" if row.get("status") == "failed" else ""


_COLUMNS: dict[str, Callable[[Row], str]] = {
    "network": lambda row: str(row.get("label") or row.get("name", "")),
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
    lines = [list(columns), ["---"] * len(columns), *zip(*columns.values(), strict=True)]
    return "".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |\n" for line in lines)


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
