"""The rank rules: which ranks each layer that may be factored gets."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from nnslim.errors import ConfigError, InputError, RankError
from nnslim.maths.knapsack import Choice, choose
from nnslim.maths.lowrank import evbmf_rank, unfolded
from nnslim.methods.tucker.config import TuckerConfig
from nnslim.methods.tucker.edit import chain_macs, chain_parameters, is_transposed, kernel_of
from nnslim.methods.tucker.latency import LatencyTable
from nnslim.methods.tucker.survey import LayerSurvey, Ranks, Survey, survey
from nnslim.network.cost import Cost
from nnslim.network.walk import Layer
from nnslim.surgery.streaming import Tiles
from nnslim.tables import read_table

_ALIGNMENT = 8  # ranks in multiples of 8 suit CPU vectors and tensor cores (odd ranks lose up to 2.3x on an A100)
_POWERS = (1.0, 0.5, 0.25, 0.0)  # exponents of the sensitivities: as measured, flattened, all alike

RankPlan = dict[str, Ranks | None]  # by layer; None: dense


@dataclass(frozen=True)
class Chosen:
    """Ranks of one layer: (R_out, R_in), None for a side that stays whole; or the reason why it stays dense.

    `error` is the predicted relative output error (of the weights, without data), where it is known.
    """

    ranks: Ranks = (None, None)
    reason: str = ""
    error: float | None = None


def choose_ranks(
    network: nn.Module, layers: Mapping[str, Layer], config: TuckerConfig, cost: Cost, tiles: Tiles | None
) -> list[dict[str, Chosen]]:
    """Return the ranks of each layer that may be factored, by the rule of the configuration.

    For a budget with images there are two answers beside the best one, the uniform rank factor of the same cost and one
    between the two: which of them is better shows when they are fitted.

    Args:
        network, config, cost, tiles: see `plan_tucker`. layers: by name, those that may be factored.
    Raises:
        RankError, ConfigError: see `plan_tucker`.
    """
    if config.rank_mode == "plan":
        return [_by_table(layers, config)]
    budget = config.rank_mode == "budget"
    if budget and config.max_drop is not None:
        raise ConfigError(
            "tucker: max_drop is found by a search with calibration images; use nnslim compress -i or NNSlimContext"
        )
    fit = {"samples": config.fit.samples, "damping": config.fit.damping}
    if budget:
        return _Budget(layers, config, cost, survey(network, list(layers), tiles, **fit)).chosen()
    energy = config.rank_mode == "energy"
    surveys = survey(network, list(layers), tiles, **fit, probe=False) if energy else {}
    ranks = {name: _override(one, config) or _by_rule(one, config, surveys.get(name)) for name, one in layers.items()}
    return [{name: Chosen(pair) for name, pair in ranks.items()}]


def _channels(layer: Layer) -> tuple[int, int]:
    return tuple(kernel_of(layer.module).shape[:2])


def _by_rule(layer: Layer, config: TuckerConfig, found: LayerSurvey | None) -> tuple[int, int]:
    outputs, inputs = _channels(layer)
    if found is not None:
        ranks = found.outputs.ranks_for_energy(config.energy or 1.0)
    elif config.rank_mode == "evbmf":
        kernel = kernel_of(layer.module).detach()
        ranks = evbmf_rank(unfolded(kernel, 0)), evbmf_rank(unfolded(kernel, 1))
    else:
        return config.rank(outputs), config.rank(inputs)
    least = config.rank_min or 1
    return config.rounded(max(least, ranks[0]), outputs), config.rounded(max(least, ranks[1]), inputs)


def _override(layer: Layer, config: TuckerConfig) -> tuple[int, int] | None:
    outputs, inputs = _channels(layer)
    for pattern, wanted in config.overrides.items():
        if not layer.matches(pattern):
            continue
        if isinstance(wanted, float):
            return config.rank(outputs, wanted), config.rank(inputs, wanted)
        _check_bounds(layer, wanted, f"override '{pattern}'")
        return wanted
    return None


def _check_bounds(layer: Layer, ranks: tuple[int, int], where: str) -> None:
    for side, rank, channels in zip(("output", "input"), ranks, _channels(layer), strict=True):
        if not 1 <= rank <= channels:
            raise RankError(
                f"tucker: {where} asks for {side} rank {rank} at '{layer.name}', "
                f"which has {channels} {side} channels; use 1..{channels}"
            )


def _by_table(layers: Mapping[str, Layer], config: TuckerConfig) -> dict[str, Chosen]:
    by_alias = {alias: layer for layer in layers.values() for alias in layer.aliases}
    made = {name: Chosen(reason="not in the plan") for name in layers}
    for name, ranks in read_ranks(config.plan).items():
        layer = by_alias.get(name)
        if layer is None and ranks is not None:  # the table also lists layers that are never factored
            raise ConfigError(f"{config.plan}: the network has no layer '{name}' that may be factored")
        if ranks is not None:
            _check_bounds(layer, ranks, f"{config.plan}")
        if layer is not None:
            made[layer.name] = Chosen(reason="dense in the plan") if ranks is None else Chosen(ranks)
    return made


class _Budget:
    """Spends a budget where it costs least: a knapsack over layers, forms and ranks.

    Sensitivities are measured one layer at a time, but errors of many layers do not simply add up. So the knapsack is
    solved with the sensitivities as measured and with flattened ones, and the plan that moves the network's answer
    least, as a whole, comes first; its rivals are the uniform rank factor of the same cost and the plan half-way.
    """

    def __init__(self, layers: Mapping[str, Layer], config: TuckerConfig, cost: Cost, surveys: Survey) -> None:
        self.layers, self.config, self.surveys = layers, config, surveys
        self.name, self.amount = config.budget
        self.price, self.total = _prices(layers, cost, self.name)
        self.fixed = self.total - sum(self.price(layer, None) for layer in layers.values())
        self.budget = (self.amount * self.total if self.amount <= 1 else self.amount) - self.fixed
        self.step = config.rank_multiple if config.rank_multiple > 1 else _ALIGNMENT
        self.least = self.step * -(-(config.rank_min or 1) // self.step)

    def chosen(self) -> list[dict[str, Chosen]]:
        """Return the best plan, then its rivals.

        Raises:
            RankError: the cheapest plan costs more than the budget.
        """
        options = {key: self._options(key) for key in self.layers}
        try:
            plans = [self._knapsack(options, power) for power in (_POWERS if self.surveys.can_judge else (1.0,))]
        except RankError:
            least = self.fixed + sum(min(cost for _, cost, _ in listed) for listed in options.values())
            raise RankError(
                f"tucker: a budget of {self.name}={self.amount:g} cannot be met: dense {self.total:,.4g}, "
                f"cheapest plan {least:,.4g} ({least / self.total:.3f} of it), of which {self.fixed:,.4g} are layers "
                "that are not factored"
            ) from None
        best, rivals = plans[0], []
        if self.surveys.can_judge:
            best = min(plans, key=lambda plan: self.surveys.distance({k: r for k, r in plan.items() if r is not None}))
            uniform = self._uniform()
            if uniform is not None and uniform != best:
                between = self._between(best, uniform)
                rivals = [uniform, *([between] if between not in (None, best, uniform) else [])]
        return [{key: self._noted(key, ranks) for key, ranks in plan.items()} for plan in (best, *rivals)]

    def _noted(self, key: str, ranks: Ranks | None) -> Chosen:
        if ranks is None:
            return Chosen(reason="costs least where it is", error=0.0)
        return Chosen(ranks, error=self.surveys[key].outputs.error(*ranks))

    def _options(self, key: str) -> list[tuple[Ranks | None, float, float]]:
        """Return what can be done with a layer as (ranks, cost, squared error): dense, or any cheaper aligned chain."""
        layer, found = self.layers[key], self.surveys[key].outputs
        dense = self.price(layer, None)
        listed: list[tuple[Ranks | None, float, float]] = [(None, dense, 0.0)]
        outputs, inputs = ([*range(self.least, channels, self.step), None] for channels in _channels(layer))
        for ranks in [(out, in_) for out in outputs for in_ in inputs][:-1]:  # the last pair is the whole layer
            if (cost := self.price(layer, ranks)) < dense:
                listed.append((ranks, cost, found.error(*ranks) ** 2))
        return listed

    def _knapsack(self, options: Mapping[str, list[tuple[Ranks | None, float, float]]], power: float) -> RankPlan:
        """Return the best plan when each layer's sensitivity counts with this power: 1 as measured, 0 all alike."""
        choices = [
            [Choice(cost, self.surveys[key].sensitivity ** power * squared) for _, cost, squared in listed]
            for key, listed in options.items()
        ]
        picks = choose(choices, self.budget)
        return {key: listed[pick][0] for (key, listed), pick in zip(options.items(), picks, strict=True)}

    def _first_within(self, plans: Iterable[Mapping[str, Ranks | None]]) -> RankPlan | None:
        """Return the first plan within the budget, layers dense where a chain would not be cheaper; None if none."""
        for wanted in plans:
            plan = {
                key: ranks if any(ranks or ()) and self.price(layer, ranks) < self.price(layer, None) else None
                for (key, layer), ranks in zip(self.layers.items(), wanted.values(), strict=True)
            }
            if sum(self.price(self.layers[key], ranks) for key, ranks in plan.items()) <= self.budget:
                return plan
        return None

    def _uniform(self) -> RankPlan | None:
        """Return the largest uniform rank factor that the budget allows, None if there is none.

        Transposed convolutions stay dense, as a rank factor leaves them, unless the configuration or the budget asks
        for them.
        """
        aligned = self.config.model_copy(update={"rank_multiple": self.step})

        def plan(factor: float, transposed: bool) -> RankPlan:
            sides = {key: _channels(layer) for key, layer in self.layers.items()}
            return {
                key: (aligned.rank(outputs, factor), aligned.rank(inputs, factor))
                if transposed or not is_transposed(self.layers[key].module)
                else None
                for key, (outputs, inputs) in sides.items()
            }

        allowed = (True,) if self.config.transposed else (False, True)
        return self._first_within(plan(share / 100, open_) for open_ in allowed for share in range(99, 0, -1))

    def _between(self, one: RankPlan, other: RankPlan) -> RankPlan | None:
        """Return the geometric means of the ranks of two plans, scaled to the budget; None if that cannot be met.

        Two plans of one cost and about one error that spend it differently have a better one between them, as the
        error is about convex in the logarithms of the ranks.
        """

        def side(first: int | None, second: int | None, channels: int, percent: int) -> int | None:
            wanted = math.sqrt((first or channels) * (second or channels)) * percent / 100
            rank = max(self.least, self.step * round(wanted / self.step))
            return None if rank >= channels else rank

        def plan(percent: int) -> RankPlan:
            whole = (None, None)
            return {
                key: tuple(map(side, one[key] or whole, other[key] or whole, _channels(layer), (percent,) * 2))
                for key, layer in self.layers.items()
            }

        return self._first_within(plan(percent) for percent in range(200, 0, -1))


