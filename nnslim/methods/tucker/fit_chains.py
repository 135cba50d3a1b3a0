"""Set the weights of a Tucker-factored network from calibration data, front to back."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
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
from nnslim.methods.base import OnLayer
from nnslim.methods.tucker.config import FitConfig, TuckerConfig
from nnslim.methods.tucker.edit import TuckerConv, kernel_of
from nnslim.methods.tucker.survey import output_metric
from nnslim.network.cost import Cost
from nnslim.network.walk import Layer, LayerIndex, replace_layer
from nnslim.running.machine import available_bytes
from nnslim.surgery.in_step import InStep
from nnslim.surgery.streaming import Request, Tiles, following_norms, stream_moments


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

    def fill(self, factors: TuckerFactors) -> None:
        shape = tuple(self.conv.kernel_size)
        self.chain.fill(replace(factors, core=factors.core.unflatten(2, shape)), self.conv.bias)

    @torch.no_grad()
    def set_bias(self, bias: Tensor) -> None:
        holder = self.place.module if self.chain is None else (self.chain.last or self.chain.core)
        if holder.bias is not None:
            holder.bias.copy_(bias)


def fit_tucker_network(
    dense: nn.Module,
    slim: nn.Module,
    config: TuckerConfig,
    cost: Cost,
    tiles: Tiles,
    *,
    compensate: bool = True,
    seed: int = 0,
    on_layer: OnLayer = None,
) -> dict[str, float]:
    """Set the weights of a slim network's Tucker chains, in place, so that its outputs are those of the dense layers.

    Each layer is fitted to the dense network's outputs from the inputs that the compressed layers before it give; see
    `Method.fit`.

    Args:
        dense: eval mode. slim: the same with chains, from `apply_spec(..., fill=True)`.
        compensate: also refit layers that stay dense, after the first factored one, to what reaches them.
        seed: decides the sampled positions.
    """
    fitter = _Fitter(dense, slim, tiles, config.fit, seed)
    tasks = fitter.tasks([name for name, layer in cost.layers.items() if layer.macs], compensate)
    for task in tasks:  # what is not fitted yet stays dense, so that a group sees sound inputs
        if task.chain is not None:
            replace_layer(task.place, copy.deepcopy(task.conv))
    errors: dict[str, float] = {}
    with fitter.in_step(tasks):
        for start in range(0, len(tasks), config.fit.layers_per_pass):
            group = tasks[start : start + config.fit.layers_per_pass]
            errors |= fitter.fit(group)
            for task in group:
                if task.chain is not None:
                    replace_layer(task.place, task.chain)
                    fitter.passes.replace(task.name, task.chain)
            if on_layer is not None:
                on_layer(start + len(group), len(tasks))
    return errors


def _free_bytes(device: torch.device) -> int | None:
    """Return how much memory of the device is free; None if unknown."""
    if device.type != "cuda":
        return available_bytes()
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + kept


@dataclass
class _Fitter:
    dense: nn.Module
    slim: nn.Module
    tiles: Tiles
    settings: FitConfig
    seed: int
    passes: InStep | None = None

    def in_step(self, tasks: Sequence[_Task]) -> InStep:
        """Return the passes that these tasks are fitted from, front to back, while half of the free memory suffices."""
        convs, device = {task.name: task.conv for task in tasks}, next(self.dense.parameters()).device
        least = (_free_bytes(device) or 0) // 2

        def enough() -> bool:
            return (_free_bytes(device) or math.inf) > least

        options = {"samples": self.settings.samples, "seed": self.seed, "enough": enough}
        self.passes = InStep(self.dense, self.slim, self.tiles, convs, **options)
        return self.passes

    def tasks(self, order: Sequence[str], compensate: bool) -> list[_Task]:
        originals, places = LayerIndex(self.dense), LayerIndex(self.slim)
        norms = following_norms(self.dense, next(iter(self.tiles)).to(next(self.dense.parameters()).device))
        found: list[_Task] = []
        for name in order:
            conv, place = originals[name].module, places[name]
            chain = place.module if isinstance(place.module, TuckerConv) else None
            if LinearView.of(conv) is not None and (chain is not None or (found and compensate)):
                norm = originals[norms[name]].module if name in norms else None
                found.append(_Task(name, conv, chain, norm, place))
        return found

    def fit(self, group: Sequence[_Task]) -> dict[str, float]:
        """Fit some layers from one pass over the tiles; return the errors of those that are factored."""
        requests = []
        for task in group:
            view = LinearView.of(task.conv)
            kind = Moments if self._fits(view) else ChannelMoments
            requests.append(Request(task.name, task.conv, kind(view, per_tile=task.norm is not None)))
        self._stream(requests)
        errors = {}
        for task, request in zip(group, requests, strict=True):
            fit = self._exactly if isinstance(request.moments, Moments) else self._wide
            error = fit(task, request.moments)
            if error is not None:
                errors[task.name] = error
        return errors

    def _fits(self, view: LinearView) -> bool:
        return view.bytes <= self.settings.memory_mb * 2**20

    def _stream(self, requests: Sequence[Request]) -> None:
        if rest := self.passes.fill(requests):
            samples, seed = self.settings.samples, self.seed
            stream_moments(self.dense, self.slim, self.tiles, rest, samples=samples, seed=seed)

    def _problem(self, kernel: Tensor, moments: Moments, metric: Tensor) -> Problem:
        ridge = self.settings.ridge
        return make_problem(kernel, moments.view, moments.xx, moments.yx, moments.variance_y, metric, ridge)

    def _exactly(self, task: _Task, moments: Moments) -> float | None:
        metric = output_metric(moments, task.norm, self.settings.damping)
        problem = self._problem(kernel_of(task.conv), moments, metric)
        if task.chain is None:
            kernel = solve_dense(problem)
            weight = kernel_of(task.place.module)
            with torch.no_grad():
                weight.copy_(kernel.reshape(weight.shape))
        else:
            factors = fit_tucker(problem, task.ranks)
            kernel = factors.reconstruct()
            task.fill(factors)
        if task.norm is None:
            rows = as_rows(kernel, moments.view)
            task.set_bias((moments.mean_y - rows @ moments.mean_x).unflatten(0, (moments.view.outputs, -1)).mean(1))
        return None if task.chain is None else factors.error

    def _wide(self, task: _Task, moments: ChannelMoments) -> float | None:
        """Fit the input factor to channel statistics; then, from a second pass in rank space, the others exactly."""
        if task.chain is None:
            return None
        metric = output_metric(moments, task.norm, self.settings.damping)
        kernel = kernel_of(task.conv).detach().cpu().double().flatten(2)
        factors = fit_by_channels(kernel, moments.channels, moments.taps, metric, task.ranks)
        view = replace(moments.view, inputs=factors.in_.shape[1])
        if task.ranks[1] is not None and self._fits(view):
            inner = Moments(view, per_tile=task.norm is not None)
            self._stream([Request(task.name, task.conv, inner, factors.in_)])
            prior = project_kernel(kernel, moments.channels, factors.in_)
            found = fit_tucker(self._problem(prior, inner, metric), (task.ranks[0], None))
            factors = TuckerFactors(found.out, found.core, factors.in_, found.error)
        task.fill(factors)
        return factors.error
