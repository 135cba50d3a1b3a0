"""The rank rules: which ranks each layer that may be factored gets."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import nn

from nnslim.errors import ConfigError, RankError
from nnslim.maths.knapsack import Choice, choose
from nnslim.maths.spectra import evbmf_rank
from nnslim.methods.tucker.chain import chain_macs, chain_parameters
from nnslim.methods.tucker.config import TuckerConfig
from nnslim.methods.tucker.latency import LatencyTable
from nnslim.methods.tucker.layers import is_transposed, kernel_of
from nnslim.methods.tucker.plan_table import read_ranks
from nnslim.methods.tucker.survey import LayerSurvey, Ranks, Survey, survey
from nnslim.network.cost import Cost
from nnslim.network.walk import Layer
from nnslim.surgery.streaming import Tiles

_ALIGNMENT = 8  # ranks in multiples of 8 suit CPU vectors and tensor cores (odd ranks lose up to 2.3x on an A100)

_POWERS = (1.0, 0.5, 0.25, 0.0)  # of the sensitivities: as measured, flattened, all alike


@dataclass(frozen=True)
class Chosen:
    """Ranks of one layer: (R_out, R_in), None for a side that stays whole; or the reason why it stays dense.

    `error` is the predicted relative output error (of the weights, without data), where it is known.
    """

    ranks: tuple[int | None, int | None] = (None, None)
    reason: str = ""
    error: float | None = None


def choose_ranks(
    network: nn.Module, layers: Mapping[str, Layer], config: TuckerConfig, cost: Cost, tiles: Tiles | None
) -> list[dict[str, Chosen]]:
    """Return the ranks of each layer that may be factored, by the rule of the configuration.

    For a budget with images there are two answers beside the best one, the uniform rank factor of the same cost and one
    between the two: which of them is better shows when they are fitted.

    Args:
        network: dense, with weights. layers: by name, those that may be factored.
        config: the rule. cost: of the network. tiles: calibration tiles or None.
    Raises:
        RankError, ConfigError: see `plan_tucker`.
    """
    if config.rank_mode == "budget":
        return _by_budget(network, layers, config, cost, tiles)
    if config.rank_mode == "plan":
        return [_by_table(layers, config)]
    rules: dict[str, Callable[[], dict[str, tuple[int, int]]]] = {
        "energy": lambda: _by_energy(network, layers, config, tiles),
        "evbmf": lambda: _by_evbmf(layers, config),
    }
    made = rules.get(config.rank_mode, lambda: {name: _by_factor(layer, config) for name, layer in layers.items()})()
    return [{name: Chosen(_override(layers[name], config) or ranks) for name, ranks in made.items()}]


def _shape(layer: Layer) -> tuple[int, int]:
    outputs, inputs = kernel_of(layer.module).shape[:2]
    return outputs, inputs


def _by_factor(layer: Layer, config: TuckerConfig) -> tuple[int, int]:
    outputs, inputs = _shape(layer)
    return config.rank(outputs), config.rank(inputs)


def _override(layer: Layer, config: TuckerConfig) -> tuple[int, int] | None:
    outputs, inputs = _shape(layer)
    for pattern, wanted in config.overrides.items():
        if not layer.matches(pattern):
            continue
        if isinstance(wanted, float):
            return config.rank(outputs, wanted), config.rank(inputs, wanted)
        _check_bounds(layer, wanted, f"override '{pattern}'")
        return wanted
    return None


def _check_bounds(layer: Layer, ranks: tuple[int | None, int | None], where: str) -> None:
    for side, rank, channels in zip(("output", "input"), ranks, _shape(layer), strict=True):
        if rank is not None and not 1 <= rank <= channels:
            raise RankError(
                f"tucker: {where} asks for {side} rank {rank} at '{layer.name}', "
                f"which has {channels} {side} channels; use 1..{channels}"
            )


def _by_energy(
    network: nn.Module, layers: Mapping[str, Layer], config: TuckerConfig, tiles: Tiles | None
) -> dict[str, tuple[int, int]]:
    found = _survey(network, layers, config, tiles, probe=False)
    return {
        name: _floored(layers[name], config, found[name].outputs.ranks_for_energy(config.energy or 1.0))
        for name in layers
    }


def _by_evbmf(layers: Mapping[str, Layer], config: TuckerConfig) -> dict[str, tuple[int, int]]:
    made = {}
    for name, layer in layers.items():
        kernel = kernel_of(layer.module)
        ranks = evbmf_rank(kernel.flatten(1)), evbmf_rank(kernel.transpose(0, 1).flatten(1))
        made[name] = _floored(layer, config, ranks)
    return made


def _floored(layer: Layer, config: TuckerConfig, ranks: tuple[int, int]) -> tuple[int, int]:
    outputs, inputs = _shape(layer)
    least = config.rank_min or 1
    return config.rounded(max(least, ranks[0]), outputs), config.rounded(max(least, ranks[1]), inputs)


def _by_table(layers: Mapping[str, Layer], config: TuckerConfig) -> dict[str, Chosen]:
    table = read_ranks(config.plan)
    by_alias = {alias: name for name, layer in layers.items() for alias in layer.aliases}
    made = {name: Chosen(reason="not in the plan") for name in layers}
    for name, ranks in table.items():
        if name not in by_alias:
            if ranks is None:
                continue  # the table also lists layers that are never factored
            raise ConfigError(f"{config.plan}: the network has no layer '{name}' that may be factored")
        layer = layers[by_alias[name]]
        if ranks is not None:
            _check_bounds(layer, ranks, f"{config.plan}")
        made[layer.name] = Chosen(reason="dense in the plan") if ranks is None else Chosen(ranks)
    return made


def _survey(
    network: nn.Module, layers: Mapping[str, Layer], config: TuckerConfig, tiles: Tiles | None, *, probe: bool
) -> Survey:
    order = list(layers)
    return survey(network, order, tiles, samples=config.fit.samples, damping=config.fit.damping, probe=probe)


def _by_budget(
    network: nn.Module, layers: Mapping[str, Layer], config: TuckerConfig, cost: Cost, tiles: Tiles | None
) -> list[dict[str, Chosen]]:
    """Spend a budget where it costs least: a knapsack over layers, forms and ranks.

    Sensitivities are measured one layer at a time, but errors of many layers do not simply add up. So the knapsack is
    solved with the sensitivities as measured and with flattened ones, and the plan that moves the network's answer
    least, as a whole, comes first; its rivals are the uniform rank factor of the same cost and the plan half-way.
    """
    name, amount = config.budget
    if name == "max_drop":
        raise ConfigError(
            "tucker: max_drop is found by a search with calibration images; use nnslim compress -i or NNSlimContext"
        )
    surveys = _survey(network, layers, config, tiles, probe=True)
    price, total = _prices(layers, cost, name)
    fixed = total - sum(price(layer, None) for layer in layers.values())
    budget = (amount * total if amount <= 1 else amount) - fixed
    options = {key: _options(layer, config, price, surveys[key]) for key, layer in layers.items()}
    try:
        plans = [_knapsack(options, surveys, budget, power) for power in (_POWERS if surveys.can_judge else (1.0,))]
    except RankError:
        least = fixed + sum(min(cost for _, cost, _ in listed) for listed in options.values())
        raise RankError(
            f"tucker: a budget of {name}={amount:g} cannot be met: dense {total:,.4g}, cheapest plan {least:,.4g} "
            f"({least / total:.3f} of it), of which {fixed:,.4g} are layers that are not factored"
        ) from None
    rivals = []
    if surveys.can_judge:
        plans.sort(key=lambda plan: surveys.distance({key: ranks for key, ranks in plan.items() if ranks is not None}))
        uniform = _uniform(layers, config, price, budget)
        if uniform is not None and uniform != plans[0]:
            between = _between(layers, config, price, budget, (plans[0], uniform))
            rivals = [uniform, *([between] if between not in (None, plans[0], uniform) else [])]
    return [
        {
            key: Chosen(reason="costs least where it is", error=0.0)
            if ranks is None
            else Chosen(ranks, error=surveys[key].outputs.error(*ranks))
            for key, ranks in plan.items()
        }
        for plan in (plans[0], *rivals)
    ]


def _knapsack(
    options: Mapping[str, list[tuple[Ranks | None, float, float]]],
    surveys: Mapping[str, LayerSurvey],
    budget: float,
    power: float,
) -> dict[str, Ranks | None]:
    """Return the best plan when each layer's sensitivity counts with this power: 1 as measured, 0 all alike."""
    choices = [
        [Choice(cost, surveys[key].sensitivity ** power * squared) for _, cost, squared in listed]
        for key, listed in options.items()
    ]
    picks = choose(choices, budget)
    return {key: listed[pick][0] for (key, listed), pick in zip(options.items(), picks, strict=True)}


