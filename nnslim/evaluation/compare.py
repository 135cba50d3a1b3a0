"""Compare one prediction with its reference, class by class."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np

from nnslim.errors import InputError
from nnslim.evaluation.classes import Classes, LabelClass, named_classes
from nnslim.evaluation.label_files import check_same_grid
from nnslim.evaluation.overlap import JointCounts, dice_of_counts, joint_counts
from nnslim.evaluation.sources import LabelSource, MaskSource, Source, open_source, union_box
from nnslim.evaluation.surfaces import surface_distances

_NAN = float("nan")
Side = Literal["prediction", "reference"]


@dataclass(frozen=True)
class Scores:
    """One class in one case.

    Attributes:
        predicted, reference, both: voxels of the class. voxels: that count at all, so without the ignored ones.
        nsd: share of both surfaces within the tolerance. hd95: mm.
    """

    predicted: int
    reference: int
    both: int
    voxels: int
    nsd: float = _NAN
    hd95: float = _NAN

    @property
    def dice(self) -> float:
        """NaN where neither side has the class, 0 where only one has it."""
        return dice_of_counts(self.predicted, self.reference, self.both)

    @property
    def empty(self) -> Literal["", "both", "prediction", "reference"]:
        """Which side lacks the class: "prediction" is a miss, "reference" a false positive."""
        if self.predicted:
            return "" if self.reference else "reference"
        return "prediction" if self.reference else "both"


@dataclass(frozen=True)
class CaseScores:
    """One case.

    Attributes:
        name: case. prediction, reference: what was compared. voxels: see `Scores`.
        scores: class key -> scores; classes that neither side has may be left out.
        lacking: class key -> side on which the file of the class is not there (one file per class only).
        found: classes of the case where none were prescribed.
    """

    name: str
    prediction: Path
    reference: Path
    voxels: int
    scores: dict[str, Scores]
    lacking: dict[str, Side] = field(default_factory=dict)
    found: tuple[LabelClass, ...] = ()

    def score(self, key: str) -> Scores | None:
        """Return the scores of a class; None where a file was lacking."""
        if key in self.lacking:
            return None
        return self.scores.get(key) or Scores(0, 0, 0, self.voxels)


@dataclass(frozen=True)
class CompareSettings:
    """What is compared.

    Attributes:
        classes: None: every label, or every class that has a file.
        tolerance: mm within which surfaces agree (NSD).
        surfaces: NSD and HD95, too.
        threads: classes at a time.
        wanted: names or keys of the classes to compare; None: all. What a case does not have is no error here.
    """

    classes: Classes | None = None
    tolerance: float = 1.0
    surfaces: bool = True
    threads: int = 1
    wanted: tuple[str, ...] | None = None


def compare_case(name: str, prediction: Path, reference: Path, settings: CompareSettings) -> CaseScores:
    """Read both sides and compare them.

    Raises:
        InputError: a file cannot be read, the grids differ, or a label is none of the classes.
    """
    one, other = (open_source(place, settings.classes) for place in (prediction, reference))
    check_same_grid(one.map, other.map)
    classes = settings.classes or _all_classes(one, other)
    if settings.wanted is not None:
        classes = classes.only(settings.wanted, known=False)
    lacking: dict[str, Side] = {}
    for side, source in (("prediction", one), ("reference", other)):
        lacking |= {c.key: side for c in classes.classes if not source.has(c) and c.key not in lacking}
    there = [c for c in classes.classes if c.key not in lacking]
    if lacking and not there:
        raise InputError(f"{prediction} and {reference} have no class in common")
    counts = None
    if isinstance(one, LabelSource) and isinstance(other, LabelSource):
        counts = joint_counts(one.volume, other.volume).without(classes.ignore)
    elif classes.ignore is not None:
        raise InputError(f"{prediction} and {reference}: an ignore label needs label maps on both sides")
    voxels = one.map.labels.size if counts is None else int(counts.counts.sum())
    with ThreadPoolExecutor(settings.threads) as pool:
        listed = pool.map(lambda c: _scores(c, one, other, counts, voxels, classes.ignore, settings), there)
        scores = {c.key: found for c, found in zip(there, listed, strict=True) if found is not None}
    found = classes.classes if settings.classes is None else ()
    return CaseScores(name, prediction, reference, voxels, scores, lacking, found)


def _all_classes(one: Source, other: Source) -> Classes:
    if isinstance(one, MaskSource) and isinstance(other, MaskSource):
        names = sorted({*one.files, *other.files})
        return Classes(tuple(LabelClass(name, (), name) for name in names))
    if isinstance(one, LabelSource) and isinstance(other, LabelSource):
        return named_classes({label: str(label) for label in (one.labels | other.labels) - {0}})
    raise InputError(
        f"{one.place} and {other.place}: to compare a label map with one file per class the names of the labels "
        "are needed; give a dataset.json"
    )


def _scores(
    one: LabelClass,
    predicted: Source,
    reference: Source,
    counts: JointCounts | None,
    voxels: int,
    ignore: int | None,
    settings: CompareSettings,
) -> Scores | None:
    """Return the scores of a class; None where neither side has it. counts: None with one file per class."""
    masks: list[np.ndarray] = []
    if counts is None or settings.surfaces:
        crops = [source.load(one) for source in (predicted, reference)]
        if (box := union_box(*(crop.box for crop in crops))) is None:
            return None
        masks = [crop.mask(box) for crop in crops]
        if ignore is not None:
            masks[0] &= crops[1].volume[box] != ignore
    counted = joint_counts(*masks).overlap([1]) if counts is None else counts.overlap(one.members)
    if not any(counted):
        return None
    nsd = hd95 = _NAN
    if settings.surfaces:
        nsd = 0.0  # a miss or a false positive: no part of the surface is right
        if counted[0] and counted[1]:
            distances = surface_distances(*masks, predicted.map.spacing[::-1])
            nsd, hd95 = distances.surface_dice(settings.tolerance), distances.hausdorff(95)
    return Scores(*counted, voxels, nsd, hd95)