def _prices(layers: Mapping[str, Layer], cost: Cost, name: str) -> tuple[Callable[[Layer, Ranks | None], float], float]:
    """Return what a layer costs dense (None) or as a chain, and what the whole dense network costs."""
    if name == "milliseconds":
        table = LatencyTable(cost)
        return (lambda layer, ranks: table.milliseconds(layer.name, layer.module, ranks)), table.total(layers)

    def parameters(layer: Layer, ranks: Ranks | None) -> float:
        dense = sum(p.numel() for p in layer.module.parameters())
        return dense if ranks is None else chain_parameters(layer.module, *ranks)

    def macs(layer: Layer, ranks: Ranks | None) -> float:
        ran = cost.layers[layer.name]
        return ran.macs if ranks is None else chain_macs(layer.module, *ranks, ran.voxels_in, ran.voxels_out)

    return (parameters, cost.parameters) if name == "params" else (macs, cost.macs())


_READ = ("layer", "action", "rank_out", "rank_in")


def read_ranks(path: Path | None) -> dict[str, tuple[int, int] | None]:
    """Return the ranks (R_out, R_in) of each layer in a table, None for a layer that stays dense.

    Raises:
        ConfigError: missing, not a table of ours, or a rank that is no positive number; names the line.
    """
    try:
        table = read_table(Path(path or ""), _READ)
    except InputError as error:
        raise ConfigError(f"plan: {error}") from error
    if table.empty:
        raise ConfigError(f"plan {path} lists no layer")
    found: dict[str, tuple[int, int] | None] = {}
    for number, (layer, action, *ranks) in enumerate(table[list(_READ)].to_numpy().tolist(), start=2):
        where = f"plan {path}, line {number} ({layer})"
        if layer in found:
            raise ConfigError(f"{where}: the layer is there twice")
        if action not in ("tucker", "dense"):
            raise ConfigError(f"{where}: action is 'tucker' or 'dense', found {action!r}")
        if action == "tucker" and not all(rank.isdecimal() and int(rank) > 0 for rank in ranks):
            raise ConfigError(f"{where}: ranks are positive numbers, found {ranks[0]!r} and {ranks[1]!r}")
        found[layer] = (int(ranks[0]), int(ranks[1])) if action == "tucker" else None
    return found
