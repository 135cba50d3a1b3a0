"""State dicts as nnU-Net writes them: the same tensor under several names."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor


def half_precision(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights in float16; names that share one tensor go on sharing it, so that it is stored once.

    Stock nnU-Net loads the result: `load_state_dict` copies into the network's float32 parameters.
    """
    halves: dict[tuple[int, tuple[int, ...]], Tensor] = {}
    return {
        name: halves.setdefault((tensor.data_ptr(), tuple(tensor.shape)), tensor.detach().half())
        for name, tensor in weights.items()
    }
