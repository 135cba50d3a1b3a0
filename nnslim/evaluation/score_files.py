"""Write an evaluation: a CSV with a row per case and class, and nnU-Net's summary.json."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nnslim._version import __version__
from nnslim.evaluation.compare import Scores
from nnslim.evaluation.results import METRICS, Difference, Evaluation, mean
from nnslim.files import write_bytes

COLUMNS = ("case", "label", "name", "dice", "nsd", "hd95", "n_ref", "n_pred", "tp", "fp", "fn", "empty")
_EMPTY = {
    "both": "NaN, and left out of all means",
    "one": "Dice, IoU and NSD 0, and counted; HD95 NaN",
    "foreground_mean": "mean over the classes that some case has; nnU-Net's own is NaN where a class is in no case",
}


def write_csv(path: Path, evaluation: Evaluation) -> None:
    """Write a row per case and class; a class whose file was lacking in a case has none.

    Columns: `label` is nnU-Net's key, `empty` is "", "both", "prediction" (missed) or "reference" (false positive),
    dice, nsd and hd95 (mm) are nan where they have no value, the rest are voxels.

    Raises:
        OutputError: it cannot be written.
    """
    rows = []
    for case in evaluation.cases:
        for one in evaluation.classes:
            if (score := case.score(one.key)) is not None:
                metrics = (f"{getattr(score, metric):.6g}" for metric in METRICS)
                wrong = (score.predicted - score.both, score.reference - score.both)
                counts = (score.reference, score.predicted, score.both, *wrong)
                rows.append((case.name, one.key, one.name, *metrics, *counts, score.empty))
    _write_rows(path, COLUMNS, rows)


def write_differences(path: Path, differences: dict[str, Sequence[Difference]]) -> None:
    """Write a row per metric and class: cases, mean and SD of the paired differences, lowest one and its case.

    Raises:
        OutputError: it cannot be written.
    """
    rows = [
        (metric, one.name, one.cases, *(f"{value:.6g}" for value in (one.mean, one.sd, one.lowest)), one.worst)
        for metric, listed in differences.items()
        for one in listed
    ]
    _write_rows(path, ("metric", "name", "cases", "mean", "sd", "lowest", "lowest_case"), rows)


def write_summary(path: Path, evaluation: Evaluation) -> None:
    """Write what nnU-Net's `compute_metrics_on_folder` writes, with NSD and HD95 added, and a key "nnslim".

    Raises:
        OutputError: it cannot be written.
    """
    numbers = _numbers(evaluation)
    cases = [
        {
            "metrics": {numbers[one.key]: _metrics(case.score(one.key)) for one in evaluation.classes},
            "prediction_file": str(case.prediction),
            "reference_file": str(case.reference),
        }
        for case in evaluation.cases
    ]
    means = {key: _mean_of([case["metrics"][key] for case in cases]) for key in numbers.values()}
    content = {
        "foreground_mean": _mean_of(list(means.values())),
        "mean": means,
        "metric_per_case": cases,
        "nnslim": _details(evaluation),
    }
    # Like nnU-Net: its readers are Python's, which know NaN.
    write_bytes(path, (json.dumps(content, indent=4, sort_keys=True) + "\n").encode())


def class_means(evaluation: Evaluation) -> list[str]:
    """Return a table for people: a line per class, the mean below."""
    width = max([len(one.name) for one in evaluation.classes] + [5])
    lines = [f"{'class':{width}}  cases  missed  false pos.  Dice    SD      NSD     HD95 mm"]
    spreads = [_sd(column) for column in evaluation.values("dice").T]
    means = [evaluation.class_means(metric) for metric in METRICS]
    for number, one in enumerate(evaluation.classes):
        cases, missed, false = (evaluation.count(one, empty) for empty in (None, "prediction", "reference"))
        if cases:
            dice, nsd, hd95 = (column[number] for column in means)
            numbers = _numbers_text(dice, spreads[number], nsd, hd95)
            lines.append(f"{one.name:{width}}  {cases:5d}  {missed:6d}  {false:10d}  {numbers}")
    dice, nsd, hd95 = (evaluation.mean(metric) for metric in METRICS)
    lines.append(f"{'mean':{width}}  {len(evaluation.cases):5d}  {'':18}  {_numbers_text(dice, math.nan, nsd, hd95)}")
    if absent := len(evaluation.classes) - len(evaluation.present):
        lines.append(f"{absent} class(es) are in no case")
    return lines


def _numbers_text(dice: float, spread: float, nsd: float, hd95: float) -> str:
    texts = [f"{value:.4f}" for value in (dice, spread, nsd)] + [f"{hd95:7.2f}"]
    return "  ".join("-".ljust(6) if text.strip() == "nan" else text for text in texts)


def _metrics(score: Scores | None) -> dict[str, float | int]:
    if score is None:  # no file: nothing is known, so nothing counts
        return dict.fromkeys(("Dice", "FN", "FP", "HD95", "IoU", "NSD", "TN", "TP", "n_pred", "n_ref"), math.nan)
    wrong = score.predicted + score.reference - 2 * score.both
    return {
        "Dice": score.dice,
        "FN": score.reference - score.both,
        "FP": score.predicted - score.both,
        "HD95": score.hd95,
        "IoU": score.both / (score.both + wrong) if score.both + wrong else math.nan,
        "NSD": score.nsd,
        "TN": score.voxels - score.both - wrong,
        "TP": score.both,
        "n_pred": score.predicted,
        "n_ref": score.reference,
    }


def _mean_of(metrics: list[dict[str, Any]]) -> dict[str, float]:
    return {key: mean(np.array([one[key] for one in metrics], float)) for key in metrics[0]} if metrics else {}


def _numbers(evaluation: Evaluation) -> dict[str, str]:
    """Return the keys that nnU-Net's reader takes: masks that only have names get their place in the list."""
    named = any(not one.members for one in evaluation.classes)
    return {one.key: str(place) if named else one.key for place, one in enumerate(evaluation.classes, start=1)}


def _details(evaluation: Evaluation) -> dict[str, Any]:
    numbers = _numbers(evaluation)
    return {
        "version": __version__,
        "tolerance_mm": evaluation.tolerance,
        "empty_classes": _EMPTY,
        "nsd": "surface elements as DeepMind's surface-distance",
        "hd95": "compute_robust_hausdorff of DeepMind's surface-distance, 95 percent, mm",
        "classes": {
            numbers[one.key]: {
                "name": one.name,
                "cases": evaluation.count(one),
                "missed": evaluation.count(one, "prediction"),
                "false_positive": evaluation.count(one, "reference"),
                "dice_sd": _sd(evaluation.values("dice")[:, number]),
            }
            for number, one in enumerate(evaluation.classes)
        },
        "failed": evaluation.failed,
        "missing": list(evaluation.missing),
        "extra": list(evaluation.extra),
        "lacking": {case.name: case.lacking for case in evaluation.cases if case.lacking},
    }


def _sd(values: np.ndarray) -> float:
    known = values[~np.isnan(values)]
    return float(known.std(ddof=1)) if len(known) > 1 else math.nan


def _write_rows(path: Path, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(rows)
    write_bytes(Path(path), text.getvalue().encode("utf-8"))
