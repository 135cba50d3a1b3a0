"""Settings of the Tucker method."""

from __future__ import annotations

import math
from typing import Any, Literal

from pydantic import Field, model_validator

from nnslim.methods.base import MethodConfig


class TuckerConfig(MethodConfig):
    """How ranks are chosen, and for which layers.

    Rank of an axis with C channels:
        relative: ceil(C * rank_factor), raised to rank_min where that is set;
        fixed: rank_min.
    Then rounded to the nearest multiple of rank_multiple (at least one multiple), and at most C.
    """

    rank_mode: Literal["relative", "fixed"] = "relative"
    rank_factor: float = Field(1 / 3, gt=0, le=1, description="share of the channels that is kept")
    rank_min: int | None = Field(16, ge=1, description="smallest rank; the rank itself in mode fixed")
    rank_multiple: int = Field(1, ge=1, description="ranks are multiples of this; 8 suits CPUs, 16 tensor cores")
    include: tuple[str, ...] = Field(("*",), description="layer name patterns (shell style) that may be factored")
    exclude: tuple[str, ...] = Field((), description="layer name patterns that stay dense")
    overrides: dict[str, tuple[int, int] | float] = Field(
        default_factory=dict, description="pattern -> (R_out, R_in), or a rank factor of its own"
    )
    first_layer: bool = Field(False, description="factor the layer that reads the image")
    pointwise: bool = Field(False, description="factor 1x1x1 layers")
    heads: bool = Field(False, description="factor segmentation heads")
    only_if_cheaper: bool = Field(True, description="leave a layer dense where the chain would not save MACs")
    one_sided: bool = Field(True, description="leave a factor out where its rank equals its channels")
    decompose: bool = Field(True, description="False: random weights, for timing only")
    verbose: bool = Field(False, description="log one line per layer")

    @model_validator(mode="after")
    def _check(self) -> TuckerConfig:
        if self.rank_mode == "fixed" and self.rank_min is None:
            raise ValueError("rank_mode 'fixed' needs rank_min, which is the rank itself")
        for pattern, wanted in self.overrides.items():
            if isinstance(wanted, float) and not 0 < wanted <= 1:
                raise ValueError(
                    f"the rank factor of override '{pattern}' is {wanted}; it must be above 0 and at most 1"
                )
        return self

    @classmethod
    def published(cls, rank_factor: float, **changes: Any) -> TuckerConfig:
        """Return the rule of the published experiments: every layer, rank_min 8, both factors, no guard."""
        settings = {
            "rank_min": 8,
            "first_layer": True,
            "pointwise": True,
            "heads": True,
            "only_if_cheaper": False,
            "one_sided": False,
        }
        return cls(rank_factor=rank_factor, **{**settings, **changes})

    def rank(self, channels: int, factor: float | None = None) -> int:
        """Return the rank for an axis with that many channels."""
        if self.rank_mode == "fixed" and factor is None:
            rank = self.rank_min or 1
        else:
            # Rounding before ceil keeps 0.1 * 30 at 3, which binary floats would make 4.
            share = self.rank_factor if factor is None else factor
            rank = max(self.rank_min or 1, math.ceil(round(channels * share, 9)))
        multiple = self.rank_multiple
        rounded = max(multiple, multiple * math.floor(rank / multiple + 0.5))
        return min(channels, rounded)
