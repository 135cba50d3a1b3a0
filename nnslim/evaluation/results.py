"""What an evaluation found: scores of all cases as tables, their means, and the difference of two evaluations."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import pandas

from nnslim.evaluation.classes import LabelClass
from nnslim.evaluation.compare import CaseScores

METRICS = ("dice", "nsd", "hd95")
COLUMNS = ("case", "label", "name", *METRICS, "n_ref", "n_pred", "tp", "fp", "fn", "empty")


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
    """

    classes: tuple[LabelClass, ...]
    cases: list[CaseScores] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    missing: tuple[str, ...] = ()
    extra: tuple[str, ...] = ()
    tolerance: float = 1.0

    @cached_property
    def table(self) -> pandas.DataFrame:
        """A row per case and class, with the columns of COLUMNS; a class whose file was lacking in a case has none.

        `label` is nnU-Net's key, `hd95` in mm, and `empty` that of `Scores`; the rest of the numbers are voxels.
        """
        rows = []
        for case, one in itertools.product(self.cases, self.classes):
            if (score := case.score(one.key)) is not None:
                counts = (score.reference, score.predicted, score.both)
                wrong = (score.predicted - score.both, score.reference - score.both)
                metrics = (score.dice, score.nsd, score.hd95)
                rows.append((case.name, one.key, one.name, *metrics, *counts, *wrong, score.empty))
        return pandas.DataFrame(rows, columns=list(COLUMNS)).astype(dict.fromkeys(METRICS, float))

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
        case), the lowest one, and lowest_case.
    """
    scores = first.scores(metric)
    table = scores - second.scores(metric).reindex_like(scores)
    table = table.rename(columns={one.key: one.name for one in first.classes})
    table["mean over classes"] = table.mean(axis=1)
    table = table.dropna(axis=1, how="all")
    found = {"cases": table.count(), "mean": table.mean(), "sd": table.std(), "lowest": table.min()}
    return pandas.DataFrame({**found, "lowest_case": table.idxmin()}).rename_axis("name").reset_index()
