"""How far a slim model is from the dense one it was made from, per class, on a user's own images."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from nnslim.errors import InputError
from nnslim.evaluation.expected import TEMPERATURE, as_segmentation, drop_of, expected_dices, expected_drop_of, harden
from nnslim.evaluation.overlap import dice_of_counts, joint_counts

_NAN = float("nan")


@dataclass(frozen=True)
class ClassAgreement:
    """One class in one case; a Dice is NaN where neither side has the class.

    Attributes:
        dice: slim against dense.
        volume_dense, volume_slim: mm^3.
        expected_drop: estimated loss of Dice against labels, without labels; below 0 where slim may be better.
        dice_dense, dice_slim: against labels; NaN without labels.
    """

    dice: float
    volume_dense: float
    volume_slim: float
    expected_drop: float
    dice_dense: float = _NAN
    dice_slim: float = _NAN

    @property
    def volume_difference(self) -> float:
        """(slim - dense) / dense in percent; NaN where the dense model finds nothing."""
        return 100 * (self.volume_slim / self.volume_dense - 1) if self.volume_dense else _NAN

    @property
    def drop(self) -> float:
        """Loss of Dice against labels; NaN without labels."""
        return float(drop_of(np.float64(self.dice_dense), np.float64(self.dice_slim)))


@dataclass(frozen=True)
class CaseAgreement:
    """All classes of one case, by name. labelled: whether labels were compared."""

    name: str
    classes: dict[str, ClassAgreement]
    labelled: bool = False


class LabelMaps(NamedTuple):
    """Label maps of one case in the grid of its image, where labels are compared.

    Attributes:
        dense, slim, truth: (*grid) integers.
        spacing: mm per voxel along each axis.
        members: per class the labels that it consists of (a region may have several).
        ignore: label of the voxels in `truth` that do not count, if there is one.
    """

    dense: np.ndarray
    slim: np.ndarray
    truth: np.ndarray
    spacing: Sequence[float]
    members: Sequence[Sequence[int]]
    ignore: int | None = None


class Worst(NamedTuple):
    """Where slim and dense agree least."""

    case: str
    class_name: str
    dice: float


@dataclass
class Agreement:
    """Agreement over all cases. Means are over the cases of each class first, then over classes, and skip NaN.

    Attributes:
        class_names: in the order of the model's channels, without background.
        cases: compared cases.
        failed: case -> why it could not be compared.
        temperature: that the expected drop was estimated with.
        mirrored: whether the dense answers are those of test-time mirroring.
    """

    class_names: tuple[str, ...]
    cases: list[CaseAgreement] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    temperature: float = TEMPERATURE
    mirrored: bool = False

    def values(self, name: str) -> np.ndarray:
        """Return (cases, classes) of an attribute of `ClassAgreement`."""
        rows = [[getattr(case.classes[key], name) for key in self.class_names] for case in self.cases]
        return np.array(rows, dtype=float).reshape(len(self.cases), len(self.class_names))

    def class_means(self, name: str) -> np.ndarray:
        """Return (classes,) means over cases."""
        return np.array([_mean(column) for column in self.values(name).T])

    def mean(self, name: str) -> float:
        """Return the mean over classes of the means over cases."""
        return _mean(self.class_means(name))

    @property
    def mean_dice(self) -> float:
        """Mean Dice of slim against dense."""
        return self.mean("dice")

    @property
    def expected_drop(self) -> float:
        """Estimated mean loss of Dice against labels."""
        return self.mean("expected_drop")

    @property
    def drop(self) -> float:
        """Measured mean loss of Dice against labels; NaN without labels."""
        return self.mean("drop")

    def worst(self, class_name: str | None = None) -> Worst | None:
        """Return the lowest Dice of slim against dense, of one class or of all; None where nothing was found."""
        names = self.class_names if class_name is None else (class_name,)
        found = [Worst(case.name, name, case.classes[name].dice) for case in self.cases for name in names]
        return min((one for one in found if not math.isnan(one.dice)), key=lambda one: one.dice, default=None)

    def ordered(self) -> list[CaseAgreement]:
        """Return the cases by mean Dice over their classes, the worst first; without those that have no class."""
        means = np.array([_mean(row) for row in self.values("dice")])
        order = np.argsort(means, kind="stable")  # NaN comes last
        return [self.cases[number] for number in order if not math.isnan(means[number])]

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON values; NaN becomes null."""
        shown = ("dice", "volume_difference", "expected_drop", "dice_dense", "dice_slim", "drop")
        means = {name: self.class_means(name).tolist() for name in shown}
        classes: dict[str, dict[str, Any]] = {}
        for number, key in enumerate(self.class_names):
            worst = self.worst(key)
            classes[key] = {name: means[name][number] for name in shown}
            classes[key] |= {"worst_case": worst and worst.case, "worst_dice": worst and worst.dice}
        cases = {case.name: {"labelled": case.labelled, "classes": _scores(case)} for case in self.cases}
        worst = self.worst()
        content = {"mean_dice": self.mean_dice, "expected_drop": self.expected_drop, "temperature": self.temperature}
        content["mirrored"] = self.mirrored
        content |= {name: self.mean(name) for name in ("dice_dense", "dice_slim", "drop")}
        content |= {"worst": worst and worst._asdict(), "classes": classes, "cases": cases, "failed": dict(self.failed)}
        return _without_nan(content)

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> Agreement:
        """Read what `to_dict` gave, or raise an InputError; figures that follow from others are computed again."""
        stored = ClassAgreement.__dataclass_fields__
        try:
            cases = []
            for name, case in content["cases"].items():
                classes = {
                    key: ClassAgreement(**{part: _NAN if one[part] is None else float(one[part]) for part in stored})
                    for key, one in case["classes"].items()
                }
                cases.append(CaseAgreement(name, classes, bool(case["labelled"])))
            classes, failed, temperature = content["classes"], content["failed"], content["temperature"]
            mirrored = bool(content.get("mirrored"))
            return cls(tuple(classes), cases, dict(failed), float(temperature), mirrored)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise InputError(f"not an agreement as nnslim writes it: {type(error).__name__}: {error}") from error

    def lines(self) -> list[str]:
        """Return the agreement as lines of text: a summary, then a table with a line per class."""
        labelled = sum(case.labelled for case in self.cases)
        lines = [
            f"slim against dense{', mirrored' if self.mirrored else ''}: {len(self.cases)} case(s), "
            f"{len(self.class_names)} class(es)",
            f"  mean Dice {_shown(self.mean_dice)}, estimated drop in Dice against labels {_shown(self.expected_drop)}",
        ]
        if labelled:
            lines.append(
                f"  against labels of {labelled} case(s): Dice dense {_shown(self.mean('dice_dense'))}, "
                f"slim {_shown(self.mean('dice_slim'))}, drop {_shown(self.drop)}"
            )
        if worst := self.worst():
            lines.append(f"  worst: case {worst.case}, class {worst.class_name}, Dice {_shown(worst.dice)}")
        lines += [f"  failed: {name}: {reason}" for name, reason in self.failed.items()]
        columns = {"Dice": "dice", "volume %": "volume_difference", "est. drop": "expected_drop"}
        columns |= {"dense": "dice_dense", "slim": "dice_slim"} if labelled else {}
        means = {head: self.class_means(name) for head, name in columns.items()}
        width = max(len(key) for key in ("class", *self.class_names))
        lines.append(f"  {'class':<{width}}" + "".join(f"{head:>11}" for head in columns) + "  worst case")
        for number, key in enumerate(self.class_names):
            cells = (_shown(mean[number], 2 if head == "volume %" else 4) for head, mean in means.items())
            worst = self.worst(key)
            where = f"{worst.case} ({_shown(worst.dice)})" if worst else "in no case"
            lines.append(f"  {key:<{width}}" + "".join(f"{cell:>11}" for cell in cells) + f"  {where}")
        return lines


