"""Compare a slim model with the dense one on a folder of images, and keep the result in the folder of the slim one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from nnslim.compression.record import read_record, write_record
from nnslim.errors import InputError, ModelError, NNSlimError, kind_and_line
from nnslim.evaluation.agreement import Agreement, CaseAgreement, LabelMaps, compare_answers
from nnslim.evaluation.expected import TEMPERATURE, harden
from nnslim.evaluation.pictures import agreement_figure
from nnslim.hosts.nnunet.cases.preprocess import check_stage, list_cases, preprocess_case, silent
from nnslim.hosts.nnunet.model.model_files import find_folds
from nnslim.hosts.nnunet.model.trained_model import classes_of, read_trained_model
from nnslim.hosts.nnunet.predict.load import load_predictor
from nnslim.hosts.nnunet.predict.predict_settings import PredictSettings
from nnslim.prediction.images import check_image


class ComparedCase(NamedTuple):
    """One case: a file per channel and, where they exist, its label map and the segmentation of the stage before."""

    name: str
    files: list[Path]
    truth: Path | None
    previous: Path | None


def agreement_of_models(
    dense: Path,
    slim: Path,
    images: Path,
    labels: Path | None = None,
    settings: PredictSettings | None = None,
    progress: Callable[[int, int], None] | None = None,
    temperature: float = TEMPERATURE,
) -> Agreement:
    """Predict each case with both models in this process, through nnU-Net's own preprocessing and sliding window.

    Where the settings name no folds, both models use those of the slim one, so that no ensemble is compared with one of
    its members, unless the slim one has learned to answer for all of them. The logits of one model and one case are in
    memory at a time.

    Args:
        dense: model folder that the slim one was made from.
        slim: model folder.
        images: folder of `<case>_0000<ending>` files, one per channel, or one such file.
        labels: folder of `<case><ending>` label maps; cases without one are compared without labels.
        settings: device, tiles, mirroring, folds.
        progress: called with (cases done, cases in all).
        temperature: softens the dense model's probabilities for the expected drop.
    Raises:
        ModelError: an unusable model, models that do not belong together, or a missing stage before. InputError: no
        images, no folder of labels, no label for any of them, or no case that could be compared. A single bad case is
        listed in `Agreement.failed`.
    """
    settings = settings or PredictSettings()
    large, small = load_pair(Path(dense), Path(slim), settings)
    cases = compared_cases(large, images, labels, settings)
    return agreement_of_cases(large, small, cases, progress, temperature)


def takes_mirrored(slim: Path) -> bool:
    """Return whether a slim model's user takes mirrored answers where there are any: unless it was made for plain ones.

    Raises:
        ModelError: it has no nnslim.json, or one that cannot be read.
    """
    record = read_record(slim)
    judged = {fold.get("judged") for fold in record.get("recovery") or ()} - {None}
    if judged:  # of the last recovery, which may be that of a distillation
        return "plain" not in judged
    return ((record.get("config") or {}).get("calibration") or {}).get("mirrored") is not False


def load_pair(dense: Path, slim: Path, settings: PredictSettings) -> tuple[Any, Any]:
    """Return initialised predictors of both, with the same folds; a ModelError tells why they cannot be compared.

    A slim model that has learned the mean of several folds is compared with all of them.
    """
    source = read_trained_model(slim, settings.folds, settings.checkpoint, trust=settings.trust)
    same = source.checkpoint_name if find_folds(dense, source.checkpoint_name) else settings.checkpoint
    small = load_predictor(slim, None, settings)
    folds = read_record(slim, required=False).get("ensemble") or list(source.checkpoints)
    large = load_predictor(dense, None, replace(settings, folds=folds, checkpoint=same))
    _check_pair(large, small)
    return large, small


def compared_cases(dense: Any, images: Path, labels: Path | None, settings: PredictSettings) -> list[ComparedCase]:
    """Return the cases of a folder for the predictor of the dense model; errors as for `agreement_of_models`."""
    check_stage(dense, settings.previous_stage)
    ending = dense.dataset_json["file_ending"]
    found = list_cases(Path(images), ending).cases
    truths: dict[str, Path] = {}
    if labels is not None:
        if not Path(labels).is_dir():
            raise InputError(f"{labels} is not a folder; expected a folder of label maps named <case>{ending}")
        truths = {name: path for name in found if (path := Path(labels) / f"{name}{ending}").is_file()}
        if not truths:
            example = f"{next(iter(found))}{ending}"
            raise InputError(f"{labels} holds no label map of any case; expected, for example, {example}")
    before = settings.previous_stage
    return [
        ComparedCase(name, files, truths.get(name), before and before / f"{name}{ending}")
        for name, files in found.items()
    ]


def agreement_of_cases(
    dense: Any,
    slim: Any,
    cases: Sequence[ComparedCase],
    progress: Callable[[int, int], None] | None = None,
    temperature: float = TEMPERATURE,
) -> Agreement:
    """Do what `agreement_of_models` does with two predictors of `load_pair`."""
    mirrored = bool(dense.use_mirroring and dense.allowed_mirroring_axes)
    agreement = Agreement(tuple(classes_of(dense.label_manager)), temperature=temperature, mirrored=mirrored)
    for number, case in enumerate(cases, start=1):
        try:
            agreement.cases.append(_compare(dense, slim, case, temperature))
        except NNSlimError as error:
            agreement.failed[case.name] = str(error)
        except (RuntimeError, MemoryError) as error:  # torch: out of memory, among others
            agreement.failed[case.name] = kind_and_line(error)
        if progress is not None:
            progress(number, len(cases))
    if not agreement.cases:
        name, reason = next(iter(agreement.failed.items()))
        folder = cases[0].files[0].parent
        raise InputError(f"none of {len(cases)} case(s) of {folder} could be compared; {name}: {reason}")
    return agreement


def write_agreement(slim: Path, agreement: Agreement, figure: bool = True) -> None:
    """Put the agreement into nnslim.json, key "agreement", and draw agreement.png beside it.

    Raises:
        ModelError: no slim model folder. OutputError: it cannot be written; nnslim.json is then as it was.
    """
    content = read_record(Path(slim))
    if figure:
        agreement_figure(agreement, Path(slim) / "agreement.png")
    write_record(Path(slim), content, agreement=agreement.to_dict())


def _check_pair(dense: Any, slim: Any) -> None:
    """Refuse models whose channels, classes or preprocessed grid differ."""
    wanted, found = _shared(dense), _shared(slim)
    for what, value in wanted.items():
        if str(value) != str(found[what]):
            raise ModelError(f"the slim model was not made from this dense one: {what} {found[what]} and {value}")


def _shared(model: Any) -> dict[str, Any]:
    configuration = model.configuration_manager
    return {
        "classes": classes_of(model.label_manager),
        "file ending": model.dataset_json["file_ending"],
        "spacing": configuration.spacing,
        "preprocessor": configuration.preprocessor_name,
        "normalisation": configuration.normalization_schemes,
        "order of axes": model.plans_manager.transpose_forward,
    }


def _compare(dense: Any, slim: Any, case: ComparedCase, temperature: float) -> CaseAgreement:
    data, properties = preprocess_case(dense, case.files, case.previous)
    truth = None if case.truth is None else read_labels(dense, case.truth)
    regions = dense.label_manager.has_regions
    slim_probabilities, slim_map = predict_maps(slim, data, properties, truth is not None)
    decided = harden(slim_probabilities, not regions)
    del slim_probabilities  # before the dense model's are made
    probabilities, dense_map = predict_maps(dense, data, properties, truth is not None)
    members = classes_of(dense.label_manager)
    maps = None
    if truth is not None:
        if truth.shape != dense_map.shape:
            raise InputError(f"{case.truth.name} has shape {truth.shape}, its image {dense_map.shape}")
        ignore = dense.label_manager.ignore_label
        maps = LabelMaps(dense_map, slim_map, truth, properties["spacing"], list(members.values()), ignore)
    spacing = _grid_spacing(dense, properties)
    return compare_answers(case.name, probabilities, decided, spacing, list(members), maps, temperature=temperature)


def read_labels(predictor: Any, path: Path) -> np.ndarray:
    """Return the (*grid) label map in the reader's order of axes."""
    check_image(path)
    try:
        labels = predictor.plans_manager.image_reader_writer_class().read_seg(str(path))[0][0]
    except Exception as error:  # readers raise whatever their format library raises
        raise InputError(f"{path.name} cannot be read: {kind_and_line(error)}") from error
    return np.rint(labels).astype(np.int64)


def predict_maps(
    predictor: Any, data: np.ndarray, properties: dict[str, Any], with_map: bool
) -> tuple[Tensor, np.ndarray | None]:
    """Return (C, *spatial) probabilities in the preprocessed grid and, on request, the label map in the image's."""
    from nnunetv2.inference.export_prediction import convert_predicted_logits_to_segmentation_with_correct_shape

    with silent():
        logits = predictor.predict_logits_from_preprocessed_data(torch.from_numpy(data))
        label_map = None
        if with_map:
            managers = (predictor.plans_manager, predictor.configuration_manager, predictor.label_manager)
            label_map = convert_predicted_logits_to_segmentation_with_correct_shape(
                logits.numpy(), *managers, properties
            )
    return predictor.label_manager.apply_inference_nonlin(logits), label_map


def _grid_spacing(predictor: Any, properties: dict[str, Any]) -> list[float]:
    """Return mm per voxel of the preprocessed grid; a 2d configuration leaves the first axis as it is in the image."""
    spacing = list(predictor.configuration_manager.spacing)
    first = properties["spacing"][predictor.plans_manager.transpose_forward[0]]
    return spacing if len(spacing) == 3 else [float(first), *spacing]
