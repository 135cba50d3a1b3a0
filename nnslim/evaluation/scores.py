"""Scores as files: a CSV with a row per case and class, which is read again, and nnU-Net's summary.json."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pandas

from nnslim._version import __version__
from nnslim.errors import InputError
from nnslim.evaluation.compare import Scores
from nnslim.evaluation.results import METRICS, Evaluation
from nnslim.files import read_json, write_bytes
from nnslim.tables import read_table, write_table

_EMPTY = {
    "both": "NaN, and left out of all means",
    "one": "Dice, IoU and NSD 0, and counted; HD95 NaN",
    "foreground_mean": "mean over the classes that some case has; nnU-Net's own is NaN where a class is in no case",
}


@dataclass(frozen=True)
class ClassScores:
    """One class: means over the cases that have a value; NaN where none has. hd95: mm."""

    dice: float
    nsd: float
    hd95: float
    cases: int


@dataclass(frozen=True)
class ScoreTable:
    """Scores of one set of predictions.

    Attributes:
        name: name of the predictions, such as "slim". classes: by name. cases: how many there are.
        tolerance: mm within which surfaces agree (NSD); None where no summary.json beside the table tells.
    """

    name: str
    classes: Mapping[str, ClassScores]
    cases: int
    tolerance: float | None = None

    def mean(self, metric: str) -> float:
        """Return the mean over classes of the means over cases; NaN left out."""
        return float(pandas.Series([getattr(one, metric) for one in self.classes.values()], dtype=float).mean())


def write_csv(path: Path, evaluation: Evaluation) -> None:
    """Write `Evaluation.table`; dice, nsd and hd95 are nan where they have no value.

    Raises:
        OutputError: it cannot be written.
    """
    _write_rounded(evaluation.table, path, METRICS)


def write_differences(path: Path, differences: Mapping[str, pandas.DataFrame]) -> None:
    """Write what `paired_differences` returned for each metric.

    Raises:
        OutputError: it cannot be written.
    """
    table = pandas.concat([one.assign(metric=metric) for metric, one in differences.items()])
    table.insert(0, "metric", table.pop("metric"))
    _write_rounded(table, path, ("mean", "sd", "lowest"))


def _write_rounded(table: pandas.DataFrame, path: Path, columns: tuple[str, ...]) -> None:
    write_table(table.assign(**{name: table[name].map("{:.6g}".format) for name in columns}), path)


def read_scores(path: Path, name: str, labels: Mapping[str, str] | None = None) -> ScoreTable:
    """Read a table with a row per case and class, and average it by class.

    Args:
        path: CSV file with the columns case, label, dice and, where there are such, name, nsd and hd95.
        name: name of the predictions.
        labels: number of a label -> name, for rows that only have the number.
    Raises:
        InputError: no such table, or a value that is not a number.
    """
    table = read_table(path)
    if table.empty or {"case", "label", "dice"} - set(table):
        raise InputError(f"{path} is not a table of nnslim evaluate: it should have the columns case, label, dice, nsd")
    texts = table.reindex(columns=list(METRICS), fill_value="")
    numbers = texts.apply(pandas.to_numeric, errors="coerce").astype(float)
    wrong = numbers.isna() & ~texts.isin(["", "nan"])
    if (lines := wrong.any(axis=1)).any():
        place = lines.idxmax()
        text = texts.loc[place, wrong.loc[place].idxmax()]
        raise InputError(
            f"{path}, line {place + 2}: could not convert '{text}'; expected numbers in {', '.join(METRICS)}"
        )
    names = table.get("name", table["label"])
    unnamed = (names == "") | (names == table["label"])
    grouped = numbers.groupby(names.where(~unnamed, table["label"].replace(dict(labels or {}))), sort=False)
    means, cases = grouped.mean(), grouped["dice"].count()
    classes = {key: ClassScores(**means.loc[key], cases=int(cases[key])) for key in means.index}
    tolerance = read_json(path.with_name("summary.json")).get("nnslim", {}).get("tolerance_mm")
    return ScoreTable(name, classes, table["case"].nunique(), tolerance)


def write_summary(path: Path, evaluation: Evaluation) -> None:
    """Write what nnU-Net's `compute_metrics_on_folder` writes, with NSD and HD95 added, and a key "nnslim".

    Raises:
        OutputError: it cannot be written.
    """
    # nnU-Net's reader takes numbers: masks that only have names get their place in the list.
    named = any(not one.members for one in evaluation.classes)
    numbers = {one.key: str(place) if named else one.key for place, one in enumerate(evaluation.classes, start=1)}
    cases = [
        {
            "metrics": {numbers[one.key]: _metrics(case.score(one.key)) for one in evaluation.classes},
            "prediction_file": str(case.prediction),
            "reference_file": str(case.reference),
        }
        for case in evaluation.cases
    ]
    means = {key: pandas.DataFrame([case["metrics"][key] for case in cases]).mean() for key in numbers.values()}
    classes = evaluation.class_table[["name", "cases", "missed", "false_positive", "dice_sd"]].rename(index=numbers)
    content = {
        "foreground_mean": pandas.DataFrame(means).mean(axis=1).to_dict(),
        "mean": {key: one.to_dict() for key, one in means.items()},
        "metric_per_case": cases,
        "nnslim": {
            "version": __version__,
            "tolerance_mm": evaluation.tolerance,
            "empty_classes": _EMPTY,
            "nsd": "surface elements as DeepMind's surface-distance",
            "hd95": "compute_robust_hausdorff of DeepMind's surface-distance, 95 percent, mm",
            "classes": classes.to_dict("index"),
            "failed": evaluation.failed,
            "missing": list(evaluation.missing),
            "extra": list(evaluation.extra),
            "lacking": {case.name: case.lacking for case in evaluation.cases if case.lacking},
        },
    }
    # Like nnU-Net: its readers are Python's, which know NaN.
    write_bytes(path, (json.dumps(content, indent=4, sort_keys=True) + "\n").encode())


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


def score_lines(evaluation: Evaluation) -> list[str]:
    """Return a table for people: a line per class, the mean below."""
    width = max([len(one.name) for one in evaluation.classes] + [5])
    lines = [f"{'class':{width}}  cases  missed  false pos.  Dice    SD      NSD     HD95 mm"]
    for row in evaluation.class_table.itertuples():
        if row.cases:
            numbers = _shown(row.dice, row.dice_sd, row.nsd, row.hd95)
            lines.append(f"{row.name:{width}}  {row.cases:5d}  {row.missed:6d}  {row.false_positive:10d}  {numbers}")
    dice, nsd, hd95 = (evaluation.mean(metric) for metric in METRICS)
    lines.append(f"{'mean':{width}}  {len(evaluation.cases):5d}  {'':18}  {_shown(dice, math.nan, nsd, hd95)}")
    if absent := len(evaluation.classes) - len(evaluation.present):
        lines.append(f"{absent} class(es) are in no case")
    return lines


def _shown(dice: float, spread: float, nsd: float, hd95: float) -> str:
    texts = [f"{value:.4f}" for value in (dice, spread, nsd)] + [f"{hd95:7.2f}"]
    return "  ".join("-".ljust(6) if text.strip() == "nan" else text for text in texts)
