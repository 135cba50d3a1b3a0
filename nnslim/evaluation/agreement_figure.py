"""A picture of an agreement: Dice and volumes per class."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from nnslim.figures import COLOURS, DARK, FEW, own_style, row_panels, save_figure, score_rows

if TYPE_CHECKING:  # it needs torch, which takes seconds and which a picture does not need
    from nnslim.evaluation.agreement import Agreement


@own_style
def agreement_figure(agreement: Agreement, path: Path) -> None:
    """Draw, per class, the Dice of slim against dense over the cases, and the difference in volume.

    A row per class: a dot per case, a box over the middle half of them and a stroke at the median; beside it the mean
    difference in volume with a thin line over all cases. The height follows the number of classes.

    Args:
        agreement: with at least one class.
        path: picture to write; the ending chooses PNG, PDF or SVG.
    Raises:
        InputError: another ending. OutputError: it cannot be written; nothing half-written is left.
    """
    figure, (dice, volume) = row_panels(agreement.class_names, height=2.0, width_ratios=(3, 2))
    _dice_rows(dice, agreement)
    _volume_rows(volume, agreement)
    figure.suptitle(_summary(agreement), fontsize=11)
    save_figure(figure, Path(path))


def _summary(agreement: Agreement) -> str:
    text = f"{len(agreement.cases)} case(s): mean Dice {agreement.mean_dice:.3f}, "
    text += f"estimated drop against labels {agreement.expected_drop:.3f}"
    return text if math.isnan(agreement.drop) else f"{text}, measured {agreement.drop:.3f}"


def _dice_rows(axes: Any, agreement: Agreement) -> None:
    lowest = score_rows(axes, agreement.values("dice").T)
    axes.set_xlabel("Dice, slim against dense")
    if worst := agreement.worst():
        row = agreement.class_names.index(worst.class_name)
        left = worst.dice < (lowest + 1) / 2
        axes.scatter(worst.dice, row, s=60, facecolors="none", edgecolors="red", zorder=4)
        axes.annotate(
            f"worst: {worst.case}, {worst.dice:.3f}",
            (worst.dice, row),
            xytext=(10 if left else -10, 16 if len(agreement.class_names) <= FEW else 0),
            textcoords="offset points",
            ha="left" if left else "right",
            va="center",
            color="red",
            fontsize=8,
            bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1},
            zorder=5,
        )


def _volume_rows(axes: Any, agreement: Agreement) -> None:
    means = agreement.class_means("volume_difference")
    sizes = np.abs(means[~np.isnan(means)])
    largest = np.abs(np.nan_to_num(agreement.values("volume_difference"))).max(initial=0)
    # One class that is doubled must not squeeze all others into the zero line.
    limit = max(1.0, min(1.25 * largest, max(10.0, 5 * float(np.median(sizes)) if len(sizes) else 0.0)))
    axes.axvline(0, color="0.4", linewidth=0.8)
    for row, (mean, column) in enumerate(zip(means, agreement.values("volume_difference").T, strict=True)):
        if math.isnan(mean):
            continue
        axes.barh(row, mean, height=0.6, color=COLOURS[1])
        axes.hlines(row, np.nanmin(column), np.nanmax(column), color=DARK, linewidth=0.8)
        edge = float(np.clip(mean, -limit, limit)) * 0.98
        if len(means) <= FEW or abs(mean) > limit:
            outwards = (mean >= 0) == (abs(mean) <= 0.8 * limit)
            side = "left" if outwards else "right"
            axes.text(edge, row - 0.32, f"{mean:+.1f} %", fontsize=7, va="bottom", ha=side)
    axes.set_xlim(-limit, limit)
    axes.set_xlabel("volume, slim against dense (%)")
