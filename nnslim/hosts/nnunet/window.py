"""nnU-Net's sliding window with several tiles per forward pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


@torch.inference_mode()
def batched_window_logits(predictor: Any, data: Tensor, slicers: Sequence[Any], on_device: bool, batch: int) -> Tensor:
    """Predict all tiles, `batch` at a time, and merge them with nnU-Net's Gaussian weights.

    Same result as nnU-Net's own loop, which runs one tile at a time and sums in half precision; on a CPU the sums are
    kept in float32 here. The last, smaller group of tiles is predicted like the others.

    Args:
        predictor: an initialised nnUNetPredictor (network, mirroring, patch size and device are read from it).
        data: (C, *spatial), padded to at least the patch size.
        slicers: one index tuple per tile, from the predictor.
        on_device: keep the sums on the predictor's device; else on the CPU.
        batch: tiles per forward pass, at least 1.
    Returns:
        (heads, *spatial) logits on the device of the sums.
    Raises:
        RuntimeError: infinite logits (as nnU-Net does).
    """
    from nnunetv2.inference.sliding_window_prediction import compute_gaussian

    device = predictor.device if on_device else torch.device("cpu")
    dtype = torch.half if device.type == "cuda" else torch.float32
    data = data.to(device)
    patch = tuple(predictor.configuration_manager.patch_size)
    weight = torch.ones(patch, dtype=dtype, device=device)
    if predictor.use_gaussian:
        weight = compute_gaussian(patch, sigma_scale=1.0 / 8, value_scaling_factor=10, device=device).to(dtype)
    heads = predictor.label_manager.num_segmentation_heads
    logits = torch.zeros((heads, *data.shape[1:]), dtype=dtype, device=device)
    weights = torch.zeros(data.shape[1:], dtype=dtype, device=device)
    for start in range(0, len(slicers), batch):
        group = slicers[start : start + batch]
        tiles = torch.stack([data[slicer] for slicer in group]).to(predictor.device)
        predicted = predictor._internal_maybe_mirror_and_predict(tiles).to(device)
        for slicer, tile in zip(group, predicted, strict=True):
            logits[slicer] += tile.to(dtype) * weight
            weights[slicer[1:]] += weight
    logits /= weights
    if torch.isinf(logits).any():
        raise RuntimeError("Encountered inf in predicted array. Aborting...")
    return logits
