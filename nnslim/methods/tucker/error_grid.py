"""The error of every convolution at each pair of ranks, and the parameters and MACs that are left."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import nn

from nnslim.errors import ConfigError, SpecError
from nnslim.maths.lowrank import Spectrum
from nnslim.methods.tucker.chain import chain_macs, chain_parameters
from nnslim.methods.tucker.layers import CONVOLUTIONS, kernel_of
from nnslim.methods.tucker.survey import LayerSurvey, survey
from nnslim.network.cost import Cost, LayerCost
from nnslim.network.walk import LayerIndex, unwrap
from nnslim.surgery.streaming import Tiles
from nnslim.tables import write_table

_STEPS = 16  # ranks per side where no step is given, as in tucker-cnn


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

    def sides(self, rank_out: int, rank_in: int) -> tuple[int | None, int | None]:
        """Return the ranks as a chain is built: a side at full rank has no factor."""
        outputs, inputs = self.shape[:2]
        return (None if rank_out == outputs else rank_out), (None if rank_in == inputs else rank_in)

    def macs(self, rank_out: int, rank_in: int) -> int:
        """Return the MACs of one patch at these ranks."""
        return chain_macs(self.conv, *self.sides(rank_out, rank_in), self.ran.voxels_in, self.ran.voxels_out)

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
                macs = self.macs(rank_out, rank_in)
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
                    "parameters": chain_parameters(self.conv, *self.sides(rank_out, rank_in)),
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
    network: nn.Module,
    cost: Cost,
    tiles: Tiles | None = None,
    *,
    step: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[LayerGrid]:
    """Survey every convolution that runs and has no groups, whatever a plan would do with it.

    Args:
        network: in eval mode, with weights; read only.
        cost: of it.
        tiles: calibration tiles; without them there are errors of the weights only.
        step: channels between the ranks of a side; see `rank_steps`.
        progress: called with (layers done, layers in all).
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
    grids = []
    for name in names:
        outputs, inputs = kernel_of(convs[name]).shape[:2]
        ranks = rank_steps(outputs, step), rank_steps(inputs, step)
        grids.append(LayerGrid(cost.layers[name], convs[name], found[name], *ranks))
    return grids


def write_grid(grids: Sequence[LayerGrid], path: Path) -> None:
    """Write the table, one line per layer and pair of ranks.

    Raises:
        OutputError: it cannot be written; nothing half-written is left.
    """
    write_table((row for grid in grids for row in grid.rows()), path)
