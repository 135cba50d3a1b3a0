"""Pictures of results."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from nnslim.errors import InputError

_COLOURS = ("#00b7eb", "#ff9f1c")


def overlay(
    image: np.ndarray,
    maps: Sequence[tuple[str, np.ndarray]],
    path: Path,
    *,
    spacing: Sequence[float] = (1.0, 1.0, 1.0),
    title: str = "",
) -> None:
    """Draw three planes through the middle of the labels with the outline of each label map.

    Args:
        image: (X, Y, Z) intensities, axes towards right, anterior, superior.
        maps: one or two (name, label map of the image's shape); the first is drawn solid, the second dashed.
        path: picture to write; the ending chooses the format.
        spacing: mm per voxel along X, Y, Z.
        title: line above the picture.
    Raises:
        InputError: a label map has another shape than the image.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    for name, labels in maps:
        if labels.shape != image.shape:
            raise InputError(f"label map '{name}' has shape {labels.shape}, the image {image.shape}")
    marked = np.argwhere(np.any([labels > 0 for _, labels in maps], axis=0))
    centre = marked.mean(0).round().astype(int) if len(marked) else np.array(image.shape) // 2
    low, high = np.percentile(image, (1, 99.5))
    # Not pyplot: it keeps global state and wants a display.
    figure = Figure(figsize=(11, 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    for position, (axis, plane) in enumerate(((0, "sagittal"), (1, "coronal"), (2, "axial"))):
        axes = figure.add_subplot(1, 3, position + 1)
        across, up = (spacing[a] for a in range(3) if a != axis)
        axes.imshow(
            image.take(centre[axis], axis).T, cmap="gray", origin="lower", vmin=low, vmax=high, aspect=up / across
        )
        for (_, labels), colour, style in zip(maps, _COLOURS, ("solid", "dashed"), strict=False):
            cut = labels.take(centre[axis], axis).T
            for label in np.unique(cut[cut > 0]):
                axes.contour(cut == label, levels=[0.5], colors=colour, linestyles=style, linewidths=1.4)
        axes.set_title(plane)
        axes.set_axis_off()
    for (name, _), colour, style in zip(maps, _COLOURS, ("solid", "dashed"), strict=False):
        figure.axes[0].plot([], [], color=colour, linestyle=style, label=name)
    figure.axes[0].legend(loc="lower left", fontsize=8)
    figure.suptitle(title)
    figure.savefig(path, dpi=110)
