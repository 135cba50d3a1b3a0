"""Settings of the levers for embedded boards."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator, model_validator

from nnslim.methods.base import MethodConfig


class EmbeddedConfig(MethodConfig):
    """Four levers, each off by default. Precision is the configuration's own: `store: half`, `run.precision: int8`."""

    drop_stages: int = Field(0, ge=0, description="deepest encoder stages to drop, with their decoder levels")
    depthwise: Literal["none", "separable", "grouped", "dense"] = Field(
        "none",
        description="convolutions become separable (depth-wise, then 1x1), grouped (as many groups as fit), or dense",
    )
    include: tuple[str, ...] = Field(("*",), description="shell patterns of layers for depthwise and sparsity")
    exclude: tuple[str, ...] = Field((), description="shell patterns of layers that are left alone")
    coarser: float | tuple[float, ...] = Field(
        1.0, description="factor of the spacing, one or one per axis of the patch; model folders only"
    )
    sparsity: float = Field(
        0.0, ge=0, lt=1, description="share of the weights set to zero, smallest first; saves no time"
    )
    start_sparsity: float | None = Field(
        None, ge=0, lt=1, description="share set to zero now; fine-tuning raises it to sparsity on a cubic curve"
    )
    begin: float = Field(1 / 15, ge=0, lt=1, description="share of the fine-tuning at which the rise begins")
    end: float = Field(2 / 3, gt=0, le=1, description="share of the fine-tuning at which it ends")
    strip: bool = Field(True, description="remove layers that neither prediction nor training calls")

    @field_validator("coarser")
    @classmethod
    def _positive(cls, value: float | tuple[float, ...]) -> float | tuple[float, ...]:
        if not all(0.25 <= each <= 8 for each in (value if isinstance(value, tuple) else (value,))):
            raise ValueError("coarser is between 0.25 and 8")
        return value

    @model_validator(mode="after")
    def _fits(self) -> EmbeddedConfig:
        if self.start_sparsity is not None and not self.start_sparsity <= self.sparsity:
            raise ValueError("start_sparsity is at most sparsity")
        if self.begin >= self.end:
            raise ValueError("begin is before end")
        return self
