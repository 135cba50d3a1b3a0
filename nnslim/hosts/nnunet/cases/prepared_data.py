"""A dataset, preprocessed the way a trained model expects it."""

from __future__ import annotations

import contextlib
import inspect
import io
import logging
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nnslim.errors import ConfigError, InputError
from nnslim.files import make_folder, read_json, write_json
from nnslim.hosts.nnunet.model.slim_plans import plans_for_fold
from nnslim.hosts.nnunet.model.trained_model import TrainedModel, model_key, preprocessing_key

_log = logging.getLogger("nnslim")


@dataclass(frozen=True)
class PreparedData:
    """A preprocessed dataset.

    Attributes:
        name: e.g. Dataset004_Hippocampus.
        identifier: directory of the preprocessed cases, inside nnUNet_preprocessed/<name>.
        dataset: content of dataset.json.
    """

    name: str
    identifier: str
    dataset: dict[str, Any]


def find_dataset(dataset: int | str) -> str:
    """Return the full name of a dataset, from its number or its name.

    Raises:
        ConfigError: nnUNet_preprocessed is not set.
        InputError: no such dataset under nnUNet_raw and nnUNet_preprocessed, or several.
    """
    places = [_place("nnUNet_preprocessed"), *([_place("nnUNet_raw")] if os.environ.get("nnUNet_raw") else [])]
    present = {p.name for place in places if place.is_dir() for p in place.glob("Dataset*_*") if p.is_dir()}
    text = str(dataset)
    wanted = {name for name in present if name == text or (text.isdigit() and _number(name) == int(text))}
    if len(wanted) == 1:
        return wanted.pop()
    where = " and ".join(str(place) for place in places)
    hint = "" if os.environ.get("nnUNet_raw") else "; the environment variable nnUNet_raw is not set"
    found = ", ".join(sorted(wanted or present)) or "none"
    raise InputError(f"dataset '{text}': expected one dataset of that number or name in {where}, found {found}{hint}")


def _place(variable: str) -> Path:
    if not os.environ.get(variable):
        raise ConfigError(f"the environment variable {variable} is not set; nnU-Net keeps its datasets there")
    return Path(os.environ[variable])


def _number(name: str) -> int | None:
    match = re.match(r"Dataset(\d{3})_", name)
    return int(match.group(1)) if match else None


def prepare_data(model: TrainedModel, dataset: int | str, processes: int) -> PreparedData:
    """Return the dataset preprocessed with the model's own plans; do what is missing.

    Data that stock nnU-Net preprocessed with the same spacing, normalisation and resampling are used as they are.
    Otherwise the cases go to their own directory, so that data of other plans are neither mistaken for these nor
    overwritten.

    Args:
        model: the model to train on.
        dataset: number or name, raw (nnUNet_raw) or preprocessed (nnUNet_preprocessed).
        processes: how many preprocess.
    Raises:
        InputError: the dataset is missing, does not fit the model, or cannot be preprocessed.
        ConfigError: an environment variable of nnU-Net is not set.
    """
    name = find_dataset(dataset)
    folder = _place("nnUNet_preprocessed") / name
    raw = Path(os.environ["nnUNet_raw"]) / name if os.environ.get("nnUNet_raw") else None
    description = read_json(folder / "dataset.json") or (read_json(raw / "dataset.json") if raw else {})
    _check_fits(model, description, name)
    cases = _raw_cases(raw, description)
    for identifier in _fitting_identifiers(model, folder):
        ready = {path.stem for path in (folder / identifier).glob("*.pkl")}  # the last file written of each case
        if ready and cases <= ready and (folder / "dataset_fingerprint.json").is_file():
            return PreparedData(name, identifier, description)
    if raw is None or not cases:
        raise InputError(
            f"{folder} holds no complete data preprocessed as {model.path.name} expects (spacing "
            f"{model.configuration_manager.spacing}, {', '.join(model.configuration_manager.normalization_schemes)}), "
            f"and no raw data to make them from are in {raw or 'nnUNet_raw, which is not set'}"
        )
    return PreparedData(name, _preprocess(model, name, folder, raw, processes), read_json(folder / "dataset.json"))


