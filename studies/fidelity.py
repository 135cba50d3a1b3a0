"""What compression costs in accuracy: weights only, data-aware, recovered, fine-tuned; for docs/results.md.

./run.sh -m studies.fidelity -m MODEL -i imagesTr --test-images imagesTs --test-labels labelsTs -o table.csv
Rows that the file has are kept, so an interrupted run goes on. Dice is that of nnU-Net without mirroring, with
--mirrored also with it; `drop` is the mean paired difference to the dense network over the cases, mirrored if asked
for, with its 95 % confidence interval, the class that loses most, and the smallest p of Wilcoxon's test over the
classes (Holm). The scores of each case stand in table_cases.csv. The stage "finetuned" (--stages ... finetuned, with
--dataset) needs nnU-Net's variables nnUNet_raw and nnUNet_preprocessed.
"""

from __future__ import annotations

import argparse
import copy
import math
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import torch
from torch import nn

from nnslim.compression.calibration import Calibration
from nnslim.compression.config import SlimConfig, from_dict
from nnslim.compression.plan_and_fit import fit_and_recover, plan_methods, settle
from nnslim.compression.recover import Recovery, recover
from nnslim.evaluation.overlap import dice_per_label
from nnslim.evaluation.scores import paired_table
from nnslim.hosts.nnunet.cases.calibration_tiles import calibration_of
from nnslim.hosts.nnunet.cases.prepared_images import Source
from nnslim.hosts.nnunet.cases.preprocess import list_cases, preprocess_case, silent
from nnslim.hosts.nnunet.compress.compress_model import write_slim
from nnslim.hosts.nnunet.model.compatibility import predictor_class
from nnslim.hosts.nnunet.model.slim_plans import slim_plans
from nnslim.hosts.nnunet.model.trained_model import (
    TrainedModel,
    build_network,
    classes_of,
    input_shape,
    read_trained_model,
)
from nnslim.hosts.nnunet.train.finetune_model import finetune_model
from nnslim.hosts.nnunet.train.settings import TrainingSettings
from nnslim.network.cost import measure_cost
from nnslim.network.spec import SlimSpec, apply_spec, spec_of
from nnslim.running.engine import Settings, with_fallback
from nnslim.tables import markdown
from studies.command import new_parser, run_command
from studies.table import GrowingTable, shown

STAGES = ("weights", "data", "recovered", "finetuned")


@dataclass(frozen=True)
class Labelled:
    """What to fine-tune on: number or name of an nnU-Net dataset, and how."""

    dataset: int | str
    settings: TrainingSettings


