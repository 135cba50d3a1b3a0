"""Find and preprocess the cases of a folder with nnU-Net's own parts."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from nnslim.errors import InputError, ModelError, one_line
from nnslim.prediction.images import check_image, not_finite

IMAGE_ENDINGS = (".nii.gz", ".nii", ".nrrd", ".mha", ".mhd", ".gipl", ".png", ".bmp", ".tif", ".tiff", ".jpg", ".jpeg")
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
        cases: files of each case, one per channel, in channel order.
        problems: case -> why its files are ambiguous or unusable.
        left_out: files that are no case's.
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
        else:
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


def _check_channels(predictor: Any, files: list[Path]) -> None:
    described = predictor.dataset_json.get("channel_names") or predictor.dataset_json.get("modality")
    numbers = [file.name.removesuffix(predictor.dataset_json["file_ending"])[-4:] for file in files]
    names = ", ".join(str(value) for value in described.values())
    found = ", ".join(file.name for file in files)
    if len(files) != len(described):
        raise InputError(f"the model needs {len(described)} channel(s) ({names}), found {len(files)} file(s): {found}")
    wanted = [f"{number:04d}" for number in range(len(files))]
    if len(files) > 1 and numbers != wanted:
        raise InputError(f"the model needs channels {', '.join(wanted)} ({names}), found {found}")


def preprocess_case(
    predictor: Any, files: list[Path], previous: Path | None, *, lean: bool = False
) -> tuple[np.ndarray, dict[str, Any]]:
    """Check, read and preprocess one case with nnU-Net's own parts.

    Args:
        predictor: an initialised nnUNetPredictor.
        files: one per channel.
        previous: for a cascade, the segmentation of the stage before.
        lean: resample without large copies, see `lean_configuration`.
    Returns:
        (channels, *spatial) data, and nnU-Net's properties of the case.
    Raises:
        InputError: wrong number of channels, a file that is cut short or cannot be read, more than three axes, a
        spacing that is not a length, or intensities that are not finite.
    """
    from nnunetv2.utilities.label_handling.label_handling import convert_labelmap_to_one_hot

    _check_channels(predictor, files)
    for file in files:
        check_image(file)
    configuration = predictor.configuration_manager
    if lean:
        from nnslim.hosts.nnunet.cases.resampling_functions import lean_configuration

        configuration = lean_configuration(configuration)
    preprocessor = configuration.preprocessor_class(verbose=False)
    try:
        with silent():
            data, stage, properties = preprocessor.run_case(
                [str(file) for file in files],
                None if previous is None else str(previous),
                predictor.plans_manager,
                configuration,
                predictor.dataset_json,
            )
    except Exception as error:  # readers raise whatever their format library raises
        names = [file.name for file in files] + ([previous.name] if previous else [])
        raise InputError(f"{', '.join(names)} cannot be read: {one_line(error)}") from error
    if not np.isfinite(data).all():
        raise InputError(_not_finite(predictor, files))
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
            return not_finite(file, bad, image.size)
    return f"{', '.join(file.name for file in files)} cannot be normalised: the result holds NaN or infinite values"
