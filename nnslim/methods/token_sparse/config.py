"""Settings of the token-sparse method."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from nnslim.methods.base import MethodConfig
from nnslim.methods.token_sparse.completion import Completion
from nnslim.methods.token_sparse.reduction import Mode
from nnslim.methods.token_sparse.scorers import LEARNED, Scorer


class UNETRConfig(MethodConfig):
    """Architecture of the token-sparse UNETR that its trainer builds; the published one by default."""

    decoder: Literal["x16", "x8", "x8v2"] = Field("x8v2", description="decides the edge of a patch: 16, or 8 voxels")
    features: int = Field(16, ge=1, description="channels of the decoder at full resolution")
    dim: int = Field(768, ge=6, description="features of a token")
    depth: int = Field(12, ge=1, description="transformer blocks")
    heads: int = Field(12, ge=1, description="attention heads; divide dim")
    drop_path: float = Field(0.0, ge=0, lt=1, description="stochastic depth of the last block")
    patch_embed: Literal["conv", "conv2p1d"] = Field("conv", description="one convolution, or (p,p,1) and (1,1,p)")
    completion_dim: int | None = Field(None, ge=6, description="width of the completion net; default: dim")
    completion_heads: int | None = Field(None, ge=1, description="heads of the completion net; default: heads")


class RecipeConfig(MethodConfig):
    """How the trainer learns, where it differs from nnU-Net's Primus recipe. None: as nnU-Net has it."""

    epochs: int | None = Field(None, ge=1, description="default: 1000")
    warmup_epochs: int | None = Field(None, ge=1, description="epochs over which the learning rate rises; default: 50")
    batch_size: int | None = Field(None, ge=1, description="patches per step; default: the plan's")
    rate_per_256: float | None = Field(None, gt=0, description="learning rate = this * batch_size / 256")
    learning_rate: float | None = Field(None, gt=0, description="default: 3e-4")
    betas: tuple[float, float] = Field((0.9, 0.98), description="betas of AdamW")
    weight_decay: float = Field(0.05, ge=0, description="weight decay of AdamW")
    layer_decay: float = Field(1.0, gt=0, le=1, description="rate of a block relative to that of the next")
    schedule: Literal["poly", "cosine"] = Field("poly", description="fall of the learning rate after the warm-up, to 0")


class TokenSparseConfig(MethodConfig):
    """Where a vision transformer drops which tokens, and how every position is filled in again at its end."""

    locations: tuple[int | float, ...] | None = Field(
        None,
        description="blocks that run before each stage, 0: at the start, or a share of all blocks, 0 < share < 1; "
        "default: 0.25, 0.5, 0.75",
    )
    ratio: float | tuple[float, ...] = Field(0.5, description="share of the tokens removed at each stage, 0 <= r < 1")
    mode: Mode = Field("drop", description="drop tokens, or merge similar ones (ToMe; needs no scorer)")
    scorer: Scorer | tuple[Scorer, ...] = Field(
        "attention",
        description="scorer of all stages, or of each: mlp, att (learned); energy, distance, attention, air, random",
    )
    shared: bool = Field(False, description="one learned scorer for all stages")
    tau: float = Field(1.0, gt=0, description="temperature of the soft choice in training")
    perturbation: Literal["gumbel", "none"] = Field("gumbel", description="noise on the scores in training")
    completion: Completion = Field("last", description="last: last values, no weights; the others are learned")
    completion_depth: int = Field(1, ge=0, description="dense blocks of a learned completion")
    skips: Literal["completed", "blocks"] = Field(
        "blocks", description="inner inputs of a UNETR decoder: completed tokens (published), or outputs of blocks"
    )
    schedule_epochs: int = Field(0, ge=0, description="training: epochs over which the ratio rises from 0")
    supervision: float = Field(
        0.0, ge=0, description="training: weight of a loss that shows learned scorers which tokens hold foreground"
    )
    warm_start: Path | None = Field(None, description="training: checkpoint of the dense network to start from")
    unetr: UNETRConfig = UNETRConfig()
    recipe: RecipeConfig = RecipeConfig()

    @model_validator(mode="after")
    def _fits(self) -> TokenSparseConfig:
        if not all(0 <= each < 1 for each in (self.ratio if isinstance(self.ratio, tuple) else (self.ratio,))):
            raise ValueError("a ratio is a share of the tokens, 0 <= ratio < 1")
        places = self.locations
        if places is not None and (list(places) != sorted(set(places)) or min(places, default=0) < 0):
            raise ValueError("locations are ascending numbers of blocks, or shares of them")
        if places is not None and any(isinstance(each, float) and not 0 < each < 1 for each in places):
            raise ValueError("a location is a whole number of blocks, or a share of all blocks, 0 < share < 1")
        for name, value in (("ratio", self.ratio), ("scorer", self.scorer)):
            if isinstance(value, tuple) and places is not None and len(value) != len(places):
                raise ValueError(f"{name} lists {len(value)} values for {len(places)} locations")
        kinds = self.scorer if isinstance(self.scorer, tuple) else (self.scorer,)
        if self.supervision and (self.mode == "merge" or not set(kinds) & set(LEARNED)):
            raise ValueError(f"supervision teaches learned scorers ({', '.join(LEARNED)}), and none is used")
        return self

    def stages(self, depth: int) -> tuple[list[int], list[float], list[Scorer]]:
        """Return locations in blocks, ratios and scorers for an encoder of `depth` blocks."""
        wanted = (0.25, 0.5, 0.75) if self.locations is None else self.locations
        places = sorted({round(depth * each) if isinstance(each, float) else each for each in wanted})
        ratios = list(self.ratio) if isinstance(self.ratio, tuple) else [float(self.ratio)] * len(places)
        scorers = list(self.scorer) if isinstance(self.scorer, tuple) else [self.scorer] * len(places)
        return places, [float(ratio) for ratio in ratios], scorers
