"""Pictures of timings: time against MACs under the machine's limits, Dice against time, and stages of the pipeline."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nnslim.benchmark.roofline import Roofline
from nnslim.benchmark.timings import Row
from nnslim.figures import new_figure, own_style
from nnslim.files import write_bytes

_COLOURS = ("#00b7eb", "#ff9f1c", "#123a4a", "#7b5ea7", "#2a9d5c", "#d1495b", "#8d6b46", "#8a8a8a")
_STAGE_COLOURS = ("#9ecae1", "#4292c6", "#ff9f1c", "#ffd08a", "#7b5ea7", "#c3b1e1", "#8a8a8a")


@own_style
def time_figure(rows: Sequence[Row], roofline: Roofline | None, path: Path, *, title: str = "") -> bool:
    """Draw the time of a pass against its MACs, both on logarithmic axes, one colour per backend.

    The line is the machine's speed in matrix products, which direct convolutions cannot beat. A stroke below a network
    is the time that its tensors need if each convolution reads its input and writes its output once: whoever is faster
    keeps tensors out of memory.

    Args:
        rows: with name, backend, precision, macs, time_median_ms; those without a time are left out.
        roofline: None where none was measured.
        path: PNG to write. title: line above.
    Returns:
        Whether there was something to draw.
    Raises:
        OutputError: it cannot be written.
    """
    rows = [row for row in rows if _number(row, "time_median_ms") and _number(row, "macs")]
    if not rows:
        return False
    figure = new_figure((11.5, 6))
    axes = figure.add_subplot()
    macs = np.array([_number(row, "macs") for row in rows]) / 1e9
    times = np.array([_number(row, "time_median_ms") for row in rows]) / 1e3
    axes.set_xscale("log")
    axes.set_yscale("log")
    for colour, (way, chosen) in zip(_cycle(), _by_way(rows).items(), strict=False):
        order = sorted(chosen, key=lambda n: macs[n])
        axes.plot(macs[order], times[order], "o-", color=colour, label=way, markersize=5, linewidth=1.2)
        low, high = (np.array([_number(rows[n], key) or 0 for n in order]) / 1e3 for key in _QUARTILES)
        axes.vlines(macs[order], low, high, color=colour, linewidth=3, alpha=0.35)
    if roofline is not None:
        _limits(axes, rows, macs, roofline)
    _name_networks(axes, rows, macs, times)
    axes.set_xlabel("GMAC per pass")
    axes.set_ylabel("seconds per pass (median; quartiles as strokes)")
    axes.grid(which="both", color="0.92")
    axes.set_axisbelow(True)
    axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)
    axes.set_title(title, fontsize=10)
    _save(figure, path)
    return True


_QUARTILES = ("time_q1_ms", "time_q3_ms")


def _limits(axes: Any, rows: Sequence[Row], macs: np.ndarray, roofline: Roofline) -> None:
    ends = np.array([macs.min() / 1.6, macs.max() * 1.6])
    label = f"{roofline.gflops:.0f} GFLOP/s matrix product, {roofline.threads} thread(s)"
    axes.plot(ends, [roofline.compute_seconds(end * 1e9) for end in ends], "--", color="0.35", label=label)
    label = f"tensors once at {roofline.copy_gbs:.1f} GB/s"
    for macs_of, moved in {(x, _number(row, "traffic_mb")) for x, row in zip(macs, rows, strict=True)}:
        if moved:
            seconds = roofline.traffic_seconds(moved * 1e6)
            axes.hlines(seconds, macs_of / 1.12, macs_of * 1.12, color="0.35", linewidth=2, label=label)
            label = "_" + label.lstrip("_")  # one entry in the legend


def _name_networks(axes: Any, rows: Sequence[Row], macs: np.ndarray, times: np.ndarray) -> None:
    highest: dict[tuple[str, float], float] = {}
    for row, x, y in zip(rows, macs, times, strict=True):
        key = (str(row.get("label") or row.get("name", "")), float(x))
        highest[key] = max(y, highest.get(key, 0.0))
    for (name, x), y in highest.items():
        axes.annotate(name, (x, y), xytext=(0, 7), textcoords="offset points", ha="center", fontsize=8)


@own_style
def dice_figure(rows: Sequence[Row], path: Path, *, title: str = "") -> bool:
    """Draw Dice against time; what nothing else beats in both is joined by a line. Same arguments as `time_figure`."""
    rows = [row for row in rows if _number(row, "dice") is not None and _number(row, "time_median_ms")]
    if not rows:
        return False
    figure = new_figure((8, 5.5))
    axes = figure.add_subplot()
    points = [(_number(row, "time_median_ms") / 1e3, _number(row, "dice")) for row in rows]
    for colour, (way, chosen) in zip(_cycle(), _by_way(rows).items(), strict=False):
        axes.scatter(*zip(*(points[n] for n in chosen), strict=True), color=colour, label=way, zorder=3)
    best = pareto(points)
    axes.plot(*zip(*(points[n] for n in best), strict=True), color="0.5", linewidth=1, zorder=2)
    for n in best:
        name = str(rows[n].get("label") or rows[n].get("name", ""))
        axes.annotate(name, points[n], xytext=(5, -11), textcoords="offset points", fontsize=8)
    axes.set_xscale("log")
    axes.set_xlabel("seconds per pass")
    axes.set_ylabel("Dice")
    axes.grid(color="0.92")
    axes.set_axisbelow(True)
    axes.legend(fontsize=8)
    axes.set_title(title, fontsize=10)
    _save(figure, path)
    return True


def pareto(points: Sequence[tuple[float, float]]) -> list[int]:
    """Return the numbers of the points (time, quality) that no other beats in both, by increasing time."""
    best: list[int] = []
    for n in sorted(range(len(points)), key=lambda n: (points[n][0], -points[n][1])):
        if not best or points[n][1] > points[best[-1]][1]:
            best.append(n)
    return best


@own_style
def stage_figure(profiles: Mapping[str, Mapping[str, float]], path: Path, *, title: str = "") -> bool:
    """Draw one bar per pipeline, made of the seconds of its stages.

    Args:
        profiles: name -> stage -> seconds per case. path: PNG to write. title: line above.
    Returns:
        Whether there was something to draw.
    Raises:
        OutputError: it cannot be written.
    """
    if not profiles:
        return False
    stages = list(dict.fromkeys(stage for profile in profiles.values() for stage in profile))
    figure = new_figure((9.5, 1.8 + 0.55 * len(profiles)))
    axes = figure.add_subplot()
    left = np.zeros(len(profiles))
    for number, stage in enumerate(stages):
        seconds = np.array([profile.get(stage, 0.0) for profile in profiles.values()])
        colour = _STAGE_COLOURS[number % len(_STAGE_COLOURS)]
        axes.barh(range(len(profiles)), seconds, left=left, color=colour, label=stage)
        left += seconds
    for row, total in enumerate(left):
        axes.text(total, row, f" {total:.3g} s", va="center", fontsize=8)
    axes.set_yticks(range(len(profiles)), list(profiles))
    axes.invert_yaxis()
    axes.set_xlim(0, left.max() * 1.12)
    axes.set_xlabel("seconds per case (median)")
    axes.legend(ncols=len(stages), fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False)
    figure.suptitle(title, fontsize=10)
    _save(figure, path)
    return True


def _by_way(rows: Sequence[Row]) -> dict[str, list[int]]:
    groups: dict[str, list[int]] = {}
    for number, row in enumerate(rows):
        precision = "" if row.get("precision") in (None, "", "f32") else f" {row['precision']}"
        groups.setdefault(f"{row.get('backend', '')}{precision}", []).append(number)
    return groups


def _cycle() -> list[str]:
    return list(_COLOURS) * 4


def _number(row: Row, key: str) -> float | None:
    """Return a cell as a number; rows may come from a CSV file."""
    value = row.get(key)
    return None if value in (None, "") else float(value)


def _save(figure: Any, path: Path) -> None:
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=110)
    write_bytes(path, picture.getvalue())
