"""Settings of Sauron: filters pruned while the network trains."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from nnslim.methods.base import MethodConfig

Distance = Literal["euc_norm", "euc_norm_nonorm", "euc_norm_deltaprunenorm", "euc_rand", "off"]
Reference = Literal["published", "first", "random", "medoid"]


class SauronConfig(MethodConfig):
    """How filters are pulled together, when a layer's threshold is raised, what is removed, and when to stop.

    Distances (names as in the original): euc_norm: maps scaled to 0..1, then the root mean square of their difference;
    euc_norm_nonorm: without the scaling; euc_norm_deltaprunenorm and euc_rand: without the scaling, divided by the
    largest of the layer.
    """

    strength: float = Field(0.5, ge=0, description="weight of the distance loss (lambda); 0: pruning alone")
    delta_opt: Distance = Field("euc_norm", description="distance that the loss makes smaller")
    delta_prune: Distance = Field("euc_rand", description="distance below which a filter is removed")
    importance: Literal["maps", "l1", "fpgm", "random", "taylor"] = Field(
        "maps",
        description="what says which filters go. maps: Sauron's distances; l1, fpgm, random: as in the method filters; "
        "taylor: the effect on the loss, by gradients; the last four as shares of the layer's largest",
    )
    reference: Reference = Field(
        "first",
        description="map that others are compared with: first, random (anew each epoch) or medoid, one for loss and "
        "criterion; published: first for the loss, random for the criterion",
    )
    batches: int = Field(8, ge=1, description="training batches at an epoch's end over which the criterion is averaged")
    threshold_first: float = Field(0.001, ge=0, description="threshold of each layer at the start")
    threshold_max: float = Field(0.3, gt=0, description="last threshold (tau_max)")
    steps: int = Field(15, ge=1, description="steps from the first threshold to the last (kappa)")
    patience: int = Field(5, ge=0, description="epochs after a raise, and epochs looked back on (rho)")
    few: float = Field(0.02, gt=0, le=1, description="a layer that loses less than this share has converged (mu)")
    convergence: Literal["auto", "validation", "training"] = Field(
        "auto", description="losses that decide convergence; auto: those of the validation where it has any"
    )
    min_filters: int = Field(1, ge=1, description="filters that each layer keeps, at least")
    multiple: int = Field(1, ge=1, description="widths stay multiples of this; 8 suits CPUs and tensor cores")
    macs: float | None = Field(None, gt=0, le=1, description="stop at this share of the MACs of the start")
    params: float | None = Field(None, gt=0, le=1, description="stop at this share of the parameters of the start")
    reach: float | None = Field(
        None,
        gt=0,
        le=1,
        description="share of the epochs after which macs or params is reached, whatever the thresholds say; none: "
        "thresholds alone decide",
    )
    ranking: Literal["uniform", "global"] = Field(
        "uniform",
        description="what is removed first on the way to macs or params: filters of the layer that has lost the "
        "smallest share of its width, or the filters of all layers that are nearest to their references",
    )
    fold: bool | None = Field(
        None,
        description="fold removed filters into those that stay (ridge regression on the maps observed); none: where a "
        "trained model is the start",
    )
    settle: float = Field(0.1, ge=0, lt=1, description="share of the epochs, at the end, in which nothing is removed")
    seed: int = Field(0, ge=0, description="seed of references, augmentation and first weights")
    start: Path | None = Field(None, description="trained model folder to start from; none: from scratch")
    base: str | None = Field(None, description="nnU-Net's trainer to build on; none: nnUNetTrainer")
    epochs: int | None = Field(None, ge=1, description="none: the trainer's")
    iterations: int | None = Field(None, ge=1, description="per epoch; none: the trainer's")
    validation_iterations: int | None = Field(None, ge=1, description="per epoch; none: the trainer's")
    batch_size: int | None = Field(None, ge=1, description="none: the plans'")
    learning_rate: float | None = Field(None, gt=0, description="none: the trainer's")
    optimizer: Literal["trainer", "adam"] = Field("trainer", description="trainer: the trainer's own, SGD in nnU-Net")
    precision: Literal["f32", "bf16", "auto"] = Field(
        "f32", description="precision on a CPU; auto: bf16 where the processor is fast in it. On CUDA nnU-Net decides"
    )
    save_maps: int = Field(0, ge=0, description="epochs between two snapshots of all feature maps; 0: none")

    @model_validator(mode="after")
    def _check(self) -> SauronConfig:
        if self.threshold_first >= self.threshold_max:
            raise ValueError(f"threshold_first {self.threshold_first} must be below threshold_max {self.threshold_max}")
        if self.delta_prune == "off":
            raise ValueError("delta_prune 'off' would prune nothing; name a distance")
        if self.macs is not None and self.params is not None:
            raise ValueError("give macs or params, not both")
        if self.reach is not None and self.macs is None and self.params is None:
            raise ValueError("reach needs macs or params, which it says when to reach")
        return self

    @property
    def grid(self) -> tuple[float, ...]:
        """The thresholds, ascending: steps + 1 of them, evenly spaced."""
        step = (self.threshold_max - self.threshold_first) / self.steps
        return (*(self.threshold_first + step * number for number in range(self.steps)), self.threshold_max)

    @property
    def folds(self) -> bool:
        """Whether filters that go are folded into those that stay."""
        return self.start is not None if self.fold is None else self.fold

    @property
    def target(self) -> float | None:
        """The share at which to stop, of MACs or of parameters."""
        return self.macs if self.macs is not None else self.params
