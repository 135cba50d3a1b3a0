"""DAEFormer and its reduced forms, trained alike on slices: Dice, MACs and milliseconds; for docs/embedded.md.

./run.sh -m studies.daeformer_table -d 27 -o table.csv --forms full 224 128 64 64-dense --epochs 30 --iterations 50
A form sees the whole slice, resampled to its size, as in the published programs. One row per training; rows that the
file has are kept, and an interrupted training goes on from its last epoch. The other levers' rows of a form come from
`studies.embedded_table -m MODEL --only dense half int8 pruned_50`; MODEL is its folder in nnUNet_results.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from nnslim.benchmark.alternated import measure_rounds
from nnslim.benchmark.passes import Way, job_of, keep_network
from nnslim.hosts.nnunet.model.trained_model import input_shape, read_trained_model
from nnslim.hosts.nnunet.train.daeformer_trainer import daeformer_trainer_class
from nnslim.network.daeformer import FORMS, form_named
from nnslim.network.operations import count_operations
from nnslim.tables import markdown
from studies.command import new_parser, run_command
from studies.quick_dice import dice_columns, validation_dice
from studies.short_training import (
    ShortTraining,
    derive_plans,
    is_preprocessed,
    preprocess_once,
    seed_training,
    train_short,
)
from studies.table import GrowingTable, over_seeds

_CONFIGURATION = "2d"


def zoomed_plans(dataset: int, edge: int) -> str:
    """Derive plans in which a slice of median size fits into `edge` pixels squared, preprocess, and return their name.

    Patches are squares, so the axis with most pixels decides, and both have the same factor.
    """
    from nnunetv2.experiment_planning.plan_and_preprocess_api import preprocess

    folder, name = preprocess_once(dataset, _CONFIGURATION, 1), f"nnUNetZoom{edge}Plans"

    def zoom(settings: dict[str, Any]) -> None:
        factor = max(settings["median_image_size_in_voxels"]) / edge
        settings["spacing"] = [each * factor for each in settings["spacing"]]
        sizes = [each / factor for each in settings["median_image_size_in_voxels"]]
        settings |= {"median_image_size_in_voxels": sizes, "data_identifier": f"{name}_{_CONFIGURATION}"}

    derive_plans(folder, name, _CONFIGURATION, zoom)
    if not is_preprocessed(folder, f"{name}_{_CONFIGURATION}"):
        preprocess([dataset], name, configurations=(_CONFIGURATION,), num_processes=[1])
    return name


def trained_form(form: str, seed: int, dataset: int, fold: int, length: ShortTraining) -> Path:
    """Train a form, or go on with it, and return its model folder."""
    plans = zoomed_plans(dataset, form_named(form).edge)
    name = f"DAEFormer_{form.replace('-', '_')}_{seed}"
    results = Path(os.environ["nnUNet_results"])
    begun = list(results.glob(f"Dataset{dataset:03d}_*/{name}__{plans}__*/fold_{fold}/checkpoint_latest.pth"))
    seed_training(seed)
    trainer = daeformer_trainer_class(form, name)
    options = {"plans_name": plans, "trainer_base": trainer, "resume": bool(begun)}
    return train_short(dataset, _CONFIGURATION, fold, length, **options).parent


def measure_form(form: str, seed: int, dataset: int, fold: int, length: ShortTraining, cases: int) -> dict[str, Any]:
    """Return the row of one training."""
    folder = trained_form(form, seed, dataset, fold, length)
    scores, seconds, predictor = validation_dice(folder, fold, dataset, cases)
    shape = input_shape(read_trained_model(folder, [fold]))
    cost = count_operations(predictor.network, shape)
    return {
        "run": f"{form}_{seed}",
        "form": form,
        "seed": seed,
        **dice_columns(scores, seconds),
        "worst_case": round(float(np.min(scores.mean(axis=1))), 4),
        "gmacs": round(cost.macs() / 1e9, 4),
        "parameters": cost.parameters,
        "slice": shape[-1],
        "steps": length.epochs * length.iterations,
        "model": str(folder),
    }


def time_forms(rows: Sequence[Mapping[str, Any]], fold: int, rounds: int, work: Path) -> list[dict[str, Any]]:
    """Time a pass of one slice of each form in alternated rounds on one thread: medians in milliseconds."""
    from nnslim.hosts.nnunet.model.trained_model import build_network

    jobs, forms = [], {row["form"]: Path(row["model"]) for row in rows}
    for form, folder in forms.items():
        model = read_trained_model(folder, [fold])
        kept = work / f"{form}.pt"
        keep_network(build_network(model), kept)
        jobs += [job_of(form, kept, input_shape(model), Way(backend, threads=1)) for backend in ("stock", "openvino")]
    found = measure_rounds(jobs, rounds, limit_memory=False)
    shown = [f"{1e3 * statistics.median(each.seconds):.1f}" if each.seconds else each.error[:60] for each in found]
    pairs = zip(shown[::2], shown[1::2], strict=True)
    return [{"form": form, "torch_ms": one, "openvino_ms": two} for form, (one, two) in zip(forms, pairs, strict=True)]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = new_parser(__doc__)
    parser.add_argument("-d", "--dataset", type=int, required=True, help="number of a dataset in nnUNet_raw")
    parser.add_argument("-o", "--output", type=Path, required=True, help="CSV file")
    parser.add_argument("-f", "--fold", type=int, default=0, help="fold of splits_final.json (0)")
    parser.add_argument("--forms", nargs="+", choices=sorted(FORMS), default=["full", "224", "128", "64"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="one training each (0)")
    parser.add_argument("--epochs", type=int, default=30, help="epochs (30)")
    parser.add_argument("--iterations", type=int, default=50, help="steps per epoch (50)")
    parser.add_argument("--batch-size", type=int, default=8, help="slices per step (8)")
    parser.add_argument("--rate", type=float, default=0.05, help="learning rate (0.05, as published)")
    parser.add_argument("--cases", type=int, default=24, help="validation cases to predict (24)")
    parser.add_argument("--bfloat16", action="store_true", help="train in half precision where that goes well")
    parser.add_argument("--rounds", type=int, default=7, help="rounds of the timing; 0: none (7)")
    chosen = parser.parse_args(arguments)
    length = ShortTraining(chosen.epochs, chosen.iterations, 4, chosen.batch_size, chosen.rate, chosen.bfloat16)
    common = {"dataset": chosen.dataset, "fold": chosen.fold, "length": length, "cases": chosen.cases}
    table = GrowingTable(chosen.output, "run")
    wanted = [(form, seed) for seed in chosen.seeds for form in chosen.forms]
    table.fill({f"{form}_{seed}": partial(measure_form, form, seed, **common) for form, seed in wanted})
    print(markdown(table.rows))
    print(markdown(over_seeds(table.rows, "form", ("dice", "gmacs"))))
    if chosen.rounds:
        print(markdown(time_forms(table.rows, chosen.fold, chosen.rounds, chosen.output.parent)))


if __name__ == "__main__":
    run_command(main)
