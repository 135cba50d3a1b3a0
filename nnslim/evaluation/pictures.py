"""Pictures: scores per class and per group, the worst cases, and the agreement of a slim model with the dense one."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import nibabel as nib
import numpy as np

from nnslim.errors import InputError
from nnslim.evaluation.classes import Classes, LabelClass
from nnslim.evaluation.compare import CaseScores, LabelSource, Source, open_source, union_box
from nnslim.evaluation.label_files import case_name, ending_of, read_volume
from nnslim.evaluation.scores import Evaluation
from nnslim.figures import COLOURS, DARK, FEW, overlay, own_style, row_panels, save_figure, score_rows

if TYPE_CHECKING:  # it needs torch, which takes seconds and which no picture needs
    from nnslim.evaluation.agreement import Agreement

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
    """Draw Dice and NSD of each group, a dot per case and class; errors as for `class_figure`."""
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
    Raises:
        InputError: a file can no longer be read, or an image has another shape than its labels. OutputError: a
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
    for axes, (metric, title) in zip(panels, titles.items(), strict=True):
        scores = evaluation.scores(metric).set_axis([one.name for one in evaluation.classes], axis=1)
        score_rows(axes, [scores[list(names)].to_numpy(float).ravel() for names in rows], colours)
        axes.set_xlabel(f"{title}, mean {evaluation.mean(metric):.3f}")
    absent = len(evaluation.classes) - len(evaluation.present)
    title = f"{len(evaluation.cases)} case(s); mean over classes of the means over cases"
    figure.suptitle(title + (f"; {absent} classes that are in no case are left out" if absent else ""), fontsize=10)
    save_figure(figure, path)


def _worst_figure(
    case: CaseScores, one: LabelClass, classes: Classes | None, images: Path | None, path: Path, title: str
) -> None:
    sources = [open_source(place, classes) for place in (case.reference, case.prediction)]
    crops = [source.load(one) for source in sources]
    grid = sources[0].map
    # Sources have their axes reversed (z, y, x); a picture has them as the file has.
    extra = [round(_MARGIN / size) + 1 for size in grid.spacing[::-1]]
    sides = zip(union_box(*(crop.box for crop in crops)), extra, strict=True)
    box = tuple(slice(max(0, side.start - more), side.stop + more) for side, more in sides)
    volumes = [_background(case.name, sources[0], images, box), *(crop.mask(box).T for crop in crops)]
    shape = (*volumes[0].shape, 1)[:3]
    to_ras = nib.orientations.io_orientation(grid.affine)
    image, *masks = (nib.orientations.apply_orientation(volume.reshape(shape), to_ras) for volume in volumes)
    spacing = np.ones(3)
    spacing[to_ras[: len(grid.spacing), 0].astype(int)] = grid.spacing
    wrong = masks[0] != masks[1]
    centre = [int(wrong.sum(axis=tuple({0, 1, 2} - {axis})).argmax()) for axis in range(3)]
    named = [(name, mask.astype(np.uint8)) for name, mask in zip(("reference", "prediction"), masks, strict=True)]
    overlay(image, named, path, spacing=spacing, title=title, centre=centre)


def _background(name: str, reference: Source, images: Path | None, box: tuple[slice, ...]) -> np.ndarray:
    """Return what the outlines are drawn on, cropped: the image, else the labels of the reference, else nothing."""
    labels = reference.map.labels
    if images is not None and (file := _image_of(name, images)) is not None:
        image = read_volume(file, grey=True)[0]
        if image.shape != labels.shape:
            raise InputError(f"{file} has shape {image.shape}, its labels {labels.shape}")
        return np.asarray(image.T[box].T, np.float32)
    cropped = labels.T[box].T > 0
    return np.asarray(cropped if isinstance(reference, LabelSource) else np.zeros_like(cropped), np.float32)


def _image_of(name: str, images: Path) -> Path | None:
    if images.is_file():
        return images
    files = [entry for entry in sorted(images.iterdir()) if entry.is_file() and ending_of(entry)]
    return next((file for file in files if case_name(file) in (f"{name}_0000", name)), None)


@own_style
def agreement_figure(agreement: Agreement, path: Path) -> None:
    """Draw, per class, the Dice of slim against dense over the cases, and the difference in volume.

    A row per class: a dot per case, a box over the middle half of them and a stroke at the median; beside it the mean
    difference in volume with a thin line over all cases. The height follows the number of classes.

    Args:
        agreement: with at least one class.
        path: picture to write; the ending chooses PNG, PDF or SVG.
    Raises:
        InputError: another ending. OutputError: it cannot be written; nothing half-written is left.
    """
    figure, (dice, volume) = row_panels(agreement.class_names, height=2.0, width_ratios=(3, 2))
    _dice_rows(dice, agreement)
    _volume_rows(volume, agreement)
    title = f"{len(agreement.cases)} case(s): mean Dice {agreement.mean_dice:.3f}, "
    title += f"estimated drop against labels {agreement.expected_drop:.3f}"
    figure.suptitle(title + ("" if math.isnan(agreement.drop) else f", measured {agreement.drop:.3f}"), fontsize=11)
    save_figure(figure, Path(path))


def _dice_rows(axes: Any, agreement: Agreement) -> None:
    lowest = score_rows(axes, agreement.values("dice").T)
    axes.set_xlabel("Dice, slim against dense")
    if worst := agreement.worst():
        row = agreement.class_names.index(worst.class_name)
        left = worst.dice < (lowest + 1) / 2
        axes.scatter(worst.dice, row, s=60, facecolors="none", edgecolors="red", zorder=4)
        offset = (10 if left else -10, 16 if len(agreement.class_names) <= FEW else 0)
        style = {"color": "red", "fontsize": 8, "va": "center", "ha": "left" if left else "right", "zorder": 5}
        style["bbox"] = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1}
        text = f"worst: {worst.case}, {worst.dice:.3f}"
        axes.annotate(text, (worst.dice, row), xytext=offset, textcoords="offset points", **style)


def _volume_rows(axes: Any, agreement: Agreement) -> None:
    means = agreement.class_means("volume_difference")
    sizes = np.abs(means[~np.isnan(means)])
    largest = np.abs(np.nan_to_num(agreement.values("volume_difference"))).max(initial=0)
    # One class that is doubled must not squeeze all others into the zero line.
    limit = max(1.0, min(1.25 * largest, max(10.0, 5 * float(np.median(sizes)) if len(sizes) else 0.0)))
    axes.axvline(0, color="0.4", linewidth=0.8)
    for row, (mean, column) in enumerate(zip(means, agreement.values("volume_difference").T, strict=True)):
        if math.isnan(mean):
            continue
        axes.barh(row, mean, height=0.6, color=COLOURS[1])
        axes.hlines(row, np.nanmin(column), np.nanmax(column), color=DARK, linewidth=0.8)
        edge = float(np.clip(mean, -limit, limit)) * 0.98
        if len(means) <= FEW or abs(mean) > limit:
            outwards = (mean >= 0) == (abs(mean) <= 0.8 * limit)
            side = "left" if outwards else "right"
            axes.text(edge, row - 0.32, f"{mean:+.1f} %", fontsize=7, va="bottom", ha=side)
    axes.set_xlim(-limit, limit)
    axes.set_xlabel("volume, slim against dense (%)")
