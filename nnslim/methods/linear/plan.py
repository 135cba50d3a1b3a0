"""Choose the ranks of linear layers, and set their weights from data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from nnslim.errors import ConfigError
from nnslim.maths.knapsack import Choice, choose
from nnslim.methods.base import Decision, OnLayer, Plan, check_patterns, left_dense, relative_error, replaced
from nnslim.methods.linear.config import LinearConfig
from nnslim.methods.linear.edit import LowRankEdit, LowRankLinear
from nnslim.network.cost import Cost
from nnslim.network.walk import LayerIndex, unwrap
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


def plan_linear(network: nn.Module, config: LinearConfig, cost: Cost, tiles: Tiles | None = None) -> Plan:
    """Decide for each linear layer: a rank, or dense with a reason; see `Method.plan`.

    Without tiles, errors are those of the weights.

    Raises:
        ConfigError: the network has no linear layer that may be factored. RankError: the budget cannot be met.
    """
    found = LayerIndex(unwrap(network)).of_type(nn.Linear)
    check_patterns("linear", "linear layer", {"include": config.include, "exclude": config.exclude}, found)
    layers = {layer.name: layer.module for layer in found}
    kept = {layer.name: left_dense(layer, config, cost) for layer in found}
    free = {name: linear for name, linear in layers.items() if not kept[name]}
    if not free:
        raise ConfigError(
            f"linear: none of the network's {len(layers)} linear layers may be factored; convolutions are for tucker"
        )
    if tiles is None:
        spectra = {name: weight_spectrum(linear) for name, linear in free.items()}
    else:
        spectra = output_spectra(network, free, tiles)
    ranks = _within_macs(free, spectra, config, cost) if config.macs is not None else _by_share(free, spectra, config)
    edits, decisions = [], []
    for name, linear in layers.items():
        shape, size = (linear.out_features, linear.in_features), linear.weight.numel()
        macs = cost.layers[name].macs if name in cost.layers else 0
        parameters = sum(p.numel() for p in linear.parameters())
        rank = ranks.get(name)
        if rank is None:
            reason = kept[name] or "would not get cheaper"
            decisions.append(Decision(name, "dense", shape, None, macs, macs, parameters, parameters, reason))
            continue
        edits.append(LowRankEdit(name, rank))
        share = rank * sum(shape)
        counts = (macs, macs // size * share, parameters, parameters - size + share)
        decisions.append(Decision(name, "low_rank", shape, (rank, rank), *counts, error=spectra[name].error(rank)))
    return Plan(tuple(edits), tuple(decisions))


def _cheaper(linear: nn.Linear, rank: int) -> bool:
    return rank * sum(linear.weight.shape) < linear.weight.numel()


def _by_share(
    layers: Mapping[str, nn.Linear], spectra: Mapping[str, OutputSpectrum], config: LinearConfig
) -> dict[str, int]:
    if config.energy is not None:
        wanted = {name: spectra[name].rank_for(config.energy) for name in layers}
    else:
        wanted = {name: config.rank_factor * min(linear.weight.shape) for name, linear in layers.items()}
    ranks = {name: config.rounded(rank) for name, rank in wanted.items()}
    return {name: rank for name, rank in ranks.items() if _cheaper(layers[name], rank)}


def _within_macs(
    layers: Mapping[str, nn.Linear], spectra: Mapping[str, OutputSpectrum], config: LinearConfig, cost: Cost
) -> dict[str, int]:
    """Spend the budget where the squared relative errors of the layers, added up, become smallest."""
    names, offered = list(layers), []
    for name in names:
        linear, calls = layers[name], cost.layers[name].macs / layers[name].weight.numel()
        ranks = range(config.rounded(1), min(linear.weight.shape), config.rank_multiple)
        known, width = [rank for rank in ranks if _cheaper(linear, rank)], sum(linear.weight.shape)
        choices = [Choice(calls * rank * width, spectra[name].error(rank) ** 2) for rank in known]
        offered.append(([*known, None], [*choices, Choice(cost.layers[name].macs, 0.0)]))
    total = config.macs if config.macs > 1 else config.macs * cost.macs()
    paid = cost.macs() - sum(cost.layers[name].macs for name in names)
    found = choose([choices for _, choices in offered], max(0.0, total - paid))
    ranks = {name: known[number] for name, (known, _), number in zip(names, offered, found, strict=True)}
    return {name: rank for name, rank in ranks.items() if rank is not None}


def fit_linear(
    dense: nn.Module, slim: nn.Module, config: Any, cost: Cost, tiles: Tiles, *, on_layer: OnLayer = None, **_: Any
) -> dict[str, float]:
    """Set the factored layers of a slim network from the dense one's outputs on data, in place; see `Method.fit`.

    The best rank-R layer for centred outputs y = W x is U U^T W, with U the R main directions of y (reduced-rank
    regression with W as the regression); the mean of what is lost goes into the bias.
    """
    pairs = replaced(dense, slim, nn.Linear, LowRankLinear)
    spectra = output_spectra(dense, {name: linear for name, (linear, _) in pairs.items()}, tiles)
    errors = {}
    for number, (name, (linear, pair)) in enumerate(pairs.items()):
        rank = pair.first.out_features
        pair.fill(linear, spectra[name].basis[:, :rank], spectra[name].mean)
        errors[name] = spectra[name].error(rank)
        if on_layer is not None:
            on_layer(number + 1, len(pairs))
    return errors


def linear_weight_errors(dense: nn.Module, slim: nn.Module) -> dict[str, float]:
    """Return ||W - W~||_F / ||W||_F of each layer that was factored between the two, 0 for a matrix of zeros."""
    return {
        name: relative_error(linear.weight, pair.matrix())
        for name, (linear, pair) in replaced(dense, slim, nn.Linear, LowRankLinear).items()
    }
