"""Set the weights of a Tucker-factored network from calibration data, front to back."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from nnslim.maths.fitting import (
    Problem,
    as_rows,
    fit_by_channels,
    fit_tucker,
    make_problem,
    project_kernel,
    solve_dense,
)
from nnslim.maths.lowrank import TuckerFactors
from nnslim.maths.moments import ChannelMoments, LinearView, Moments
from nnslim.methods.tucker.config import TuckerConfig
from nnslim.methods.tucker.layers import TuckerConv, kernel_of
from nnslim.methods.tucker.metric import output_metric
from nnslim.network.cost import Cost
from nnslim.network.replace import replace_layer
from nnslim.network.walk import Layer, LayerIndex
from nnslim.surgery.streaming import Request, Tiles, following_norms, stream_moments


@dataclass(frozen=True)
class FitSettings:
    """How the data are used.

    Attributes:
        samples: positions per layer, over all tiles.
        ridge: pull towards the dense weights, as a share of the mean variance of a layer's input.
        damping: share of the mean output variance that is added to each channel's.
        compensate: also refit layers that stay dense, after the first factored one, to what reaches them.
        memory: bytes that one layer's moments may take; wider layers use channel statistics.
        group: layers that are fitted from one pass over the tiles; more is faster, and a little less exact.
        seed: decides the sampled positions.
    """

    samples: int = 6000
    ridge: float = 1e-3
    damping: float = 1e-2
    compensate: bool = True
    memory: int = 256 * 2**20
    group: int = 1
    seed: int = 0


@dataclass
class _Task:
    name: str
    conv: nn.Module
    chain: TuckerConv | None
    norm: nn.Module | None
    place: Layer

    @property
    def ranks(self) -> tuple[int | None, int | None]:
        last, first = self.chain.last, self.chain.first
        return (None if last is None else last.in_channels), (None if first is None else first.out_channels)


def fit_tucker_network(
    dense: nn.Module,
    slim: nn.Module,
    config: TuckerConfig,
    cost: Cost,
    tiles: Tiles,
    *,
    compensate: bool = True,
    seed: int = 0,
    on_layer: Callable[[int, int], None] | None = None,
) -> dict[str, float]:
    """Set the weights of a slim network's chains from data; see `Method.fit` and `fit_network`."""
    order = [name for name, layer in cost.layers.items() if layer.macs]
    settings = FitSettings(
        samples=config.fit.samples,
        ridge=config.fit.ridge,
        damping=config.fit.damping,
        compensate=compensate,
        memory=config.fit.memory_mb * 2**20,
        group=config.fit.layers_per_pass,
        seed=seed,
    )
    return fit_network(dense, slim, order, tiles, settings, on_layer)


def fit_network(
    dense: nn.Module,
    slim: nn.Module,
    order: Sequence[str],
    tiles: Tiles,
    settings: FitSettings,
    on_layer: Callable[[int, int], None] | None = None,
) -> dict[str, float]:
    """Set the weights of `slim`'s Tucker chains, in place, so that its layers put out what the dense ones do.

    Each layer is fitted to the dense network's outputs from the inputs that the compressed layers before it give.

    Args:
        dense: the dense network, eval mode. slim: the same with chains, from `apply_spec(..., fill=True)`.
        order: names of the convolutions, in order of execution.
        tiles: calibration tiles.
        settings: see there.
        on_layer: called with (layers done, layers in all).
    Returns:
        Relative output error of each factored layer, on the calibration data.
    """
    tasks = _tasks(dense, slim, order, tiles, settings)
    for task in tasks:  # what is not fitted yet stays dense, so that a group sees sound inputs
        if task.chain is not None:
            replace_layer(task.place, copy.deepcopy(task.conv))
    errors: dict[str, float] = {}
    for start in range(0, len(tasks), settings.group):
        group = tasks[start : start + settings.group]
        errors |= _fit_group(dense, slim, group, tiles, settings)
        for task in group:
            if task.chain is not None:
                replace_layer(task.place, task.chain)
        if on_layer is not None:
            on_layer(start + len(group), len(tasks))
    return errors


