"""Pictures of results."""

from __future__ import annotations

import functools
import io
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import numpy as np

from nnslim.errors import InputError
from nnslim.files import write_bytes

COLOURS = ("#00b7eb", "#ff9f1c", "#ff4fd8")
_STROKES = ("solid", "dashed", "dotted")
DARK = "#123a4a"
FEW = 12  # classes; with more, rows are narrow
_PLANES = ((0, "sagittal"), (1, "coronal"), (2, "axial"))  # across which axis they lie
_PLANE, _PLANE_STROKE = 5.0, 2.4  # inches of the longer side, and points, of a plane in a picture of its own
_FORMATS = (".png", ".pdf", ".svg")

_P = ParamSpec("_P")
_R = TypeVar("_R")


def own_style(draw: Callable[_P, _R]) -> Callable[_P, _R]:
    """Draw with matplotlib's defaults, and names with a $ as they are.

    nnU-Net's trainer sets seaborn's style, with huge letters, for the process.
    """

    @functools.wraps(draw)
    def styled(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        import matplotlib.style

        with matplotlib.style.context(["default", {"text.parse_math": False}]):
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
    """Write PNG, PDF or SVG, as the ending says, or raise an InputError (another ending) or OutputError."""
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
    """Draw three planes with the outline of each label map, or the one plane of an image of one slice.

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
    for (name, _), colour, style in zip(maps, COLOURS, _STROKES, strict=False):
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
    for (_, labels), colour, style in zip(maps, COLOURS, _STROKES, strict=False):
        cut = labels.take(centre[axis], axis).T
        for label in np.unique(cut[cut > 0]):
            axes.contour(cut == label, levels=[0.5], colors=colour, linestyles=style, linewidths=width)
    axes.set_axis_off()


def row_panels(
    labels: Sequence[str], height: float, width_ratios: tuple[float, float] = (1, 1)
) -> tuple[Any, Sequence[Any]]:
    """Return an empty figure with two panels whose rows have these labels, the first on top; many rows are narrow.

    Args:
        height: inches besides the rows. width_ratios: widths of the panels.
    """
    few = len(labels) <= FEW
    figure = new_figure((11, height + len(labels) * (0.45 if few else 0.2)))
    panels = figure.subplots(1, 2, sharey=True, width_ratios=width_ratios)
    panels[0].set_yticks(range(len(labels)), labels, fontsize=10 if few else 7)
    panels[0].set_ylim(len(labels) - 0.4, -0.6)
    for axes in panels:
        axes.grid(axis="x", color="0.9")
        axes.set_axisbelow(True)
        if not few:  # the scale is out of sight at the other end of a high picture
            axes.tick_params(top=True, labeltop=True)
    return figure, panels


def score_rows(axes: Any, columns: Sequence[np.ndarray], colours: Sequence[str] = COLOURS[:1]) -> float:
    """Draw a row per column of scores in 0..1: a dot each, a box over the middle half, a stroke at the median.

    Args:
        columns: scores of each row, NaN left out. colours: the boxes' colours, in turn.
    Returns:
        The left end of the axis, chosen for the lowest score.
    """
    lowest = 0.9
    for row, column in enumerate(columns):
        values = column[~np.isnan(column)]
        if not len(values):
            place = {"va": "center", "transform": axes.get_yaxis_transform()}
            axes.text(0.01, row, "in no case", color="0.5", fontsize=7, **place)
            continue
        lowest = min(lowest, values.min())
        low, middle, high = np.percentile(values, (25, 50, 75))
        axes.barh(row, high - low, left=low, height=0.6, color=colours[row % len(colours)], alpha=0.35)
        axes.plot((middle, middle), (row - 0.3, row + 0.3), color=DARK, linewidth=1.5)
        axes.scatter(values, np.full(len(values), row), s=9, color=DARK, alpha=0.5, linewidths=0)
    lowest = max(0.0, math.floor(lowest * 20 - 0.5) / 20)
    axes.set_xlim(lowest or -0.02, 1 + (1 - lowest) * 0.02)  # a dot at 0 is the most important of all
    return lowest
