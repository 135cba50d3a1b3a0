"""Never slower: dense and slim are measured on this device, at the real patch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from nnslim.running.engine import Settings, with_fallback
from nnslim.running.select import measure, remembered

_NEGLIGIBLE = 0.05  # seconds of the dense pass below which overheads decide, and nobody waits


@dataclass(frozen=True)
class Speed:
    """Seconds of one forward pass, dense and slim, in alternated rounds on one backend.

    Attributes:
        dense, slim: medians. backend: both ran on it.
    """

    dense: float
    slim: float
    backend: str

    @property
    def gains(self) -> bool:
        """Whether slim wins, or a pass is so short that it does not matter."""
        return self.slim < self.dense or self.dense < _NEGLIGIBLE

    def __str__(self) -> str:
        return f"{self.slim:.3g} s per patch, dense {self.dense:.3g} s ({self.dense / self.slim:.2f}x, {self.backend})"

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values, milliseconds."""
        return {
            "dense_ms": round(self.dense * 1e3, 2),
            "slim_ms": round(self.slim * 1e3, 2),
            "backend": self.backend,
        }


def compare_speed(dense: nn.Module, slim: nn.Module, shape: Sequence[int], settings: Settings) -> Speed:
    """Measure both networks on the same backend, in single precision: int8 models are made from the result only later.

    Args:
        dense, slim: in eval mode, on one device. shape: (B, C, *patch).
        settings: "auto" takes the backend known to be the fastest for the dense network here, else eager.
    Raises:
        BackendError: not even stock torch runs one of them.
    """
    single = replace(settings, precision="f32")
    if single.backend == "auto":
        single = replace(single, backend=remembered(dense, shape, single) or "eager")
    engines = [with_fallback(network, shape, single) for network in (dense, slim)]
    seconds = measure([engine for engine, _ in engines], shape)
    return Speed(*seconds, engines[1][1])
