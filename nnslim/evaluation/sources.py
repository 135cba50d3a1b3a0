"""Where the mask of a class comes from: a label map, or a folder with one file per class."""

from __future__ import annotations

from functools import reduce
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy import ndimage

from nnslim.errors import InputError
from nnslim.evaluation.classes import Classes, LabelClass
from nnslim.evaluation.label_files import check_same_grid, read_label_map
from nnslim.evaluation.pairing import mask_files

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
        """Read the map.

        Raises:
            InputError: it cannot be read, or a label is none of the classes.
        """
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
        """List the files and read one of them for the grid.

        Raises:
            InputError: it cannot be read.
        """
        self.place = place
        self.files = mask_files(place)
        if not self.files:
            raise InputError(f"{place} holds no masks; expected <class>.nii.gz")
        self.map = read_label_map(next(iter(self.files.values())))

    def has(self, one: LabelClass) -> bool:
        """Tell whether the class has a file."""
        return one.name in self.files

    def load(self, one: LabelClass) -> Crop:
        """Read the class.

        Raises:
            InputError: the file cannot be read, or has another grid than the others.
        """
        file = self.files[one.name]
        read = self.map if file == self.map.path else read_label_map(file)
        check_same_grid(self.map, read)
        volume = read.labels.T
        filled = volume if volume.max(initial=0) <= 1 else (volume != 0).view(np.uint8)
        boxes = ndimage.find_objects(filled, max_label=1)
        return Crop(boxes[0] if boxes else None, volume, None)


Source = LabelSource | MaskSource


def open_source(place: Path, classes: Classes | None) -> Source:
    """Return a folder as masks and a file as a label map.

    Raises:
        InputError: see `LabelSource` and `MaskSource`.
    """
    return MaskSource(place) if place.is_dir() else LabelSource(place, classes)


def union_box(first: Box | None, second: Box | None) -> Box | None:
    """Return the smallest box that holds both; None is empty."""
    if first is None or second is None:
        return first if second is None else second
    return tuple(slice(min(a.start, b.start), max(a.stop, b.stop)) for a, b in zip(first, second, strict=True))
