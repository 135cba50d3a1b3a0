"""Settings of low-rank linear layers."""

from __future__ import annotations

import math

from pydantic import Field, model_validator

from nnslim.methods.base import MethodConfig

_RULES = ("rank_factor", "energy", "macs")


class LinearConfig(MethodConfig):
    """Ranks of the linear layers of a transformer, by exactly one of three rules; convolutions are not touched.

    A layer of I inputs and O outputs costs I * O, its two factors R * (I + O): only ranks below I * O / (I + O), half
    the width of a square layer, save anything, and a layer stays dense where the rule asks for more.
    """

    rank_factor: float | None = Field(None, gt=0, lt=1, description="share of the smaller of inputs and outputs")
    energy: float | None = Field(None, gt=0, lt=1, description="share of the outputs' variance that each layer keeps")
    macs: float | None = Field(None, gt=0, description="budget: share of the network's MACs (up to 1), or their number")
    rank_min: int = Field(8, ge=1, description="smallest rank")
    rank_multiple: int = Field(8, ge=1, description="ranks are multiples of this")
    include: tuple[str, ...] = Field(("*",), description="layer name patterns (shell style) that may be factored")
    exclude: tuple[str, ...] = Field((), description="layer name patterns that stay dense")

    @model_validator(mode="after")
    def _check(self) -> LinearConfig:
        given = [rule for rule in _RULES if getattr(self, rule) is not None]
        if len(given) != 1:
            raise ValueError(f"give exactly one of {', '.join(_RULES)}, found {', '.join(given) or 'none'}")
        return self

    def rounded(self, rank: float) -> int:
        """Return the smallest multiple of rank_multiple from rank and rank_min on."""
        return self.rank_multiple * math.ceil(max(self.rank_min, round(rank, 9)) / self.rank_multiple)
