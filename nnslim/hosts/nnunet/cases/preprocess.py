"""Find and preprocess the cases of a folder with nnU-Net's own parts."""

from __future__ import annotations

import logging
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from nnslim.errors import InputError, ModelError, NNSlimError, one_line
from nnslim.files import check_name
from nnslim.prediction.images import check_image

IMAGE_ENDINGS = (".nii.gz", ".nii", ".nrrd", ".mha", ".mhd", ".gipl", ".png", ".bmp", ".tif", ".tiff", ".jpg", ".jpeg")
_log = logging.getLogger("nnslim")
_lock = threading.Lock()
_hushed = 0
_shown: TextIO = sys.stdout


@contextmanager
def silent() -> Iterator[None]:
    """Drop what nnU-Net prints. Nests, also across threads: the last one out restores."""
    global _hushed, _shown
    with _lock:
        if not _hushed:
            # Names of files may be no UTF-8, and nnU-Net prints them.
            sink = open(os.devnull, "w", encoding="utf-8", errors="replace")  # noqa: PTH123, SIM115
            _shown, sys.stdout = sys.stdout, sink
        _hushed += 1
    try:
        yield
    finally:
        with _lock:
            _hushed -= 1
            if not _hushed:
                sink, sys.stdout = sys.stdout, _shown
                sink.close()


@dataclass
class Listing:
    """What a folder of images holds.

    Attributes:
        cases: files of each case in the order of their channels; the model's reader tells how many a file holds.
        problems: case -> why its files are ambiguous or unusable.
        left_out: files that are no case's. What has the name of a case or of its image is (the spacing of a TIFF, the
            voxels of an .mhd).
    """

    cases: dict[str, list[Path]] = field(default_factory=dict)
    problems: dict[str, str] = field(default_factory=dict)
    left_out: list[Path] = field(default_factory=list)


def list_cases(images: Path, ending: str) -> Listing:
    """Sort the files of a folder, or one file, by case; hidden files do not count.

    Raises:
        InputError: nothing fits `<case>_0000<ending>`.
    """
    if not images.exists():
        raise InputError(f"{images} does not exist; expected a folder of images or one image")
    files = [images] if images.is_file() else sorted(path for path in images.iterdir() if path.is_file())
    found, others = Listing(), {}
    for file in (file for file in files if not file.name.startswith(".")):
        if (name := _case_name(file.name, ending)) is not None:
            found.cases.setdefault(name, []).append(file)
        else:
            others[file] = next((name for other in IMAGE_ENDINGS if (name := _case_name(file.name, other))), None)
    if not found.cases:
        raise InputError(f"{images} holds no image named <case>_0000{ending}, as nnU-Net and this model expect")
    for file, name in others.items():
        stem = file.name[: len(name) + 5] if name else ""
        twin = next((path for path in found.cases.get(name or "", ()) if path.name == stem + ending), None)
        if name and twin is not None:
            found.problems[name] = f"{twin.name} and {file.name} are both channel {stem[-4:]}; remove one"
        elif name and name not in found.cases:
            found.problems[name] = f"{file.name} cannot be taken: the model reads {ending} files; convert it"
        elif file.name.endswith(ending) or not {file.stem, file.stem[:-5]} & found.cases.keys():
            found.left_out.append(file)
    return found


def _case_name(name: str, ending: str) -> str | None:
    stem = name.removesuffix(ending)
    fits = name.endswith(ending) and len(stem) > 5 and stem[-5] == "_" and stem[-4:].isdigit()
    return stem[:-5] if fits else None


def check_stage(model: Any, previous: Path | None) -> None:
    """Refuse a cascade without the stage before it.

    Args:
        model: what has nnU-Net's `configuration_manager`. previous: folder of the segmentations of that stage.
    Raises:
        ModelError: the model needs them, and `previous` is None.
    """
    stage = model.configuration_manager.previous_stage_name
    if stage is not None and previous is None:
        raise ModelError(
            f"the model is the second stage of a cascade and needs the segmentations of '{stage}'; "
            "name their folder with --previous-stage"
        )


