"""Benchmark of what compression costs in accuracy: budgets x {weights only, data-aware, recovered, fine-tuned}."""

from __future__ import annotations

import copy
import csv
import io
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from nnslim.compression.calibration import Calibration
from nnslim.compression.config import SlimConfig
from nnslim.compression.plan_and_fit import fit_and_recover, plan_methods, settle
from nnslim.compression.recover import Recovery, recover
from nnslim.evaluation.overlap import dice_per_label
from nnslim.files import write_bytes
from nnslim.hosts.nnunet.cases.calibration_tiles import Source, calibration_of
from nnslim.hosts.nnunet.cases.preprocess import find_cases, preprocess_case, silent
from nnslim.hosts.nnunet.compress.compress_model import write_network
from nnslim.hosts.nnunet.model.class_names import classes_of
from nnslim.hosts.nnunet.model.compatibility import predictor_class
from nnslim.hosts.nnunet.model.trained_model import TrainedModel, build_network, input_shape, read_trained_model
from nnslim.hosts.nnunet.train.finetune_model import finetune_model
from nnslim.hosts.nnunet.train.finetune_settings import FinetuneSettings
from nnslim.methods.base import Plan
from nnslim.network.cost import measure_cost
from nnslim.network.spec import SlimSpec, apply_spec

STAGES = ("weights", "data", "recovered", "finetuned")


@dataclass(frozen=True)
class Row:
    """One line of the table; times in seconds, Dice 0..1 per class and as mean over classes and cases."""

    setting: str
    stage: str
    parameters: int
    macs: int
    dice: tuple[float, ...]
    dice_dense: float
    seconds: float
    estimated_drop: float
    steps: int = 0

    def to_dict(self, classes: Sequence[str]) -> dict[str, Any]:
        """Return the row with one column per class where there are few."""
        values = {
            "setting": self.setting,
            "stage": self.stage,
            "parameters": self.parameters,
            "gmacs": round(self.macs / 1e9, 3),
            "dice": round(float(np.nanmean(self.dice)), 4),
            "dice_against_dense": round(self.dice_dense, 4),
            "worst_class": round(float(np.nanmin(self.dice)), 4),
            "estimated_drop": round(self.estimated_drop, 4),
            "steps": self.steps,
            "seconds": round(self.seconds, 1),
        }
        if len(classes) <= 4:
            values |= {f"dice_{name}": round(value, 4) for name, value in zip(classes, self.dice, strict=True)}
        return values


@dataclass(frozen=True)
class Labelled:
    """What to fine-tune on: number or name of an nnU-Net dataset, and how."""

    dataset: int | str
    settings: FinetuneSettings


@dataclass
class _Judge:
    """Predicts the test cases in memory, as nnU-Net does without mirroring, and compares with labels and dense maps."""

    model: TrainedModel
    cases: dict[str, list[Path]]
    labels: Path
    dense_maps: dict[str, np.ndarray] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.classes = classes_of(self.model.plans_manager.get_label_manager(self.model.dataset))

    def score(self, network: nn.Module) -> tuple[tuple[float, ...], float]:
        """Return mean Dice per class against the labels, and mean Dice against the dense network's maps."""
        against_labels, against_dense = [], []
        members = [labels[0] for labels in self.classes.values()]
        for name, found in self._maps(network):
            truth = self._read(name)
            against_labels.append(list(dice_per_label(found, truth, members).values()))
            reference = self.dense_maps.setdefault(name, found)
            against_dense.append(list(dice_per_label(found, reference, members).values()))
        by_class = tuple(float(value) for value in np.nanmean(np.array(against_labels), axis=0))
        return by_class, float(np.nanmean(np.array(against_dense)))

    def _maps(self, network: nn.Module) -> Iterator[tuple[str, np.ndarray]]:
        from nnunetv2.inference.export_prediction import convert_predicted_logits_to_segmentation_with_correct_shape

        model, source = self.model, Source.of(self.model)
        with silent():
            predictor = predictor_class()(use_mirroring=False, device=torch.device("cpu"), allow_tqdm=False)
            predictor.manual_initialization(
                network.eval(),
                model.plans_manager,
                model.configuration_manager,
                None,
                model.dataset,
                model.trainer_name,
                None,
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
    report: Callable[[str], None] = print,
) -> list[dict[str, Any]]:
    """Fill the table and write it after each row, so that an interrupted run goes on where it stopped.

    Args:
        model_folder: dense model; its first fold counts.
        configs: setting -> configuration (its recovery section says how the stage "recovered" learns).
        images: unlabelled images for calibration and recovery.
        test_images, test_labels: cases to score on, `<case>_0000<ending>` and `<case><ending>`.
        output: CSV file; rows that are there already are not computed again.
        stages: which of `STAGES`; each goes on from the one before it.
        labelled: what the stage "finetuned" trains on.
        report: called with each finished row as text.
    """
    model = read_trained_model(model_folder)
    model.checkpoints = dict(list(model.checkpoints.items())[:1])
    dense, shape = build_network(model), input_shape(model)
    judge = _Judge(model, find_cases(test_images, model.dataset["file_ending"]), test_labels)
    rows = _read_rows(output)
    classes = list(judge.classes)
    cost = measure_cost(dense, shape)
    started = time.perf_counter()
    scores = judge.score(dense)  # also fills the dense maps that the others are compared with
    if not any(row["setting"] == "dense" for row in rows):
        row = Row("dense", "dense", cost.parameters, cost.macs(), *scores, time.perf_counter() - started, 0.0)
        _add(rows, row, classes, output, report)
    for setting, config in configs.items():
        missing = [s for s in stages if not any(r["setting"] == setting and r["stage"] == s for r in rows)]
        if missing:
            with calibration_of(model, config.with_images(images)) as data:
                asked = _Asked(setting, config.with_images(images), tuple(missing), labelled)
                for row in _rows_of(asked, dense, shape, data, judge):
                    _add(rows, row, classes, output, report)
    return rows


