"""Remove channels from layers: new, smaller tensors in the same layer objects and in the optimiser; what is left."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from nnslim.errors import SpecError
from nnslim.network.cost import Counts, measure_cost
from nnslim.network.spec import Edit, forget_spec, register_edit
from nnslim.network.walk import LayerIndex, deep_supervision
from nnslim.surgery.channels import NORMS, Kept

NARROWABLE = (nn.modules.conv._ConvNd, *NORMS)
Axes = tuple[int, int | None]  # on which axes of a tensor the outputs and the inputs lie; None: nowhere


@dataclass(frozen=True)
class Cut:
    """One parameter that was replaced by a part of itself.

    Attributes:
        new: the smaller one.
        take: gives a copy of the part that stays of any tensor of the old one's shape.
    """

    new: nn.Parameter
    take: Callable[[Tensor], Tensor]


def narrow_layers(layers: LayerIndex, kept: Mapping[str, Kept]) -> dict[nn.Parameter, Cut]:
    """Keep only some channels of layers, in place; every alias sees it, since the layer objects stay.

    Args:
        layers: of the network. kept: by layer, see `ChannelMap.narrowing`.
    Returns:
        old parameter -> its cut, for `narrow_optimizer`.
    Raises:
        SpecError: a layer is neither a convolution nor a norm; nothing was changed.
    """
    for name in kept:
        if not isinstance(layers[name].module, NARROWABLE):
            kind = type(layers[name].module).__name__
            raise SpecError(f"layer '{name}': only convolutions and norms have channels to remove, found {kind}")
    cuts: dict[nn.Parameter, Cut] = {}
    for name, sides in kept.items():
        layer = layers[name].module
        old = {key: parameter for key, parameter in layer._parameters.items() if parameter is not None}
        outputs, inputs = (None if side is None else len(side) for side in (sides.outputs, sides.inputs))
        _change(layer, outputs, inputs, partial(_part, kept=sides))
        for key, parameter in old.items():
            cut = cuts[parameter] = Cut(getattr(layer, key), partial(_part, axes=axes_of(layer, key), kept=sides))
            if parameter.grad is not None:
                cut.new.grad = cut.take(parameter.grad)
    return cuts


def axes_of(layer: nn.Module, parameter: str) -> Axes:
    """Return the axes of a layer's parameter."""
    if parameter != "weight" or isinstance(layer, NORMS) or layer.groups != 1:
        return 0, None
    return (1, 0) if layer.transposed else (0, 1)


def _part(tensor: Tensor, axes: Axes, kept: Kept) -> Tensor:
    for axis, indices in zip(axes, (kept.outputs, kept.inputs), strict=True):
        if axis is not None and indices is not None:
            tensor = tensor.index_select(axis, torch.tensor(indices, device=tensor.device))
    return tensor.clone()


def _change(
    layer: nn.Module, outputs: int | None, inputs: int | None, change: Callable[[Tensor, Axes], Tensor]
) -> Callable[[], None]:
    """Give a layer changed tensors and other widths (None leaves a side); return an undo."""
    grouped = getattr(layer, "groups", 1) != 1
    widths = {"out_channels": outputs, "num_features": outputs, "in_channels": outputs if grouped else inputs}
    widths["groups"] = outputs if grouped else None
    before = {name: value for name, value in vars(layer).items() if name in widths}
    changed: dict[str, Any] = {name: widths[name] for name in before if widths[name] is not None}
    before |= {"_parameters": dict(layer._parameters), "_buffers": dict(layer._buffers)}
    for name, parameter in before["_parameters"].items():
        if parameter is not None:
            made = change(parameter.detach(), axes_of(layer, name))
            changed[name] = nn.Parameter(made, requires_grad=parameter.requires_grad)
    for name in ("running_mean", "running_var"):
        if before["_buffers"].get(name) is not None:
            changed[name] = change(before["_buffers"][name], (0, None))
    for name, value in changed.items():
        setattr(layer, name, value)
    return partial(vars(layer).update, before)


def narrow_optimizer(optimizer: torch.optim.Optimizer, cuts: Mapping[nn.Parameter, Cut]) -> None:
    """Put the new parameters where the old ones were, and cut their state alike.

    Works for any optimiser: a state tensor of the old parameter's shape (SGD's momentum, Adam's moments) is cut as the
    parameter was, everything else (step counts) is kept. Groups keep their order.
    """
    for group in optimizer.param_groups:
        group["params"] = [cuts[old].new if old in cuts else old for old in group["params"]]
    for old, cut in cuts.items():
        if old in optimizer.state:
            optimizer.state[cut.new] = {
                key: cut.take(value) if torch.is_tensor(value) and value.shape == old.shape else value
                for key, value in optimizer.state.pop(old).items()
            }


def widths_of(network: nn.Module) -> dict[str, tuple[int, int | None]]:
    """Return (outputs, inputs) of each convolution and (channels, None) of each norm, by canonical name."""
    return {layer.name: _widths(layer.module) for layer in LayerIndex(network).of_type(*NARROWABLE)}


def _widths(layer: nn.Module) -> tuple[int, int | None]:
    return (layer.num_features, None) if isinstance(layer, NORMS) else (layer.out_channels, layer.in_channels)


def narrow_edits(before: Mapping[str, tuple[int, int | None]], network: nn.Module) -> tuple[NarrowEdit, ...]:
    """Return the edits that lead from the widths before to those of the network."""
    now = widths_of(network)
    return tuple(NarrowEdit(name, *now[name]) for name, width in before.items() if now[name] != width)


