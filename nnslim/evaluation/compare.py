"""Compare one prediction with its reference, class by class; each is a label map or a folder with a file per class."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import reduce
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from scipy import ndimage

from nnslim.errors import InputError
from nnslim.evaluation.classes import Classes, LabelClass, named_classes
from nnslim.evaluation.label_files import check_same_grid, mask_files, read_label_map
from nnslim.evaluation.overlap import JointCounts, dice_of_counts, joint_counts
from nnslim.evaluation.surfaces import surface_distances

Box = tuple[slice, ...]


class Crop(NamedTuple):
    """A class in a volume.

    Attributes:
        box: the smallest that holds it; None where it is not there.
        volume: labels. members: the labels of the class; None: everything but 0.
    """

    box: Box | None
    volume: np.ndarray
    members: tuple[int, ...] | None

    def mask(self, box: Box) -> np.ndarray:
        """Return (*box) booleans."""
        values = self.volume[box]
        if self.members is None:
            return values != 0
        if len(self.members) == 1:
            return values == self.members[0]
        return np.isin(values, self.members)


class LabelSource:
    """A label map; `volume` has its axes reversed, so that numpy finds the fastest one last."""

    def __init__(self, place: Path, classes: Classes | None) -> None:
        """Read the map; an InputError tells that it cannot be read, or that a label is none of the classes."""
        self.place = place
        self.map = read_label_map(place)
        self.volume = self.map.labels.T
        self._boxes = ndimage.find_objects(self.volume)
        self.labels = {label for label, box in enumerate(self._boxes, start=1) if box is not None}
        if classes is not None and (unknown := self.labels - classes.known - {classes.ignore}):
            listed = ", ".join(str(label) for label in sorted(unknown)[:10])
            named = ", ".join(str(label) for label in sorted(classes.known)[:20])
            raise InputError(f"{place} has label(s) {listed}, which are none of the classes; known: {named}")

    def has(self, one: LabelClass) -> bool:
        """Tell whether the class could be here; a label map has room for all."""
        return True

    def load(self, one: LabelClass) -> Crop:
        """Return the class."""
        boxes = [self._boxes[label - 1] for label in one.members if 0 < label <= len(self._boxes)]
        return Crop(reduce(union_box, boxes, None), self.volume, one.members)


class MaskSource:
    """A folder with one mask per class, as TotalSegmentator writes it; `map` is one of them, the rest are read late."""

    def __init__(self, place: Path) -> None:
        """List the files and read one of them for the grid; an InputError tells that there is none, or it is broken."""
        self.place = place
        self.files = mask_files(place)
        if not self.files:
            raise InputError(f"{place} holds no masks; expected <class>.nii.gz")
        self.map = read_label_map(next(iter(self.files.values())))

    def has(self, one: LabelClass) -> bool:
        """Tell whether the class has a file."""
        return one.name in self.files

    def load(self, one: LabelClass) -> Crop:
        """Read the class; an InputError tells that its file cannot be read, or has another grid than the others."""
        file = self.files[one.name]
        read = self.map if file == self.map.path else read_label_map(file)
        check_same_grid(self.map, read)
        volume = read.labels.T
        filled = volume if volume.max(initial=0) <= 1 else (volume != 0).view(np.uint8)
        boxes = ndimage.find_objects(filled, max_label=1)
        return Crop(boxes[0] if boxes else None, volume, None)


Source = LabelSource | MaskSource


def open_source(place: Path, classes: Classes | None) -> Source:
    """Return a folder as masks and a file as a label map."""
    return MaskSource(place) if place.is_dir() else LabelSource(place, classes)


def union_box(first: Box | None, second: Box | None) -> Box | None:
    """Return the smallest box that holds both; None is empty."""
    if first is None or second is None:
        return first if second is None else second
    return tuple(slice(min(a.start, b.start), max(a.stop, b.stop)) for a, b in zip(first, second, strict=True))


_NAN = float("nan")
Side = Literal["prediction", "reference"]


@dataclass(frozen=True)
class Scores:
    """One class in one case.

    Attributes:
        predicted, reference, both: voxels of the class. voxels: that count at all, so without the ignored ones.
        nsd: share of both surfaces within the tolerance. hd95: mm.
        hd: mm; compactness, compactness_ref: see `SurfaceDistances.compactness`; where they were asked for.
    """

    predicted: int
    reference: int
    both: int
    voxels: int
    nsd: float = _NAN
    hd95: float = _NAN
    hd: float = _NAN
    compactness: float = _NAN
    compactness_ref: float = _NAN

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
        surfaces: NSD and HD95, too. shapes: and HD and compactness.
        threads: classes at a time.
        wanted: names or keys of the classes to compare; None: all. What a case does not have is no error here.
    """

    classes: Classes | None = None
    tolerance: float = 1.0
    surfaces: bool = True
    threads: int = 1
    wanted: tuple[str, ...] | None = None
    shapes: bool = False


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
    if not settings.surfaces:
        return Scores(*counted, voxels)
    nsd, hd95, more = 0.0, _NAN, ()  # a miss or a false positive: no part of the surface is right
    if (whole := all(counted[:2])) or settings.shapes:
        distances = surface_distances(*masks, predicted.map.spacing[::-1])
        if whole:
            nsd, hd95 = distances.surface_dice(settings.tolerance), distances.hausdorff(95)
        if settings.shapes:
            more = (distances.largest(), *distances.compactness(*counted[:2]))
    return Scores(*counted, voxels, nsd, hd95, *more)
