"""Geometry of the report's figures. Positions are percent of the plot, so that a figure fits any width of the page."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from nnslim.benchmark.timing_figures import pareto
from nnslim.methods.base import Decision

SERIES = 8  # colours that the style sheet has
_CORNERS = ((8, -7), (8, 16), (-15, -7), (-15, 16))  # pixels from a point to its number
_NEAR = 6.0  # percent of the plot
View = dict[str, Any]


@dataclass(frozen=True)
class Axis:
    """A linear or logarithmic axis.

    Attributes:
        low, high: ends. log: whether it is logarithmic.
    """

    low: float
    high: float
    log: bool = False

    @classmethod
    def around(cls, values: Sequence[float], *, log: bool = False, upper: float | None = None) -> Axis:
        """Return an axis that shows all values with some air.

        Args:
            values: at least one, finite; positive where `log`.
            upper: the values cannot be above this, so the axis need not go much beyond.
        """
        low, high = min(values), max(values)
        if log:
            air = max((high / low) ** 0.08, 1.15)
            return cls(low / air, high * air, True)
        air = max((high - low) * 0.12, abs(high) * 0.004, 1e-9)
        return cls(low - air, high + air if upper is None else min(high + air, upper + air / 4))

    def at(self, value: float) -> float:
        """Return the position of a value, percent from the low end."""
        low, high, value = (math.log(v) for v in (self.low, self.high, value)) if self.log else (*self.ends, value)
        return round(100 * (value - low) / (high - low), 3)

    @property
    def ends(self) -> tuple[float, float]:
        """(low, high)."""
        return self.low, self.high

    def ticks(self, most: int = 5) -> list[View]:
        """Return round values within the axis with their position and text."""
        from matplotlib.ticker import LogLocator, MaxNLocator

        values = MaxNLocator(most).tick_values(*self.ends)
        if self.log:
            for steps in ((1.0,), (1.0, 3.0), (1.0, 2.0, 5.0), tuple(range(1, 10))):
                values = LogLocator(subs=steps).tick_values(*self.ends)
                if sum(self.low <= value <= self.high for value in values) >= 3:
                    break
        inside = [float(value) for value in values if self.low <= value <= self.high]
        return [{"at": self.at(value), "text": f"{value:.4g}"} for value in inside]


@dataclass(frozen=True)
class Point:
    """A point of a scatter plot: name, way (its colour stands for it), x and y; dense: drawn hollow."""

    name: str
    way: str
    x: float
    y: float
    dense: bool = False


def scatter(points: Sequence[Point], x_title: str, y_title: str, way_title: str = "run by") -> View | None:
    """Return a scatter plot on a logarithmic x axis, with the points that no other beats in both joined by a line.

    Args:
        points: x: cost, lower is better; y: quality, 0..1, higher is better. NaN is left out.
        way_title: head of the column that names what a colour stands for.
    Returns:
        None with fewer than two points.
    """
    points = [point for point in points if point.x > 0 and math.isfinite(point.x) and math.isfinite(point.y)]
    if len(points) < 2:
        return None
    x_axis = Axis.around([point.x for point in points], log=True)
    y_axis = Axis.around([point.y for point in points], upper=1.0)
    ways = list(dict.fromkeys(point.way for point in points))
    best = pareto([(point.x, point.y) for point in points])
    placed = [
        {
            **vars(point),
            "number": number + 1,
            "left": x_axis.at(point.x),
            "top": 100 - y_axis.at(point.y),
            "series": ways.index(point.way) % SERIES,
            "best": number in best,
        }
        for number, point in enumerate(points)
    ]
    _place_numbers(placed)
    return {
        "points": placed,
        "front": [(placed[one], placed[other]) for one, other in itertools.pairwise(best)],
        "way_title": way_title,
        "ways": [{"name": way, "series": number % SERIES} for number, way in enumerate(ways) if way],
        "x": {"title": x_title, "ticks": x_axis.ticks()},
        "y": {"title": y_title, "ticks": _from_top(y_axis)},
    }


def _place_numbers(placed: Sequence[View]) -> None:
    """Give each point a corner for its number, another one than that of the points near it have."""
    for number, point in enumerate(placed):
        near = [
            other["corner"]
            for other in placed[:number]
            if abs(other["left"] - point["left"]) < _NEAR and abs(other["top"] - point["top"]) < _NEAR
        ]
        point["corner"] = min(range(len(_CORNERS)), key=lambda corner: (near.count(corner), corner))
        point["dx"], point["dy"] = _CORNERS[point["corner"]]


def recovery_lines(recovery: Sequence[Mapping[str, Any]], folds: Sequence[str]) -> View | None:
    """Return the estimated drop over the steps of recovery, a line per fold, and the drop before as a dashed one.

    Returns:
        None where there was no step.
    """
    lines = []
    for number, fold in enumerate(recovery):
        before = fold.get("estimated_drop_before")
        history = [(0, before), *fold.get("history", [])]
        known = [(float(step), float(drop)) for step, drop in history if drop is not None]
        if len(known) > 1:
            name = f"fold {folds[number]}" if number < len(folds) else f"fold number {number + 1}"
            lines.append(
                {"name": name, "series": number % SERIES, "known": known, "kept": fold["estimated_drop_after"]}
            )
    if not lines:
        return None
    x_axis = Axis(0, max(step for line in lines for step, _ in line["known"]))
    drops = [drop for line in lines for _, drop in line["known"]]
    y_axis = Axis.around([0.0, *drops])
    for line in lines:
        places = [{"left": x_axis.at(step), "top": 100 - y_axis.at(drop)} for step, drop in line["known"]]
        for place, (step, drop) in zip(places, line["known"], strict=True):
            place |= {"step": int(step), "drop": drop, "kept": drop == line["kept"]}
        line |= {"points": places, "parts": list(itertools.pairwise(places))}
    return {
        "lines": lines,
        "x": {"title": "steps", "ticks": x_axis.ticks()},
        "y": {"title": "estimated drop in Dice", "ticks": _from_top(y_axis)},
    }


def layer_bars(decisions: Sequence[Decision]) -> list[View]:
    """Return a row per layer that the forward pass reaches: MACs before and after as percent of the largest."""
    largest = max((max(one.macs_before, one.macs_after) for one in decisions), default=0)
    return [
        {
            "decision": one,
            "before": round(100 * one.macs_before / largest, 2),
            "after": round(100 * one.macs_after / largest, 2),
        }
        for one in decisions
        if one.macs_before
    ]


def stage_bars(profiles: Mapping[str, Mapping[str, float]]) -> View | None:
    """Return one bar per pipeline, made of the seconds of its stages, as percent of the longest bar."""
    longest = max((sum(stages.values()) for stages in profiles.values()), default=0.0)
    if not longest:
        return None
    names = list(dict.fromkeys(stage for stages in profiles.values() for stage in stages))
    rows = []
    for pipeline, stages in profiles.items():
        left, parts = 0.0, []
        for stage, seconds in stages.items():
            width = 100 * seconds / longest
            parts.append({"stage": stage, "seconds": seconds, "left": round(left, 3), "width": round(width, 3)})
            parts[-1]["series"] = names.index(stage) % SERIES
            left += width
        rows.append({"name": pipeline, "parts": parts, "total": sum(stages.values())})
    return {"rows": rows, "stages": [{"name": name, "series": n % SERIES} for n, name in enumerate(names)]}


def strips(values: np.ndarray, cases: Sequence[str]) -> tuple[list[View], View]:
    """Return, per class, where the Dice of each case lies, and the scale: from below the lowest value to 1.

    Args:
        values: (cases, classes), NaN where a case does not have the class.
    """
    known = values[~np.isnan(values)]
    low = math.floor(float(known.min(initial=0.95)) * 20 - 0.5) / 20
    axis = Axis(max(0.0, low), 1.0)
    rows = []
    for column in values.T:
        dots = [
            {"at": axis.at(float(dice)), "case": case, "dice": float(dice)}
            for case, dice in zip(cases, column, strict=True)
            if not math.isnan(dice)
        ]
        middle = float(np.nanmedian(column)) if dots else math.nan
        rows.append({"dots": dots, "median": axis.at(middle) if dots else None})
    return rows, {"low": axis.low, "ticks": axis.ticks(3)}


def _from_top(axis: Axis) -> list[View]:
    return [{**tick, "at": 100 - tick["at"]} for tick in axis.ticks()]
