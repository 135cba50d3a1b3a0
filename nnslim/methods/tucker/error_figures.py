"""Pictures of the error grid: a heat map for each layer, and all layers along equal rank factors."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from nnslim.figures import new_figure, own_style
from nnslim.files import write_bytes
from nnslim.methods.tucker.error_grid import LayerGrid, error_grid, write_grid
from nnslim.network.cost import Cost
from nnslim.surgery.streaming import Tiles

_COLUMNS, _ROWS = 4, 5  # panels of one page
_FACTORS = tuple(number / 32 for number in range(1, 33))
_LEVELS = (0.1, 0.3, 0.5)
_STYLES = ("solid", "dashed", "dotted", "dashdot")


def survey_ranks(
    network: nn.Module,
    cost: Cost,
    tiles: Tiles | None,
    folder: Path,
    *,
    step: int | None = None,
    title: str = "",
    progress: Callable[[str, int, int], None] | None = None,
) -> list[LayerGrid]:
    """Write the error of each pair of ranks of every layer; see `Method.survey`.

    The folder gets errors.csv, `weights` (heat maps) and `equal_factor` (lines) as PNG and PDF, and `outputs` (heat
    maps) where there are tiles.

    Args:
        step: channels between the ranks of a side; a sixteenth of the channels if None.
    Raises:
        ConfigError: a step below 1. OutputError: a file cannot be written.
    """
    progress = progress or (lambda what, done, total: None)
    grids = error_grid(network, cost, tiles, step=step, progress=lambda done, total: progress("layers", done, total))
    write_grid(grids, folder / "errors.csv")
    progress("pictures", 0, 1)
    heat_maps(grids, folder, title=title)
    heat_maps(grids, folder, outputs=True, title=title)
    equal_factor_lines(grids, folder, title=title)
    return grids


@own_style
def heat_maps(grids: Sequence[LayerGrid], folder: Path, *, outputs: bool = False, title: str = "") -> list[Path]:
    """Draw the error over (R_in, R_out), one panel per layer, on as many pages as that takes.

    Writes `<what>.pdf` with all pages and `<what>.png`, or `<what>_1.png` and so on for several pages, where <what> is
    `weights` or `outputs`.

    Args:
        grids: layers; for outputs only those that have them are drawn.
        folder: to write to. outputs: error of the outputs instead of the weights. title: line above each page.
    Returns:
        The files. Empty where no layer has what is asked for.
    Raises:
        OutputError: one cannot be written.
    """
    shown = [grid for grid in grids if grid.has_outputs] if outputs else list(grids)
    what = "outputs" if outputs else "weights"
    figures = []
    for number, total, part in _pages(shown):
        figures.append(_page(part, outputs, f"{title} (page {number} of {total})" if total > 1 else title))
    return _save(figures, folder, what) if figures else []


@own_style
def equal_factor_lines(grids: Sequence[LayerGrid], folder: Path, *, title: str = "") -> list[Path]:
    """Draw the error of each layer along one rank factor for both sides; `equal_factor.png` and `.pdf`.

    Args:
        grids: layers, in order of execution. folder: to write to. title: line above.
    Raises:
        OutputError: one cannot be written.
    """
    both = any(grid.has_outputs for grid in grids)
    entries = len(grids)
    figure = new_figure((13.5 if both else 9.5, max(5.0, 1.2 + 0.17 * entries)))
    axes = figure.subplots(1, 2 if both else 1, sharey=True, squeeze=False)[0]
    colours = _colour_map("turbo")(np.linspace(0.03, 0.97, max(entries, 2)))
    for panel, outputs in zip(axes, (False, True), strict=False):
        for number, grid in enumerate(grids):
            if outputs and not grid.has_outputs:
                continue
            style = _STYLES[number % len(_STYLES)]
            values = grid.equal_factor(_FACTORS, outputs=outputs)
            panel.plot(_FACTORS, values, color=colours[number], linestyle=style, linewidth=1.3, label=grid.name)
        panel.set(xlim=(0, 1), ylim=(0, 1), xlabel="rank factor, the same for both sides")
        panel.set_title("outputs, on the images" if outputs else "weights", fontsize=10)
        panel.grid(color="0.9")
    axes[0].set_ylabel("relative error")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", fontsize=7, title="front to back", title_fontsize=8)
    figure.suptitle(title, fontsize=11)
    return _save([figure], folder, "equal_factor")


def _pages(grids: Sequence[LayerGrid]) -> Iterator[tuple[int, int, Sequence[LayerGrid]]]:
    """Yield (page, pages, its layers), pages about equally full."""
    total = math.ceil(len(grids) / (_COLUMNS * _ROWS))
    if not total:
        return
    rows = math.ceil(math.ceil(len(grids) / total) / _COLUMNS)
    each = rows * _COLUMNS
    for number in range(total):
        yield number + 1, total, grids[number * each : (number + 1) * each]


def _page(grids: Sequence[LayerGrid], outputs: bool, title: str) -> Any:
    columns = min(_COLUMNS, len(grids))
    rows = math.ceil(len(grids) / columns)
    figure = new_figure((0.9 + 3.1 * columns, 1.0 + 2.75 * rows))
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    mesh = None
    for axes, grid in zip(panels, grids, strict=False):
        mesh = _heat_map(axes, grid, grid.outputs_error if outputs else grid.weights_error)
    for axes in panels[len(grids) :]:
        axes.set_axis_off()
    for number, axes in enumerate(panels[: len(grids)]):
        if number % columns == 0:
            axes.set_ylabel("rank of the outputs", fontsize=8)
        if number + columns >= len(grids):
            axes.set_xlabel("rank of the inputs", fontsize=8)
    bar = figure.colorbar(mesh, ax=panels.tolist(), shrink=0.6, aspect=40, pad=0.01)
    bar.set_label(f"relative error of the {'outputs, on the images' if outputs else 'weights'}", fontsize=9)
    figure.suptitle(
        f"{title}\nblack: equal error; red, dashed: from here on no fewer MACs than the dense layer", fontsize=10
    )
    return figure


def _heat_map(axes: Any, grid: LayerGrid, error: np.ndarray) -> Any:
    # A cell reaches down to the rank before its own, so that steps of unequal length keep their place.
    mesh = axes.pcolormesh((0, *grid.ranks_in), (0, *grid.ranks_out), error, cmap="viridis_r", vmin=0, vmax=1)
    if min(error.shape) > 3:  # between fewer ranks a line would only be a guess
        where = grid.ranks_in, grid.ranks_out
        levels = [level for level in _LEVELS if error.min() < level < error.max()]
        if levels:
            lines = axes.contour(*where, error, levels=levels, colors="black", linewidths=0.8)
            axes.clabel(lines, fmt="%g", fontsize=6)
        share = _two_sided_share(grid)
        if share.min() < 1 < share.max():
            axes.contour(*where, share, levels=[1.0], colors="red", linewidths=1.2, linestyles="dashed")
    outputs, inputs, *kernel = grid.shape
    axes.set_title(f"{grid.name}\n{inputs} to {outputs}, kernel {'x'.join(map(str, kernel))}", fontsize=7)
    axes.set_xticks(_ticks(inputs))
    axes.set_yticks(_ticks(outputs))
    axes.tick_params(labelsize=7)
    return mesh


def _two_sided_share(grid: LayerGrid) -> np.ndarray:
    """Return MACs of the chain with both factors over the dense MACs: without the jump where a factor is left out."""
    outputs, inputs = grid.shape[:2]
    out, in_ = np.array(grid.ranks_out)[:, None], np.array(grid.ranks_in)[None]
    core = grid.ran.macs / (outputs * inputs)  # MACs of the core for each pair of its channels
    return (out * in_ * core + outputs * out * grid.ran.voxels_out + inputs * in_ * grid.ran.voxels_in) / grid.ran.macs


def _ticks(channels: int) -> list[int]:
    return sorted({max(1, round(channels * share)) for share in (0.25, 0.5, 0.75, 1)})


def _colour_map(name: str) -> Any:
    import matplotlib

    return matplotlib.colormaps[name]


def _save(figures: Sequence[Any], folder: Path, name: str) -> list[Path]:
    from matplotlib.backends.backend_pdf import PdfPages

    files, pages = [], io.BytesIO()
    with PdfPages(pages, metadata={"CreationDate": None}) as pdf:  # the same bytes at every run
        for number, figure in enumerate(figures, start=1):
            picture = io.BytesIO()
            figure.savefig(picture, format="png", dpi=110)
            files.append(folder / (f"{name}_{number}.png" if len(figures) > 1 else f"{name}.png"))
            write_bytes(files[-1], picture.getvalue())
            pdf.savefig(figure)
    files.append(folder / f"{name}.pdf")
    write_bytes(files[-1], pages.getvalue())
    return files