def resize(layer: nn.Module, outputs: int | None, inputs: int | None) -> Callable[[], None]:
    """Give a layer other widths, with tensors of zeros; return an undo."""

    def empty(tensor: Tensor, axes: Axes) -> Tensor:
        shape = list(tensor.shape)
        for axis, width in zip(axes, (outputs, inputs), strict=True):
            if axis is not None and width is not None:
                shape[axis] = width
        return tensor.new_zeros(shape)

    return _change(layer, outputs, inputs, empty)


@register_edit
@dataclass(frozen=True)
class NarrowEdit(Edit):
    """Give one layer the widths that are left after channels were removed.

    Structure only: which channels stayed is in the weights. Readers and norms of a layer have edits of their own.

    Attributes:
        layer: any of the layer's names.
        outputs: output channels, or the channels of a norm. inputs: input channels, None for a norm.
    """

    layer: str
    outputs: int
    inputs: int | None
    kind: ClassVar[str] = "narrow"

    def apply(self, layers: LayerIndex, *, fill: bool) -> Callable[[], None]:
        """See Edit.apply. With `fill` the first channels stay: a structure to plan on, not a choice."""
        layer = layers[self.layer].module
        if not isinstance(layer, NARROWABLE):
            raise SpecError(f"layer '{self.layer}': expected a convolution or norm, found {type(layer).__name__}")
        for wanted, width, side in zip((self.outputs, self.inputs), _widths(layer), ("outputs", "inputs"), strict=True):
            if (wanted is None) != (width is None) or (wanted is not None and not 1 <= wanted <= width):
                raise SpecError(f"layer '{self.layer}': {side} {wanted} asked for, it has {width}")
        old = dict(layer._parameters)
        undo = resize(layer, self.outputs, self.inputs)
        for name, parameter in layer.named_parameters() if fill else ():
            parameter.data.copy_(old[name][tuple(slice(size) for size in parameter.shape)])
        return undo


@register_edit
@dataclass(frozen=True)
class ElasticEdit(Edit):
    """Let the network take the widths of whatever state dict it loads.

    Folds that were pruned apart, and the best and the last checkpoint of one, have widths of their own, and nnU-Net
    builds one network for all of them from one plans file, then loads the weights of each. A network with this edit
    changes its widths at `load_state_dict`. Any other difference is torch's error, as ever.
    """

    kind: ClassVar[str] = "elastic"

    def apply(self, layers: LayerIndex, *, fill: bool) -> Callable[[], None]:
        """See Edit.apply; changes no layer."""
        # torch knows no public hook of this kind before 2.5
        handle = layers.root._register_load_state_dict_pre_hook(fit_widths, with_module=True)
        return handle.remove


def fit_widths(network: nn.Module, state_dict: Mapping[str, Any], prefix: str = "", *_: Any) -> list[str]:
    """Give the layers of a network the widths that a state dict has, with weights that are not set yet.

    Args:
        network: plain. state_dict: under any alias of each layer. prefix: of its keys.
    Returns:
        Names of the layers that changed.
    """
    changed = []
    for layer in LayerIndex(network).of_type(*NARROWABLE):
        given = [state_dict[key] for alias in layer.aliases if (key := f"{prefix}{alias}.weight") in state_dict]
        weight = layer.module.weight
        if not given or weight is None or given[0].dim() != weight.dim():
            continue
        axes = axes_of(layer.module, "weight")
        old, new = ([None if at is None else one.shape[at] for at in axes] for one in (weight, given[0]))
        if new != old:
            resize(layer.module, *new)
            changed.append(layer.name)
    return changed


def as_base(network: nn.Module) -> nn.Module:
    """Return a copy of a pruned network that keeps its widths but carries no spec: a base for other edits."""
    base = copy.deepcopy(network)
    base._load_state_dict_pre_hooks.clear()  # the elastic edit's
    forget_spec(base)
    return base


class CostTable:
    """Counts of a network as it is, and as it would be with fewer channels.

    Heads of deep supervision, which do not run at inference, are in neither count.

    Attributes:
        macs, parameters, counts: of the network as it is. layer_macs: by layer, convention "macs".
        shapes: (outputs, inputs, *kernel) and parameters of each convolution.
    """

    def __init__(self, network: nn.Module, shape: Sequence[int]) -> None:
        """Count once a plain network without hooks, on (1, C, *patch); reads only."""
        with deep_supervision(network, False):
            cost = measure_cost(network, shape)
        self.layer_macs = {name: layer.macs for name, layer in cost.layers.items()}
        self.macs, self.parameters = sum(self.layer_macs.values()), cost.parameters
        self.counts = Counts(self.parameters, self.macs, cost.macs("fvcore"))
        layers = LayerIndex(network)
        self._layers = {name: layers[name].module for name in cost.layers}
        self.shapes = {
            name: ((conv.out_channels, conv.in_channels, *conv.kernel_size), sum(p.numel() for p in conv.parameters()))
            for name, conv in self._layers.items()
            if isinstance(conv, nn.modules.conv._ConvNd)
        }

    def after(self, kept: Mapping[str, Kept]) -> tuple[int, int]:
        """Return MACs and parameters once only the channels of `kept` are left, see `ChannelMap.narrowing`."""
        macs, parameters = self.macs, self.parameters
        for name, sides in kept.items():
            layer = self._layers.get(name)
            if layer is None or layer.weight is None:
                continue
            share = 1.0
            if sides.outputs is not None:
                share = len(sides.outputs) / getattr(layer, "out_channels", getattr(layer, "num_features", 1))
                if layer.bias is not None:
                    parameters += len(sides.outputs) - layer.bias.numel()
            if sides.inputs is not None:
                share = share * len(sides.inputs) / layer.in_channels
            macs += round(self.layer_macs[name] * share) - self.layer_macs[name]
            parameters += round(layer.weight.numel() * share) - layer.weight.numel()
        return macs, parameters
