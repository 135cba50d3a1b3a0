"""Settings of the Tucker method."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from nnslim.methods.base import MethodConfig

BUDGETS = ("macs", "params", "milliseconds", "max_drop")


class FitConfig(MethodConfig):
    """How calibration images are used to set the weights; without images the weights alone decide."""

    samples: int = Field(6000, ge=100, description="positions per layer, over all tiles")
    ridge: float = Field(1e-3, ge=0, description="pull towards the dense weights, share of the input variance")
    damping: float = Field(1e-2, ge=0, description="share of the mean output variance added to each channel's")
    memory_mb: int = Field(
        256, ge=1, description="memory of one layer's moments, MB; wider layers use channel statistics"
    )
    layers_per_pass: int = Field(1, ge=1, description="more: faster, a little less exact")


class TuckerConfig(MethodConfig):
    """How ranks are chosen, and for which layers.

    Rank of an axis with C channels:
        relative: ceil(C * rank_factor), raised to rank_min where that is set;
        fixed: rank_min;
        energy: smallest rank whose side keeps the share `energy` of the kernel's energy, raised to rank_min;
        evbmf: analytic variational Bayes on the kernel's unfoldings, raised to rank_min.
    Then rounded to the nearest multiple of rank_multiple (at least one multiple), and at most C.
        budget: one of macs, params, milliseconds, max_drop is spent where it costs least, in multiples of
        rank_multiple (8 if that is 1); a layer may be factored on both sides, on one, or stay dense;
        plan: read from a table that nnslim wrote and a person may have edited.
    Naming a budget, `energy` or `plan` chooses the mode.
    """

    rank_mode: Literal["relative", "fixed", "energy", "evbmf", "budget", "plan"] = "relative"
    macs: float | None = Field(None, gt=0, description="budget: share of the dense MACs (up to 1), or a number of MACs")
    params: float | None = Field(None, gt=0, description="budget: share of the dense parameters, or a number of them")
    milliseconds: float | None = Field(
        None, gt=0, description="budget: forward time of one patch on this machine; up to 1 a share of the dense time"
    )
    max_drop: float | None = Field(
        None, gt=0, lt=1, description="budget: estimated drop in Dice; the fewest MACs that keep it, recovery included"
    )
    max_drop_worst: float | None = Field(
        None, gt=0, lt=1, description="with max_drop: estimated drop in Dice of the class that loses most"
    )
    energy: float | None = Field(None, gt=0, le=1, description="share of the energy that each side keeps")
    plan: Path | None = Field(None, description="table of ranks (CSV)")
    fit: FitConfig = FitConfig()
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
    transposed: bool = Field(
        False,
        description="factor transposed convolutions, which have few MACs and lose much; a budget may always do so",
    )
    only_if_cheaper: bool = Field(True, description="leave a layer dense where the chain would not save MACs")
    one_sided: bool = Field(True, description="leave a factor out where its rank equals its channels")
    decompose: bool = Field(True, description="False: random weights, for timing only")
    verbose: bool = Field(False, description="log one line per layer")

    @property
    def timed(self) -> bool:
        """Whether the budget is a time of this machine."""
        return self.milliseconds is not None

    @model_validator(mode="before")
    @classmethod
    def _choose_mode(cls, raw: Any) -> Any:
        if not isinstance(raw, dict) or "rank_mode" in raw:
            return raw
        given = {"budget": any(raw.get(key) is not None for key in BUDGETS)}
        given |= {key: raw.get(key) is not None for key in ("energy", "plan")}
        modes = [mode for mode, named in given.items() if named]
        return {**raw, "rank_mode": modes[0]} if modes else raw

    @model_validator(mode="after")
    def _worst_needs_mean(self) -> TuckerConfig:
        if self.max_drop_worst is not None and self.max_drop is None:
            raise ValueError("max_drop_worst is a second limit: name max_drop, too")
        return self

    @property
    def drop_limit(self) -> float | None:
        """See MethodConfig."""
        return self.max_drop

    @property
    def worst_limit(self) -> float | None:
        """See MethodConfig."""
        return self.max_drop_worst

    def with_macs(self, share: float) -> TuckerConfig:
        """See MethodConfig."""
        return self.model_copy(update={"max_drop": None, "max_drop_worst": None, "macs": share})

    @property
    def budget(self) -> tuple[str, float] | None:
        """The budget that is set, by name, or None."""
        return next(((key, getattr(self, key)) for key in BUDGETS if getattr(self, key) is not None), None)

    @model_validator(mode="after")
    def _check(self) -> TuckerConfig:
        budgets = [key for key in BUDGETS if getattr(self, key) is not None]
        if len(budgets) > 1 or (self.rank_mode == "budget") != bool(budgets):
            found = ", ".join(budgets) or "none"
            raise ValueError(f"rank_mode 'budget' needs exactly one of {', '.join(BUDGETS)}, and found {found}")
        for key in ("energy", "plan"):
            if (self.rank_mode == key) != (getattr(self, key) is not None):
                raise ValueError(f"rank_mode '{key}' and the key '{key}' belong together")
        if self.rank_mode == "fixed" and self.rank_min is None:
            raise ValueError("rank_mode 'fixed' needs rank_min, which is the rank itself")
        for pattern, wanted in self.overrides.items():
            if isinstance(wanted, float) and not 0 < wanted <= 1:
                raise ValueError(f"override '{pattern}': rank factor {wanted} must be above 0 and at most 1")
        return self

    @classmethod
    def published(cls, rank_factor: float, **changes: Any) -> TuckerConfig:
        """Return the rule of the published experiments: every layer, rank_min 8, both factors, no guard."""
        settings = {"rank_min": 8, **dict.fromkeys(("first_layer", "pointwise", "heads", "transposed"), True)}
        settings |= dict.fromkeys(("only_if_cheaper", "one_sided"), False)
        return cls(rank_factor=rank_factor, **{**settings, **changes})

    def rank(self, channels: int, factor: float | None = None) -> int:
        """Return the rank for an axis with that many channels."""
        rank = self.rank_min or 1
        if self.rank_mode != "fixed" or factor is not None:
            # Rounding before ceil keeps 0.1 * 30 at 3, which binary floats would make 4.
            share = self.rank_factor if factor is None else factor
            rank = max(rank, math.ceil(round(channels * share, 9)))
        return self.rounded(rank, channels)

    def rounded(self, rank: int, channels: int) -> int:
        """Return the nearest multiple of rank_multiple, at least one multiple and at most the channels."""
        multiple = self.rank_multiple
        return min(channels, max(multiple, multiple * math.floor(rank / multiple + 0.5)))
