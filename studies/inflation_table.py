"""What inflated 2D weights are worth: the same short training from them and from random weights, one row per run."""

from __future__ import annotations

import copy
import logging
import os
import random
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nnslim.errors import ConfigError
from nnslim.hosts.nnunet.model.inflated import inflate_model, target_of, write_inflated
from nnslim.hosts.nnunet.model.trained_model import read_trained_model
from nnslim.hosts.nnunet.train.described import DescribedTraining
from nnslim.hosts.nnunet.train.window_trainer import window_trainer_class
from nnslim.inflation.window_net import WindowConfig
from nnslim.network.walk import unwrap
from studies.quick_dice import append_row, read_rows, validation_dice
from studies.short_training import DEFAULT_PLANS, ShortTraining, preprocess_once, train_short

_log = logging.getLogger("nnslim")
_CONFIGURATION = "3d_fullres"
_CPU = torch.device("cpu")


@dataclass(frozen=True)
class Row:
    """One training.

    Attributes:
        part: unet or window. start: scratch, center or average (of the U-Net, or of the patch embedding).
        seed: of first weights, patches and augmentation. trained: False to predict with the start itself.
    """

    part: str
    start: str
    seed: int
    trained: bool = True

    @property
    def name(self) -> str:
        """Return the name of the row and of its results folder."""
        return f"Inflation_{self.part}_{self.start}_{self.seed}" + ("" if self.trained else "_untuned")


@dataclass(frozen=True)
class Study:
    """What is compared on what.

    Attributes:
        dataset, fold: in nnUNet_raw. model: trained 2D model folder, for part unet.
        unet, window: length of each training; every start of a part has the same.
        patch: of the trainings of part unet, voxels; None for the plans'. That of part window is among its settings.
        settings: of the window network; its `weights` are the inflated start. cases: to predict, at most.
        work: folder for what lies between.
        heads: start part unet with the inflated heads, too, as `nnslim finetune` of an inflated folder does; False
            leaves them at random, as nnU-Net's -pretrained_weights does.
    """

    dataset: int
    fold: int
    model: Path | None
    unet: ShortTraining
    window: ShortTraining
    settings: WindowConfig
    cases: int
    work: Path
    patch: tuple[int, ...] | None = None
    heads: bool = True


def rows_of(parts: list[str], modes: list[str], seeds: list[int]) -> list[Row]:
    """Return the rows, in an order in which a table that is cut off still compares."""
    made = []
    if "unet" in parts:
        made += [Row("unet", mode, 0, trained=False) for mode in modes]
    for seed in seeds:
        for part in parts:
            made += [Row(part, start, seed) for start in ("scratch", *modes)]
    return made


def measure_inflation(study: Study, rows: list[Row], output: Path) -> None:
    """Make one row after the other, each written to `output` as it is done; rows that are there are left alone.

    Beside `output`, NAME_curve.csv has nnU-Net's own (pooled, patch-wise) Dice after every epoch.
    """
    done = {row["run"] for row in read_rows(output)}
    for row in rows:
        if row.name in done:
            continue
        made, curve = _measured(row, study)
        for epoch in curve:
            append_row(curve_of(output), epoch)
        append_row(output, made)
        _log.info("%s", made)


def curve_of(output: Path) -> Path:
    """Return the file with the Dice over iterations that belongs to a table."""
    return output.with_name(f"{output.stem}_curve.csv")


def _measured(row: Row, study: Study) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    length = study.unet if row.part == "unet" else study.window
    if row.trained:
        folder = _train(row, study, length)
    else:
        folder = _inflated(row.start, study)
    scores, seconds, _ = validation_dice(folder, study.fold, study.dataset, study.cases)
    made = {
        "run": row.name,
        "part": row.part,
        "start": row.start,
        "seed": row.seed,
        "steps": length.epochs * length.iterations if row.trained else 0,
        "dice": round(float(scores.mean()), 4),
        "dice_by_class": " ".join(f"{value:.4f}" for value in scores.mean(axis=0)),
        "cases": len(scores),
        "cpu_seconds_per_case": round(float(np.median(seconds)), 3),
    }
    curve = []
    if row.trained:
        log = torch.load(folder / f"fold_{study.fold}" / "checkpoint_final.pth", weights_only=False)["logging"]
        for number, value in enumerate(log["mean_fg_dice"], 1):
            steps = number * length.iterations
            curve.append({"run": row.name, "part": row.part, "start": row.start, "seed": row.seed, "steps": steps})
            curve[-1]["dice"] = round(float(value), 4)
    return made, curve


