"""The report's figures: matplotlib's SVG, made to stand inside the page and to follow its colours."""

from __future__ import annotations

import html
import io
import re
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from nnslim.benchmark.timing_figures import SERIES
from nnslim.figures import new_figure, own_style
from nnslim.methods.base import Decision
from nnslim.report.number_format import dice, giga

# Colours of the figures -> variables of the style sheet, which has a light and a dark value for each.
_VARIABLES = {"#000000": "ink", "#ffffff": "card"} | {colour: f"s{number}" for number, colour in enumerate(SERIES)}
_TIP = "tip:"  # what follows it in an artist's gid is shown under the mouse
_MOST_TIPS = 1000  # dots; more of them are one picture
_DENSE, _SLIM = SERIES[:2]


def inline_svg(figure: Any, name: str, label: str) -> str:
    """Return a figure as an SVG element, in which all text is escaped.

    Args:
        name: unique on the page; every id in the element starts with it. label: text in place of the figure.
    """
    import matplotlib

    made = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a browser has letters that matplotlib's font lacks
        figure.savefig(
            made, format="svg", transparent=True, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type"))
        )
    drawn = made.getvalue()
    box = drawn.split('viewBox="', 1)[1].split('"', 1)[0]
    body = drawn[drawn.index(">", drawn.index("<svg")) + 1 : drawn.rindex("</svg>")]
    body = re.sub(r"<style.*?</style>| font-family: [^;\"]*;?", "", body)
    body = re.sub(rf'<g id="{_TIP}([^"]*)">', r"<g><title>\1</title>", body)
    body = re.sub(r'( id="|href="#|url\(#)', rf"\g<1>{name}-", body)
    body = re.sub(r"(fill|stroke): (#\w{6})", _follow, body)
    return f'<svg id="{name}" role="img" aria-label="{html.escape(label)}" viewBox="{box}">{body}</svg>'


def _follow(found: re.Match[str]) -> str:
    variable = _VARIABLES.get(found[2])
    return f"{found[1]}: var(--{variable})" if variable else found[0]


@own_style
def recovery_figure(recovery: Sequence[Mapping[str, Any]], folds: Sequence[str]) -> Any:
    """Draw the estimated drop over the steps of recovery, a line per fold; what was kept is filled.

    Returns:
        The figure, or None where there was no step.
    """
    figure = new_figure((8, 3.6))
    axes = figure.add_subplot(xlabel="steps", ylabel="estimated drop in Dice")
    for number, fold in enumerate(recovery):
        history = [(0, fold.get("estimated_drop_before")), *fold.get("history", [])]
        known = [(int(step), float(drop)) for step, drop in history if drop is not None]
        if len(known) < 2:
            continue
        name, colour = fold_name(folds, number), SERIES[number % len(SERIES)]
        axes.plot(*zip(*known, strict=True), color=colour, label=name)
        for step, drop in known:
            kept = drop == fold["estimated_drop_after"]
            tip = f"{_TIP}{name}, step {step}: {dice(drop)}{', kept' if kept else ''}"
            face = colour if kept else "#ffffff"
            axes.plot(step, drop, "o", color=colour, markerfacecolor=face, markersize=6, clip_on=False, gid=tip)
    if not axes.lines:
        return None
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=min(0, axes.get_ylim()[0]))
    axes.grid(color="0.5", alpha=0.25)
    axes.legend(fontsize=8, frameon=False)
    return figure


def fold_name(folds: Sequence[Any], place: int) -> str:
    """Return what a fold is called; a record may name fewer folds than it recovered."""
    return f"fold {folds[place]}" if place < len(folds) else f"fold number {place + 1}"


@own_style
def layer_figure(decisions: Sequence[Decision]) -> Any:
    """Draw MACs before and after of each layer that the forward pass reaches, the first on top; None without any."""
    shown = [one for one in decisions if one.macs_before]
    if not shown:
        return None
    axes = _rows_of([one.layer for one in shown])
    before, after = ([getattr(one, f"macs_{when}") / 1e9 for one in shown] for when in ("before", "after"))
    rows = np.arange(len(shown))
    axes.barh(rows - 0.2, before, 0.38, color=_DENSE, label="before")
    axes.barh(rows + 0.2, after, 0.38, color=_SLIM, label="after")
    for row, one in enumerate(shown):
        text = giga(one.macs_before) + (f" → {giga(one.macs_after)}" if one.macs_after != one.macs_before else "")
        axes.text(max(before[row], after[row]), row, f" {text}", va="center", fontsize=7)
    axes.set(xlabel="GMAC", xlim=(0, 1.25 * max(*before, *after)))
    axes.figure.legend(ncols=2, fontsize=8, loc="outside upper left", frameon=False)
    return axes.figure


@own_style
def strips_figure(values: np.ndarray, classes: Sequence[str], cases: Sequence[str]) -> Any:
    """Draw a dot for the Dice of each case and a stroke at the median, a row per class; None where nothing is known.

    Args:
        values: (cases, classes), NaN where a case does not have the class.
    """
    if np.isnan(values).all():
        return None
    axes = _rows_of(classes)
    tips = values.size <= _MOST_TIPS
    for row, column in enumerate(values.T):
        known = np.flatnonzero(~np.isnan(column))
        for case in known if tips else ():
            tip = f"{_TIP}{cases[case]}: {dice(column[case])}"
            axes.plot(column[case], row, "o", color=_SLIM, alpha=0.55, markersize=5, clip_on=False, gid=tip)
        if not tips:
            axes.scatter(column[known], np.full(len(known), row), s=20, color=_SLIM, alpha=0.55, rasterized=True)
        if len(known):
            axes.vlines(np.median(column[known]), row - 0.4, row + 0.4, color="#000000", linewidth=1.5)
    axes.set(xlabel="Dice, slim against dense", xlim=(None, 1.0))
    axes.tick_params(top=True, labeltop=True)
    return axes.figure


def _rows_of(names: Sequence[str]) -> Any:
    """Return axes with a named row for each bar, the first on top, in a figure as high as that needs."""
    figure = new_figure((8, 1.0 + 0.24 * len(names)))
    axes = figure.add_subplot(axisbelow=True)
    axes.set_yticks(range(len(names)), names, fontsize=7)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.grid(axis="x", color="0.5", alpha=0.25)
    return axes
