"""Pictures of results."""

from __future__ import annotations

import functools
import io
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import numpy as np

from nnslim.errors import InputError
from nnslim.files import write_bytes

if TYPE_CHECKING:  # it needs torch, which takes seconds and which a picture does not need
    from nnslim.work.agreement import Agreement

_COLOURS = ("#00b7eb", "#ff9f1c", "#ff4fd8")
_STROKES = ("solid", "dashed", "dotted")
_DARK = "#123a4a"
_FEW = 12  # classes; with more, rows are narrow
_PLANES = ((0, "sagittal"), (1, "coronal"), (2, "axial"))  # across which axis they lie
_PLANE, _PLANE_STROKE = 5.0, 2.4  # inches of the longer side, and points, of a plane in a picture of its own
_FORMATS = (".png", ".pdf", ".svg")

_P = ParamSpec("_P")
_R = TypeVar("_R")


def own_style(draw: Callable[_P, _R]) -> Callable[_P, _R]:
    """Draw with matplotlib's defaults: nnU-Net's trainer sets seaborn's style, with huge letters, for the process."""

    @functools.wraps(draw)
    def styled(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        import matplotlib.style

        with matplotlib.style.context("default"):
            return draw(*args, **kwargs)

    return styled


def new_figure(size: tuple[float, float]) -> Any:
    """Return an empty figure of the size in inches; not pyplot's, which keeps global state and wants a display."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure: Any, path: Path) -> None:
    """Write a figure, whole or not at all; the ending chooses PNG, PDF or SVG.

    Raises:
        InputError: another ending. OutputError: it cannot be written.
    """
    if path.suffix.lower() not in _FORMATS:
        raise InputError(f"cannot draw {path.name}: its ending should be one of {', '.join(_FORMATS)}")
    picture = io.BytesIO()
    figure.savefig(picture, format=path.suffix[1:].lower(), dpi=110)
    write_bytes(path, picture.getvalue())


@own_style
def overlay(
    image: np.ndarray,
    maps: Sequence[tuple[str, np.ndarray]],
    path: Path,
    *,
    spacing: Sequence[float] = (1.0, 1.0, 1.0),
    title: str = "",
    centre: Sequence[int] | None = None,
) -> None:
    """Draw three planes with the outline of each label map; of an image of one slice, that slice.

    Args:
        image: (X, Y, Z) intensities, axes towards right, anterior, superior.
        maps: up to three (name, label map of the image's shape), drawn solid, dashed and dotted.
        path: picture to write; the ending chooses the format.
        spacing: mm per voxel along X, Y, Z.
        title: line above the picture.
        centre: voxel that the planes go through; default: the middle of the labels.
    Raises:
        InputError: a label map has another shape than the image, or the ending is unknown. OutputError: it cannot be
        written.
    """
    _check_shapes(image, maps)
    if centre is None:
        marked = np.argwhere(np.any([labels > 0 for _, labels in maps], axis=0))
        centre = marked.mean(0).round().astype(int) if len(marked) else np.array(image.shape) // 2
    planes, window = _planes(image.shape), np.percentile(image, (1, 99.5))
    figure = new_figure((1.4 + 3.2 * len(planes), 4.4))
    for position, (axis, plane) in enumerate(planes):
        axes = figure.add_subplot(1, len(planes), position + 1)
        _draw_plane(axes, image, maps, axis, centre, spacing, window)
        axes.set_title(plane)
    for (name, _), colour, style in zip(maps, _COLOURS, _STROKES, strict=False):
        figure.axes[0].plot([], [], color=colour, linestyle=style, label=name)
    figure.axes[0].legend(loc="lower left", fontsize=8)
    figure.suptitle(title)
    save_figure(figure, Path(path))


@own_style
def overlay_planes(
    image: np.ndarray,
    maps: Sequence[tuple[str, np.ndarray]],
    *,
    spacing: Sequence[float] = (1.0, 1.0, 1.0),
    centre: Sequence[int],
) -> dict[str, bytes]:
    """Return a PNG picture of each plane, without margins: its name -> bytes. Arguments as for `overlay`."""
    _check_shapes(image, maps)
    pictures, window = {}, np.percentile(image, (1, 99.5))
    for axis, plane in _planes(image.shape):
        across, up = (image.shape[a] * spacing[a] for a in range(3) if a != axis)
        figure = new_figure((_PLANE * across / max(across, up), _PLANE * up / max(across, up)))
        figure.set_layout_engine("none")
        axes = figure.add_axes((0, 0, 1, 1))
        _draw_plane(axes, image, maps, axis, centre, spacing, window, _PLANE_STROKE)
        picture = io.BytesIO()
        figure.savefig(picture, format="png", dpi=110, facecolor="black", metadata={"Software": None})
        pictures[plane] = picture.getvalue()
    return pictures


def _planes(shape: Sequence[int]) -> list[tuple[int, str]]:
    """Return (axis, name) of the planes that can be drawn: a contour needs two voxels both ways."""
    drawn = [(axis, plane) for axis, plane in _PLANES if min(np.delete(shape, axis)) > 1]
    return drawn or list(_PLANES)


def _check_shapes(image: np.ndarray, maps: Sequence[tuple[str, np.ndarray]]) -> None:
    for name, labels in maps:
        if labels.shape != image.shape:
            raise InputError(f"label map '{name}' has shape {labels.shape}, the image {image.shape}")


def _draw_plane(
    axes: Any,
    image: np.ndarray,
    maps: Sequence[tuple[str, np.ndarray]],
    axis: int,
    centre: Sequence[int],
    spacing: Sequence[float],
    window: Sequence[float],
    width: float = 1.4,
) -> None:
    """Draw one plane; `window` is what is black and white, `width` that of the outlines, in points."""
    across, up = (spacing[a] for a in range(3) if a != axis)
    scale = {"vmin": window[0], "vmax": window[1], "aspect": up / across}
    axes.imshow(image.take(centre[axis], axis).T, cmap="gray", origin="lower", **scale)
    for (_, labels), colour, style in zip(maps, _COLOURS, _STROKES, strict=False):
        cut = labels.take(centre[axis], axis).T
        for label in np.unique(cut[cut > 0]):
            axes.contour(cut == label, levels=[0.5], colors=colour, linestyles=style, linewidths=width)
    axes.set_axis_off()


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
    count = len(agreement.class_names)
    few = count <= _FEW
    figure = new_figure((11, 2.0 + count * (0.45 if few else 0.2)))
    dice, volume = figure.subplots(1, 2, sharey=True, width_ratios=(3, 2))
    _dice_rows(dice, agreement)
    _volume_rows(volume, agreement)
    dice.set_yticks(range(count), agreement.class_names, fontsize=10 if few else 7)
    dice.set_ylim(count - 0.4, -0.6)  # the first class on top
    for axes in (dice, volume):
        axes.grid(axis="x", color="0.9")
        axes.set_axisbelow(True)
        if not few:  # the scale is out of sight at the other end of a high picture
            axes.tick_params(top=True, labeltop=True)
    figure.suptitle(_summary(agreement), fontsize=11)
    save_figure(figure, Path(path))


def _summary(agreement: Agreement) -> str:
    text = f"{len(agreement.cases)} case(s): mean Dice {agreement.mean_dice:.3f}, "
    text += f"estimated drop against labels {agreement.expected_drop:.3f}"
    return text if math.isnan(agreement.drop) else f"{text}, measured {agreement.drop:.3f}"


def score_rows(axes: Any, columns: Sequence[np.ndarray], colours: Sequence[str] = _COLOURS[:1]) -> float:
    """Draw a row per column of scores in 0..1: a dot each, a box over the middle half, a stroke at the median.

    Args:
        columns: scores of each row, NaN left out. colours: of the boxes, in turn.
    Returns:
        The left end of the axis, chosen for the lowest score.
    """
    lowest = 0.9
    for row, column in enumerate(columns):
        values = column[~np.isnan(column)]
        if not len(values):
            axes.text(
                0.01, row, "in no case", color="0.5", fontsize=7, va="center", transform=axes.get_yaxis_transform()
            )
            continue
        lowest = min(lowest, values.min())
        low, middle, high = np.percentile(values, (25, 50, 75))
        axes.barh(row, high - low, left=low, height=0.6, color=colours[row % len(colours)], alpha=0.35)
        axes.plot((middle, middle), (row - 0.3, row + 0.3), color=_DARK, linewidth=1.5)
        axes.scatter(values, np.full(len(values), row), s=9, color=_DARK, alpha=0.5, linewidths=0)
    lowest = max(0.0, math.floor(lowest * 20 - 0.5) / 20)
    axes.set_xlim(lowest or -0.02, 1 + (1 - lowest) * 0.02)  # a dot at 0 is the most important of all
    return lowest


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
            xytext=(10 if left else -10, 16 if len(agreement.class_names) <= _FEW else 0),
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
        axes.barh(row, mean, height=0.6, color=_COLOURS[1])
        axes.hlines(row, np.nanmin(column), np.nanmax(column), color=_DARK, linewidth=0.8)
        edge = float(np.clip(mean, -limit, limit)) * 0.98
        if len(means) <= _FEW or abs(mean) > limit:
            outwards = (mean >= 0) == (abs(mean) <= 0.8 * limit)
            side = "left" if outwards else "right"
            axes.text(edge, row - 0.32, f"{mean:+.1f} %", fontsize=7, va="bottom", ha=side)
    axes.set_xlim(-limit, limit)
    axes.set_xlabel("volume, slim against dense (%)")
