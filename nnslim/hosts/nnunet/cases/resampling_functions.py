"""nnU-Net's resampling functions as grids of matrices, and preprocessing without copies in double precision."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch

from nnslim.resampling.resample import Grid, grid_like_interpolate, grid_like_resize, resample
from nnslim.resampling.resample_seg import resample_labels

_DEFAULT = {"is_seg", "order", "order_z", "force_separate_z", "separate_z_anisotropy_threshold"}
_TORCH = {"is_seg", "num_threads", "device", "memefficient_seg_resampling", "force_separate_z", "mode"} | {
    "separate_z_anisotropy_threshold",
    "aniso_axis_mode",
}
Spacing = Sequence[float]
"""Edges of a voxel, mm."""
_log = logging.getLogger("nnslim")


def known_function(function: Callable[..., Any]) -> str | None:
    """Return "resize" for nnU-Net's default, "interpolate" for its torch function, None for any other.

    Args:
        function: as nnU-Net's configuration gives it: a partial of one of its functions with the plans' settings.
    """
    from nnunetv2.preprocessing.resampling import default_resampling as default

    plain, settings = _taken_apart(function)
    if plain is getattr(default, "resample_data_or_seg_to_shape", None) and set(settings) <= _DEFAULT:
        # Before 2.5 the results stayed in double precision.
        kept = "dtype_out" in inspect.signature(default.resample_data_or_seg).parameters
        return "resize" if kept and hasattr(default, "determine_do_sep_z_and_axis") else None
    try:
        from nnunetv2.preprocessing.resampling.resample_torch import resample_torch_fornnunet
    except ImportError:  # not yet there in 2.3
        return None
    known = plain is resample_torch_fornnunet and set(settings) <= _TORCH
    known = known and settings.get("mode", "linear") == "linear"
    known = known and settings.get("aniso_axis_mode", "nearest-exact") in ("nearest-exact", "linear")
    return "interpolate" if known else None


def grid_of(
    function: Callable[..., Any], shape: Sequence[int], new_shape: Sequence[int], spacing: Spacing, new_spacing: Spacing
) -> Grid | None:
    """Return what one of nnU-Net's functions would do to images or scores; None for a function that is not known.

    Args:
        function: see `known_function`. shape, new_shape: three sizes in voxels.
    """
    kind = known_function(function)
    settings = _taken_apart(function)[1]
    if kind is None or settings.get("is_seg", False):
        return None
    sizes = [int(size) for size in shape], [int(size) for size in new_shape]
    last_axis = _separate_axis(settings, kind, spacing, new_spacing)
    if kind == "resize":
        return grid_like_resize(*sizes, settings.get("order", 3), settings.get("order_z", 0), last_axis)
    return grid_like_interpolate(*sizes, settings.get("aniso_axis_mode", "nearest-exact"), last_axis)


def _separate_axis(settings: dict[str, Any], kind: str, spacing: Spacing, new_spacing: Spacing) -> int | None:
    """Return the axis of thick slices, which nnU-Net resamples by itself; None where all are resampled as one."""
    from nnunetv2.preprocessing.resampling import default_resampling as default

    by_default = False if kind == "resize" else None
    threshold = settings.get("separate_z_anisotropy_threshold", default.ANISO_THRESHOLD)
    separate, axis = default.determine_do_sep_z_and_axis(
        settings.get("force_separate_z", by_default), spacing, new_spacing, threshold
    )
    return int(axis) if separate else None


def _taken_apart(function: Callable[..., Any]) -> tuple[Callable[..., Any], dict[str, Any]]:
    if isinstance(function, partial) and not function.args:
        return function.func, function.keywords
    return function, {}


class Stand:
    """Stands for another object, with some attributes of its own."""

    def __init__(self, other: Any, **own: Any) -> None:
        self._other = other
        self.__dict__.update(own)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_other"], name)


def lean_configuration(configuration: Any) -> Any:
    """Return nnU-Net's configuration with resampling of images and segmentations that makes no large copies.

    The results are nnU-Net's: images up to single precision (1e-5 of their range), segmentations exactly. Functions
    that are not known are left as they are.
    """
    if isinstance(configuration, Stand):
        return configuration
    return Stand(
        configuration,
        resampling_fn_data=partial(_resampled, configuration.resampling_fn_data),
        resampling_fn_seg=partial(_resampled_seg, configuration.resampling_fn_seg),
    )


def _resampled(
    function: Callable[..., Any], data: Any, new_shape: Sequence[int], current_spacing: Spacing, new_spacing: Spacing
) -> Any:
    grid = None
    if isinstance(data, np.ndarray) and data.ndim == 4 and data.dtype == np.float32:
        grid = grid_of(function, data.shape[1:], new_shape, current_spacing, new_spacing)
    if grid is None:
        _log.debug("images are resampled by nnU-Net's own function: %s", function)
        return function(data, new_shape, current_spacing, new_spacing)
    return data if grid.identity else resample(torch.from_numpy(data), grid).numpy()


def _resampled_seg(
    function: Callable[..., Any], seg: Any, new_shape: Sequence[int], current_spacing: Spacing, new_spacing: Spacing
) -> Any:
    if not (isinstance(seg, np.ndarray) and seg.ndim == 4 and seg.size and _votes(function)):
        return function(seg, new_shape, current_spacing, new_spacing)
    sizes = [int(size) for size in new_shape]
    if list(seg.shape[1:]) == sizes:
        return seg
    last_axis = _separate_axis(_taken_apart(function)[1], "resize", current_spacing, new_spacing)
    return np.stack([resample_labels(one, sizes, last_axis) for one in seg])


def _votes(function: Callable[..., Any]) -> bool:
    """Whether labels are resampled linearly, by the rule that we know; older batchgenerators have another."""
    from batchgenerators.augmentations import utils

    settings = _taken_apart(function)[1]
    orders = settings.get("order", 3), settings.get("order_z", 0)
    tie = inspect.signature(utils.resize_segmentation).parameters.get("seg_tiebreak")
    known = known_function(function) == "resize" and settings.get("is_seg", False) and orders == (1, 0)
    return known and tie is not None and tie.default == "nearest"
