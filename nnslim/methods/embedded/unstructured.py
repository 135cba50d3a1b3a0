"""Unstructured pruning by magnitude: zeros in the weights, which make a compressed file smaller and save no time.

PyTorch, OpenVINO and ONNX Runtime compute with dense kernels: a product with a zero takes as long as any other. Whole
filters that are removed (methods `filters` and `sauron`) do save time.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn
from torch.nn.utils import prune

from nnslim.errors import ConfigError, SpecError
from nnslim.network.reached import reached_parameters
from nnslim.network.spec import Edit, register_edit
from nnslim.network.walk import Layer, LayerIndex

_log = logging.getLogger("nnslim")
PRUNABLE = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d, nn.Linear)


def cubic_sparsity(t: float, initial: float, final: float) -> float:
    """Return s(t) = s_f + (s_i - s_f) (1 - t)^3, t held in 0..1 (Zhu and Gupta, arXiv 1710.01878)."""
    t = min(1.0, max(0.0, t))
    left = (1 - t) ** 3  # in this order the ends are exact
    return final * (1 - left) + initial * left


def prune_globally(modules: Sequence[nn.Module], sparsity: float) -> None:
    """Set the smallest weights of all modules together to zero, in place; the parameters stay the same objects.

    Args:
        modules: each once, with a `weight`. sparsity: share of all their weights, 0..1; zeros already there count.
    """
    if not modules or sparsity <= 0:
        return
    weights = [(module, "weight") for module in modules]
    prune.global_unstructured(weights, prune.L1Unstructured, amount=float(sparsity))
    for module, name in weights:
        prune.remove(module, name)


def zero_share(modules: Iterable[nn.Module]) -> float:
    """Return the share of zeros among the weights of modules."""
    weights = [module.weight for module in modules]
    total = sum(weight.numel() for weight in weights)
    return 1 - sum(int(weight.count_nonzero()) for weight in weights) / total if total else 0.0


@register_edit
@dataclass(frozen=True)
class SparseEdit(Edit):
    """Zeros among the weights of some layers. The structure stays, and so do zeros in fine-tuning (`HeldZeros`).

    Attributes:
        layers: names. sparsity: share of all their weights that is zero in the end.
        start: share that is zero before any fine-tuning.
        begin, end: shares of the fine-tuning between which it rises, on the cubic curve.
    """

    layers: list
    sparsity: float
    start: float
    begin: float = 0.0
    end: float = 1.0
    kind: ClassVar[str] = "sparse"

    def apply(self, layers: LayerIndex, *, fill: bool) -> Callable[[], None]:
        """See Edit.apply."""
        modules = self.modules(layers)
        if not fill:
            return lambda: None
        before = [module.weight.detach().clone() for module in modules]
        with torch.no_grad():
            prune_globally(modules, self.start)

        def undo() -> None:
            with torch.no_grad():
                for module, weight in zip(modules, before, strict=True):
                    module.weight.copy_(weight)

        return undo

    def modules(self, layers: LayerIndex) -> list[nn.Module]:
        """Return the layers themselves.

        Raises:
            SpecError: one is missing, or has no weight to prune.
        """
        found = [layers[name].module for name in self.layers]
        for name, module in zip(self.layers, found, strict=True):
            if not isinstance(module, PRUNABLE):
                raise SpecError(
                    f"layer '{name}' is {type(module).__name__}; zeros are for convolutions and linear layers"
                )
        return found

    def held(self, layers: LayerIndex) -> HeldZeros:
        """See Edit.held: zeros stay, and their share rises."""
        return HeldZeros(self, self.modules(layers))

    def at(self, share: float) -> float:
        """Return the sparsity due after a share of the fine-tuning."""
        if share < self.begin:
            return self.start
        return cubic_sparsity((share - self.begin) / max(self.end - self.begin, 1e-9), self.start, self.sparsity)


def reached_layers(layers: Sequence[Layer], network: nn.Module, shape: Sequence[int]) -> list[str]:
    """Return the names of those layers whose weights the output of a network depends on; others are logged.

    Heads of deep supervision are left out, too: they are not used, so their zeros would count and help nobody.

    Args:
        shape: (1, C, *patch) of the network's input.
    Raises:
        ConfigError: there is none.
    """
    alive = set(reached_parameters(network, shape).names)
    live = [layer.name for layer in layers if any(f"{alias}.weight" in alive for alias in layer.aliases)]
    never = set(reached_parameters(network, shape, training=True).dead)
    if dead := [layer.name for layer in layers if f"{layer.name}.weight" in never]:
        _log.warning("sparsity leaves out %d layer(s) that the output does not depend on: %s", len(dead), dead[:3])
    if not live:
        raise ConfigError("embedded: sparsity is asked for, but no layer with weights is reached")
    return live


class HeldZeros:
    """See `Held`: keeps the zeros of a network that learns, and adds those that its spec asks for.

    Attributes:
        edit: what the spec says. modules: the layers. masks: False at zeros. share: of zeros.
    """

    def __init__(self, edit: SparseEdit, modules: Sequence[nn.Module]) -> None:
        self.edit, self.modules = edit, list(modules)
        self._take()

    def _take(self) -> None:
        self.masks = [module.weight.detach() != 0 for module in self.modules]
        self.share = zero_share(self.modules)

    @torch.no_grad()
    def hold(self) -> None:
        """Set the zeros back after an optimiser's step, since its momentum moves them."""
        for module, mask in zip(self.modules, self.masks, strict=True):
            module.weight.masked_fill_(~mask, 0)

    @torch.no_grad()
    def advance(self, share: float) -> None:
        """Prune to what is due after a share of the fine-tuning; never gives weights back."""
        due = self.edit.at(share)
        if due > self.share:
            prune_globally(self.modules, due)
            self._take()
            _log.info("sparsity %.3f of %d layers; zeros save no time", self.share, len(self.modules))