class _Judge:
    """Predicts the test cases in memory, as nnU-Net does, and compares with labels and with the dense network's maps.

    Attributes:
        ways: of answering: plain, mirrored. classes: members by name.
    """

    def __init__(
        self, model: TrainedModel, cases: dict[str, list[Path]], labels: Path, output: Path, mirrored: bool
    ) -> None:
        self.model, self.cases, self.labels = model, cases, labels
        self.classes = classes_of(model.plans_manager.get_label_manager(model.dataset))
        self.ways = ("plain", "mirrored") if mirrored and Source.of(model).mirror_axes else ("plain",)
        self._scores = GrowingTable(output.with_name(f"{output.stem}_cases.csv"), "setting", "stage", "answer")
        self._dense = output.with_name(f"{output.stem}_dense.npz")

    def score(self, setting: str, stage: str, network: nn.Module) -> dict[str, Any]:
        """Return the columns of Dice; the first call is with the dense network, and others are compared with it."""
        members = [labels[0] for labels in self.classes.values()]
        dense = dict(np.load(self._dense)) if self._dense.is_file() else {}
        made, near = {}, []
        for way in self.ways:
            if setting == "dense" and ("dense", "dense", way) in self._scores and f"{way} {min(self.cases)}" in dense:
                near.append(1.0)
                continue
            rows = []
            for name, found in self._maps(network, way == "mirrored"):
                made[f"{way} {name}"] = found.astype(np.uint8 if found.max() < 256 else np.uint16)
                dices = dice_per_label(found, self._read(name), members).values()
                row = {"setting": setting, "stage": stage, "answer": way, "case": name}
                rows.append(row | dict(zip(self.classes, map(float, dices), strict=True)))
                wanted = made if setting == "dense" else dense
                near += dice_per_label(found, wanted[f"{way} {name}"], members).values()
            self._scores.add(*rows)
        if setting == "dense" and made:
            np.savez_compressed(self._dense, **(dense | made))
        return self._columns(setting, stage) | {"dice_against_dense": round(float(np.nanmean(near)), 4)}

    def _columns(self, setting: str, stage: str) -> dict[str, Any]:
        table = pandas.DataFrame(self._scores.rows).set_index(["setting", "stage", "answer", "case"]).astype(float)
        # Twice is a case of a run that ended before its row was written.
        table = table[~table.index.duplicated(keep="last")].sort_index()
        found = {way: table.loc[(setting, stage, way)] for way in self.ways}
        means = {way: one.mean() for way, one in found.items()}
        columns = {f"dice_{way}": round(float(one.mean()), 4) for way, one in means.items()}
        last = self.ways[-1]
        columns |= {"lowest_class": means[last].idxmin(), "lowest_dice": round(float(means[last].min()), 4)}
        lost = paired_table(table.loc[("dense", "dense", last)] - found[last]).set_index("name")
        overall, classes = lost.iloc[-1], lost.iloc[:-1]
        width = 1.96 * overall["sd"] / math.sqrt(overall["cases"])
        worst = classes["mean"].idxmax()
        columns |= {"drop": round(float(overall["mean"]), 4), "drop_ci95": round(float(width), 4)}
        columns |= {"most_lost": worst, "most_lost_drop": round(float(classes.loc[worst, "mean"]), 4)}
        columns |= {"least_p_holm": round(float(classes["p_holm"].min()), 4)}
        if len(self.classes) <= 4:
            columns |= {f"dice_{name}": round(float(value), 4) for name, value in means[last].items()}
        return columns

    def _maps(self, network: nn.Module, mirrored: bool) -> Iterator[tuple[str, np.ndarray]]:
        from nnunetv2.inference.export_prediction import convert_predicted_logits_to_segmentation_with_correct_shape

        model, source = self.model, Source.of(self.model)
        network = with_fallback(network.eval(), input_shape(model), Settings("eager"))[0]
        with silent():
            predictor = predictor_class()(use_mirroring=mirrored, device=torch.device("cpu"), allow_tqdm=False)
            predictor.manual_initialization(
                network,
                model.plans_manager,
                model.configuration_manager,
                None,
                model.dataset,
                model.trainer_name,
                source.mirror_axes,
            )
        for name, files in self.cases.items():
            data, properties = preprocess_case(source, files, None)
            with silent(), torch.inference_mode():
                logits = predictor.predict_sliding_window_return_logits(torch.from_numpy(np.asarray(data)))
                made = convert_predicted_logits_to_segmentation_with_correct_shape(
                    logits.float().numpy(),
                    model.plans_manager,
                    model.configuration_manager,
                    predictor.label_manager,
                    properties,
                )
            yield name, np.asarray(made)

    def _read(self, name: str) -> np.ndarray:
        path = self.labels / f"{name}{self.model.dataset['file_ending']}"
        return np.rint(self.model.plans_manager.image_reader_writer_class().read_seg(str(path))[0][0]).astype(np.int64)


def fidelity_table(
    model_folder: Path,
    configs: dict[str, SlimConfig],
    images: Path,
    test_images: Path,
    test_labels: Path,
    output: Path,
    *,
    stages: Sequence[str] = STAGES,
    labelled: Labelled | None = None,
    mirrored: bool = False,
) -> list[dict[str, Any]]:
    """Fill the table and write it after each row.

    Args:
        model_folder: dense model; only its first fold is used.
        configs: setting -> configuration (its recovery section says how the stage "recovered" learns).
        images: unlabelled images for calibration and recovery, where a configuration names none.
        test_images, test_labels: cases to score on, `<case>_0000<ending>` and `<case><ending>`.
        output: CSV file; rows that it has are kept.
        stages: which of `STAGES`; each goes on from the one before it.
        labelled: what the stage "finetuned" trains on.
        mirrored: score mirrored answers, too, where the model may be mirrored.
    """
    model = read_trained_model(model_folder)
    model.checkpoints = dict(list(model.checkpoints.items())[:1])
    dense, shape = build_network(model), input_shape(model)
    cases = list_cases(test_images, model.dataset["file_ending"]).cases
    judge = _Judge(model, cases, test_labels, output, mirrored)
    table = GrowingTable(output, "setting", "stage")

    def add(setting: str, stage: str, network: nn.Module, *facts: Any) -> None:
        scores = judge.score(setting, stage, network)
        table.add({"setting": setting, "stage": stage, **_row(network, shape, scores, *facts)})
        print(shown(table.rows[-1]), flush=True)

    if ("dense", "dense") not in table:
        add("dense", "dense", dense, 0.0, 0.0, 0)
    for setting, config in configs.items():
        if missing := [stage for stage in stages if (setting, stage) not in table]:
            config = config if config.calibration.images else config.with_images(images)
            with calibration_of(model, config) as data:
                for stage, slim, *facts in _stages_of(config, missing, labelled, dense, shape, data, model):
                    add(setting, stage, slim, *facts)
    return table.rows