def _inflated(mode: str, study: Study) -> Path:
    """Return a 3D model folder made from the 2D model, made anew where it is not there."""
    folder = study.work / f"inflated_{mode}__{DEFAULT_PLANS}__{_CONFIGURATION}"
    if not folder.is_dir():
        if study.model is None:
            raise ConfigError("part unet inflates a trained 2D model: name its folder (-m)")
        flat = read_trained_model(study.model, [study.fold])
        prepared = preprocess_once(study.dataset, _CONFIGURATION, 1)
        target = target_of(flat, _CONFIGURATION, prepared / f"{DEFAULT_PLANS}.json")
        write_inflated(flat, target, inflate_model(flat, target, mode), file=None, folder=folder)
    return folder


def _train(row: Row, study: Study, length: ShortTraining) -> Path:
    preprocess_once(study.dataset, _CONFIGURATION, 1)
    os.environ["nnUNet_n_proc_DA"] = "0"  # patches and augmentation come from this process' generators
    for seeded in (random.seed, np.random.seed, torch.manual_seed):
        seeded(row.seed)
    if row.part == "window":
        settings = study.settings.model_copy(update={"mode": "center" if row.start == "scratch" else row.start})
        if row.start == "scratch":
            settings = settings.model_copy(update={"weights": None})
        elif settings.weights is None:
            raise ConfigError("part window starts from 2D weights: name them (--weights)")
        base = window_trainer_class(_with_length(settings, length), row.name)
        return train_short(study.dataset, _CONFIGURATION, study.fold, length, trainer_base=base).parent
    start = None if row.start == "scratch" else _inflated(row.start, study)

    def warm(trainer: Any) -> None:
        if start is None:
            return
        path = start / f"fold_{study.fold}" / "checkpoint_final.pth"
        weights = torch.load(path, map_location="cpu", weights_only=False)["network_weights"]
        if not study.heads:
            own = unwrap(trainer.network).state_dict()
            weights = {key: own[key] if ".seg_layers." in key else weights[key] for key in own}
        unwrap(trainer.network).load_state_dict(weights)

    base = _named_trainer(row.name, study.patch)
    return train_short(study.dataset, _CONFIGURATION, study.fold, length, trainer_base=base, on_start=warm).parent


def _with_length(settings: WindowConfig, length: ShortTraining) -> WindowConfig:
    """Return settings with the batch and rate of a short training, which would otherwise win over them."""
    return settings.model_copy(update={"batch_size": length.batch_size, "learning_rate": length.learning_rate})


def _named_trainer(name: str, patch: tuple[int, ...] | None) -> type:
    """Return nnU-Net's default trainer under another name, so that it has a results folder of its own."""
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

    class Named(DescribedTraining, nnUNetTrainer):
        set_deep_supervision_enabled = nnUNetTrainer.set_deep_supervision_enabled

        def __init__(
            self, plans: dict, configuration: str, fold: int, dataset_json: dict, device: torch.device = _CPU
        ) -> None:
            self.as_planned = copy.deepcopy(plans)
            if patch is not None:
                plans["configurations"][configuration]["patch_size"] = list(patch)
            super().__init__(plans, configuration, fold, dataset_json, device)

        def described_plans(self) -> dict[str, Any]:
            """Return the plans as they were: tiles of prediction have the planned size."""
            return self.as_planned

    Named.__name__ = Named.__qualname__ = name
    return Named


def draw_curves(output: Path, picture: Path) -> None:
    """Draw Dice over steps, mean and range over seeds, one panel per part."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    grouped: dict[str, dict[str, dict[int, list[float]]]] = defaultdict(lambda: defaultdict(lambda: defaultdict(list)))
    for row in read_rows(curve_of(output)):
        grouped[row["part"]][row["start"]][int(row["steps"])].append(float(row["dice"]))
    if not grouped:
        return
    figure, axes = pyplot.subplots(1, len(grouped), figsize=(5 * len(grouped), 3.6), squeeze=False)
    for axis, (part, starts) in zip(axes[0], grouped.items(), strict=True):
        for start, points in starts.items():
            steps = sorted(points)
            axis.plot(steps, [float(np.mean(points[step])) for step in steps], marker=".", label=start)
            lows, highs = [min(points[step]) for step in steps], [max(points[step]) for step in steps]
            axis.fill_between(steps, lows, highs, alpha=0.2)
        axis.set(title=part, xlabel="steps", ylabel="Dice (patches, pooled)", ylim=(0, 1))
        axis.legend()
    figure.tight_layout()
    figure.savefig(picture, dpi=120)
    pyplot.close(figure)
