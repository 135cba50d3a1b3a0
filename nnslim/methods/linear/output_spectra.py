"""Main directions of the outputs of linear layers, from streamed second moments in float64."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from nnslim.surgery.folding import MapMoments
from nnslim.surgery.streaming import Tiles, run_hooked


@dataclass(frozen=True)
class OutputSpectrum:
    """Variance of the outputs W x of one layer, without the bias, by direction.

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


def output_spectra(network: nn.Module, layers: Mapping[str, nn.Linear], tiles: Tiles) -> dict[str, OutputSpectrum]:
    """Return the spectrum of each layer over all rows of all tiles, from one pass; rows are not kept.

    Args:
        network: in eval mode. layers: some of its linear layers, by name; those that no pass reaches get that of
            their weights. tiles: calibration tiles.
    """
    found: dict[str, MapMoments] = {}

    def add(name: str, linear: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        rows = inputs[0].detach().flatten(0, -2).double()
        made = MapMoments.of_rows(rows if _widens(linear) else rows @ linear.weight.detach().double().T)
        found[name] = found[name] + made if name in found else made

    run_hooked(network, tiles, before={name: partial(add, name) for name in layers})
    return {
        name: _spectrum(linear, found[name]) if name in found else weight_spectrum(linear)
        for name, linear in layers.items()
    }


def _widens(linear: nn.Module) -> bool:
    """Return whether the inputs, rather than the outputs, are summed: of the narrower, 8 * min(I, O)^2 bytes."""
    return linear.in_features < linear.out_features


def _spectrum(linear: nn.Linear, moments: MapMoments) -> OutputSpectrum:
    values, vectors = torch.linalg.eigh(moments.covariance)
    values, vectors = values.flip(0).clamp_min(0), vectors.flip(1)
    if not _widens(linear):
        return OutputSpectrum(vectors, values, moments.mean)
    weight = linear.weight.detach().double()
    left, strengths, _ = torch.linalg.svd(weight @ (vectors * values.sqrt()), full_matrices=False)
    return OutputSpectrum(left, strengths.square(), weight @ moments.mean)