def _row(
    network: nn.Module,
    shape: tuple[int, ...],
    scores: dict[str, Any],
    seconds: float,
    estimated_drop: float,
    steps: int,
) -> dict[str, Any]:
    """Return the figures of a row; seconds are those of compression."""
    cost = measure_cost(network, shape)
    return {
        "parameters": cost.parameters,
        "gmacs": round(cost.macs() / 1e9, 3),
        **scores,
        "estimated_drop": round(estimated_drop, 4),
        "steps": steps,
        "seconds": round(seconds, 1),
    }


def _stages_of(
    config: SlimConfig,
    stages: Sequence[str],
    labelled: Labelled | None,
    dense: nn.Module,
    shape: tuple[int, ...],
    data: Calibration,
    model: TrainedModel,
) -> Iterator[tuple[str, nn.Module, float, float, int]]:
    """Yield each stage with its network, the seconds from the start, the estimated drop and the steps of recovery."""
    unlearned = _no_learning(config)
    started = time.perf_counter()
    plans = plan_methods(dense, config, measure_cost(dense, shape), shape, data)
    plans, _ = settle(dense, config, plans, shape, data)
    planning = time.perf_counter() - started
    if "weights" in stages:
        started = time.perf_counter()
        spec = SlimSpec(tuple(edit for plan in plans for edit in plan.edits))
        slim = apply_spec(spec, copy.deepcopy(dense), fill=True).eval()
        seconds = planning + time.perf_counter() - started
        recovery = recover(dense, slim, data, unlearned.recovery)  # only estimates the drop
        yield "weights", slim, seconds, recovery.after, recovery.steps
    if not set(stages) - {"weights"}:
        return
    started = time.perf_counter()
    slim, recovery, _ = fit_and_recover(dense, unlearned, plans, shape, data)
    seconds = planning + time.perf_counter() - started
    if "data" in stages:
        learned = recovery or Recovery()
        yield "data", slim, seconds, learned.after, learned.steps
    if not config.recovery.learns or not {"recovered", "finetuned"} & set(stages):
        return
    recovery = recover(dense, slim, data, config.recovery)
    seconds += recovery.seconds
    if "recovered" in stages:
        yield "recovered", slim, seconds, recovery.after, recovery.steps
    if "finetuned" in stages and labelled is not None:
        started = time.perf_counter()
        tuned = _finetuned(model, slim, labelled)
        yield "finetuned", tuned, seconds + time.perf_counter() - started, recovery.after, recovery.steps


def _finetuned(model: TrainedModel, slim: nn.Module, labelled: Labelled) -> nn.Module:
    with tempfile.TemporaryDirectory(prefix="nnslim-") as work:
        (Path(work) / "slim").mkdir()
        first = replace(model, checkpoints=dict([next(iter(model.checkpoints.items()))]))
        plans = slim_plans(model, spec_of(slim) or SlimSpec())
        write_slim(Path(work) / "slim", first, [slim.state_dict()], plans)
        finetune_model(Path(work) / "slim", Path(work) / "tuned", labelled.dataset, labelled.settings)
        return build_network(read_trained_model(Path(work) / "tuned")).eval()


