"""Main directions of what linear layers put out, from streamed second moments in float64."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from nnslim.surgery.streaming import Tiles, hooked


@dataclass(frozen=True)
class OutputSpectrum:
    """Of the outputs W x of one layer, the bias left out.

    Attributes:
        basis: (O, min(I, O)) orthonormal directions, the strongest first. energy: (min(I, O),) variance along each.
        mean: (O,).
    """

    basis: Tensor
    energy: Tensor
    mean: Tensor

    def error(self, rank: int) -> float:
        """Return the relative error of the centred outputs at a rank."""
        total = float(self.energy.sum())
        return (float(self.energy[rank:].sum()) / total) ** 0.5 if total else 0.0

    def rank_for(self, share: float) -> int:
        """Return the smallest rank that keeps that share of the variance, at least 1."""
        kept = self.energy.cumsum(0)
        return int((kept < share * kept[-1]).sum()) + 1


def weight_spectrum(linear: nn.Linear) -> OutputSpectrum:
    """Return the spectrum for white inputs: that of the weights."""
    left, values, _ = torch.linalg.svd(linear.weight.detach().double(), full_matrices=False)
    return OutputSpectrum(left, values.square(), left.new_zeros(len(left)))


@dataclass
class _Moments:
    """Sums over rows, of the narrower of inputs and outputs: memory 8 * min(I, O)^2 bytes."""

    linear: nn.Linear
    count: int = 0
    total: Tensor | float = 0.0
    products: Tensor | float = 0.0
    on_inputs: bool = field(init=False)

    def __post_init__(self) -> None:
        self.on_inputs = self.linear.in_features < self.linear.out_features

    def add(self, x: Tensor) -> None:
        """Take inputs (..., I)."""
        rows = x.detach().flatten(0, -2).double()
        if not self.on_inputs:
            rows = rows @ self.linear.weight.detach().double().T
        self.count += len(rows)
        self.total = self.total + rows.sum(0)
        self.products = self.products + rows.T @ rows

    def spectrum(self) -> OutputSpectrum:
        mean = self.total / self.count
        values, vectors = torch.linalg.eigh(self.products / self.count - torch.outer(mean, mean))
        values, vectors = values.flip(0).clamp_min(0), vectors.flip(1)
        if not self.on_inputs:
            return OutputSpectrum(vectors, values, mean)
        weight = self.linear.weight.detach().double()
        left, strengths, _ = torch.linalg.svd(weight @ (vectors * values.sqrt()), full_matrices=False)
        return OutputSpectrum(left, strengths.square(), weight @ mean)


def output_spectra(network: nn.Module, layers: Mapping[str, nn.Linear], tiles: Tiles) -> dict[str, OutputSpectrum]:
    """Return the spectrum of each layer over all rows of all tiles, from one pass; rows are not kept.

    Args:
        network: in eval mode. layers: some of its linear layers, by name; those that no pass reaches get that of
            their weights. tiles: calibration tiles.
    """
    moments = {name: _Moments(linear) for name, linear in layers.items()}
    device = next(network.parameters()).device
    hooks = {name: lambda _, inputs, one=one: one.add(inputs[0]) for name, one in moments.items()}
    with hooked(network, hooks, {}), torch.no_grad():
        for tile in tiles:
            network(tile.to(device))
    return {name: one.spectrum() if one.count else weight_spectrum(layers[name]) for name, one in moments.items()}
