"""Figures of timings: time against MACs under the machine's limits, quality against cost, stages of the pipeline."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nnslim.benchmark.roofline import Roofline
from nnslim.benchmark.timings import Row, label_of, number_in, stage_names, way_of
from nnslim.figures import new_figure, own_style, save_figure

SERIES = ("#0a7ea4", "#c25e00", "#6d4fb3", "#1d7a46", "#b8268f", "#8a6d1a", "#b3261e", "#66717b")
_CORNERS = ((6, 5), (6, -11), (-13, 5), (-13, -11))  # points from a dot to its mark


def save_timing_figures(
    rows: Sequence[Row],
    roofline: Roofline | None,
    path_of: Callable[[str], Path],
    profiles: Mapping[str, Mapping[str, float]] | None = None,
    title: str = "",
) -> None:
    """Write what can be drawn as PNG files.

    Args:
        rows: see `time_figure`; profiles: see `stage_figure`.
        path_of: returns the file for "time", "dice" and "stages".
    Raises:
        OutputError: a file cannot be written.
    """
    figures = {"time": time_figure(rows, roofline), "dice": dice_figure(rows), "stages": stage_figure(profiles or {})}
    for kind, figure in figures.items():
        if figure is not None:
            figure.suptitle(title, fontsize=10)
            save_figure(figure, path_of(kind))


@own_style
def time_figure(rows: Sequence[Row], roofline: Roofline | None) -> Any:
    """Draw the time of a pass against its MACs, both on logarithmic axes, one colour per backend.

    The line is the machine's speed in matrix products, which direct convolutions cannot beat. A stroke below a network
    is the time that its tensors need if each convolution reads its input and writes its output once: a faster pass
    keeps tensors out of memory.

    Args:
        rows: with name (or label), backend, precision, macs, time_median_ms; those without a time are left out.
        roofline: None where none was measured.
    Returns:
        The figure, or None where there is nothing to draw.
    """
    rows = [row for row in rows if number_in(row, "time_median_ms") > 0 and number_in(row, "macs") > 0]
    if not rows:
        return None
    figure = new_figure((11.5, 6))
    axes = figure.add_subplot(xscale="log", yscale="log")
    macs = np.array([number_in(row, "macs") for row in rows]) / 1e9
    low, times, high = (
        np.array([number_in(row, f"time_{key}_ms") for row in rows]) / 1e3 for key in ("q1", "median", "q3")
    )
    ways = [way_of(row) for row in rows]
    for number, way in enumerate(dict.fromkeys(ways)):
        order = sorted((n for n, one in enumerate(ways) if one == way), key=lambda n: macs[n])
        colour = SERIES[number % len(SERIES)]
        axes.plot(macs[order], times[order], "o-", color=colour, label=way, markersize=5, linewidth=1.2)
        axes.vlines(macs[order], low[order], high[order], color=colour, linewidth=3, alpha=0.35)
    if roofline is not None:
        _draw_limits(axes, rows, macs, roofline)
    highest: dict[tuple[str, float], float] = {}
    for row, x, y in zip(rows, macs, times, strict=True):
        highest[label_of(row), x] = max(y, highest.get((label_of(row), x), 0.0))
    for (name, x), y in highest.items():
        axes.annotate(name, (x, y), xytext=(0, 7), textcoords="offset points", ha="center", fontsize=8)
    axes.set(xlabel="GMAC per pass", ylabel="seconds per pass (median; quartiles as strokes)", axisbelow=True)
    axes.grid(which="both", color="0.92")
    axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)
    return figure


def _draw_limits(axes: Any, rows: Sequence[Row], macs: np.ndarray, roofline: Roofline) -> None:
    ends = np.array([macs.min() / 1.6, macs.max() * 1.6])
    label = f"{roofline.gflops:.0f} GFLOP/s matrix product, {roofline.threads} thread(s)"
    axes.plot(ends, [roofline.compute_seconds(end * 1e9) for end in ends], "--", color="0.35", label=label)
    label = f"tensors once at {roofline.copy_gbs:.1f} GB/s"
    for macs_of, moved in {(x, number_in(row, "traffic_mb")) for x, row in zip(macs, rows, strict=True)}:
        if moved > 0:
            seconds = roofline.traffic_seconds(moved * 1e6)
            axes.hlines(seconds, macs_of / 1.12, macs_of * 1.12, color="0.35", linewidth=2, label=label)
            label = "_" + label.lstrip("_")  # one entry in the legend


@dataclass(frozen=True)
class QualityPoint:
    """A point of a `quality_figure`.

    Attributes:
        name: the network. series: what its colour stands for. cost: lower is better. quality: higher is better.
        dense: drawn hollow. mark: text beside it.
    """

    name: str
    series: str
    cost: float
    quality: float
    dense: bool = False
    mark: str = ""


@own_style
def quality_figure(points: Sequence[QualityPoint], cost_title: str, quality_title: str = "Dice") -> Any:
    """Draw quality against cost, on a logarithmic axis; a dashed line joins the points that no other beats in both."""
    from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

    figure = new_figure((8, 4.6))
    axes = figure.add_subplot(xscale="log")
    for number, series in enumerate(dict.fromkeys(point.series for point in points)):
        colour, label = SERIES[number % len(SERIES)], series
        for filled in (True, False):
            chosen = [point for point in points if point.series == series and point.dense != filled]
            places = [[point.cost for point in chosen], [point.quality for point in chosen]]
            face = colour if filled else "#ffffff"
            if chosen:
                axes.plot(*places, "o", color=colour, markerfacecolor=face, markersize=7, label=label, zorder=3)
                label = f"_{series}"  # one entry in the legend
    best = [points[n] for n in pareto([(point.cost, point.quality) for point in points])]
    places = [[point.cost for point in best], [point.quality for point in best]]
    axes.plot(*places, "--", color="0.5", linewidth=1, zorder=2, label="_front")
    for number, point in enumerate(points):
        corner = _CORNERS[number % len(_CORNERS)]
        axes.annotate(point.mark, (point.cost, point.quality), xytext=corner, textcoords="offset points", fontsize=9)
    axes.set(xlabel=cost_title, ylabel=quality_title, axisbelow=True)
    low, high = axes.get_xlim()
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)) if high > 5 * low else MaxNLocator(5))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.grid(color="0.5", alpha=0.25)
    axes.legend(fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=4, frameon=False)
    return figure


def dice_figure(rows: Sequence[Row]) -> Any:
    """Draw Dice against time. Rows and result as for `time_figure`; rows without a Dice are left out."""
    rows = [row for row in rows if number_in(row, "dice") >= 0 and number_in(row, "time_median_ms") > 0]
    places = [(number_in(row, "time_median_ms") / 1e3, number_in(row, "dice")) for row in rows]
    best = pareto(places)
    points = [
        QualityPoint(label_of(row), way_of(row), *place, mark=label_of(row) if n in best else "")
        for n, (row, place) in enumerate(zip(rows, places, strict=True))
    ]
    return quality_figure(points, "seconds per pass") if points else None


def pareto(points: Sequence[tuple[float, float]]) -> list[int]:
    """Return the numbers of the points (cost, quality) that no other beats in both, by increasing cost."""
    best: list[int] = []
    for n in sorted(range(len(points)), key=lambda n: (points[n][0], -points[n][1])):
        if not best or points[n][1] > points[best[-1]][1]:
            best.append(n)
    return best


@own_style
def stage_figure(profiles: Mapping[str, Mapping[str, float]]) -> Any:
    """Draw one bar per pipeline, made of the seconds of its stages.

    Args:
        profiles: name -> stage -> seconds per case.
    Returns:
        The figure, or None where there is nothing to draw.
    """
    totals = [sum(profile.values()) for profile in profiles.values()]
    if not any(totals):
        return None
    figure = new_figure((8, 1.4 + 0.5 * len(profiles)))
    axes = figure.add_subplot()
    left = np.zeros(len(profiles))
    for number, stage in enumerate(stage_names(profiles)):
        seconds = np.array([profile.get(stage, 0.0) for profile in profiles.values()])
        axes.barh(range(len(profiles)), seconds, left=left, color=SERIES[number % len(SERIES)], label=stage)
        left += seconds
    for row, total in enumerate(totals):
        axes.text(total, row, f" {total:.3g} s", va="center", fontsize=8)
    axes.set_yticks(range(len(profiles)), list(profiles), fontsize=8)
    axes.invert_yaxis()
    axes.set(xlim=(0, max(totals) * 1.12), xlabel="seconds per case (median)")
    axes.legend(ncols=6, fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False)
    return figure
