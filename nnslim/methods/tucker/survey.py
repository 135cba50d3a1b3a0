"""Survey, once, the error of each pair of ranks at each layer, and what such an error costs the network's answer."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nnslim.maths.fitting import fit_by_channels, whitened
from nnslim.maths.lowrank import Spectrum
from nnslim.maths.moments import ChannelMoments, LinearView, Moments
from nnslim.methods.base import OnLayer
from nnslim.methods.tucker.edit import kernel_of
from nnslim.network.walk import LayerIndex
from nnslim.running.kept_models import network_fingerprint
from nnslim.surgery.streaming import Request, Tiles, following_norms, stream_moments


def output_metric(moments: Moments | ChannelMoments, norm: nn.Module | None, damping: float) -> Tensor:
    """Return the metric of a layer's outputs, (O, O): each channel in units of its standard deviation.

    Instance norm divides each channel by its deviation and multiplies it by its affine weight, so an error of the
    channel reaches the next layers with that factor. Without a norm all channels count alike. The damping keeps
    channels that hardly vary (dead ones) from dominating the fit.
    """
    view = moments.view
    variance = moments.variance_y.unflatten(0, (view.outputs, -1)).mean(1)
    if norm is None:
        return torch.eye(view.outputs, dtype=torch.float64) / variance.mean().clamp(min=1e-30).sqrt()
    weight = torch.ones(view.outputs) if norm.weight is None else norm.weight.detach().cpu()
    scale = (variance + damping * variance.mean() + norm.eps).rsqrt()
    return torch.diag(weight.double().abs().clamp(min=1e-2) * scale)


_PROBE_ERROR = 0.1  # squared relative error of a probe: large enough to be seen, small enough to be local
_PROBE_TILES = 4
_KEPT = 1 << 24  # values of one tile's logits that are kept rather than computed again


Ranks = tuple[int | None, int | None]


@dataclass(frozen=True)
class LayerSurvey:
    """What is known of one layer.

    Attributes:
        weights: error of the weights for each pair of ranks.
        outputs: error of the outputs, in the units of `output_metric`; the same as `weights` without data.
        sensitivity: what one unit of squared relative output error costs in the network's answer; 1 without data.
        approximate: ranks -> kernel (O, I, taps) of the chain with those ranks, from channel statistics; None without
            data.
    """

    weights: Spectrum
    outputs: Spectrum
    sensitivity: float = 1.0
    approximate: Callable[[Ranks], Tensor] | None = None


class Survey(dict[str, LayerSurvey]):
    """Surveys by layer name, and a judge of whole plans where there are data."""

    def __init__(self, layers: Mapping[str, LayerSurvey], prober: _Prober | None = None) -> None:
        super().__init__(layers)
        self._prober = prober

    @property
    def can_judge(self) -> bool:
        """Whether there are data to judge plans on."""
        return self._prober is not None

    def distance(self, ranks: Mapping[str, Ranks]) -> float:
        """Return how far the network's answer moves if these layers are factored together.

        Errors of many layers do not simply add up; this sees what they do together. It takes one pass over a few tiles.
        """
        if self._prober is None:
            return 0.0
        known = {name: self[name].approximate for name in ranks}
        return self._prober.divergence({name: make(ranks[name]) for name, make in known.items() if make is not None})


def survey(
    network: nn.Module,
    names: Sequence[str],
    tiles: Tiles | None,
    *,
    samples: int = 4000,
    seed: int = 0,
    damping: float = 1e-2,
    probe: bool = True,
    on_step: OnLayer = None,
) -> Survey:
    """Survey layers of a dense network, in one pass over the tiles and one short probe per layer.

    The same survey of the same weights is made once where tiles keep what is `known`, so that a search over budgets
    costs one.

    Args:
        network: eval mode; not modified. names: convolutions without groups.
        tiles: calibration tiles; None surveys the weights alone.
        samples, damping: as in `FitConfig`. probe: measure the sensitivities.
    """
    known = getattr(tiles, "known", {})
    key = (network_fingerprint(network), tuple(names), samples, seed, damping, probe)
    if key not in known:
        known[key] = _survey(network, names, tiles, samples, seed, damping, probe, on_step)
    return known[key]


def _survey(
    network: nn.Module,
    names: Sequence[str],
    tiles: Tiles | None,
    samples: int,
    seed: int,
    damping: float,
    probe: bool,
    on_step: OnLayer,
) -> Survey:
    layers = LayerIndex(network)
    kernels = {name: kernel_of(layers[name].module).detach().cpu().double().flatten(2) for name in names}
    plain = {name: Spectrum.of(kernel) for name, kernel in kernels.items()}
    if tiles is None:
        return Survey({name: LayerSurvey(plain[name], plain[name]) for name in names})
    norms = following_norms(network, next(iter(tiles)).to(next(network.parameters()).device))
    requests = []
    for name in names:
        conv = layers[name].module
        if (view := LinearView.of(conv)) is not None:
            requests.append(Request(name, conv, ChannelMoments(view, per_tile=name in norms)))
    stream_moments(network, network, tiles, requests, samples=samples, seed=seed)
    moments = {request.layer: request.moments for request in requests}
    found = {}
    prober = _Prober(network, tiles) if probe else None
    for number, name in enumerate(names, start=1):
        found[name] = LayerSurvey(plain[name], plain[name])  # stays for overlapping transposed convolutions
        if name in moments:
            norm = layers[norms[name]].module if name in norms else None
            outputs, approximate = _on_data(kernels[name], moments[name], output_metric(moments[name], norm, damping))
            worth = 1.0 if prober is None else prober.sensitivity(name, outputs, approximate)
            found[name] = LayerSurvey(plain[name], outputs, worth, approximate)
        if on_step is not None:
            on_step(number, len(names))
    return Survey(found, prober)


def _on_data(kernel: Tensor, moments: ChannelMoments, metric: Tensor) -> tuple[Spectrum, Callable[[Ranks], Tensor]]:
    """Return the errors of the outputs, and what gives the kernel of a chain."""
    channels, taps = moments.channels, moments.taps

    def approximate(ranks: Ranks) -> Tensor:
        return fit_by_channels(kernel, channels, taps, metric, ranks).reconstruct()

    return Spectrum.of(whitened(kernel, channels, taps, metric)[0]), approximate


def _probe_ranks(spectrum: Spectrum) -> tuple[int, int]:
    """Return ranks of about the same share on both sides, with a squared error nearest to the probe's."""
    outputs, inputs = (size - 1 for size in spectrum.squared_error.shape)
    shares = [(max(1, round(outputs * s / 40)), max(1, round(inputs * s / 40))) for s in range(1, 41)]
    return min(shares, key=lambda ranks: abs(float(spectrum.squared_error[ranks]) - _PROBE_ERROR))


