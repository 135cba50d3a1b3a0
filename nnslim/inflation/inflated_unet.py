"""A trained 2D U-Net (nnU-Net's plain and residual-encoder ones) as the weights of its 3D twin."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from nnslim.errors import ConfigError
from nnslim.inflation.kernels import Mode, adapt_channels, inflate_conv
from nnslim.network.walk import unwrap

Fit = Literal["error", "cut-or-pad"]
_CONVOLUTIONS = (nn.Conv3d, nn.ConvTranspose3d)
_AFTER_CONCAT = re.compile(r"(^|\.)decoder\.stages\.\d+\.convs\.0\.(conv|all_modules\.0)\.weight$")
_HEAD = ".seg_layers."


@dataclass(frozen=True)
class Inflated:
    """Weights of a 3D network.

    Attributes:
        weights: its whole state dict; keys that name one tensor hold one tensor.
        notes: what is not simply inflated, in words: heads at their start values, channels cut or added.
    """

    weights: dict[str, Tensor]
    notes: tuple[str, ...] = ()


def inflate_unet(
    source: nn.Module,
    target: nn.Module,
    mode: Mode = "center",
    *,
    axes: Sequence[int] = (0, 1, 2),
    fit: Fit = "error",
) -> Inflated:
    """Make the weights of a 3D network from a 2D one of the same structure.

    Convolutions are inflated by `mode`, transposed ones repeated, everything else (norms, biases) is copied. A target
    kernel of depth 1, as (1, 3, 3), is the 2D kernel itself. With `center`, a network without norms and without strides
    along depth gives on every slice what the 2D network gives; instance norm, which takes its statistics over the
    volume in one and over the slice in the other, makes that approximate. With `average` the outermost slices see zero
    padding, too.

    Args:
        source: trained 2D network. target: 3D network; not modified, its values fill what `source` cannot.
        mode: center or average.
        axes: for each spatial axis of `target`, which axis of `source`'s volumes it is (0 the slices, 1 rows, 2
            columns); (0, 1, 2) where both have the same `transpose_forward`.
        fit: what to do where the widths differ. cut-or-pad: the first channels stay; new ones keep the start values of
            `target`, but nothing reads them yet, so that the others' outputs are as before.
    Raises:
        ConfigError: the networks differ in structure, in-plane kernels, in-plane strides, or (`fit` error) in widths;
            the message names the tensor or layer.
    """
    if sorted(axes) != [0, 1, 2]:
        raise ConfigError(f"inflation: axes must be an order of 0, 1, 2, found {tuple(axes)}")
    source, target = unwrap(source), unwrap(target)
    if mode not in ("center", "average"):
        raise ConfigError(f"inflation: a network is inflated by center or average, not by '{mode}'")
    given, start = source.state_dict(), target.state_dict()
    _same_structure(given, start)
    first = _same_strides(source, target, tuple(axes))
    kinds = {
        f"{name}.weight" if name else "weight": module
        for name, module in target.named_modules(remove_duplicate=False)
        if isinstance(module, _CONVOLUTIONS)
    }
    made: dict[tuple[int, torch.Size], Tensor] = {}
    notes: dict[str, None] = {}
    weights = {}
    for key, old in start.items():
        identity = (old.data_ptr(), old.shape)  # aliases are one tensor, and stay one
        if identity not in made:
            module = kinds.get(key)
            value = given[key].to(old.dtype)
            if module is not None:
                value = _inflated(key, value, module, mode, tuple(axes))
            if module is not None and module is first and value.shape[1] != old.shape[1]:
                notes[f"{key}: {value.shape[1]} input channels, {old.shape[1]} wanted: summed and shared"] = None
                value = adapt_channels(value, old.shape[1])
            if value.shape != old.shape:
                value = _fitted(key, value, old, module, fit, notes)
            made[identity] = value.clone()
        weights[key] = made[identity]
    return Inflated(weights, tuple(notes))


def _inflated(key: str, kernel: Tensor, module: nn.Module, mode: Mode, axes: tuple[int, ...]) -> Tensor:
    size = [module.kernel_size[axes.index(axis)] for axis in (0, 1, 2)]  # depth, rows, columns of the source
    if list(kernel.shape[2:]) != size[1:]:
        raise ConfigError(
            f"inflation: {key}: the 2D kernel is {tuple(kernel.shape[2:])}, in the 3D plan it is {tuple(size[1:])} in "
            "plane; plan both with the same kernels"
        )
    wide = inflate_conv(kernel, size[0], "repeat" if isinstance(module, nn.ConvTranspose3d) else mode)
    return wide.permute(0, 1, *(2 + axis for axis in axes)).contiguous()


def _fitted(key: str, value: Tensor, old: Tensor, module: nn.Module | None, fit: Fit, notes: dict[str, None]) -> Tensor:
    if _HEAD in key and len(value) != len(old):
        notes["segmentation heads differ in number: they keep the start values of the 3D network"] = None
        return old
    if fit != "cut-or-pad":
        raise ConfigError(
            f"inflation: {key}: the 2D network has the shape {tuple(value.shape)}, the 3D plan wants "
            f"{tuple(old.shape)}; plan both with the same widths, or allow cutting and padding (--fit cut-or-pad)"
        )
    notes["widths differ: channels were cut, or added with start values that nothing reads yet"] = None
    made, transposed = old.clone(), isinstance(module, nn.ConvTranspose3d)
    if transposed:
        value, made = value.transpose(0, 1), made.transpose(0, 1)
    outputs = min(len(value), len(made))
    if module is None:  # one value per output channel
        made[:outputs] = value[:outputs]
        return made
    made[:outputs] = 0  # known outputs read nothing that is new
    parts = 2 if _AFTER_CONCAT.search(key) else 1  # upsampled and skip channels lie behind each other
    for into, out_of in zip(made.chunk(parts, 1), value.chunk(parts, 1), strict=True):
        inputs = min(into.shape[1], out_of.shape[1])
        into[:outputs, :inputs] = out_of[:outputs, :inputs]
    return made.transpose(0, 1).contiguous() if transposed else made


def _same_structure(given: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    missing, foreign = sorted(set(wanted) - set(given)), sorted(set(given) - set(wanted))
    if missing or foreign:
        raise ConfigError(
            f"inflation: the 2D network and the 3D plan differ in structure (stages, blocks or kind): {len(missing)} "
            f"tensors of the 3D network have no source, {len(foreign)} of the 2D network no place: "
            f"{', '.join((missing + foreign)[:3])}; plan both with the same number of stages and blocks"
        )


def _same_strides(source: nn.Module, target: nn.Module, axes: tuple[int, ...]) -> nn.Module | None:
    """Check strides in plane and return the target's first convolution, which reads the image."""
    flat = dict(source.named_modules(remove_duplicate=False))
    first = None
    for name, module in target.named_modules():
        if not isinstance(module, _CONVOLUTIONS):
            continue
        first = first or module
        stride = [module.stride[axes.index(axis)] for axis in (0, 1, 2)]
        if list(flat[name].stride) != stride[1:]:
            raise ConfigError(
                f"inflation: layer {name}: stride {tuple(flat[name].stride)} in 2D, {tuple(stride[1:])} in plane in "
                "the 3D plan; plan both with the same strides"
            )
    return first
