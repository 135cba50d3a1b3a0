"""Train, prune and score networks side by side, with nnslim's own commands: pruning.csv, pruning.md.

scratch   from random weights, with the same trainer, epochs and seeds: nnU-Net (Sauron's trainer, nothing removed),
          Sauron, Sauron with folding, without its loss (lambda 0), with its loss alone deciding (importance maps), and
          with other importances on the same way to the target: L1, FPGM, random, Taylor.
start     from a trained model: Sauron with and without folding; and L1, FPGM, random and Torch-Pruning, which prune
          before training. The same trainer then runs the same number of iterations for all.
composed  Tucker, int8, and both, on the model that Sauron with folding pruned from the trained one.

Stock nnU-Net (nnslim for int8) predicts the test images without mirroring; then one forward pass of each network is
timed in alternated rounds. Rows whose folder is finished are kept, so an interrupted run goes on. nnUNet_raw and
nnUNet_preprocessed must be set, and the dataset preprocessed.

Example: ./run.sh benchmarks/pruning.py -d 4 -m MODEL --test-images imagesTs --test-labels labelsTs -o pruning
"""

from __future__ import annotations

import argparse
import copy
import itertools
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from nnslim.errors import InputError
from nnslim.tables import markdown, read_table, write_table
from studies.command import new_parser, run_command
from studies.table import over_seeds

_PLANS = "nnUNetSmallPlans"
_NNSLIM = (sys.executable, "-m", "nnslim.cli")


@dataclass(frozen=True)
class Row:
    """One row of the table.

    Attributes:
        name: names the row and its folder. part: scratch, start or composed.
        settings: Sauron's, for the training.
        pruned: how the starting model was pruned: settings of the method `filters`, or torch-pruning.
        source: row that is compressed further, with `methods`, in place of a training.
        precision: in which the row runs.
    """

    name: str
    part: str
    settings: dict[str, Any] = field(default_factory=dict)
    pruned: dict[str, Any] | str | None = None
    source: str = ""
    methods: tuple[dict[str, Any], ...] = ()
    precision: str = "f32"


# Nothing is pruned: the share of the epochs, at the end, in which nothing is removed is all of them.
_PLAIN = {"strength": 0, "settle": 0.999, "batches": 1}
_COMPOSED = "start-sauron-fold"


def all_rows(args: argparse.Namespace) -> list[Row]:
    """Return the rows in the order in which they are made."""
    sauron = {"macs": args.macs, "reach": args.reach, "min_filters": 4}
    after = {"macs": args.start_macs, "reach": args.reach, "min_filters": 4}
    rows = [
        Row("nnunet", "scratch", _PLAIN),
        Row("sauron", "scratch", sauron),
        Row("sauron-fold", "scratch", {**sauron, "fold": True}),
        Row("sauron-lambda0", "scratch", {**sauron, "strength": 0}),
        *(
            Row(kind, "scratch", {**sauron, "strength": 0, "importance": kind})
            for kind in ("l1", "fpgm", "random", "taylor")
        ),
        Row("taylor-fold", "scratch", {**sauron, "strength": 0, "importance": "taylor", "fold": True}),
        Row("taylor-global", "scratch", {**sauron, "strength": 0, "importance": "taylor", "ranking": "global"}),
        Row("start-nnunet", "start", _PLAIN),
        Row("start-sauron-fold", "start", after),
        Row("start-sauron", "start", {**after, "fold": False}),
        Row("start-sauron-lambda0", "start", {**after, "strength": 0}),
    ]
    for importance in ("l1", "fpgm", "random"):
        method = {"method": "filters", "importance": importance, "macs": args.start_macs, "min_filters": 4}
        rows.append(Row(f"start-{importance}", "start", _PLAIN, method))
    rows.append(Row("start-torch-pruning", "start", _PLAIN, "torch-pruning"))
    for factor in args.rank_factors:
        tucker = ({"method": "tucker", "rank_factor": factor, "rank_min": 8},)
        rows.append(Row(f"composed-tucker-{factor:g}", "composed", source=_COMPOSED, methods=tucker))
    rows.append(Row("composed-int8", "composed", source=_COMPOSED, precision="int8"))
    rows.append(Row(f"composed-tucker-{factor:g}-int8", "composed", source=_COMPOSED, methods=tucker, precision="int8"))
    return [row for row in rows if row.part in args.parts and (args.rows is None or row.name in args.rows)]


def run(command: Sequence[str | Path], results: Path, log: Path) -> None:
    """Run a command with a results folder of its own; what it prints goes to a log file."""
    environment = {**os.environ, "nnUNet_results": str(results), "nnUNet_n_proc_DA": "0"}
    with log.open("a", encoding="utf-8") as file:
        print("$", *command, file=file, flush=True)
        subprocess.run([str(part) for part in command], env=environment, stdout=file, stderr=file, check=True)