def some_images(images: Path, ending: str, count: int, target: Path) -> Path:
    """Link the images of `count` cases, evenly spaced in the order of their names, into a folder, and return it."""
    cases = list_cases(images, ending).cases
    names = sorted(cases)
    count = min(count, len(names))
    target.mkdir(parents=True, exist_ok=True)
    for name in (names[number * len(names) // count] for number in range(count)):
        for file in cases[name]:
            if not (link := target / file.name).is_symlink():
                link.symlink_to(file.resolve())
    return target


def _no_learning(config: SlimConfig) -> SlimConfig:
    recovery = config.recovery.model_copy(update={"steps": 0, "block_steps": 0})
    return config.model_copy(update={"recovery": recovery})


def make_parser() -> argparse.ArgumentParser:
    parser = new_parser(__doc__)
    parser.add_argument("-m", "--model", type=Path, required=True, help="dense nnU-Net model folder")
    parser.add_argument(
        "-i", "--images", type=Path, required=True, help="unlabelled images for calibration and recovery"
    )
    parser.add_argument("--test-images", type=Path, required=True, help="images to score on")
    parser.add_argument("--test-labels", type=Path, required=True, help="their label maps")
    parser.add_argument("-o", "--output", type=Path, required=True, help="CSV file")
    parser.add_argument("--rank-factors", type=float, nargs="*", default=[0.7, 0.5, 0.4, 0.3, 0.2, 0.1, 0.05])
    parser.add_argument("--macs", type=float, nargs="*", default=[], help="budgets as shares of the dense MACs")
    parser.add_argument("--rank-min", type=int, default=8, help="smallest rank (default: 8)")
    parser.add_argument("--stages", nargs="*", default=["weights", "data", "recovered"])
    parser.add_argument("--calibration-images", type=int, default=8)
    parser.add_argument(
        "--image-counts", type=int, nargs="*", default=[], help="also with so few of the images, such as 1 4 16"
    )
    parser.add_argument("--tiles-per-image", type=int, default=1)
    parser.add_argument("--recovery-images", type=int, default=40)
    parser.add_argument("--steps", type=int, default=400, help="steps of logit distillation (default: 400)")
    parser.add_argument("--block-steps", type=int, default=0)
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    parser.add_argument("--no-mirrored-teacher", action="store_true", help="learn the dense answers as they are")
    parser.add_argument("--dataset", help="number or name of the labelled dataset to fine-tune on")
    parser.add_argument("--epochs", type=int, default=4, help="epochs of fine-tuning (default: 4)")
    parser.add_argument("--iterations", type=int, default=60, help="iterations per epoch of fine-tuning (default: 60)")
    parser.add_argument("--finetune-rate", type=float, default=3e-4, help="learning rate of fine-tuning, poly decay")
    parser.add_argument("--mirrored", action="store_true", help="score mirrored answers, too")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, help="torch threads (default: all)")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    args = make_parser().parse_args(arguments)
    if args.threads:
        torch.set_num_threads(args.threads)
    common = {
        "calibration": {
            "count": args.calibration_images,
            "tiles_per_image": args.tiles_per_image,
            "seed": args.seed,
            "device": "cpu",
        },
        "recovery": {
            "steps": args.steps,
            "block_steps": args.block_steps,
            "batch_size": args.batch_size,
            "learning_rate": args.learning_rate,
            "images": args.recovery_images,
            "mirrored_teacher": not args.no_mirrored_teacher,
        },
    }
    settings = {f"rank_factor={factor:g}": {"rank_factor": factor} for factor in args.rank_factors}
    settings |= {f"macs={share:g}": {"macs": share} for share in args.macs}
    configs = {
        name: from_dict({"methods": [{"method": "tucker", "rank_min": args.rank_min, **chosen}], **common})
        for name, chosen in settings.items()
    }
    ending = read_trained_model(args.model).dataset["file_ending"]
    for count in args.image_counts:
        folder = args.output.with_name(f"{args.output.stem}_images{count}")
        few = some_images(args.images, ending, count, folder)
        configs |= {
            f"{name}, {count} image(s)": config.with_images(few)
            for name, config in configs.items()
            if config.calibration.images is None
        }
    labelled = None
    if args.dataset is not None:
        tuning = TrainingSettings(
            epochs=args.epochs,
            iterations=args.iterations,
            validation_iterations=5,
            batch_size=args.batch_size,
            learning_rate=args.finetune_rate,
            schedule="poly",
            seed=args.seed,
        )
        labelled = Labelled(args.dataset, tuning)
    rows = fidelity_table(
        args.model,
        configs,
        args.images,
        args.test_images,
        args.test_labels,
        args.output,
        stages=args.stages,
        labelled=labelled,
        mirrored=args.mirrored,
    )
    print(markdown(rows))


if __name__ == "__main__":
    run_command(main)