def compare_answers(
    name: str,
    dense: Tensor | np.ndarray,
    slim: Tensor | np.ndarray,
    spacing: Sequence[float],
    class_names: Sequence[str],
    labels: LabelMaps | None = None,
    *,
    temperature: float = TEMPERATURE,
) -> CaseAgreement:
    """Compare the two models on one case.

    Args:
        name: the case.
        dense: (C, *spatial) probabilities. C is one more than the classes where channel 0 is the background, else each
            channel is a region with threshold 0.5.
        slim: probabilities of the same shape, or what was decided: (*spatial) integer map, (C, *spatial) booleans.
        spacing: mm per voxel along the spatial axes of `dense`.
        class_names: without background.
        labels: maps in the image's grid; the volumes are then measured there.
        temperature: softens the dense model's probabilities for the expected drop.
    Raises:
        InputError: shapes, channels, classes or spacing do not fit.
    """
    dense, slim = torch.as_tensor(dense), torch.as_tensor(slim)
    background = len(dense) == len(class_names) + 1
    if not background and len(dense) != len(class_names):
        raise InputError(f"{len(dense)} channels do not fit {len(class_names)} classes, with or without background")
    if len(spacing) != dense.ndim - 1:
        raise InputError(f"spacing {tuple(spacing)} does not fit an image of shape {tuple(dense.shape[1:])}")
    if slim.is_floating_point():
        if slim.shape != dense.shape:
            raise InputError(f"shapes differ: dense {tuple(dense.shape)}, slim {tuple(slim.shape)}")
        slim = harden(slim, background)
    decided = [harden(dense, background), as_segmentation(slim)]
    drop = expected_drop_of(*expected_dices(dense, decided, background, temperature))
    counts = _overlaps(*decided, len(class_names), background)
    found = {"dice": [dice_of_counts(*one) for one in counts], "expected_drop": drop}
    volumes = [[one[side] for one in counts] for side in (0, 1)]
    if labels is not None:
        if len(labels.members) != len(class_names):
            raise InputError(f"{len(labels.members)} groups of labels do not fit {len(class_names)} classes")
        pairs = {"dice_dense": labels.dense, "dice_slim": labels.slim}
        joint = {key: joint_counts(label_map, labels.truth) for key, label_map in pairs.items()}
        volumes = [[one.overlap(members)[0] for members in labels.members] for one in joint.values()]
        for key, one in joint.items():
            valid = one.without(labels.ignore)
            found[key] = [dice_of_counts(*valid.overlap(members)) for members in labels.members]
    scale = math.prod(spacing if labels is None else labels.spacing)
    found |= {"volume_dense": np.multiply(volumes[0], scale), "volume_slim": np.multiply(volumes[1], scale)}
    classes = {
        key: ClassAgreement(**{part: float(value[number]) for part, value in found.items()})
        for number, key in enumerate(class_names)
    }
    return CaseAgreement(name, classes, labels is not None)


def _overlaps(first: Tensor, second: Tensor, classes: int, background: bool) -> list[tuple[int, int, int]]:
    """Return, per class, voxels in the first, in the second and in both; see `compare_answers` for the shapes."""
    if not background:
        masks = zip(first.numpy(), (second != 0).numpy(), strict=True)
        return [joint_counts(*pair).overlap([1]) for pair in masks]
    if second.ndim > first.ndim:  # masks, the background first
        second = second.long().argmax(0)
    counted = joint_counts(first.numpy(), second.numpy())
    return [counted.overlap([label]) for label in range(1, classes + 1)]


def _scores(case: CaseAgreement) -> dict[str, dict[str, float]]:
    derived = ("volume_difference", "drop")
    return {key: asdict(one) | {name: getattr(one, name) for name in derived} for key, one in case.classes.items()}


def _mean(values: np.ndarray) -> float:
    values = values[~np.isnan(values)]
    return float(values.mean()) if len(values) else _NAN


def _shown(value: float, digits: int = 4) -> str:
    return "-" if math.isnan(value) else f"{value:.{digits}f}"


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(one) for key, one in value.items()}
    return None if isinstance(value, float) and math.isnan(value) else value
