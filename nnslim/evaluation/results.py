"""What an evaluation found: scores of all cases, their means, and the difference of two evaluations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from nnslim.evaluation.classes import LabelClass
from nnslim.evaluation.compare import CaseScores, Scores

METRICS = ("dice", "nsd", "hd95")


@dataclass
class Evaluation:
    """Scores of all cases.

    Means are over the cases of each class, NaN left out: a class that neither side has says nothing about the model,
    and counts in no mean. Where one side alone has it, Dice and NSD are 0 and count; HD95 has no value.

    Attributes:
        classes: in the order of the output.
        cases: compared cases, by name.
        failed: case -> why it could not be compared.
        missing: references without a prediction. extra: predictions without a reference.
        tolerance: of the NSD, mm.
    """

    classes: tuple[LabelClass, ...]
    cases: list[CaseScores] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    missing: tuple[str, ...] = ()
    extra: tuple[str, ...] = ()
    tolerance: float = 1.0

    @property
    def complete(self) -> bool:
        """True if each reference has been compared, in all of its classes."""
        lacking = any("prediction" in case.lacking.values() for case in self.cases)
        return not (self.failed or self.missing or lacking)

    @property
    def present(self) -> tuple[LabelClass, ...]:
        """The classes that some case has, on either side."""
        return tuple(one for one in self.classes if self.count(one))

    def values(self, metric: str) -> np.ndarray:
        """Return (cases, classes) of an attribute of `Scores`; NaN where a file was lacking."""
        rows = [[_value(case.score(one.key), metric) for one in self.classes] for case in self.cases]
        return np.array(rows, dtype=float).reshape(len(self.cases), len(self.classes))

    def class_means(self, metric: str) -> np.ndarray:
        """Return (classes,) means over cases."""
        return np.array([mean(column) for column in self.values(metric).T])

    def mean(self, metric: str) -> float:
        """Return the mean over classes of the means over cases."""
        return mean(self.class_means(metric))

    def count(self, one: LabelClass, empty: str | None = None) -> int:
        """Return in how many cases the class is there; with `empty`, how many have that value of `Scores.empty`."""
        scores = [score for case in self.cases if (score := case.score(one.key)) is not None]
        return sum(score.empty != "both" if empty is None else score.empty == empty for score in scores)

    def worst(self, count: int) -> list[tuple[CaseScores, LabelClass]]:
        """Return the cases with the lowest Dice of any class, each with that class, the lowest first.

        Of equal ones that with more wrong voxels comes first, so that a missed liver is before a missed vessel. Where
        there are fewer cases than `count`, their next classes follow.
        """
        found = [
            (_badness(score), case.name, case, one)
            for case in self.cases
            for one in self.classes
            if (score := case.score(one.key)) is not None and score.empty != "both"
        ]
        found.sort(key=lambda item: item[:2])
        firsts: dict[str, int] = {}
        for place, (_, name, _, _) in enumerate(found):
            firsts.setdefault(name, place)
        order = sorted(range(len(found)), key=lambda place: (firsts[found[place][1]] != place, place))
        return [found[place][2:] for place in order[:count]]


@dataclass(frozen=True)
class Difference:
    """One class, first minus second evaluation, over the cases where both have a value.

    Attributes:
        name: of the class. cases: how many. mean, sd: of the differences; the SD is NaN for a single case.
        worst: case with the lowest difference. lowest: that difference.
    """

    name: str
    cases: int
    mean: float
    sd: float
    worst: str
    lowest: float


def paired_differences(first: Evaluation, second: Evaluation, metric: str) -> list[Difference]:
    """Return how much higher the first evaluation is than the second, case by case.

    Args:
        metric: an attribute of `Scores`.
    Returns:
        One per class of the first evaluation that has a value in both for some case; then "mean over classes", from
        the mean of each case over its classes.
    """
    shared = [case.name for case in first.cases if any(case.name == other.name for other in second.cases)]
    classes = [one for one in first.classes if any(one.key == other.key for other in second.classes)]
    tables = []
    for evaluation in (first, second):
        by_name = {case.name: case for case in evaluation.cases}
        rows = [[_value(by_name[name].score(one.key), metric) for one in classes] for name in shared]
        tables.append(np.array(rows, dtype=float).reshape(len(shared), len(classes)))
    table = tables[0] - tables[1]
    rows = [(one.name, column) for one, column in zip(classes, table.T, strict=True)]
    rows.append(("mean over classes", np.array([mean(row) for row in table])))
    return [_difference(name, column, shared) for name, column in rows if not np.isnan(column).all()]


def mean(values: np.ndarray) -> float:
    """Return the mean without NaN; NaN if nothing is left."""
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else float("nan")


def _difference(name: str, values: np.ndarray, cases: Sequence[str]) -> Difference:
    known = values[~np.isnan(values)]
    lowest = int(np.nanargmin(values))
    sd = float(known.std(ddof=1)) if len(known) > 1 else float("nan")
    return Difference(name, len(known), float(known.mean()), sd, cases[lowest], float(values[lowest]))


def _badness(score: Scores) -> tuple[float, int]:
    return score.dice, 2 * score.both - score.predicted - score.reference


def _value(score: Scores | None, metric: str) -> float:
    return float("nan") if score is None else float(getattr(score, metric))
