"""Choose the ranks of linear layers, and set their weights from data."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import nn

from nnslim.errors import ConfigError
from nnslim.maths.knapsack import Choice, choose
from nnslim.methods.base import Decision, Plan, check_patterns, left_dense, relative_error, replaced
from nnslim.methods.linear.config import LinearConfig
from nnslim.methods.linear.edit import LowRankEdit, LowRankLinear
from nnslim.methods.linear.output_spectra import OutputSpectrum, output_spectra, weight_spectrum
from nnslim.network.cost import Cost
from nnslim.network.walk import LayerIndex, unwrap
from nnslim.surgery.streaming import Tiles


def plan_linear(network: nn.Module, config: LinearConfig, cost: Cost, tiles: Tiles | None = None) -> Plan:
    """Decide for each linear layer: a rank, or dense with a reason. Reads only.

    Args:
        network: with the weights of the first fold. config: rule and choice of layers. cost: of it, at its patch.
        tiles: calibration tiles; without them errors are those of the weights.
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
    return rank * (linear.in_features + linear.out_features) < linear.weight.numel()


def _by_share(
    layers: Mapping[str, nn.Linear], spectra: Mapping[str, OutputSpectrum], config: LinearConfig
) -> dict[str, int]:
    ranks = {}
    for name, linear in layers.items():
        if config.energy is not None:
            wanted = spectra[name].rank_for(config.energy)
        else:
            wanted = config.rank_factor * min(linear.in_features, linear.out_features)
        if _cheaper(linear, rank := config.rounded(wanted)):
            ranks[name] = rank
    return ranks


def _within_macs(
    layers: Mapping[str, nn.Linear], spectra: Mapping[str, OutputSpectrum], config: LinearConfig, cost: Cost
) -> dict[str, int]:
    """Spend the budget where the squared relative errors of the layers, added up, become smallest."""
    names, offered = list(layers), []
    for name in names:
        linear, calls = layers[name], cost.layers[name].macs / layers[name].weight.numel()
        ranks = range(config.rounded(1), min(linear.weight.shape), config.rank_multiple)
        known = [rank for rank in ranks if _cheaper(linear, rank)]
        choices = [
            Choice(calls * rank * (linear.in_features + linear.out_features), spectra[name].error(rank) ** 2)
            for rank in known
        ]
        offered.append(([*known, None], [*choices, Choice(cost.layers[name].macs, 0.0)]))
    total = config.macs if config.macs > 1 else config.macs * cost.macs()
    paid = cost.macs() - sum(cost.layers[name].macs for name in names)
    found = choose([choices for _, choices in offered], max(0.0, total - paid))
    ranks = {name: known[number] for name, (known, _), number in zip(names, offered, found, strict=True)}
    return {name: rank for name, rank in ranks.items() if rank is not None}


def fit_linear(
    dense: nn.Module,
    slim: nn.Module,
    config: LinearConfig,
    cost: Cost,
    tiles: Tiles,
    *,
    compensate: bool = True,
    seed: int = 0,
    on_layer: Callable[[int, int], None] | None = None,
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