def _tasks(dense: nn.Module, slim: nn.Module, order: Sequence[str], tiles: Tiles, settings: FitSettings) -> list[_Task]:
    originals, places = LayerIndex(dense), LayerIndex(slim)
    norms = following_norms(dense, next(iter(tiles)).to(next(dense.parameters()).device))
    tasks: list[_Task] = []
    for name in order:
        conv, place = originals[name].module, places[name]
        chain = place.module if isinstance(place.module, TuckerConv) else None
        if LinearView.of(conv) is None or (chain is None and not (tasks and settings.compensate)):
            continue
        tasks.append(_Task(name, conv, chain, originals[norms[name]].module if name in norms else None, place))
    return tasks


def _fit_group(
    dense: nn.Module, slim: nn.Module, group: Sequence[_Task], tiles: Tiles, settings: FitSettings
) -> dict[str, float]:
    requests = []
    for task in group:
        view = LinearView.of(task.conv)
        kind = Moments if view.bytes <= settings.memory else ChannelMoments
        requests.append(Request(task.name, task.conv, kind(view, per_tile=task.norm is not None)))
    stream_moments(dense, slim, tiles, requests, samples=settings.samples, seed=settings.seed)
    errors = {}
    for task, request in zip(group, requests, strict=True):
        if isinstance(request.moments, Moments):
            error = _fit_exactly(task, request.moments, settings)
        else:
            error = _fit_wide(dense, slim, task, request.moments, tiles, settings)
        if error is not None:
            errors[task.name] = error
    return errors


def _problem(kernel: Tensor, moments: Moments, metric: Tensor, settings: FitSettings) -> Problem:
    return make_problem(kernel, moments.view, moments.xx, moments.yx, moments.variance_y, metric, settings.ridge)


def _fit_exactly(task: _Task, moments: Moments, settings: FitSettings) -> float | None:
    metric = output_metric(moments, task.norm, settings.damping)
    problem = _problem(kernel_of(task.conv), moments, metric, settings)
    if task.chain is None:
        kernel = solve_dense(problem)
        weight = kernel_of(task.place.module)
        with torch.no_grad():
            weight.copy_(kernel.reshape(weight.shape))
    else:
        factors = fit_tucker(problem, task.ranks)
        kernel = factors.reconstruct()
        _fill(task, factors)
    if task.norm is None:
        rows = as_rows(kernel, moments.view)
        _set_bias(task, (moments.mean_y - rows @ moments.mean_x).unflatten(0, (moments.view.outputs, -1)).mean(1))
    return None if task.chain is None else factors.error


def _fit_wide(
    dense: nn.Module, slim: nn.Module, task: _Task, moments: ChannelMoments, tiles: Tiles, settings: FitSettings
) -> float | None:
    """Input factor from channel statistics; then output factor and core exactly, from a second pass in rank space."""
    if task.chain is None:
        return None
    metric = output_metric(moments, task.norm, settings.damping)
    kernel = kernel_of(task.conv).detach().cpu().double().flatten(2)
    factors = fit_by_channels(kernel, moments.channels, moments.taps, metric, task.ranks)
    view = replace(moments.view, inputs=factors.in_.shape[1])
    if task.ranks[1] is not None and view.bytes <= settings.memory:
        inner = Moments(view, per_tile=task.norm is not None)
        request = Request(task.name, task.conv, inner, factors.in_)
        stream_moments(dense, slim, tiles, [request], samples=settings.samples, seed=settings.seed)
        prior = project_kernel(kernel, moments.channels, factors.in_)
        found = fit_tucker(_problem(prior, inner, metric, settings), (task.ranks[0], None))
        factors = TuckerFactors(found.out, found.core, factors.in_, found.error)
    _fill(task, factors)
    return factors.error


def _fill(task: _Task, factors: TuckerFactors) -> None:
    shape = tuple(task.conv.kernel_size)
    task.chain.fill(replace(factors, core=factors.core.unflatten(2, shape)), task.conv.bias)


@torch.no_grad()
def _set_bias(task: _Task, bias: Tensor) -> None:
    holder = task.place.module if task.chain is None else (task.chain.last or task.chain.core)
    if holder.bias is not None:
        holder.bias.copy_(bias)