@dataclass(frozen=True)
class _Asked:
    """The rows of one setting that are missing."""

    setting: str
    config: SlimConfig
    stages: tuple[str, ...]
    labelled: Labelled | None


def _rows_of(
    asked: _Asked, dense: nn.Module, shape: tuple[int, ...], data: Calibration, judge: _Judge
) -> Iterator[Row]:
    config, stages = asked.config, asked.stages
    started = time.perf_counter()
    plans = plan_methods(dense, config, measure_cost(dense, shape), shape, data)
    plans, _ = settle(dense, config, plans, shape, data)
    planning = time.perf_counter() - started

    def row(stage: str, slim: nn.Module, recovery: Recovery, seconds: float) -> Row:
        cost = measure_cost(slim, shape)
        scores = judge.score(slim)
        return Row(asked.setting, stage, cost.parameters, cost.macs(), *scores, seconds, recovery.after, recovery.steps)

    if "weights" in stages:
        started = time.perf_counter()
        slim = _weights_only(dense, plans)
        seconds = planning + time.perf_counter() - started
        yield row("weights", slim, recover(dense, slim, data, _no_learning(config).recovery), seconds)
    started = time.perf_counter()
    slim, recovery = fit_and_recover(dense, _no_learning(config), plans, shape, data)
    fitting = planning + time.perf_counter() - started
    if "data" in stages:
        yield row("data", slim, recovery, fitting)
    if not config.recovery.learns or not {"recovered", "finetuned"} & set(stages):
        return
    recovery = recover(dense, slim, data, config.recovery)
    seconds = fitting + recovery.seconds
    if "recovered" in stages:
        yield row("recovered", slim, recovery, seconds)
    if "finetuned" in stages and asked.labelled is not None:
        started = time.perf_counter()
        tuned = _finetuned(judge.model, slim, asked.labelled)
        yield row("finetuned", tuned, recovery, seconds + time.perf_counter() - started)


def _finetuned(model: TrainedModel, slim: nn.Module, labelled: Labelled) -> nn.Module:
    with tempfile.TemporaryDirectory(prefix="nnslim-") as work:
        write_network(model, slim, Path(work) / "slim")
        finetune_model(Path(work) / "slim", Path(work) / "tuned", labelled.dataset, labelled.settings)
        return build_network(read_trained_model(Path(work) / "tuned")).eval()


def _weights_only(dense: nn.Module, plans: Sequence[Plan]) -> nn.Module:
    edits = tuple(edit for plan in plans for edit in plan.edits)
    return apply_spec(SlimSpec(edits), copy.deepcopy(dense), fill=True).eval()


def _no_learning(config: SlimConfig) -> SlimConfig:
    recovery = config.recovery.model_copy(update={"steps": 0, "block_steps": 0})
    return config.model_copy(update={"recovery": recovery})


def _read_rows(output: Path) -> list[dict[str, Any]]:
    if not output.is_file():
        return []
    with output.open(newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def _add(
    rows: list[dict[str, Any]], row: Row, classes: Sequence[str], output: Path, report: Callable[[str], None]
) -> None:
    rows.append(row.to_dict(classes))
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[-1]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_bytes(output, text.getvalue().encode())
    report("  ".join(f"{key} {value}" for key, value in rows[-1].items()))
