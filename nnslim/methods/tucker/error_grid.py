"""The error of every convolution at each pair of ranks, and the parameters and MACs that are left: tables, pictures."""

from __future__ import annotations

import io
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from nnslim.errors import ConfigError, SpecError
from nnslim.figures import new_figure, own_style, save_figure
from nnslim.files import write_bytes
from nnslim.maths.lowrank import Spectrum
from nnslim.methods.base import OnLayer
from nnslim.methods.tucker.edit import CONVOLUTIONS, chain_macs, chain_parameters, kernel_of
from nnslim.methods.tucker.survey import LayerSurvey, survey
from nnslim.network.cost import Cost, LayerCost
from nnslim.network.walk import LayerIndex, unwrap
from nnslim.surgery.streaming import Tiles
from nnslim.tables import write_table

_STEPS = 16  # ranks per side where no step is given, as in tucker-cnn
_COLUMNS, _ROWS = 4, 5  # panels of one page
_FACTORS = tuple(number / 32 for number in range(1, 33))
_LEVELS = (0.1, 0.3, 0.5)
_STYLES = ("solid", "dashed", "dotted", "dashdot")


@dataclass(frozen=True)
class LayerGrid:
    """One convolution and its grid of rank pairs. Arrays are (len(ranks_out), len(ranks_in)).

    Attributes:
        ran: its shapes and MACs in one forward pass; `ran.name` is the layer's name.
        conv: the dense convolution.
        found: errors for all pairs of ranks, from one decomposition of the weights and one of the outputs.
        ranks_out, ranks_in: ranks of the grid, rising; the last one is the full rank.
    """

    ran: LayerCost
    conv: nn.Module
    found: LayerSurvey
    ranks_out: tuple[int, ...]
    ranks_in: tuple[int, ...]

    @property
    def name(self) -> str:
        """Canonical name of the layer."""
        return self.ran.name

    @property
    def shape(self) -> tuple[int, ...]:
        """(outputs, inputs, *kernel)."""
        return tuple(kernel_of(self.conv).shape)

    @property
    def weights_error(self) -> np.ndarray:
        """Relative Frobenius error of the weights."""
        return self._on_grid(self.found.weights)

    @property
    def outputs_error(self) -> np.ndarray | None:
        """Relative error of the outputs on the images; None without images, or where the layer gave no statistics."""
        return self._on_grid(self.found.outputs) if self.has_outputs else None

    @property
    def has_outputs(self) -> bool:
        """Whether images decided `found.outputs`; the survey repeats the weights' spectrum where they did not."""
        return self.found.outputs is not self.found.weights

    def _on_grid(self, spectrum: Spectrum) -> np.ndarray:
        return spectrum.squared_error[list(self.ranks_out)][:, list(self.ranks_in)].sqrt().numpy()

    def equal_factor(self, factors: Sequence[float], *, outputs: bool = False) -> list[float]:
        """Return the error with both ranks at the same share of their channels, ranks rounded up.

        Args:
            factors: shares above 0, at most 1. outputs: of the outputs instead of the weights.
        """
        spectrum = self.found.outputs if outputs else self.found.weights
        # Rounding before ceil keeps 0.1 * 30 at 3, which binary floats would make 4.
        ranks = [[math.ceil(round(size * share, 9)) for size in self.shape[:2]] for share in factors]
        return [spectrum.error(*pair) for pair in ranks]

    def rows(self) -> Iterator[dict[str, object]]:
        """Yield one line of the table for each pair of ranks."""
        outputs, inputs = self.shape[:2]
        weights, out = self.weights_error, self.outputs_error
        for a, rank_out in enumerate(self.ranks_out):
            for b, rank_in in enumerate(self.ranks_in):
                # a side at full rank has no factor
                sides = (None if rank_out == outputs else rank_out, None if rank_in == inputs else rank_in)
                macs = chain_macs(self.conv, *sides, self.ran.voxels_in, self.ran.voxels_out)
                yield {
                    "layer": self.name,
                    "rank_out": rank_out,
                    "rank_in": rank_in,
                    "outputs": outputs,
                    "inputs": inputs,
                    "weights_error": f"{weights[a, b]:.6g}",
                    "outputs_error": "" if out is None else f"{out[a, b]:.6g}",
                    "energy_error": f"{weights[a, b] ** 2:.6g}",
                    "macs": macs,
                    "parameters": chain_parameters(self.conv, *sides),
                    "macs_share": f"{macs / self.ran.macs:.4f}",
                }


