"""The worst and the median case, predicted by both models, for pictures and the viewer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

from nnslim.compression.recover import Progress
from nnslim.errors import InputError
from nnslim.evaluation.agreement import Agreement, CaseAgreement
from nnslim.hosts.nnunet.cases.preprocess import preprocess_case, silent
from nnslim.hosts.nnunet.judge.agree_models import (
    ComparedCase,
    agreement_of_cases,
    compared_cases,
    load_pair,
    predict_maps,
    read_labels,
)
from nnslim.hosts.nnunet.model.trained_model import classes_of
from nnslim.hosts.nnunet.predict.predict_settings import PredictSettings
from nnslim.report.viewer import Scene


def scenes_of_models(
    dense: Path,
    slim: Path,
    images: Path,
    labels: Path | None = None,
    settings: PredictSettings | None = None,
    known: Agreement | None = None,
    progress: Progress | None = None,
) -> tuple[list[Scene], Agreement, dict[int, str]]:
    """Find the worst and the median case by mean Dice of slim against dense, and predict them with both models.

    Args:
        dense, slim, images, labels, settings: as for `agreement_of_folders`.
        known: an agreement measured before; it is measured again unless it has every case, and every one with labels.
        progress: called with (what is done, done, in all).
    Returns:
        The scenes, the agreement that they were chosen by, and the names of the labels.
    Raises:
        ModelError: an unusable model. InputError: no images, or none that can be compared.
    """
    settings = settings or PredictSettings()
    large, small = load_pair(dense, slim, settings)
    cases = {case.name: case for case in compared_cases(large, images, labels, settings)}
    agreement = known
    if agreement is None or not _covers(agreement, cases):
        count = progress and (lambda done, total: progress("comparing", done, total))
        agreement = agreement_of_cases(large, small, list(cases.values()), count)
    chosen = representative([case for case in agreement.ordered() if case.name in cases])
    if not chosen:
        raise InputError(f"no case of {images} has a class in either prediction; there is nothing to show")
    scenes = []
    for number, (role, case) in enumerate(chosen):
        if progress is not None:
            progress("predicting cases to show", number, len(chosen))
        scenes.append(_scene(large, small, role, case, cases[case.name]))
    return scenes, agreement, label_names(large.label_manager)


def representative(cases: Sequence[CaseAgreement]) -> list[tuple[str, CaseAgreement]]:
    """Return the worst and the median of cases that are ordered with the worst first, each with its role."""
    if len(cases) < 2:
        return [("Only case", case) for case in cases]
    return [("Worst case", cases[0]), ("Median case", cases[len(cases) // 2])]


def label_names(label_manager: Any) -> dict[int, str]:
    """Return the name of each label, or the names of the regions that it belongs to."""
    names: dict[int, list[str]] = {}
    for name, members in classes_of(label_manager).items():
        for label in members:
            names.setdefault(label, []).append(name)
    return {label: ", ".join(listed) for label, listed in names.items()}


def to_canonical(volumes: Sequence[np.ndarray], properties: Mapping[str, Any]) -> tuple[list[np.ndarray], np.ndarray]:
    """Turn volumes as nnU-Net reads them towards right, anterior, superior.

    Args:
        volumes: (Z, Y, X). properties: what nnU-Net's reader tells; formats without directions keep their axes.
    Returns:
        (X, Y, Z) volumes and their affine, voxels to mm.
    """
    affine = _affine(properties)
    turn = nib.orientations.io_orientation(affine)
    turned = [nib.orientations.apply_orientation(volume.transpose(2, 1, 0), turn) for volume in volumes]
    return turned, affine @ nib.orientations.inv_ornt_aff(turn, volumes[0].shape[::-1])


def _affine(properties: Mapping[str, Any]) -> np.ndarray:
    if (stored := properties.get("nibabel_stuff")) is not None:
        return np.array(stored.get("reoriented_affine", stored["original_affine"]), float)
    affine = np.eye(4)
    geometry = properties.get("sitk_stuff")
    if geometry is None or len(geometry["spacing"]) not in (2, 3):
        spacing = np.array(properties["spacing"], float)
        spacing[0] = 1.0 if spacing[0] >= 999 * min(spacing[1:]) else spacing[0]  # nnU-Net's mark of a 2D image
        affine[:3, :3] = np.diag(spacing[::-1])
        return affine
    axes = len(geometry["spacing"])
    directions = np.array(geometry["direction"], float).reshape(axes, axes)
    affine[:axes, :axes] = directions * np.array(geometry["spacing"], float)
    affine[:axes, 3] = geometry["origin"]
    return np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine  # ITK's axes point to the left and to the back


def _covers(agreement: Agreement, cases: Mapping[str, ComparedCase]) -> bool:
    compared = {case.name: case.labelled for case in agreement.cases}
    return all(name in compared and (compared[name] or case.truth is None) for name, case in cases.items())


def _scene(dense: Any, slim: Any, role: str, found: CaseAgreement, case: ComparedCase) -> Scene:
    data, properties = preprocess_case(dense, case.files, case.previous)
    maps = {name: predict_maps(model, data, properties, True)[1] for name, model in (("dense", dense), ("slim", slim))}
    if case.truth is not None:
        maps["label"] = read_labels(dense, case.truth)
    with silent():
        reader = dense.plans_manager.image_reader_writer_class()
        image, geometry = reader.read_images([str(file) for file in case.files])
    turned, affine = to_canonical([image[0], *(np.asarray(labels) for labels in maps.values())], geometry)
    note = "" if len(image) == 1 else f"The first of {len(image)} channels is shown."
    volumes = dict(zip(maps, (labels.astype(np.int32) for labels in turned[1:]), strict=True))
    if (ignored := dense.label_manager.ignore_label) is not None and "label" in volumes:
        volumes["label"] = np.where(volumes["label"] == ignored, 0, volumes["label"])
    shown = {name: one.dice for name, one in found.classes.items()}
    return Scene(case.name, role, turned[0], volumes, affine, shown, note)