def _check_channels(predictor: Any, files: list[Path], count: int) -> None:
    """Refuse a case that has not the model's channels; one file may hold several, as a colour picture does."""
    described = predictor.dataset_json.get("channel_names") or predictor.dataset_json.get("modality")
    numbers = [file.name.removesuffix(predictor.dataset_json["file_ending"])[-4:] for file in files]
    names = ", ".join(str(value) for value in described.values())
    found = ", ".join(file.name for file in files)
    if count != len(described):
        inside = "" if count == len(files) else f"{count} in "
        needed = f"the model needs {len(described)} channel(s) ({names})"
        raise InputError(f"{needed}, found {inside}{len(files)} file(s): {found}")
    wanted = [f"{number:04d}" for number in range(len(files))]
    if 1 < len(files) == count and numbers != wanted:
        raise InputError(f"the model needs channels {', '.join(wanted)} ({names}), found {found}")


def check_names(model: Any, *paths: Path) -> None:
    """Refuse paths that end the process in the model's reader and writer, see `check_name`."""
    if model.plans_manager.image_reader_writer_class.__name__.startswith("SimpleITK"):
        for path in paths:
            check_name(path)


def preprocess_case(
    predictor: Any, files: list[Path], previous: Path | None, *, lean: bool = False, finite: bool = True
) -> tuple[np.ndarray, dict[str, Any]]:
    """Check, read and preprocess one case with nnU-Net's own parts.

    Args:
        predictor: an initialised nnUNetPredictor.
        files: in the order of their channels, see `Listing`.
        previous: for a cascade, the segmentation of the stage before.
        lean: resample without large copies, see `lean_configuration`.
        finite: refuse what comes out not finite; else nnU-Net predicts it, with a warning.
    Returns:
        (channels, *spatial) data, and nnU-Net's properties of the case.
    Raises:
        InputError: wrong number of channels, a file that is cut short or that the model's reader cannot read, or
        intensities that are not finite.
    """
    from nnunetv2.utilities.label_handling.label_handling import convert_labelmap_to_one_hot

    from nnslim.hosts.nnunet.cases.resampling_functions import Stand, lean_configuration

    check_names(predictor, *files, *(() if previous is None else (previous,)))
    for file in files:
        check_image(file)
    configuration, plans = predictor.configuration_manager, predictor.plans_manager
    if lean:
        configuration = lean_configuration(configuration)
    # Only CT's normalisation reads them, and plans may have them for fewer channels than the model.
    known = plans.foreground_intensity_properties_per_channel
    known = {str(number): {} for number in range(len(configuration.normalization_schemes))} | known
    plans = Stand(plans, foreground_intensity_properties_per_channel=known)
    preprocessor = configuration.preprocessor_class(verbose=False)
    original = preprocessor.run_case_npy

    def run_case_npy(data: np.ndarray, *rest: Any, **named: Any) -> Any:
        _check_channels(predictor, files, len(data))
        return original(data, *rest, **named)

    preprocessor.run_case_npy = run_case_npy
    try:
        with silent():
            data, stage, properties = preprocessor.run_case(
                [str(file) for file in files],
                None if previous is None else str(previous),
                plans,
                configuration,
                predictor.dataset_json,
            )
    except NNSlimError:
        raise
    except Exception as error:  # readers raise whatever their format library raises
        names = [file.name for file in files] + ([previous.name] if previous else [])
        reason = one_line(error) if str(error) else "its reader wants files of one shape and spacing"  # as it prints
        raise InputError(f"{', '.join(names)} cannot be read: {reason}") from error
    if not np.isfinite(data).all():
        if finite:
            raise InputError(_not_finite(predictor, files))
        _log.warning("%s; nnU-Net predicts it all the same", _not_finite(predictor, files))
    if previous is not None:  # a cascade sees the stage before it as one channel per label
        labels = predictor.label_manager.foreground_labels
        data = np.vstack((data, convert_labelmap_to_one_hot(stage[0], labels, data.dtype)))
    return data, properties


def _not_finite(predictor: Any, files: list[Path]) -> str:
    """Return which file holds how many voxels that are not finite: one of them spoils the normalisation of all."""
    reader = predictor.plans_manager.image_reader_writer_class()
    for file in files:
        image, _ = reader.read_images([str(file)])
        if bad := int(np.count_nonzero(~np.isfinite(image))):
            return f"{file.name} has {bad:,} of {image.size:,} voxels that are NaN or infinite"
    return f"{', '.join(file.name for file in files)} cannot be normalised: the result holds NaN or infinite values"