def rank_steps(channels: int, step: int | None = None) -> tuple[int, ...]:
    """Return multiples of the step below the channels, and the channels themselves.

    Args:
        channels: of one side. step: channels; a sixteenth of them, rounded up, if None.
    Raises:
        ConfigError: a step below 1.
    """
    step = -(-channels // _STEPS) if step is None else step
    if step < 1:
        raise ConfigError(f"the step between ranks is a number of channels from 1 on, found {step}")
    return (*range(step, channels, step), channels)


def error_grid(
    network: nn.Module, cost: Cost, tiles: Tiles | None = None, *, step: int | None = None, progress: OnLayer = None
) -> list[LayerGrid]:
    """Survey every convolution that runs and has no groups, whatever a plan would do with it.

    Args:
        network: in eval mode, with weights; read only. cost: of it.
        tiles: calibration tiles; without them there are errors of the weights only.
        step: see `rank_steps`.
    Returns:
        One entry per layer, in order of execution.
    Raises:
        ConfigError: a step below 1. SpecError: the network has no convolution that could be factored.
    """
    rank_steps(1, step)  # a bad step is named before the work
    convs = {layer.name: layer.module for layer in LayerIndex(unwrap(network)).of_type(*CONVOLUTIONS)}
    names = [name for name in cost.layers if name in convs and convs[name].groups == 1]
    if not names:
        raise SpecError("the network runs no 2D or 3D convolution without groups, so there are no ranks to try")
    # With tiles in one go, so that they pass through the network once; without, layer by layer for the progress.
    found: dict[str, LayerSurvey] = {}
    for part in [names] if tiles is not None else [[name] for name in names]:
        found |= survey(network, part, tiles, probe=False, on_step=progress)
        if progress is not None:
            progress(len(found), len(names))
    ranks = {name: [rank_steps(size, step) for size in kernel_of(convs[name]).shape[:2]] for name in names}
    return [LayerGrid(cost.layers[name], convs[name], found[name], *ranks[name]) for name in names]


def write_grid(grids: Sequence[LayerGrid], path: Path) -> None:
    """Write the table, one line per layer and pair of ranks.

    Raises:
        OutputError: it cannot be written; nothing half-written is left.
    """
    write_table((row for grid in grids for row in grid.rows()), path)


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
    shown = [grid for grid in grids if grid.has_outputs or not outputs]
    if not shown:
        return []
    total = math.ceil(len(shown) / (_COLUMNS * _ROWS))
    each = _COLUMNS * math.ceil(math.ceil(len(shown) / total) / _COLUMNS)  # pages are about equally full
    figures = []
    for number in range(total):
        line = f"{title} (page {number + 1} of {total})" if total > 1 else title
        figures.append(_page(shown[number * each : (number + 1) * each], outputs, line))
    return _save(figures, folder, "outputs" if outputs else "weights")


@own_style
def equal_factor_lines(grids: Sequence[LayerGrid], folder: Path, *, title: str = "") -> list[Path]:
    """Draw the error of each layer, in order of execution, along one rank factor for both sides.

    Writes `equal_factor.png` and `.pdf`.

    Raises:
        OutputError: one cannot be written.
    """
    from matplotlib import colormaps

    both = any(grid.has_outputs for grid in grids)
    figure = new_figure((13.5 if both else 9.5, max(5.0, 1.2 + 0.17 * len(grids))))
    axes = figure.subplots(1, 2 if both else 1, sharey=True, squeeze=False)[0]
    colours = colormaps["turbo"](np.linspace(0.03, 0.97, max(len(grids), 2)))
    for panel, outputs in zip(axes, (False, True), strict=False):
        for grid, colour, style in zip(grids, colours, itertools.cycle(_STYLES), strict=False):
            if grid.has_outputs or not outputs:
                values = grid.equal_factor(_FACTORS, outputs=outputs)
                panel.plot(_FACTORS, values, color=colour, linestyle=style, linewidth=1.3, label=grid.name)
        panel.set(xlim=(0, 1), ylim=(0, 1), xlabel="rank factor, the same for both sides")
        panel.set_title("outputs, on the images" if outputs else "weights", fontsize=10)
        panel.grid(color="0.9")
    axes[0].set_ylabel("relative error")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", fontsize=7, title="front to back", title_fontsize=8)
    figure.suptitle(title, fontsize=11)
    return _save([figure], folder, "equal_factor")


def _page(grids: Sequence[LayerGrid], outputs: bool, title: str) -> Any:
    columns = min(_COLUMNS, len(grids))
    rows = math.ceil(len(grids) / columns)
    figure = new_figure((0.9 + 3.1 * columns, 1.0 + 2.75 * rows))
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    mesh = None
    for number, (axes, grid) in enumerate(zip(panels, grids, strict=False)):
        mesh = _heat_map(axes, grid, grid.outputs_error if outputs else grid.weights_error)
        if number % columns == 0:
            axes.set_ylabel("rank of the outputs", fontsize=8)
        if number + columns >= len(grids):
            axes.set_xlabel("rank of the inputs", fontsize=8)
    for axes in panels[len(grids) :]:
        axes.set_axis_off()
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
    for axis, channels in ((axes.xaxis, inputs), (axes.yaxis, outputs)):
        axis.set_ticks(sorted({max(1, round(channels * share)) for share in (0.25, 0.5, 0.75, 1)}))
    axes.tick_params(labelsize=7)
    return mesh


def _two_sided_share(grid: LayerGrid) -> np.ndarray:
    """Return MACs of the chain with both factors over the dense MACs: without the jump where a factor is left out."""
    outputs, inputs = grid.shape[:2]
    out, in_ = np.array(grid.ranks_out)[:, None], np.array(grid.ranks_in)[None]
    core = grid.ran.macs / (outputs * inputs)  # MACs of the core for each pair of its channels
    return (out * in_ * core + outputs * out * grid.ran.voxels_out + inputs * in_ * grid.ran.voxels_in) / grid.ran.macs


def _save(figures: Sequence[Any], folder: Path, name: str) -> list[Path]:
    from matplotlib.backends.backend_pdf import PdfPages

    files, pages = [], io.BytesIO()
    with PdfPages(pages, metadata={"CreationDate": None}) as pdf:  # the same bytes at every run
        for number, figure in enumerate(figures, start=1):
            files.append(folder / (f"{name}_{number}.png" if len(figures) > 1 else f"{name}.png"))
            save_figure(figure, files[-1])
            pdf.savefig(figure)
    files.append(folder / f"{name}.pdf")
    write_bytes(files[-1], pages.getvalue())
    return files
