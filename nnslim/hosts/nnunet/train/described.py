"""Shared by trainers of networks that nnU-Net's plans do not describe: the model's description, and a recipe."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from nnslim.hosts.nnunet.model.planned import PLAIN_TRAINER
from nnslim.hosts.nnunet.train.steady import SteadyTraining
from nnslim.methods.token_sparse.config import RecipeConfig

_BLOCK = re.compile(r"(?:encoder|eva|vit)\.blocks\.(\d+)\.")
_EMBEDDINGS = ("pos_embed", "cls_token", "register_tokens", "relative_position_bias_table")


class DescribedTraining(SteadyTraining):
    """Mixed into an nnU-Net trainer that builds its network itself; `described_plans` name what it builds.

    plans.json describes the network and the checkpoints name nnU-Net's default trainer, which builds from plans: so
    stock nnU-Net predicts with the model wherever nnslim is installed. There is no deep supervision.
    """

    def changed_content(self) -> dict[str, Any]:
        """Name nnU-Net's default trainer, and the plans from which it builds the network."""
        arguments = {**self.my_init_kwargs, "plans": self.described_plans()}
        return {"trainer_name": PLAIN_TRAINER, "init_args": arguments}

    def set_deep_supervision_enabled(self, enabled: bool) -> None:
        """There is none."""


def parameter_groups(network: nn.Module, recipe: RecipeConfig) -> list[dict]:
    """Return AdamW's groups: no decay for vectors and embeddings, dense or sparse; each block at its own rate.

    As published: rate * layer_decay ** (depth + 1 - id), id 0 for embeddings, i + 1 for block i; all else at full rate.
    """
    numbers = [int(found[1]) for name, _ in network.named_parameters() if (found := _BLOCK.search(name))]
    depth = max(numbers, default=-1) + 1

    def scale(name: str) -> float:
        if name.rsplit(".", 1)[-1] in _EMBEDDINGS or "patch_embed" in name or "down_projection" in name:
            position = 0
        elif found := _BLOCK.search(name):
            position = int(found[1]) + 1
        else:
            return 1.0
        return recipe.layer_decay ** (depth + 1 - position)

    return grouped(network, scale, recipe.weight_decay)


def grouped(network: nn.Module, scale: Callable[[str], float], weight_decay: float) -> list[dict]:
    """Return an optimiser's groups: the scale of the rate by a parameter's name, decay for matrices only."""
    groups: dict[tuple[float, float], dict] = {}
    for name, parameter in network.named_parameters():
        if parameter.requires_grad:
            plain = parameter.ndim < 2 or name.rsplit(".", 1)[-1] in _EMBEDDINGS
            key = scale(name), 0.0 if plain else weight_decay
            groups.setdefault(key, {"params": [], "scale": key[0], "weight_decay": key[1]})["params"].append(parameter)
    return list(groups.values())


class RateSchedule:
    """Learning rate by epoch: linear warm-up, then poly or cosine to 0; times the scale of each group."""

    def __init__(self, optimizer: torch.optim.Optimizer, rate: float, epochs: int, warmup: int, kind: str) -> None:
        self.optimizer, self.rate, self.epochs, self.warmup, self.kind = optimizer, rate, epochs, warmup, kind
        self.step(0)

    def at(self, epoch: int) -> float:
        """Return the rate of an epoch."""
        if epoch < self.warmup:
            return self.rate * (epoch + 1) / self.warmup
        share = min(1.0, (epoch - self.warmup) / max(1, self.epochs - self.warmup))
        return self.rate * ((1 - share) ** 0.9 if self.kind == "poly" else 0.5 * (1 + math.cos(math.pi * share)))

    def step(self, epoch: int) -> None:
        """Set the rates of an epoch, as nnU-Net asks at its start."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.at(epoch) * group.get("scale", 1.0)

    def get_last_lr(self) -> list[float]:
        """Return the rates in force."""
        return [group["lr"] for group in self.optimizer.param_groups]
