"""Pictures of token sparsity: how deep each token got, over a slice; and how sparse the classes of a dataset are."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from nnslim.errors import ConfigError
from nnslim.methods.token_sparse.reduction import TokenReduction
from nnslim.methods.token_sparse.sequence import Sequence3d


def depth_map(network: nn.Module, image: Tensor) -> np.ndarray:
    """Return (B, *grid) integers: the number of stages that each token lived through.

    Args:
        network: token-sparse, in eval mode, dropping tokens. image: (B, C, *size).
    Raises:
        ConfigError: the network drops no tokens.
    """
    found = [module for module in network.modules() if isinstance(module, TokenReduction)]
    if len(found) != 1 or not found[0].active or found[0].mode != "drop":
        raise ConfigError("token_sparse: a depth map needs one encoder that drops tokens, with a ratio above 0")
    seen: list[Sequence3d] = []
    hook = found[0].register_forward_hook(lambda _, __, now: seen.append(now))
    try:
        with torch.no_grad():
            network(image)
    finally:
        hook.remove()
    now = seen[-1]
    length = sum(where.shape[1] for where in now.group_positions) + now.length
    depth = torch.full((image.shape[0], now.prefix + length), len(found[0].locations))
    for stage, where in zip(now.stages, now.group_positions, strict=True):
        depth.scatter_(1, where.cpu(), stage)
    return depth[:, now.prefix :].reshape(image.shape[0], *grid_of(image.shape[2:], length)).numpy()


def grid_of(size: Sequence[int], tokens: int) -> tuple[int, ...]:
    """Return the tokens along each axis for cubic patches."""
    edge = round((np.prod([int(each) for each in size]) / tokens) ** (1 / 3))
    return tuple(int(each) // edge for each in size)


def draw_depth(image: np.ndarray, depth: np.ndarray, path: Path, *, axis: int = 2) -> None:
    """Draw three slices of an image (X, Y, Z), with and without the depth of its tokens (*grid) over them, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    edges = [size // count for size, count in zip(image.shape, depth.shape, strict=True)]
    full = depth.repeat(edges[0], 0).repeat(edges[1], 1).repeat(edges[2], 2)
    figure, axes = pyplot.subplots(2, 3, figsize=(9, 6), layout="constrained")
    for column, share in enumerate((0.3, 0.5, 0.7)):
        where = int(image.shape[axis] * share)
        for row, over in enumerate((False, True)):
            panel = axes[row, column]
            panel.imshow(np.take(image, where, axis).T, cmap="gray", origin="lower")
            if over:
                drawn = panel.imshow(
                    np.take(full, where, axis).T, cmap="viridis", alpha=0.5, origin="lower", vmin=0, vmax=depth.max()
                )
            panel.set_axis_off()
            panel.set_title(f"slice {where}")
    figure.colorbar(drawn, ax=axes, label="stages that a token lived through")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def class_sparsity(labels: Iterable[np.ndarray], names: Mapping[int, str], *, edge: int = 8) -> list[dict[str, Any]]:
    """Return, for each class and for any foreground, its share of all voxels and of all tokens, in percent.

    Args:
        labels: (X, Y, Z) label maps. names: by label, without background. edge: of a token's cube, voxels; what is left
            over at the far ends does not count as a token.
    """
    voxels, tokens = dict.fromkeys([*names, 0], 0), dict.fromkeys([*names, 0], 0)
    all_voxels = all_tokens = 0
    for label in labels:
        whole = label[tuple(slice(size // edge * edge) for size in label.shape)]
        x, y, z = (size // edge for size in whole.shape)
        cubes = whole.reshape(x, edge, y, edge, z, edge)
        all_voxels, all_tokens = all_voxels + label.size, all_tokens + x * y * z
        for value in voxels:  # 0 stands for any foreground here
            voxels[value] += int(((label == value) if value else (label > 0)).sum())
            tokens[value] += int(((cubes == value) if value else (cubes > 0)).any(axis=(1, 3, 5)).sum())
    return [
        {
            "label": value,
            "name": names.get(value, "any foreground"),
            "percent_of_voxels": round(100 * voxels[value] / max(1, all_voxels), 3),
            "percent_of_tokens": round(100 * tokens[value] / max(1, all_tokens), 3),
        }
        for value in [*names, 0]
    ]
