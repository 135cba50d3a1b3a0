"""Scores against labels, as `nnslim evaluate` writes them, read back and averaged by class."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nnslim.errors import InputError
from nnslim.evaluation.results import METRICS, mean
from nnslim.files import read_json


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
        name: of the predictions, such as "slim". classes: by name. cases: how many there are.
        tolerance: of the NSD, mm; None where no summary.json beside the table tells.
    """

    name: str
    classes: Mapping[str, ClassScores]
    cases: int
    tolerance: float | None = None

    def mean(self, metric: str) -> float:
        """Return the mean over classes of the means over cases; NaN left out."""
        return mean(np.array([getattr(one, metric) for one in self.classes.values()], float))


def read_scores(path: Path, name: str, labels: Mapping[str, str] | None = None) -> ScoreTable:
    """Read a table with a row per case and class.

    Args:
        path: CSV file with the columns case, label, dice and, where there are such, name, nsd and hd95.
        name: of the predictions.
        labels: number of a label -> name, for rows that only have the number.
    Raises:
        InputError: no such table, or a value that is not a number.
    """
    try:
        with path.open(newline="", encoding="utf-8") as stream:
            rows = list(csv.DictReader(stream))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path} cannot be read as a table: {error}") from error
    if not rows or {"case", "label", "dice"} - set(rows[0]):
        raise InputError(f"{path} is not a table of nnslim evaluate: it should have the columns case, label, dice, nsd")
    found: dict[str, list[dict[str, float]]] = {}
    for line, row in enumerate(rows, start=2):
        known = (labels or {}).get(row["label"], row["label"])
        key = row.get("name") or known
        if key == row["label"]:  # evaluated without names
            key = known
        try:
            values = {metric: float(row.get(metric) or "nan") for metric in METRICS}
        except ValueError as error:
            raise InputError(f"{path}, line {line}: {error}; expected numbers in {', '.join(METRICS)}") from error
        found.setdefault(key, []).append(values)
    classes = {
        key: ClassScores(
            **{metric: mean(np.array([values[metric] for values in listed])) for metric in METRICS},
            cases=sum(not math.isnan(values["dice"]) for values in listed),
        )
        for key, listed in found.items()
    }
    tolerance = read_json(path.with_name("summary.json")).get("nnslim", {}).get("tolerance_mm")
    return ScoreTable(name, classes, len({row["case"] for row in rows}), tolerance)
