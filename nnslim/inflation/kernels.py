"""2D weights to 3D: kernels along depth and input channels, and what transformers know of token positions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, get_args

import numpy as np
import torch
from scipy.interpolate import RectBivariateSpline
from torch import Tensor
from torch.nn import functional

from nnslim.errors import ConfigError

Mode = Literal["center", "average", "repeat"]


def adapt_channels(kernel: Tensor, channels: int) -> Tensor:
    """Let a kernel that reads n input channels read another number of them.

    The n inputs are summed (exact for a grey image copied to RGB), repeated `channels` times, and divided by that.

    Args:
        kernel: (O, n, *K), not modified. channels: C.
    Returns:
        (O, C, *K): on C equal channels it gives what `kernel` gives on n channels equal to each of them.
    """
    _check(channels >= 1, f"a kernel needs at least one input channel, found {channels}")
    summed = kernel.sum(1, keepdim=True)
    return summed.expand(-1, channels, *[-1] * (kernel.ndim - 2)).contiguous() / channels


def inflate_conv(kernel: Tensor, depth: int, mode: Mode = "center", channels: int | None = None) -> Tensor:
    """Return a 3D convolution kernel made from a 2D one.

    Args:
        kernel: (O, I, kh, kw), not modified.
        depth: D, size along the new axis.
        mode: center: the 2D kernel at D // 2, zeros elsewhere. So on any volume the convolution gives the 2D one of the
            centre slice. average: 1/D of it everywhere; gives the 2D one of the mean slice. repeat: all of it
            everywhere; D times the output on equal slices, so only for what is normalised next, or is transposed.
        channels: input channels wanted; None keeps them, see `adapt_channels` otherwise. Give the number to sum and
            share also where it does not change, as for an RGB kernel on three images of other kinds.
    Returns:
        (O, C, D, kh, kw).
    Raises:
        ConfigError: no 2D kernel, an unknown mode, or a depth below 1.
    """
    _check(kernel.ndim == 4, f"expected a 2D kernel (O, I, kh, kw), found shape {tuple(kernel.shape)}")
    _check(depth >= 1, f"depth must be at least 1, found {depth}")
    _check(mode in get_args(Mode), f"mode '{mode}' is not one of {', '.join(get_args(Mode))}")
    if channels is not None:
        kernel = adapt_channels(kernel, channels)
    flat = kernel.unsqueeze(2)
    if mode == "center":
        made = flat.new_zeros(*flat.shape[:2], depth, *flat.shape[3:])
        made[:, :, depth // 2] = kernel
        return made
    made = flat.repeat(1, 1, depth, 1, 1)
    return made / depth if mode == "average" else made


def inflate_transposed_conv(kernel: Tensor, depth: int) -> Tensor:
    """Return a 3D kernel of a transposed convolution with kernel = stride, (I, O, kh, kw) to (I, O, D, kh, kw).

    Each output voxel gets one tap, so repetition without a factor leaves equal slices equal.
    """
    return inflate_conv(kernel, depth, "repeat")


def inflate_patch_embedding(
    kernel: Tensor, depth: int, channels: int, mode: Mode = "center", size: Sequence[int] | None = None
) -> Tensor:
    """Return the patch embedding of a 3D token network made from a 2D one.

    Args:
        kernel: (D, n, p, p) of the 2D transformer, not modified; its n inputs are summed.
        depth: slices, or voxels along depth, of a patch. channels: C of the images.
        mode: center or average, see `inflate_conv`.
        size: in-plane patch of the target where it is another; the kernel is resized (bicubic) and its sum kept.
    Returns:
        (D, C, depth, *size).
    """
    _check(mode != "repeat", "a patch embedding is inflated by center or average, not by repeat")
    if size is not None and tuple(size) != tuple(kernel.shape[2:]):
        share = torch.tensor(kernel.shape[2:]).prod() / (size[0] * size[1])
        kernel = functional.interpolate(kernel, size=tuple(size), mode="bicubic", align_corners=False) * share
    return inflate_conv(kernel, depth, mode, channels)


def _check(good: bool, message: str) -> None:
    if not good:
        raise ConfigError(f"inflation: {message}")


CLASS_ROWS = 3  # of a BEiT table: class token to tokens, tokens to it, it to itself


def resize_positions(embedding: Tensor, grid: Sequence[int], prefix: int = 1) -> Tensor:
    """Resize learned positions of a square grid (bicubic, half-pixel centres), as DINO's and DINOv2's are.

    Args:
        embedding: (1, prefix + g * g, D). grid: (rows, columns) wanted.
        prefix: rows before the grid (class token), which are kept.
    Returns:
        (1, prefix + rows * columns, D); unchanged where the grid is the same.
    """
    first, rest = embedding[:, :prefix], embedding[:, prefix:]
    edge = _edge(rest.shape[1], "position embedding")
    if tuple(grid) == (edge, edge):
        return embedding
    image = rest.reshape(1, edge, edge, -1).permute(0, 3, 1, 2).float()
    image = functional.interpolate(image, size=tuple(grid), mode="bicubic", align_corners=False)
    return torch.cat((first, image.flatten(2).transpose(1, 2).to(first.dtype)), dim=1)


def inflate_positions(embedding: Tensor, grid: Sequence[int], prefix: int = 1) -> Tensor:
    """Return positions of a 3D token grid: resized in plane, repeated along depth.

    Args:
        embedding: (1, prefix + g * g, D). grid: tokens (depth, rows, columns). prefix: rows kept apart, see above.
    Returns:
        (1, prefix + depth * rows * columns, D), depth slowest.
    """
    flat = resize_positions(embedding, grid[1:], prefix)
    return torch.cat((flat[:, :prefix], flat[:, prefix:].repeat(1, grid[0], 1)), dim=1)


def resize_beit_table(table: Tensor, grid: Sequence[int], depth: int = 1) -> Tensor:
    """Resize a BEiT table of relative position biases, by cubic splines on coordinates that grow geometrically.

    The source coordinates are 0, +-1, +-(1 + q), +-(1 + q + q^2)..., with the q that makes the last one the target's
    largest offset: resolution is highest near offset 0. The three rows of the class token are kept.

    Args:
        table: ((2g - 1)^2 + 3, heads). grid: (rows, columns) of tokens wanted.
        depth: of the token grid; BEiT's table is defined for 1 only.
    Returns:
        ((2 rows - 1)(2 columns - 1) + 3, heads); unchanged where the grid is the same.
    Raises:
        ConfigError: no such table, or depth above 1.
    """
    if depth != 1:
        raise ConfigError(
            f"inflation: a BEiT position table says nothing about offsets along depth, and {depth} token layers were "
            "asked for; use one (the patch embedding takes all slices), or a Swin encoder (see tile_table)"
        )
    body, last = table[:-CLASS_ROWS], table[-CLASS_ROWS:]
    edge = _edge(body.shape[0], "relative position table")
    _check(edge % 2 == 1, f"a relative position table of {body.shape[0]} rows has no offset 0 in its middle")
    rows, columns = (2 * int(size) - 1 for size in grid)
    if (rows, columns) == (edge, edge):
        return table
    if edge == 1:  # of one token: nothing to interpolate between
        return torch.cat((body.expand(rows * columns, -1), last))
    source = [geometric_offsets(edge // 2, size // 2) for size in (rows, columns)]
    target = [np.arange(size) - size // 2 for size in (rows, columns)]
    heads = body.double().reshape(edge, edge, -1).cpu().numpy()
    order = min(3, edge - 1)
    made = [
        RectBivariateSpline(*source, heads[..., head], kx=order, ky=order)(*target) for head in range(heads.shape[2])
    ]
    flat = torch.from_numpy(np.stack(made, axis=-1)).reshape(rows * columns, -1)
    return torch.cat((flat.to(last), last))


def geometric_offsets(steps: int, reach: int) -> np.ndarray:
    """Return 2 * steps + 1 coordinates whose distances grow by one factor and that end at +-reach.

    For a reach that so many steps cannot keep to, since their distances would vanish, they end behind it.
    """
    low, high = 1e-6 ** (1 / max(1, steps - 1)), max(2.0, float(reach))
    for _ in range(200):
        factor = (low + high) / 2
        low, high = (low, factor) if sum(factor**i for i in range(steps)) > reach else (factor, high)
    side = np.cumsum(low ** np.arange(steps))
    return np.concatenate((-side[::-1], [0.0], side))


def resize_swin_table(table: Tensor, window: Sequence[int]) -> Tensor:
    """Resize a Swin table ((2w - 1)^2, heads) to another window (rows, columns), bicubic; unchanged for the same."""
    edge = _edge(table.shape[0], "relative position table")
    rows, columns = (2 * int(size) - 1 for size in window)
    if (rows, columns) == (edge, edge):
        return table
    image = table.float().T.reshape(1, -1, edge, edge)
    image = functional.interpolate(image, size=(rows, columns), mode="bicubic", align_corners=False)
    return image.flatten(2)[0].T.to(table).contiguous()


def tile_table(table: Tensor, depth: int) -> Tensor:
    """Return the table of a 3D Swin window: the 2D one, ((2h - 1)(2w - 1), heads), for each of 2 * depth - 1 offsets.

    The bias then does not depend on the offset along depth.
    """
    return table.repeat(2 * depth - 1, 1)


def _edge(count: int, what: str) -> int:
    edge = math.isqrt(count)
    if edge * edge != count or not count:
        raise ConfigError(f"inflation: a {what} of {count} rows is not of a square grid")
    return edge
