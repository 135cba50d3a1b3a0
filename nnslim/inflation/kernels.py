"""2D kernels to 3D: along depth by `center`, `average` or `repeat`, along the input channels by their mean."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch
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
