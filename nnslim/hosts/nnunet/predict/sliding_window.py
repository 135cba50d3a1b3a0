"""nnU-Net's sliding window: several tiles per forward pass, sums in single precision on a CPU, heap kept."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from nnslim.running.machine import keep_heap


@torch.no_grad()  # not inference mode where nnU-Net is not in it: before 2.6 it adds up the folds outside
@keep_heap()
def window_logits(
    predictor: Any, data: Tensor, slicers: Sequence[Any], on_device: bool, batch: int = 1, *, contiguous: bool = True
) -> Tensor:
    """Predict all tiles, `batch` at a time, and merge them with nnU-Net's Gaussian weights.

    Same result as nnU-Net's own loop, which runs one tile at a time and sums in half precision; on a CPU the sums are
    kept in float32 here, channels last where the network's answer is. The last, smaller group of tiles is predicted
    like the others.

    Args:
        predictor: an initialised nnUNetPredictor (network, mirroring, patch size and device are read from it).
        data: (C, *spatial), padded to at least the patch size.
        slicers: one index tuple per tile, from the predictor.
        on_device: keep the sums on the predictor's device; else on the CPU.
        batch: tiles per forward pass, at least 1.
        contiguous: False for logits in the network's memory layout, which saves a copy.
    Returns:
        (heads, *spatial) logits on the device of the sums.
    Raises:
        RuntimeError: infinite logits (as nnU-Net does).
    """
    from nnunetv2.inference.sliding_window_prediction import compute_gaussian
    from tqdm import tqdm

    device = predictor.device if on_device else torch.device("cpu")
    dtype = torch.half if device.type == "cuda" else torch.float32
    data = data.to(device)
    patch = tuple(predictor.configuration_manager.patch_size)
    weight = torch.ones(patch, dtype=dtype, device=device)
    if predictor.use_gaussian:
        weight = compute_gaussian(patch, sigma_scale=1.0 / 8, value_scaling_factor=10, device=device).to(dtype)
    heads = predictor.label_manager.num_segmentation_heads
    logits: Tensor | None = None
    weights = torch.zeros(data.shape[1:], dtype=dtype, device=device)
    for start in tqdm(range(0, len(slicers), batch), disable=not predictor.allow_tqdm):
        group = slicers[start : start + batch]
        tiles = torch.stack([data[slicer] for slicer in group]).to(predictor.device)
        predicted = predictor._internal_maybe_mirror_and_predict(tiles).to(device)
        if logits is None:
            last = predicted.stride(1) == 1 and heads > 1
            size = (*data.shape[1:], heads) if last else (heads, *data.shape[1:])
            logits = torch.zeros(size, dtype=dtype, device=device)
            logits = logits.movedim(-1, 0) if last else logits
        for slicer, tile in zip(group, predicted, strict=True):
            logits[slicer].addcmul_(tile.to(dtype), weight)
            weights[slicer[1:]] += weight
    assert logits is not None  # a window has at least one tile
    logits /= weights
    if torch.isinf(logits).any():
        raise RuntimeError("Encountered inf in predicted array. Aborting...")
    return logits.contiguous() if contiguous else logits