class _Prober:
    """Measures how far the network's answer moves when one layer's kernel is replaced."""

    def __init__(self, network: nn.Module, tiles: Tiles) -> None:
        self._dense = network
        self._twin = copy.deepcopy(network)
        self._layers = LayerIndex(self._twin)
        self._device = next(network.parameters()).device
        self._tiles, self._picked = tiles, range(0, len(tiles), max(1, len(tiles) // _PROBE_TILES))[:_PROBE_TILES]
        self._wanted: dict[int, Tensor] = {}  # the dense answers, half precision, as far as they are small

    def sensitivity(self, name: str, outputs: Spectrum, approximate: Callable[[Ranks], Tensor]) -> float:
        """Return what one unit of squared relative output error of a layer costs in the network's answer."""
        ranks = _probe_ranks(outputs)
        squared = max(float(outputs.squared_error[ranks]), 1e-6)
        return max(self.divergence({name: approximate(ranks)}), 1e-9) / squared

    @torch.inference_mode()
    def divergence(self, kernels: Mapping[str, Tensor]) -> float:
        """Return the mean `answer_distance` over the tiles with these layers' kernels replaced."""
        saved = {}
        for name, kernel in kernels.items():
            module = self._layers[name].module
            saved[name] = module.weight.detach().clone()
            view = kernel_of(module)
            view.copy_(kernel.reshape(view.shape))
        try:
            total, picked = 0.0, self._picked
            for number, tile in zip(picked, itertools.islice(self._tiles, 0, picked.stop, picked.step), strict=True):
                tile = tile.to(self._device)
                total += answer_distance(self._twin(tile), self._answer(number, tile))
            return total / len(picked)
        finally:
            for name, weight in saved.items():
                self._layers[name].module.weight.copy_(weight)

    def _answer(self, number: int, tile: Tensor) -> Tensor:
        if number not in self._wanted:
            logits = self._dense(tile)
            if logits.numel() > _KEPT:
                return logits
            self._wanted[number] = logits.half()
        return self._wanted[number].float()


def answer_distance(found: Tensor, wanted: Tensor) -> float:
    """Return how far logits are from the wanted ones: one minus soft Dice per class, over the wanted one's own.

    Both are taken as softmax probabilities; classes count alike, so that a small organ weighs as much as a large one.

    Args:
        found, wanted: (B, C, *spatial) logits; a single channel, and regions, are close enough by sigmoid.
    """
    p, q = (x.float().softmax(1) if x.shape[1] > 1 else x.float().sigmoid() for x in (found, wanted))
    axes = [0, *range(2, p.ndim)]
    distance = (p - q).square().sum(axes) / (p.square() + q.square()).sum(axes).clamp(min=1e-6)
    return float(distance.mean())
