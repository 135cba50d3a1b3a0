"""A coarser input: what changes in the plans, the network and its weights being the same."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np


def coarser_settings(
    settings: Mapping[str, Any], factors: Sequence[float], multiple: Sequence[int], identifier: str
) -> dict[str, Any]:
    """Return a configuration of nnU-Net's plans at a coarser spacing.

    nnU-Net resamples images to the spacing, and its answers back to the image's own grid. The patch covers as many
    millimetres as before, rounded up to what the strides divide, and never so little that the deepest stage has a
    single voxel, which an instance norm cannot learn from.

    Args:
        settings: of the configuration, inheritance resolved. factors: of the spacing, per axis of the patch.
        multiple: product of the strides per axis. identifier: for the folder of preprocessed data.
    """
    axes = len(factors)
    made = dict(settings)
    spacing = [float(size) for size in settings["spacing"]]
    offset = len(spacing) - axes  # the slices of a 2D configuration keep their distance
    made["spacing"] = spacing[:offset] + [size * factor for size, factor in zip(spacing[offset:], factors, strict=True)]
    for key in ("patch_size", "median_image_size_in_voxels"):
        sizes = list(settings.get(key) or ())
        if key == "patch_size":
            made[key] = [
                step * max(1, math.ceil(size / factor / step - 1e-6))
                for size, factor, step in zip(sizes, factors, multiple, strict=True)
            ]
        elif len(sizes) >= axes:
            kept = len(sizes) - axes
            made[key] = sizes[:kept] + [
                float(size) / factor for size, factor in zip(sizes[kept:], factors, strict=True)
            ]
    if np.prod(np.array(made["patch_size"]) // np.array(multiple)) == 1:
        made["patch_size"][0] += multiple[0]
    made["data_identifier"] = identifier
    return made
