"""Pictures of an evaluation: box plots per class and per group, and the worst cases."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import nibabel as nib
import numpy as np

from nnslim.errors import InputError
from nnslim.evaluation.classes import Classes, LabelClass
from nnslim.evaluation.compare import CaseScores
from nnslim.evaluation.label_files import ending_of, read_volume
from nnslim.evaluation.pairing import case_name
from nnslim.evaluation.results import Evaluation
from nnslim.evaluation.sources import LabelSource, Source, open_source, union_box
from nnslim.figures import overlay, own_style, row_panels, save_figure, score_rows

_GROUP_COLOURS = ("#00b7eb", "#ff9f1c", "#7a5cff", "#2a9d8f", "#e5579e", "#8d99ae")
_MARGIN = 25.0  # mm around a class in the picture of a worst case


def class_figure(evaluation: Evaluation, path: Path, groups: Mapping[str, Sequence[str]] | None = None) -> None:
    """Draw Dice and NSD of each class over the cases.

    Args:
        path: picture to write. groups: classes of one group stand together and have one colour.
    Raises:
        InputError: unknown ending. OutputError: it cannot be written.
    """
    shown = {"": [one.name for one in evaluation.present]} if groups is None else groups
    names = [name for members in shown.values() for name in members]
    colours = [
        _GROUP_COLOURS[place % len(_GROUP_COLOURS)] for place, members in enumerate(shown.values()) for _ in members
    ]
    counts = evaluation.class_table.set_index("name")
    marks = [(counts.missed[name], counts.false_positive[name]) for name in names]
    told = [", ".join(f"{n} {word}" for n, word in zip(one, ("missed", "false"), strict=True) if n) for one in marks]
    labels = [f"{name}  [{mark}]" if mark else name for name, mark in zip(names, told, strict=True)]
    _rows_figure(evaluation, path, labels, [[name] for name in names], colours)


def group_figure(evaluation: Evaluation, path: Path, groups: Mapping[str, Sequence[str]]) -> None:
    """Draw Dice and NSD of each group: a dot per case and class.

    Raises:
        InputError: unknown ending. OutputError: it cannot be written.
    """
    labels = [f"{group} ({len(members)} classes)" for group, members in groups.items()]
    _rows_figure(evaluation, path, labels, list(groups.values()), _GROUP_COLOURS)


def worst_figures(
    evaluation: Evaluation, stem: Path, count: int, classes: Classes | None = None, images: Path | None = None
) -> list[Path]:
    """Draw the worst class of each of the worst cases: in each direction the slice with the most wrong voxels.

    Args:
        stem: pictures are `<stem>_worst<number>.png`, the worst first.
        classes: as for the comparison.
        images: folder of `<case>_0000<ending>` or `<case><ending>`, or one image; without, the other labels are shown.
    Returns:
        The pictures.
    Raises:
        InputError: a file cannot be read any more, or an image has another shape than its labels. OutputError: a
        picture cannot be written.
    """
    drawn = []
    for number, (case, one) in enumerate(evaluation.worst(count), start=1):
        path = stem.with_name(f"{stem.name}_worst{number}.png")
        score = case.score(one.key)
        title = f"{case.name}, {one.name}: Dice {score.dice:.3f}, NSD {score.nsd:.3f} at {evaluation.tolerance:g} mm"
        _worst_figure(case, one, classes, images, path, title)
        drawn.append(path)
    return drawn


@own_style
def _rows_figure(
    evaluation: Evaluation, path: Path, labels: list[str], rows: list[Sequence[str]], colours: Sequence[str]
) -> None:
    """Draw a row of dots for each of `rows`, which are the names of its classes."""
    figure, panels = row_panels(labels, height=1.6)
    titles = {"dice": "Dice", "nsd": f"NSD at {evaluation.tolerance:g} mm"}
    by_class = dict(list(evaluation.table.groupby("name")))
    for axes, (metric, title) in zip(panels, titles.items(), strict=True):
        score_rows(axes, [np.concatenate([by_class[name][metric] for name in names]) for names in rows], colours)
        axes.set_xlabel(f"{title}, mean {evaluation.mean(metric):.3f}")
    absent = len(evaluation.classes) - len(evaluation.present)
    title = f"{len(evaluation.cases)} case(s); mean over classes of the means over cases"
    figure.suptitle(title + (f"; {absent} classes that are in no case are left out" if absent else ""), fontsize=10)
    save_figure(figure, path)


def _worst_figure(
    case: CaseScores, one: LabelClass, classes: Classes | None, images: Path | None, path: Path, title: str
) -> None:
    sources = [open_source(place, classes) for place in (case.reference, case.prediction)]
    reference, prediction = (source.load(one) for source in sources)
    grid = sources[0].map
    box = _wider(union_box(reference.box, prediction.box), grid.labels.shape[::-1], grid.spacing[::-1])
    # Sources have their axes reversed (z, y, x); a picture has them as the file has.
    masks = [crop.mask(box).T for crop in (reference, prediction)]
    background = _background(case, sources[0], images, box, grid.labels.shape)
    shapes = (*masks[0].shape, 1)[:3]
    to_ras = nib.orientations.io_orientation(grid.affine)
    turned = [nib.orientations.apply_orientation(volume.reshape(shapes), to_ras) for volume in (background, *masks)]
    spacing = np.ones(3)
    for axis, size in enumerate(grid.spacing):
        spacing[int(to_ras[axis, 0])] = size
    wrong = turned[1] != turned[2]
    centre = [int(wrong.sum(axis=tuple({0, 1, 2} - {axis})).argmax()) for axis in range(3)]
    named = [(name, mask.astype(np.uint8)) for name, mask in zip(("reference", "prediction"), turned[1:], strict=True)]
    overlay(turned[0], named, path, spacing=spacing, title=title, centre=centre)


def _wider(box: Sequence[slice], shape: Sequence[int], spacing: Sequence[float]) -> tuple[slice, ...]:
    extra = [round(_MARGIN / size) + 1 for size in spacing]
    return tuple(
        slice(max(0, side.start - more), min(size, side.stop + more))
        for side, size, more in zip(box, shape, extra, strict=True)
    )


def _background(
    case: CaseScores,
    reference: Source,
    images: Path | None,
    box: Sequence[slice],
    shape: tuple[int, ...],
) -> np.ndarray:
    """Return what the outlines are drawn on, cropped: the image, else the labels of the reference, else nothing."""
    if images is not None and (file := _image_of(case.name, images)) is not None:
        image = read_volume(file)[0]
        if image.shape != shape:
            raise InputError(f"{file} has shape {image.shape}, its labels {shape}")
        return np.asarray(image.T[tuple(box)].T, np.float32)
    if isinstance(reference, LabelSource):
        return np.asarray(reference.volume[tuple(box)].T > 0, np.float32)
    return np.zeros([side.stop - side.start for side in reversed(box)], np.float32)


def _image_of(name: str, images: Path) -> Path | None:
    if images.is_file():
        return images
    files = [entry for entry in sorted(images.iterdir()) if entry.is_file() and ending_of(entry)]
    return next((file for file in files if case_name(file) in (f"{name}_0000", name)), None)
