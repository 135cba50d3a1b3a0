"""Dense against token-sparse on one dataset: the same short training, then Dice, MACs and seconds; one row per run."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from nnslim.compression.config import SlimConfig, from_dict
from nnslim.errors import ConfigError
from nnslim.hosts.nnunet.compress.compress_model import compress_model
from nnslim.hosts.nnunet.model.trained_model import input_shape, read_trained_model
from nnslim.hosts.nnunet.train.token_sparse_trainer import token_sparse_trainer_class, unetr_trainer_class
from nnslim.methods.token_sparse.config import RecipeConfig, TokenSparseConfig, UNETRConfig
from nnslim.network.operations import count_operations
from studies.quick_dice import append_row, read_rows, validation_dice
from studies.short_training import ShortTraining, train_short

_log = logging.getLogger("nnslim")


@dataclass(frozen=True)
class Run:
    """One row: what is trained, or made of what was trained.

    Attributes:
        name: of the row, and of its results folder.
        network: primus or unetr.
        settings: of the method, for training.
        start: row whose weights are the start; None: from scratch.
        compress: method settings for a training-free use of row `start`, in place of a training.
        images: whether the training-free use may look at the training images.
    """

    name: str
    network: str
    settings: dict[str, Any]
    start: str | None = None
    compress: dict[str, Any] | None = None
    images: bool = False


_LEARNED = {"scorer": "mlp", "completion": "fusion"}
_TAUGHT = {**_LEARNED, "supervision": 1.0, "perturbation": "none"}
_ONE = {"locations": (0.25,)}  # one stage, after a quarter of the blocks
_DENSE = {"ratio": 0.0, "scorer": "energy", "completion": "last"}


def default_runs() -> list[Run]:
    """Return the rows of the table, in an order in which the most telling come first."""
    runs = [Run("primus_dense", "primus", _DENSE)]
    runs += [Run(f"primus_{r}_scratch", "primus", {**_LEARNED, "ratio": r}) for r in (0.5, 0.75)]
    runs += [Run(f"primus_{r}_taught", "primus", {**_TAUGHT, "ratio": r}) for r in (0.5, 0.75)]
    runs += [Run(f"primus_{r}_one_taught", "primus", {**_TAUGHT, **_ONE, "ratio": r}) for r in (0.5, 0.75)]
    for scorer in ("attention", "energy", "distance", "random"):
        free = {"scorer": scorer, "completion": "last", "ratio": 0.5}
        runs.append(Run(f"primus_0.5_free_{scorer}", "primus", {}, "primus_dense", free))
    runs.append(Run("primus_0.5_free_tome", "primus", {}, "primus_dense", {"mode": "merge", "ratio": 0.5}))
    fitted = {"scorer": "attention", "completion": "fusion", "ratio": 0.5}
    runs.append(Run("primus_0.5_free_fitted", "primus", {}, "primus_dense", fitted, images=True))
    runs += [Run("unetr_dense", "unetr", _DENSE)]
    runs += [Run(f"unetr_{r}_scratch", "unetr", {**_LEARNED, "ratio": r, "skips": "completed"}) for r in (0.5, 0.75)]
    runs += [Run(f"unetr_{r}_taught", "unetr", {**_TAUGHT, "ratio": r}) for r in (0.5, 0.75)]
    runs.append(Run("primus_dense_on", "primus", _DENSE, "primus_dense"))
    for name, settings in (("warm", _LEARNED), ("taught_warm", _TAUGHT)):
        for shape, stages in (("", {}), ("one_", _ONE)):
            runs += [
                Run(f"primus_{r}_{shape}{name}", "primus", {**settings, **stages, "ratio": r}, "primus_dense")
                for r in (0.5, 0.75)
            ]
    return runs


def small_primus_trainer() -> type:
    """Return a Primus trainer of a size that two cores can train: 3.6 million parameters."""
    from dynamic_network_architectures.architectures.primus import Primus
    from nnunetv2.training.nnUNetTrainer.primus.primus_trainers import AbstractPrimus

    class SmallPrimus(AbstractPrimus):
        @staticmethod
        def build_network_architecture(
            plans_manager: Any,
            configuration_manager: Any,
            num_input_channels: int,
            num_output_channels: int,
            enable_deep_supervision: bool = True,
        ) -> nn.Module:
            patch = configuration_manager.patch_size
            options = {"scale_attn_inner": True, "init_values": 0.1}
            return Primus(num_input_channels, 192, (8, 8, 8), num_output_channels, 8, 4, patch, **options)

    return SmallPrimus


def trainer_of(run: Run, length: ShortTraining, start: Path | None) -> type:
    """Return the trainer of a run; its name, and so its results folder, is that of the run."""
    recipe = RecipeConfig(warmup_epochs=1)
    unetr = UNETRConfig(decoder="x8", dim=192, depth=9, heads=4)
    settings = TokenSparseConfig(**run.settings, recipe=recipe, unetr=unetr, warm_start=start)
    if run.network == "unetr":
        return unetr_trainer_class(settings, run.name)
    return token_sparse_trainer_class(small_primus_trainer(), settings, run.name)


def measure_table(
    dataset: int, fold: int, length: ShortTraining, runs: Sequence[Run], output: Path, *, cases: int = 20
) -> None:
    """Make one row after the other and write each to `output` as it is done; rows that are there are left alone.

    Args:
        dataset, fold: in nnUNet_raw. length: of every training. output: CSV. cases: of the validation part, at most.
    """
    done = {row["run"] for row in read_rows(output)}
    for run in runs:
        if run.name in done:
            continue
        folder = _made(run, dataset, fold, length, output.parent)
        row = {"run": run.name, **_measured(folder, fold, dataset, cases)}
        log = torch.load(folder / f"fold_{fold}" / "checkpoint_final.pth", weights_only=False).get("logging") or {}
        starts, ends = log.get("epoch_start_timestamps", []), log.get("epoch_end_timestamps", [])
        times = sorted(end - start for start, end in zip(starts, ends, strict=False))
        row["seconds_per_epoch"] = round(times[len(times) // 2], 2) if times and run.compress is None else ""
        row["steps"] = length.epochs * length.iterations if run.compress is None else 0
        append_row(output, row)
        _log.info("%s", row)


def _made(run: Run, dataset: int, fold: int, length: ShortTraining, work: Path) -> Path:
    def trained(name: str) -> Path:
        found = sorted(Path(os.environ["nnUNet_results"]).glob(f"Dataset{dataset:03d}_*/{name}__*"))
        if not found:
            raise ConfigError(f"row {run.name} starts from row {name}, which is not there")
        return found[0]

    if run.compress is None:
        start = None if run.start is None else trained(run.start) / f"fold_{fold}" / "checkpoint_final.pth"
        return train_short(dataset, "3d_fullres", fold, length, trainer_base=trainer_of(run, length, start)).parent
    target = work / f"{run.name}__nnUNetPlans__3d_fullres"
    if not target.is_dir():
        images = None
        if run.images:
            images = next(Path(os.environ["nnUNet_raw"]).glob(f"Dataset{dataset:03d}_*")) / "imagesTr"
        config: SlimConfig = from_dict(
            {"methods": [{"method": "token_sparse", **run.compress}], "run": {"guard": False}}
        )
        dense = read_trained_model(_dense_twin(trained(run.start), work), [fold])
        compress_model(dense, target, config, images=images)
    return target


def _dense_twin(folder: Path, work: Path) -> Path:
    """Return a copy of a folder that was trained with ratio 0, with the dense network in its plans."""
    from nnslim.hosts.nnunet.model.slim_network import BASE_KEY, SPEC_KEY

    twin = work / "dense" / folder.name
    if not twin.is_dir():
        import shutil

        shutil.copytree(folder, twin)
        plans = json.loads((twin / "plans.json").read_text())
        architecture = plans["configurations"]["3d_fullres"]["architecture"]
        architecture["arch_kwargs"].pop(SPEC_KEY)
        architecture["network_class_name"] = architecture["arch_kwargs"].pop(BASE_KEY)
        (twin / "plans.json").write_text(json.dumps(plans))
    return twin


def _measured(folder: Path, fold: int, dataset: int, cases: int) -> dict[str, Any]:
    scores, seconds, predictor = validation_dice(folder, fold, dataset, cases)
    model = read_trained_model(folder, [fold])
    cost = count_operations(predictor.network, input_shape(model))
    return {
        "dice": round(float(np.mean(scores)), 4),
        "dice_by_class": " ".join(f"{value:.4f}" for value in np.mean(scores, axis=0)),
        "cases": len(scores),
        "cpu_seconds_per_case": round(sorted(seconds)[len(seconds) // 2], 3),
        "mmacs": round(cost.macs() / 1e6, 2),
        "encoder_mmacs": round(sum(cost.macs("torch", name) for name in ("eva", "encoder", "completion")) / 1e6, 2),
        "parameters": cost.parameters,
    }