def _uniform(
    layers: Mapping[str, Layer],
    config: TuckerConfig,
    price: Callable[[Layer, Ranks | None], float],
    budget: float,
) -> dict[str, Ranks | None] | None:
    """Return the largest uniform rank factor that the budget allows, None if there is none.

    Transposed convolutions stay dense, as a rank factor leaves them, unless the configuration or the budget asks for
    them, too.
    """
    aligned = config.model_copy(update={"rank_multiple": _ALIGNMENT}) if config.rank_multiple == 1 else config
    for transposed in (True,) if config.transposed else (False, True):
        for share in range(99, 0, -1):
            plan: dict[str, Ranks | None] = {}
            for key, layer in layers.items():
                outputs, inputs = _shape(layer)
                ranks = aligned.rank(outputs, share / 100), aligned.rank(inputs, share / 100)
                open_ = transposed or not is_transposed(layer.module)
                plan[key] = ranks if open_ and price(layer, ranks) < price(layer, None) else None
            if sum(price(layers[key], ranks) for key, ranks in plan.items()) <= budget:
                return plan
    return None


def _between(
    layers: Mapping[str, Layer],
    config: TuckerConfig,
    price: Callable[[Layer, Ranks | None], float],
    budget: float,
    plans: tuple[Mapping[str, Ranks | None], Mapping[str, Ranks | None]],
) -> dict[str, Ranks | None] | None:
    """Return the geometric means of the ranks of two plans, scaled to the budget; None if that cannot be met.

    Two plans of one cost and about one error that spend it differently have a better one between them, as the
    error is about convex in the logarithms of the ranks.
    """
    step = config.rank_multiple if config.rank_multiple > 1 else _ALIGNMENT
    least = step * -(-(config.rank_min or 1) // step)
    whole = (None, None)
    for percent in range(200, 0, -1):
        plan: dict[str, Ranks | None] = {}
        for key, layer in layers.items():
            pairs = zip(*(plan_of[key] or whole for plan_of in plans), _shape(layer), strict=True)
            wanted = [
                (math.sqrt((one or channels) * (other or channels)) * percent / 100, channels)
                for one, other, channels in pairs
            ]
            rounded = [(max(least, step * round(rank / step)), channels) for rank, channels in wanted]
            out, in_ = (None if rank >= channels else rank for rank, channels in rounded)
            ranks = (out, in_)
            plan[key] = ranks if ranks != whole and price(layer, ranks) < price(layer, None) else None
        if sum(price(layers[key], ranks) for key, ranks in plan.items()) <= budget:
            return plan
    return None


def _options(
    layer: Layer, config: TuckerConfig, price: Callable[[Layer, Ranks | None], float], found: LayerSurvey
) -> list[tuple[Ranks | None, float, float]]:
    """Return what can be done with one layer as (ranks, cost, squared error): dense, or any cheaper aligned chain."""
    outputs, inputs = _shape(layer)
    step = config.rank_multiple if config.rank_multiple > 1 else _ALIGNMENT
    dense = price(layer, None)
    listed: list[tuple[Ranks | None, float, float]] = [(None, dense, 0.0)]
    first = step * -(-(config.rank_min or 1) // step)
    for out in [*range(first, outputs, step), None]:
        for in_ in [*range(first, inputs, step), None]:
            cost = dense if (out, in_) == (None, None) else price(layer, (out, in_))
            if cost < dense:
                listed.append(((out, in_), cost, found.outputs.error(out, in_) ** 2))
    return listed


def _prices(layers: Mapping[str, Layer], cost: Cost, name: str) -> tuple[Callable[[Layer, Ranks | None], float], float]:
    """Return what a layer costs dense (None) or as a chain, and what the whole dense network costs."""
    if name == "params":
        return (
            lambda layer, ranks: (
                sum(p.numel() for p in layer.module.parameters())
                if ranks is None
                else chain_parameters(layer.module, *ranks)
            )
        ), cost.parameters
    if name == "macs":

        def macs(layer: Layer, ranks: Ranks | None) -> float:
            ran = cost.layers[layer.name]
            return ran.macs if ranks is None else chain_macs(layer.module, *ranks, ran.voxels_in, ran.voxels_out)

        return macs, cost.macs()
    table = LatencyTable(cost)
    return (lambda layer, ranks: table.milliseconds(layer.name, layer.module, ranks)), table.total(layers)
