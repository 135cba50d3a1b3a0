"""Scores of all cases as tables and means, and as files: a CSV, which is read again, and nnU-Net's summary.json."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas

from nnslim._version import __version__
from nnslim.errors import InputError
from nnslim.evaluation.classes import LabelClass
from nnslim.evaluation.compare import CaseScores, Scores
from nnslim.files import read_json, write_bytes
from nnslim.tables import read_table, write_table

METRICS = ("dice", "nsd", "hd95")
SHAPES = ("hd", "compactness", "compactness_ref")
COLUMNS = ("case", "label", "name", *METRICS, "n_ref", "n_pred", "tp", "fp", "fn", "empty")
_EMPTY = {
    "both": "NaN, and left out of all means",
    "one": "Dice, IoU and NSD 0, and counted; HD95 NaN",
    "foreground_mean": "mean over the classes that some case has; nnU-Net's own is NaN where a class is in no case",
}


@dataclass
class Evaluation:
    """Scores of all cases; its tables are made when they are first asked for.

    Means are over the cases of each class, NaN left out: a class that neither side has says nothing about the model,
    and counts in no mean. Where one side alone has it, Dice and NSD are 0 and count; HD95 has no value.

    Attributes:
        classes: in the order of the output.
        cases: compared cases, by name.
        failed: case -> why it could not be compared.
        missing: references without a prediction. extra: predictions without a reference.
        tolerance: mm within which surfaces agree (NSD).
        shapes: whether HD and compactness (`SHAPES`) were asked for.
    """

    classes: tuple[LabelClass, ...]
    cases: list[CaseScores] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    missing: tuple[str, ...] = ()
    extra: tuple[str, ...] = ()
    tolerance: float = 1.0
    shapes: bool = False

    @cached_property
    def table(self) -> pandas.DataFrame:
        """A row per case and class, with COLUMNS (and SHAPES); a class whose file was lacking in a case has none.

        `label` is nnU-Net's key, `hd95` in mm, and `empty` that of `Scores`; the rest of the numbers are voxels.
        """
        rows = []
        for case, one in itertools.product(self.cases, self.classes):
            if (score := case.score(one.key)) is not None:
                counts = (score.reference, score.predicted, score.both)
                wrong = (score.predicted - score.both, score.reference - score.both)
                metrics = (score.dice, score.nsd, score.hd95)
                more = [getattr(score, name) for name in self.shape_columns]
                rows.append((case.name, one.key, one.name, *metrics, *counts, *wrong, score.empty, *more))
        columns = [*COLUMNS, *self.shape_columns]
        return pandas.DataFrame(rows, columns=columns).astype(dict.fromkeys(METRICS, float))

    @property
    def shape_columns(self) -> tuple[str, ...]:
        """SHAPES where they were asked for, else nothing."""
        return SHAPES if self.shapes else ()

    @cached_property
    def class_table(self) -> pandas.DataFrame:
        """A row per class, by key: name, cases that have it, missed, false_positive, mean dice, nsd, hd95; dice_sd."""
        empty = self.table["empty"]
        sides = {"cases": empty != "both", "missed": empty == "prediction", "false_positive": empty == "reference"}
        grouped = self.table.assign(**sides).groupby("label")
        counts = grouped[list(sides)].sum()
        means = grouped[list(METRICS)].mean().assign(dice_sd=grouped["dice"].std())
        keys = [one.key for one in self.classes]
        table = counts.reindex(keys, fill_value=0).astype(int).join(means)
        table.insert(0, "name", [one.name for one in self.classes])
        return table

    @property
    def complete(self) -> bool:
        """True if each reference has been compared, in all of its classes."""
        lacking = any("prediction" in case.lacking.values() for case in self.cases)
        return not (self.failed or self.missing or lacking)

    @property
    def present(self) -> tuple[LabelClass, ...]:
        """The classes that some case has, on either side."""
        cases = self.class_table["cases"]
        return tuple(one for one in self.classes if cases[one.key])

    def scores(self, metric: str) -> pandas.DataFrame:
        """Return one of METRICS, a row per case and a column per class, by key; NaN where a file was lacking."""
        wide = self.table.pivot(index="case", columns="label", values=metric)
        return wide.reindex(index=[case.name for case in self.cases], columns=[one.key for one in self.classes])

    def values(self, metric: str) -> np.ndarray:
        """Return what `scores` does, as (cases, classes) numbers."""
        return self.scores(metric).to_numpy(float)

    def class_means(self, metric: str) -> np.ndarray:
        """Return (classes,) means over cases."""
        return self.class_table[metric].to_numpy(float)

    def mean(self, metric: str) -> float:
        """Return the mean over classes of the means over cases."""
        return float(self.class_table[metric].mean())

    def worst(self, count: int) -> list[tuple[CaseScores, LabelClass]]:
        """Return the cases with the lowest Dice of any class, each with that class, the lowest first.

        Of equal ones that with more wrong voxels comes first, so that a missed liver is before a missed vessel. Where
        there are fewer cases than `count`, their next classes follow.
        """
        found = self.table[self.table["empty"] != "both"]
        found = found.assign(right=-found["fp"] - found["fn"]).sort_values(["dice", "right", "case"])
        again = found["case"].duplicated()
        cases, classes = {case.name: case for case in self.cases}, {one.key: one for one in self.classes}
        chosen = pandas.concat([found[~again], found[again]]).head(count)
        return [(cases[name], classes[key]) for name, key in zip(chosen["case"], chosen["label"], strict=True)]


def paired_differences(first: Evaluation, second: Evaluation, metric: str) -> pandas.DataFrame:
    """Return how much higher the first evaluation is than the second, over the cases where both have a value.

    Args:
        metric: one of METRICS.
    Returns:
        A row per class of the first evaluation that has a value in both for some case; then "mean over classes", from
        the mean of each case over its classes. Columns: name, cases, mean and sd of the differences (NaN for a single
        case), the lowest one, and lowest_case; p of Wilcoxon's signed-rank test, two-sided, and p_holm, corrected by
        Holm for the number of classes (NaN for the mean).
    """
    names = {one.key: one.name for one in first.classes}
    scores = first.scores(metric)
    return paired_table((scores - second.scores(metric).reindex_like(scores)).rename(columns=names))


def paired_table(differences: pandas.DataFrame) -> pandas.DataFrame:
    """Return what `paired_differences` does, for differences with a row per case and a column per class."""
    table = differences.assign(**{"mean over classes": differences.mean(axis=1)})
    table = table.dropna(axis=1, how="all")
    found = {"cases": table.count(), "mean": table.mean(), "sd": table.std(), "lowest": table.min()}
    p = pandas.Series({name: _signed_rank(table[name]) for name in table}, dtype=float)
    found |= {"lowest_case": table.idxmin(), "p": p, "p_holm": _holm(p.iloc[:-1]).reindex(p.index)}
    return pandas.DataFrame(found).rename_axis("name").reset_index()


def _signed_rank(differences: pandas.Series) -> float:
    """Return p of Wilcoxon's test; 1 where nothing differs, which scipy's versions answer differently."""
    from scipy.stats import wilcoxon

    values = differences.dropna()
    return float(wilcoxon(values).pvalue) if values.any() else 1.0


def _holm(p: pandas.Series) -> pandas.Series:
    """Return p corrected for so many tests: the smallest times all, the next times one less, and never falling."""
    rising = p.sort_values()
    return (rising * np.arange(len(p), 0, -1)).cummax().clip(upper=1.0)


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
    """Write `Evaluation.table`, or raise an OutputError; a score is nan where it has no value."""
    _write_rounded(evaluation.table, path, (*METRICS, *evaluation.shape_columns))


def write_differences(path: Path, differences: Mapping[str, pandas.DataFrame]) -> None:
    """Write what `paired_differences` returned for each metric, or raise an OutputError."""
    table = pandas.concat([one.assign(metric=metric) for metric, one in differences.items()])
    table.insert(0, "metric", table.pop("metric"))
    _write_rounded(table, path, ("mean", "sd", "lowest", "p", "p_holm"))


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
    """Write what nnU-Net's `compute_metrics_on_folder` does, NSD, HD95 and a key "nnslim", or raise an OutputError."""
    # nnU-Net's reader takes numbers: masks that only have names get their place in the list.
    named = any(not one.members for one in evaluation.classes)
    numbers = {one.key: str(place) if named else one.key for place, one in enumerate(evaluation.classes, start=1)}
    cases = [
        {
            "metrics": {
                numbers[one.key]: _metrics(case.score(one.key), evaluation.shape_columns) for one in evaluation.classes
            },
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
            **({"hd": "the same at 100 percent", "compactness": "surface^1.5 / volume"} if evaluation.shapes else {}),
            "classes": classes.to_dict("index"),
            "failed": evaluation.failed,
            "missing": list(evaluation.missing),
            "extra": list(evaluation.extra),
            "lacking": {case.name: case.lacking for case in evaluation.cases if case.lacking},
        },
    }
    # Like nnU-Net: its readers are Python's, which know NaN.
    write_bytes(path, (json.dumps(content, indent=4, sort_keys=True) + "\n").encode())


def _metrics(score: Scores | None, shapes: tuple[str, ...]) -> dict[str, float | int]:
    if score is None:  # no file: nothing is known, so nothing counts
        made = _metrics(Scores(0, 0, 0, 0), shapes)
        return dict.fromkeys(made, math.nan)
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
        **{{"hd": "HD"}.get(name, name): getattr(score, name) for name in shapes},
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
