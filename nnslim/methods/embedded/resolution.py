"""A coarser input: only the plans change; the network and its weights stay the same."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from nnslim.errors import ConfigError
from nnslim.methods.embedded.config import EmbeddedConfig


def coarser_settings(settings: Mapping[str, Any], config: EmbeddedConfig) -> dict[str, Any] | None:
    """Return a configuration of nnU-Net's plans at a coarser spacing, None where the spacing stays; see `Method.plans`.

    nnU-Net resamples images to the spacing, and its answers back to the image's own grid. The patch covers as many
    millimetres as before, rounded up to what the strides divide, and is never so small that the deepest stage has a
    single voxel, which an instance norm cannot learn from.

    Raises:
        ConfigError: there are factors for another number of axes, or the plans name no strides.
    """
    axes = len(settings["patch_size"])
    factors = config.factors(axes)
    if factors is None:
        return None
    strides = settings["architecture"]["arch_kwargs"].get("strides")
    if strides is None:
        raise ConfigError("embedded: the plans name no strides, so the patch of a coarser spacing is not known")
    # All stages count, also those that will be dropped: the whole network is measured on this patch first.
    per_stage = [stride if isinstance(stride, (list, tuple)) else [stride] * axes for stride in strides]
    multiple = [math.prod(map(int, along)) for along in zip(*per_stage, strict=True)]
    patch = [
        step * max(1, math.ceil(size / factor / step - 1e-6))
        for size, factor, step in zip(settings["patch_size"], factors, multiple, strict=True)
    ]
    if patch == multiple:
        patch[0] += multiple[0]
    name = "x".join(f"{factor:g}" for factor in (factors if len(set(factors)) > 1 else factors[:1]))
    made = {**settings, "patch_size": patch, "data_identifier": f"{settings.get('data_identifier')}_coarser{name}"}
    made["spacing"] = _scaled(settings["spacing"], factors)
    if len(sizes := settings.get("median_image_size_in_voxels") or ()) >= axes:
        made["median_image_size_in_voxels"] = _scaled(sizes, [1 / factor for factor in factors])
    return made


def _scaled(values: list[float], factors: list[float] | tuple[float, ...]) -> list[float]:
    """Scale the last axes: the slices of a 2D configuration keep their distance."""
    kept = len(values) - len(factors)
    return [*values[:kept], *(float(value) * factor for value, factor in zip(values[kept:], factors, strict=True))]