def _check_fits(model: TrainedModel, description: dict[str, Any], name: str) -> None:
    """Refuse a dataset whose channels or labels are not the model's: training keeps first layer and heads."""
    if "labels" not in description:
        raise InputError(f"{name} has no readable dataset.json with 'labels'")
    found, expected = _labels_and_channels(description), _labels_and_channels(model.dataset)
    if found != expected:
        raise InputError(
            f"{name} does not fit {model.path.name}: its dataset.json has labels {found[0]} and {found[2]} channel(s), "
            f"the model's has labels {expected[0]} and {expected[2]} channel(s)"
        )
    names = [", ".join(each["labels"]) for each in (description, model.dataset)]
    if names[0] != names[1]:
        _log.warning("labels of %s are called %s, those of the model %s", name, *names)


def _labels_and_channels(description: dict[str, Any]) -> tuple[list[Any], Any, int]:
    channels = description.get("channel_names") or description.get("modality") or {}
    return sorted(description["labels"].values(), key=str), description.get("regions_class_order"), len(channels)


def _fitting_identifiers(model: TrainedModel, folder: Path) -> list[str]:
    """Return data directories whose plans, kept beside them, preprocess as the model's do; its own name first."""
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    key, found = model_key(model), []
    for path in sorted(folder.glob("*.json")):
        plans = read_json(path)
        for configuration in plans.get("configurations", {}):
            try:
                settings = PlansManager(plans).get_configuration(configuration).configuration
            except (KeyError, RuntimeError, ValueError):
                continue  # someone else's broken file
            if preprocessing_key(plans, settings) == key and settings.get("data_identifier"):
                found.append(settings["data_identifier"])
    own = model.configuration_manager.data_identifier
    return sorted(set(found), key=lambda identifier: (identifier != own, identifier))


def _raw_cases(raw: Path | None, description: dict[str, Any]) -> set[str]:
    if raw is None or not (raw / "dataset.json").is_file():
        return set()
    from nnunetv2.utilities.utils import get_filenames_of_train_images_and_targets

    try:
        return set(get_filenames_of_train_images_and_targets(str(raw), description))
    except (OSError, AssertionError, KeyError) as error:
        raise InputError(f"{raw} cannot be read as a raw dataset: {error}") from error


def _preprocess(model: TrainedModel, name: str, folder: Path, raw: Path, processes: int) -> str:
    """Run nnU-Net's preprocessing with the model's plans, and return the name of the directory of cases."""
    from nnunetv2.experiment_planning import plan_and_preprocess_api as api

    make_folder(folder)
    for file in ("dataset.json", "splits_final.json"):
        if (raw / file).is_file() and not (folder / file).is_file():
            shutil.copyfile(raw / file, folder / file)
    plans_name = f"nnslim_{model_key(model)}"
    identifier = f"{plans_name}_{model.configuration}"
    settings = {**model.configuration_manager.configuration, "data_identifier": identifier}
    settings.pop("inherits_from", None)
    names = {"plans_name": plans_name, "dataset_name": name}
    write_json(folder / f"{plans_name}.json", model.plans | names | {"configurations": {model.configuration: settings}})
    _log.info("preprocessing %s with the plans of %s into %s", name, model.path.name, folder / identifier)
    number, quiet = _number(name), {"verbose": False, "show_progress_bar": False}
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            if not (folder / "dataset_fingerprint.json").is_file():
                _call(api.extract_fingerprints, [number], num_processes=processes, **quiet)
            _call(api.preprocess, [number], plans_name, (model.configuration,), [processes], **quiet)
    except (RuntimeError, AssertionError, OSError, ValueError, KeyError) as error:
        raise InputError(f"{raw} cannot be preprocessed: {' '.join(str(error).split())[:300]}") from error
    return identifier


def _call(function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """Call with the options that this nnU-Net's function knows: `show_progress_bar` came late."""
    known = inspect.signature(function).parameters
    return function(*arguments, **{key: value for key, value in options.items() if key in known})


def plans_on(model: TrainedModel, data: PreparedData, fold: str) -> dict[str, Any]:
    """Return the plans of a model, pointed at prepared data; of a pruned model with the widths of the fold."""
    plans = plans_for_fold(model, fold)
    plans["configurations"][model.configuration]["data_identifier"] = data.identifier
    plans["dataset_name"] = data.name
    return plans
