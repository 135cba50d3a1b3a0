"""Find and preprocess the cases of a folder with nnU-Net's own parts."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np

from nnslim.errors import InputError, ModelFolderError
from nnslim.hosts.nnunet.resampling import lean_configuration
from nnslim.work.images import check_complete


@contextmanager
def silent() -> Iterator[None]:
    """Drop what nnU-Net prints."""
    with open(os.devnull, "w") as sink, redirect_stdout(sink):  # noqa: PTH123
        yield


def find_cases(images: Path, ending: str) -> dict[str, list[Path]]:
    """Return the files of each case, one per channel, in channel order.

    Raises:
        InputError: nothing fits `<case>_0000<ending>`.
    """
    if not images.exists():
        raise InputError(f"{images} does not exist; expected a folder of images or one image")
    files = [images] if images.is_file() else sorted(images.glob(f"*{ending}"))
    cases: dict[str, list[Path]] = {}
    for file in files:
        stem = file.name.removesuffix(ending)
        if file.name.endswith(ending) and len(stem) > 5 and stem[-5] == "_" and stem[-4:].isdigit():
            cases.setdefault(stem[:-5], []).append(file)
    if not cases:
        raise InputError(f"{images} holds no image named <case>_0000{ending}, as nnU-Net and this model expect")
    return cases


def check_stage(model: Any, previous: Path | None) -> None:
    """Refuse a cascade without the stage before it.

    Args:
        model: what has nnU-Net's `configuration_manager`. previous: folder of the segmentations of that stage.
    Raises:
        ModelFolderError: the model needs them, and `previous` is None.
    """
    stage = model.configuration_manager.previous_stage_name
    if stage is not None and previous is None:
        raise ModelFolderError(
            f"the model is the second stage of a cascade and needs the segmentations of '{stage}'; "
            "name their folder with --previous-stage"
        )


def _check_channels(predictor: Any, files: list[Path]) -> None:
    described = predictor.dataset_json.get("channel_names") or predictor.dataset_json.get("modality")
    if len(files) != len(described):
        names = ", ".join(str(value) for value in described.values())
        found = ", ".join(file.name for file in files)
        raise InputError(f"the model needs {len(described)} channel(s) ({names}), found {len(files)} file(s): {found}")


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
        InputError: wrong number of channels, or a file that is cut short or cannot be read.
    """
    from nnunetv2.utilities.label_handling.label_handling import convert_labelmap_to_one_hot

    _check_channels(predictor, files)
    for file in files:
        check_complete(file)
    configuration = predictor.configuration_manager
    preprocessor = configuration.preprocessor_class(verbose=False)
    try:
        with silent():
            data, stage, properties = preprocessor.run_case(
                [str(file) for file in files],
                None if previous is None else str(previous),
                predictor.plans_manager,
                lean_configuration(configuration) if lean else configuration,
                predictor.dataset_json,
            )
    except Exception as error:  # readers raise whatever their format library raises
        text = " ".join(str(error).split()) or type(error).__name__
        names = [file.name for file in files] + ([previous.name] if previous else [])
        raise InputError(f"{', '.join(names)} cannot be read: {text[:300]}") from error
    if previous is not None:  # a cascade sees the stage before it as one channel per label
        labels = predictor.label_manager.foreground_labels
        data = np.vstack((data, convert_labelmap_to_one_hot(stage[0], labels, data.dtype)))
    return data, properties
