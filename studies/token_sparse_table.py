"""Dense against token-sparse networks, trained alike: Dice, MACs and seconds; for docs/token_sparse.md.

./run.sh -m studies.token_sparse_table -d 4 -o table.csv --epochs 8 --iterations 40
One row per run; rows that the file has are kept, so an interrupted run goes on.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from nnslim.compression.config import SlimConfig, from_dict
from nnslim.errors import ConfigError
from nnslim.hosts.nnunet.compress.compress_model import compress_model
from nnslim.hosts.nnunet.model.checked_plans import BASE_KEY, SPEC_KEY
from nnslim.hosts.nnunet.model.trained_model import input_shape, load_checkpoint, read_trained_model
from nnslim.hosts.nnunet.train.token_sparse_trainer import token_sparse_trainer_class, unetr_trainer_class
from nnslim.methods.token_sparse.config import RecipeConfig, TokenSparseConfig, UNETRConfig
from nnslim.network.operations import count_operations
from nnslim.tables import markdown
from studies.command import new_parser, run_command
from studies.quick_dice import dice_columns, raw_dataset, validation_dice
from studies.short_training import ShortTraining, seed_training, train_short
from studies.table import GrowingTable, over_seeds


@dataclass(frozen=True)
class SparseRun:
    """One row: a network that is trained, or made from a trained one.

    Attributes:
        name: names the row and its results folder.
        network: primus or unetr.
        settings: the method's, for training.
        start: row whose weights are the start; None: from scratch.
        compress: method settings to apply to row `start` without training; None: train.
        images: whether `compress` may use the training images.
        seed: fixes first weights, patches and augmentation; runs with seeds other than 0 carry theirs in the name.
    """

    name: str
    network: str
    settings: dict[str, Any]
    start: str | None = None
    compress: dict[str, Any] | None = None
    images: bool = False
    seed: int = 0

    @property
    def run(self) -> str:
        """Return the name of the row and of its results folder."""
        return _run_name(self.name, self.seed)


def _run_name(name: str, seed: int) -> str:
    return f"{name}_seed{seed}" if seed else name


_LEARNED = {"scorer": "mlp", "completion": "fusion"}
_TAUGHT = {**_LEARNED, "supervision": 1.0, "perturbation": "none"}
_ONE = {"locations": (0.25,)}  # one stage, after a quarter of the blocks
_DENSE = {"ratio": 0.0, "scorer": "energy", "completion": "last"}


def default_runs() -> list[SparseRun]:
    """Return the rows of the table, the most informative first."""
    runs = [SparseRun("primus_dense", "primus", _DENSE)]
    runs += [SparseRun(f"primus_{r}_scratch", "primus", {**_LEARNED, "ratio": r}) for r in (0.5, 0.75)]
    runs += [SparseRun(f"primus_{r}_taught", "primus", {**_TAUGHT, "ratio": r}) for r in (0.5, 0.75)]
    runs += [SparseRun(f"primus_{r}_one_taught", "primus", {**_TAUGHT, **_ONE, "ratio": r}) for r in (0.5, 0.75)]
    for scorer in ("attention", "energy", "distance", "random"):
        free = {"scorer": scorer, "completion": "last", "ratio": 0.5}
        runs.append(SparseRun(f"primus_0.5_free_{scorer}", "primus", {}, "primus_dense", free))
    runs.append(SparseRun("primus_0.5_free_tome", "primus", {}, "primus_dense", {"mode": "merge", "ratio": 0.5}))
    fitted = {"scorer": "attention", "completion": "fusion", "ratio": 0.5}
    runs.append(SparseRun("primus_0.5_free_fitted", "primus", {}, "primus_dense", fitted, images=True))
    runs.append(SparseRun("primus_0.5_merge", "primus", {"mode": "merge", "ratio": 0.5, "completion": "fusion"}))
    runs += [SparseRun("unetr_dense", "unetr", _DENSE)]
    runs += [
        SparseRun(f"unetr_{r}_scratch", "unetr", {**_LEARNED, "ratio": r, "skips": "completed"}) for r in (0.5, 0.75)
    ]
    runs += [SparseRun(f"unetr_{r}_taught", "unetr", {**_TAUGHT, "ratio": r}) for r in (0.5, 0.75)]
    runs.append(SparseRun("primus_dense_on", "primus", _DENSE, "primus_dense"))
    for name, settings in (("warm", _LEARNED), ("taught_warm", _TAUGHT)):
        for shape, stages in (("", {}), ("one_", _ONE)):
            runs += [
                SparseRun(f"primus_{r}_{shape}{name}", "primus", {**settings, **stages, "ratio": r}, "primus_dense")
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


def trainer_of(run: SparseRun, length: ShortTraining, start: Path | None) -> type:
    """Return the trainer of a run; its name, and so its results folder, is that of the run."""
    recipe = RecipeConfig(warmup_epochs=1)
    unetr = UNETRConfig(decoder="x8", dim=192, depth=9, heads=4)
    settings = TokenSparseConfig(**run.settings, recipe=recipe, unetr=unetr, warm_start=start)
    if run.network == "unetr":
        return unetr_trainer_class(settings, run.run)
    return token_sparse_trainer_class(small_primus_trainer(), settings, run.run)


def measure_table(
    dataset: int, fold: int, length: ShortTraining, runs: Sequence[SparseRun], output: Path, *, cases: int = 20
) -> list[dict[str, Any]]:
    """Make the rows that the CSV file lacks, and return all of them.

    Args:
        dataset: in nnUNet_raw. fold: of its splits_final.json. length: of every training.
        output: CSV file; models are written beside it. cases: validation cases, at most.
    """
    table = GrowingTable(output, "run")
    table.fill({run.run: partial(_row, run, dataset, fold, length, output.parent, cases) for run in runs})
    return table.rows


def _row(run: SparseRun, dataset: int, fold: int, length: ShortTraining, work: Path, cases: int) -> dict[str, Any]:
    folder = _made(run, dataset, fold, length, work)
    scores, seconds, predictor = validation_dice(folder, fold, dataset, cases)
    cost = count_operations(predictor.network, input_shape(read_trained_model(folder, [fold])))
    log = load_checkpoint(folder / f"fold_{fold}" / "checkpoint_final.pth").get("logging") or {}
    starts, ends = log.get("epoch_start_timestamps", []), log.get("epoch_end_timestamps", [])
    times = sorted(end - start for start, end in zip(starts, ends, strict=False))
    trained = run.compress is None
    return {
        "run": run.run,
        "row": run.name,
        "seed": run.seed,
        **dice_columns(scores, seconds),
        "mmacs": round(cost.macs() / 1e6, 2),
        "encoder_mmacs": round(sum(cost.macs("torch", name) for name in ("eva", "encoder", "completion")) / 1e6, 2),
        "parameters": cost.parameters,
        "seconds_per_epoch": round(times[len(times) // 2], 2) if times and trained else "",
        "steps": length.epochs * length.iterations if trained else 0,
    }


def _made(run: SparseRun, dataset: int, fold: int, length: ShortTraining, work: Path) -> Path:
    def trained(name: str) -> Path:
        results = Path(os.environ["nnUNet_results"])
        found = sorted(results.glob(f"Dataset{dataset:03d}_*/{_run_name(name, run.seed)}__*"))
        if not found:
            raise ConfigError(f"row {run.name} starts from row {name}, which does not exist yet")
        return found[0]

    if run.compress is None:
        seed_training(run.seed)
        start = None if run.start is None else trained(run.start) / f"fold_{fold}" / "checkpoint_final.pth"
        return train_short(dataset, "3d_fullres", fold, length, trainer_base=trainer_of(run, length, start)).parent
    target = work / f"{run.run}__nnUNetPlans__3d_fullres"
    if not target.is_dir():
        images = None
        if run.images:
            images = raw_dataset(dataset) / "imagesTr"
        config: SlimConfig = from_dict(
            {"methods": [{"method": "token_sparse", **run.compress}], "run": {"guard": False}}
        )
        dense = read_trained_model(_dense_twin(trained(run.start), work), [fold])
        compress_model(dense, target, config, images=images)
    return target


def _dense_twin(folder: Path, work: Path) -> Path:
    """Return a copy of a folder that was trained with ratio 0, with the dense network in its plans."""
    twin = work / "dense" / folder.name
    if not twin.is_dir():
        shutil.copytree(folder, twin)
        plans = json.loads((twin / "plans.json").read_text())
        architecture = plans["configurations"]["3d_fullres"]["architecture"]
        architecture["arch_kwargs"].pop(SPEC_KEY)
        architecture["network_class_name"] = architecture["arch_kwargs"].pop(BASE_KEY)
        (twin / "plans.json").write_text(json.dumps(plans))
    return twin


def main(arguments: Sequence[str] | None = None) -> None:
    parser = new_parser(__doc__)
    parser.add_argument("-d", "--dataset", type=int, required=True, help="number of a dataset in nnUNet_raw")
    parser.add_argument("-o", "--output", type=Path, required=True, help="CSV file; models are written beside it")
    parser.add_argument("-f", "--fold", type=int, default=0, help="fold of splits_final.json (0)")
    parser.add_argument("--epochs", type=int, default=8, help="epochs of every training (8)")
    parser.add_argument("--iterations", type=int, default=40, help="steps per epoch (40)")
    parser.add_argument("--batch-size", type=int, default=4, help="patches per step (4)")
    parser.add_argument("--rate", type=float, default=1e-3, help="learning rate (1e-3)")
    parser.add_argument("--cases", type=int, default=20, help="validation cases to predict (20)")
    parser.add_argument("--only", nargs="+", help="names of rows; default: all")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="one training of each row (0)")
    parser.add_argument("--bfloat16", action="store_true", help="train in half precision where that goes well")
    chosen = parser.parse_args(arguments)
    length = ShortTraining(chosen.epochs, chosen.iterations, 4, chosen.batch_size, chosen.rate, chosen.bfloat16)
    wanted = [run for run in default_runs() if chosen.only is None or run.name in chosen.only]
    runs = [replace(run, seed=seed) for seed in chosen.seeds for run in wanted]
    rows = measure_table(chosen.dataset, chosen.fold, length, runs, chosen.output, cases=chosen.cases)
    print(markdown(rows))
    if len(chosen.seeds) > 1:
        print(markdown(over_seeds(rows, "row", ("dice", "mmacs"))))


if __name__ == "__main__":
    run_command(main)