def use_small_network(settings: dict[str, Any]) -> None:
    """Halve the widths (in 2D quarter them) and cut the patch to 40 voxels (96 in 2D): what two cores can train."""
    arguments = settings["architecture"]["arch_kwargs"]
    part, step, most = (2, 8, 40) if len(settings["patch_size"]) == 3 else (4, 32, 96)
    arguments["features_per_stage"] = [width // part for width in arguments["features_per_stage"]]
    settings["patch_size"] = [min(most, step * round(0.8 * size / step)) for size in settings["patch_size"]]


def make(row: Row, seed: int, args: argparse.Namespace) -> Path:
    """Train or compress what the row stands for, unless that is done, and return its model folder."""
    folder = folder_of(row.name, seed, args)
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / "log.txt"
    if row.source:
        return compressed(row, seed, args, folder, log)
    start = None
    if row.part == "start":
        dense = args.model or trained(folder_of("nnunet", seed, args))
        if dense is None:
            raise InputError(f"{row.name} starts from a trained model: name it with -m, or make row nnunet before")
        start = dense if row.pruned is None else pruned_start(row, dense, args, folder, log)
    found = trained(folder)
    if found is not None and (found / "fold_0" / "checkpoint_final.pth").is_file():
        return found
    config = folder / "config.yml"
    method = {"method": "sauron", "optimizer": args.optimizer, **row.settings}
    config.write_text(yaml.safe_dump({"version": 1, "methods": [method]}))
    epochs, rate = (args.epochs, args.rate) if start is None else (args.start_epochs, args.start_rate)
    command = [
        *_NNSLIM,
        "train",
        "-d",
        args.dataset,
        "--configuration",
        args.configuration,
        "-c",
        config,
        "-f",
        "0",
        "--seed",
        seed,
        "--quiet",
    ]
    command += ["--epochs", epochs, "--iterations", args.iterations, "--validation-iterations", 4]
    command += ["--batch-size", args.batch_size, "--learning-rate", rate, "--precision", args.precision]
    command += ["-p", _PLANS] if start is None else ["--start", start]
    if found is not None and (found / "fold_0" / "checkpoint_latest.pth").is_file():
        command.append("--continue")
    run(command, folder, log)
    return trained(folder)


def folder_of(name: str, seed: int, args: argparse.Namespace) -> Path:
    """Return the folder of a row."""
    return args.output / f"seed{seed}" / name


def trained(folder: Path) -> Path | None:
    """Return the results folder that a row has written, if there is one."""
    return next(iter(sorted(folder.glob("Dataset*/nnUNetTrainerSauron__*"))), None)


def pruned_start(row: Row, dense: Path, args: argparse.Namespace, folder: Path, log: Path) -> Path:
    """Prune the trained model without training, and return the folder."""
    target = folder / "pruned"
    if target.is_dir():
        return target
    if row.pruned == "torch-pruning":
        return torch_pruned(dense, args.start_macs, target)
    config = folder / "pruned.yml"
    config.write_text(yaml.safe_dump({"version": 1, "methods": [row.pruned], "run": {"guard": False}}))
    run([*_NNSLIM, "compress", "-m", dense, "-o", target, "-c", config, "-f", "0", "--quiet"], folder, log)
    return target


def torch_pruned(dense: Path, macs: float, target: Path) -> Path:
    """Let Torch-Pruning prune the trained model; its widths become a SlimSpec, so that all else is the same."""
    from benchmarks.peers import prune
    from nnslim.benchmark.passes import network_facts
    from nnslim.files import whole_folder
    from nnslim.hosts.nnunet.compress.compress_model import write_slim
    from nnslim.hosts.nnunet.model.slim_plans import base_of, named_after, slim_plans
    from nnslim.hosts.nnunet.model.trained_model import input_shape, read_trained_model
    from nnslim.network.spec import SlimSpec, apply_spec
    from nnslim.network.walk import deep_supervision
    from nnslim.surgery.narrow import narrow_edits, widths_of

    model = read_trained_model(dense, [0])
    (network, before), shape = base_of(model), input_shape(model)  # Sauron's trainer writes a spec, if an empty one
    slim = copy.deepcopy(network)
    facts = network_facts(network, shape)
    with deep_supervision(network, True):  # else the heads that only run in training would keep their inputs
        pruned = prune(network, shape, int(macs * facts["macs"]), multiple=1)
    edits = narrow_edits(widths_of(network), pruned)
    apply_spec(SlimSpec(edits), slim)
    slim.load_state_dict(pruned.state_dict())
    with whole_folder(target) as side:
        write_slim(
            side, model, [slim.state_dict()], named_after(target.name, slim_plans(model, SlimSpec((*before, *edits))))
        )
    return target


def compressed(row: Row, seed: int, args: argparse.Namespace, folder: Path, log: Path) -> Path:
    """Compress the model of another row further, by the user's command."""
    source, target = trained(folder_of(row.source, seed, args)), folder / "slim"
    if source is None:
        raise SystemExit(f"{row.name} compresses row {row.source}, which does not exist yet")
    if not target.is_dir():
        config = folder / "config.yml"
        recovery = {"steps": args.steps if row.methods else 0}
        content = {"version": 1, "methods": list(row.methods), "recovery": recovery}
        content["run"] = {"guard": False, "backend": "openvino", "precision": row.precision}
        config.write_text(yaml.safe_dump(content))
        run([*_NNSLIM, "compress", "-m", source, "-o", target, "-c", config, "-i", args.images, "-f", "0"], folder, log)
    return target


def score(row: Row, model: Path, folder: Path, args: argparse.Namespace) -> dict[str, float]:
    """Predict the test images and return the mean Dice, and that of each class."""
    from nnslim.evaluation.classes import read_dataset_json
    from nnslim.evaluation.directories import evaluate_directories

    predictions = folder / "predictions"
    if not (predictions / "done").is_file():
        arguments = ["-i", args.test_images, "-o", predictions, "-m", model]
        if row.precision == "int8":
            command = [
                *_NNSLIM,
                "predict",
                *arguments,
                "--backend",
                "openvino",
                "--precision",
                "int8",
                "--disable_tta",
                "--quiet",
            ]
            run(command, folder, folder / "log.txt")
        else:
            predict_stock(model, args.test_images, predictions)
        (predictions / "done").touch()
    classes = read_dataset_json(model / "dataset.json")
    found = evaluate_directories(predictions, args.test_labels, classes, surfaces=False, workers=1)
    by_class = {one.name: value for one, value in zip(found.classes, found.class_means("dice"), strict=True)}
    return {"dice": found.mean("dice"), **{f"dice_{name}": float(value) for name, value in by_class.items()}}


def predict_stock(model: Path, images: Path, target: Path) -> None:
    """Predict a folder by nnU-Net's own predictor, case after case in this process, without mirroring."""
    import torch
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    target.mkdir(parents=True, exist_ok=True)
    predictor = nnUNetPredictor(use_mirroring=False, device=torch.device("cpu"), allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(str(model), (0,))
    with open(os.devnull, "w") as sink, redirect_stdout(sink):  # noqa: PTH123
        predictor.predict_from_files_sequential(str(images), str(target))


def history(model: Path) -> dict[str, float]:
    """Return the seconds of a training: in all, and per epoch at its beginning and its end (medians of three)."""
    path = model / "fold_0" / "pruning.csv"
    if not path.is_file():
        return {}
    seconds = read_table(path).drop_duplicates("epoch", keep="last")["seconds"].astype(float)
    first, last = seconds.head(3).median(), seconds.tail(3).median()
    return {"training_seconds": seconds.sum(), "epoch_seconds_first": first, "epoch_seconds_last": last}


def facts_of(model: Path, kept: Path) -> dict[str, int]:
    """Return the counts of a model, and keep its network for the timing."""
    from nnslim.benchmark.passes import keep_network, network_facts
    from nnslim.hosts.nnunet.model.trained_model import build_network, input_shape, read_trained_model

    source = read_trained_model(model, [0])
    network, shape = build_network(source), input_shape(source)
    keep_network(network, kept)
    facts = network_facts(network, shape)
    return {"parameters": facts["parameters"], "macs": facts["macs"], "shape": shape}


def time_rows(rows: Sequence[dict[str, Any]], args: argparse.Namespace) -> None:
    """Time one forward pass of each row, stock and by nnslim's best backends, in alternated rounds."""
    from nnslim.benchmark.alternated import measure_rounds
    from nnslim.benchmark.passes import Way, job_of

    def jobs_of(column: str, make_way: Callable[[dict[str, Any]], Way]) -> list[tuple[str, dict[str, Any], Any]]:
        return [(column, row, job_of(row["row"], row["kept"], row["shape"], make_way(row))) for row in rows]

    threads = args.threads
    wanted = jobs_of("stock_ms", lambda row: Way("stock", threads=threads))
    wanted += jobs_of("openvino_ms", lambda row: Way("openvino", row["precision"], threads))
    timings = measure_rounds([job for _, _, job in wanted], args.rounds, limit_memory=False)
    for (column, row, _), timing in zip(wanted, timings, strict=True):
        row[column] = round(1e3 * statistics.median(timing.seconds), 1) if timing.seconds else timing.error[:60]


_COLUMNS = ("row", "seed", "parameters", "gmacs", "macs_share", "dice", "stock_ms", "openvino_ms", "precision")
_COLUMNS += ("training_seconds", "epoch_seconds_first", "epoch_seconds_last")


def write_tables(rows: Sequence[dict[str, Any]], output: Path) -> str:
    """Write pruning.csv and pruning.md, and return the latter."""
    classes = [key for key in rows[0] if key.startswith("dice_")]
    columns = [*_COLUMNS[:6], *classes, *_COLUMNS[6:]]
    write_table(rows, output / "pruning.csv", columns)
    text = markdown([{key: _shown(value) for key, value in row.items()} for row in rows], columns)
    if len({row["seed"] for row in rows}) > 1:
        text += "\n" + markdown(over_seeds(rows, "row", ["gmacs", "dice", *classes], part="part"))
    (output / "pruning.md").write_text(text)
    return text


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4f}" if value < 2 else f"{value:.1f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def make_parser() -> argparse.ArgumentParser:
    parser = new_parser(__doc__)
    parser.add_argument("-d", "--dataset", required=True, help="number or name")
    parser.add_argument("--configuration", default="3d_fullres")
    parser.add_argument(
        "-m", "--model", type=Path, help="trained model folder, fold 0, for the rows that start from it"
    )
    parser.add_argument("-i", "--images", type=Path, help="unlabelled images for the composed rows")
    parser.add_argument("--test-images", type=Path, required=True)
    parser.add_argument("--test-labels", type=Path, required=True)
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder")
    parser.add_argument("--parts", nargs="+", default=["scratch", "start", "composed"])
    parser.add_argument("--rows", nargs="+", help="names; default: all of the parts")
    parser.add_argument("--epochs", type=int, default=24, help="from scratch (24)")
    parser.add_argument("--start-epochs", type=int, default=12, help="from the trained model (12)")
    parser.add_argument("--iterations", type=int, default=50, help="per epoch (50)")
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument(
        "--optimizer", choices=["trainer", "adam"], default="trainer", help="nnU-Net's, or the original's presets' Adam"
    )
    parser.add_argument("--rate", type=float, default=1e-2, help="learning rate from scratch (0.01)")
    parser.add_argument("--start-rate", type=float, default=5e-3, help="from the trained model (0.005)")
    parser.add_argument("--macs", type=float, default=0.19, help="share of the MACs that is left, from scratch (0.19)")
    parser.add_argument("--start-macs", type=float, default=0.25, help="from the trained model (0.25)")
    parser.add_argument("--reach", type=float, default=0.6, help="share of the epochs by which it is reached (0.6)")
    parser.add_argument("--rank-factors", type=float, nargs="+", default=[0.5, 0.3], help="for the composed rows")
    parser.add_argument("--steps", type=int, default=200, help="steps of recovery, composed rows (200)")
    parser.add_argument(
        "--precision", choices=["f32", "bf16", "auto"], default="auto", help="precision of the trainings (auto)"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="one table, and mean and spread over them")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads of the timed passes (2)")
    parser.add_argument("--rounds", type=int, default=5, help="rounds of the timing; 0: none")
    return parser


def main() -> None:
    args = make_parser().parse_args()
    args.output = args.output.resolve()
    args.output.mkdir(parents=True, exist_ok=True)
    if "scratch" in args.parts:
        from studies.short_training import derive_plans

        data = next(Path(os.environ["nnUNet_preprocessed"]).glob(f"Dataset{int(args.dataset):03d}_*"))
        derive_plans(data, _PLANS, args.configuration, use_small_network)
    rows = []
    for seed, row in itertools.product(args.seeds, all_rows(args)):
        started = time.perf_counter()
        model, folder = make(row, seed, args), folder_of(row.name, seed, args)
        kept = folder / "network.pt"
        facts = facts_of(model, kept)
        result = {"row": row.name, "seed": seed, "part": row.part, "precision": row.precision, "kept": kept, **facts}
        result |= {"gmacs": facts["macs"] / 1e9, **score(row, model, folder, args), **history(model)}
        rows.append(result)
        first = next(one for one in rows if (one["part"] == "scratch") == (row.part == "scratch"))
        result["macs_share"] = facts["macs"] / first["macs"]
        spent = time.perf_counter() - started
        print(f"{row.name}, seed {seed}: Dice {result['dice']:.4f}, {spent:.0f} s", flush=True)
        write_tables(rows, args.output)
    if args.rounds:
        time_rows(rows, args)
    print(write_tables(rows, args.output))


if __name__ == "__main__":
    run_command(main)
