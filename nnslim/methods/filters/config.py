"""Settings of filter pruning after training."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from nnslim.methods.base import MethodConfig


class FiltersConfig(MethodConfig):
    """Which filters are removed from a trained network until a budget is met; fine-tune afterwards.

    The weights decide. With images, removed filters are folded into those that stay (`recovery: {compensate: true}`,
    the default).
    """

    importance: Literal["l1", "fpgm", "random"] = Field(
        "l1", description="l1: size of the weights; fpgm: distance from the layer's other filters; random"
    )
    macs: float | None = Field(None, gt=0, lt=1, description="budget: share of the dense MACs")
    params: float | None = Field(None, gt=0, lt=1, description="budget: share of the dense parameters")
    ranking: Literal["global", "uniform"] = Field(
        "global", description="global: all layers' filters in one order; uniform: the same share of each layer"
    )
    min_filters: int = Field(4, ge=1, description="filters that each layer keeps, at least")
    multiple: int = Field(1, ge=1, description="widths are multiples of this; 8 suits CPUs")
    seed: int = Field(0, ge=0, description="seed of the importance random")

    @model_validator(mode="after")
    def _check(self) -> FiltersConfig:
        if (self.macs is None) == (self.params is None):
            raise ValueError("give macs or params, one of them")
        return self
