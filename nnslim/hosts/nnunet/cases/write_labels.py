"""nnU-Net's export without the full-size scores: its own functions, with resampling and choosing of labels in one step.

The functions of this module have the names and arguments of nnU-Net's and stand in for them. A process that is started
for exports imports them from here, so they work there, too, where no patch is in force.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nnslim.errors import InputError, OutputError
from nnslim.hosts.nnunet.cases.preprocess import check_names, silent
from nnslim.hosts.nnunet.cases.resampling_functions import Spacing, Stand, grid_of, known_function, lean_configuration
from nnslim.prediction.images import check_complete
from nnslim.resampling.labels import Regions, label_map
from nnslim.running.machine import machine_threads

_EXPORT = "nnunetv2.inference.export_prediction"
_CHOOSING = ("convert_logits_to_segmentation", "apply_inference_nonlin", "convert_probabilities_to_segmentation")
originals: dict[str, Callable[..., Any]] = {}  # what the patches of this process have replaced, by name
_log = logging.getLogger("nnslim")


def write_segmentation(
    predictor: Any,
    logits: Tensor | np.ndarray,
    properties: dict[str, Any],
    path: Path,
    *,
    streamed: bool = True,
    threads: int | None = None,
) -> None:
    """Write the segmentation of a case in the geometry of its image.

    Args:
        predictor: what has nnU-Net's `plans_manager`, `configuration_manager` and `dataset_json`.
        logits: (heads, *spatial) at the network's resolution, on the CPU; not modified.
        properties: nnU-Net's, from preprocessing.
        path: file to write, with the dataset's ending.
        streamed: False for nnU-Net's own export.
        threads: of torch; default: nnU-Net's.
    Raises:
        OutputError: it cannot be written. InputError: its path is no UTF-8.
    """
    export = export_prediction_from_logits if streamed else _original("export_prediction_from_logits")
    check_names(predictor, path)
    logits = logits if streamed or isinstance(logits, np.ndarray) else logits.numpy()
    truncated = str(path).removesuffix(predictor.dataset_json["file_ending"])
    plans, configuration = predictor.plans_manager, predictor.configuration_manager
    try:
        with silent():
            export(
                logits, properties, configuration, plans, predictor.dataset_json, truncated, **_threads(threads, export)
            )
    except RuntimeError as error:  # SimpleITK's way to report a failed write
        raise OutputError(f"cannot write {path}: {' '.join(str(error).split())[-300:]}") from error
    try:
        check_complete(path)  # ITK writes what fits on a full disk, and says nothing
    except InputError as error:
        raise OutputError(f"cannot write {path}: it came out cut short; the disk is probably full") from error


def export_prediction_from_logits(
    predicted_array_or_file: Tensor | np.ndarray,
    properties_dict: dict[str, Any],
    configuration_manager: Any,
    plans_manager: Any,
    dataset_json_dict_or_file: dict[str, Any] | str,
    output_file_truncated: str,
    save_probabilities: bool = False,
    num_threads_torch: int | None = None,
    use_cropped_logits_resampling: bool = False,
) -> None:
    """Do what nnU-Net's function of this name does; probabilities are saved by nnU-Net's own.

    Args:
        num_threads_torch: default: nnU-Net's.
        use_cropped_logits_resampling: TotalSegmentator's wish to need less memory, met by approximation there. Here
            it is met anyway, exactly; its own function is used where this one does not know the resampling function.
    """
    models = configuration_manager, plans_manager, _dataset(dataset_json_dict_or_file)
    ours = None if save_probabilities else _stand_ins(*models)
    call = _plain("export_prediction_from_logits", use_cropped_logits_resampling and ours is None)
    given = (predicted_array_or_file, properties_dict, *(ours or models), output_file_truncated)
    call(*given, save_probabilities, **_threads(num_threads_torch, call))


def convert_predicted_logits_to_segmentation_with_correct_shape(
    predicted_logits: Tensor | np.ndarray,
    plans_manager: Any,
    configuration_manager: Any,
    label_manager: Any,
    properties_dict: dict[str, Any],
    return_probabilities: bool = False,
    num_threads_torch: int | None = None,
    use_cropped_logits_resampling: bool = False,
) -> Any:
    """Do what nnU-Net's function of this name does; see `export_prediction_from_logits`."""
    ours = not return_probabilities and _known(configuration_manager, label_manager)
    if ours:
        configuration_manager, label_manager = _streaming(configuration_manager, label_manager)
    name = "convert_predicted_logits_to_segmentation_with_correct_shape"
    given = (predicted_logits, plans_manager, configuration_manager, label_manager, properties_dict)
    call = _plain(name, use_cropped_logits_resampling and not ours)
    return call(*given, return_probabilities, **_threads(num_threads_torch, call))


def resample_and_save(
    predicted: Tensor | np.ndarray,
    target_shape: Sequence[int],
    output_file: str,
    plans_manager: Any,
    configuration_manager: Any,
    properties_dict: dict[str, Any],
    dataset_json_dict_or_file: dict[str, Any] | str,
    *rest: Any,
    **more: Any,
) -> None:
    """Do what nnU-Net's function of this name does: the segmentation that the next stage of a cascade starts from."""
    models = configuration_manager, plans_manager, _dataset(dataset_json_dict_or_file)
    configuration, plans, dataset = _stand_ins(*models) or models
    given = (predicted, target_shape, output_file, plans, configuration, properties_dict, dataset)
    _original("resample_and_save")(*given, *rest, **more)


def _dataset(content_or_file: dict[str, Any] | str) -> dict[str, Any]:
    if isinstance(content_or_file, str):
        return json.loads(Path(content_or_file).read_text(encoding="utf-8"))
    return content_or_file


def _threads(count: int | None, call: Callable[..., Any]) -> dict[str, int]:
    """Return the count as an argument for a function of nnU-Net, if it takes one; exports before 2.6 do not."""
    known = count is not None and "num_threads_torch" in inspect.signature(call).parameters
    return {"num_threads_torch": count} if known else {}


def preprocess_fromfiles_save_to_queue(*given: Any, **named: Any) -> None:
    """Do what nnU-Net's function of this name does, in a process of its own, without large copies."""
    _preprocess_lean("preprocess_fromfiles_save_to_queue", given, named)


def preprocess_fromnpy_save_to_queue(*given: Any, **named: Any) -> None:
    """Do what nnU-Net's function of this name does, in a process of its own, without large copies."""
    _preprocess_lean("preprocess_fromnpy_save_to_queue", given, named)


def _preprocess_lean(name: str, given: tuple[Any, ...], named: dict[str, Any]) -> None:
    call_lean(_original(name, "nnunetv2.inference.data_iterators"), given, named)


def call_lean(function: Callable[..., Any], given: tuple[Any, ...], named: dict[str, Any]) -> Any:
    """Call a function of nnU-Net with its configuration, wherever that is among the arguments, made lean."""
    from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager

    def lean(value: Any) -> Any:
        return lean_configuration(value) if isinstance(value, ConfigurationManager) else value

    return function(*map(lean, given), **{key: lean(value) for key, value in named.items()})


def _original(name: str, module: str = _EXPORT) -> Callable[..., Any]:
    """Return nnU-Net's own function, also while ours stands in for it."""
    return originals.get(f"{module}.{name}") or getattr(importlib.import_module(module), name)


def _plain(name: str, cropped: bool) -> Callable[..., Any]:
    """Return the function that does it without us: nnU-Net's, or TotalSegmentator's for its approximation."""
    if not cropped:
        return _original(name)
    module = "totalsegmentator.nnunet_runtime_patches"
    return functools.partial(_original(name, module), use_cropped_logits_resampling=True)


def _known(configuration: Any, labels: Any) -> bool:
    """Return whether scores are resampled and labels chosen by the functions of nnU-Net that we know."""
    if isinstance(labels, Stand):
        return False  # called by nnU-Net's export inside ours, which has replaced them already
    from nnunetv2.utilities.label_handling.label_handling import LabelManager

    function = configuration.resampling_fn_probabilities
    own = all(getattr(type(labels), name) is getattr(LabelManager, name) for name in _CHOOSING)
    own = own and (not labels.has_regions or labels.inference_nonlin is torch.sigmoid)
    if own and known_function(function) is not None:
        return True
    _log.debug("export by nnU-Net's own functions: %s, %s", function, type(labels).__name__)
    return False


def _stand_ins(configuration: Any, plans: Any, dataset: dict[str, Any]) -> tuple[Any, Any, dict[str, Any]] | None:
    """Return what makes nnU-Net's export resample and choose labels in our way; None where that is not nnU-Net's."""
    labels = plans.get_label_manager(dataset)
    if not _known(configuration, labels):
        return None
    configuration, labels = _streaming(configuration, labels)
    return configuration, Stand(plans, get_label_manager=lambda *_: labels), dataset


def _streaming(configuration: Any, labels: Any) -> tuple[Any, Any]:
    """Return stand-ins for both: resampling scores then gives labels, and converting labels leaves them as they are."""
    made: list[np.ndarray] = []

    def resampled(logits: Any, new_shape: Sequence[int], spacing: Spacing, new_spacing: Spacing) -> Any:
        function = configuration.resampling_fn_probabilities
        found = labels_of(logits, function, labels, new_shape, spacing, new_spacing)
        if found is None:
            return function(logits, new_shape, spacing, new_spacing)
        made.append(found)
        return found

    def unless_made(method: Callable[[Any], Any]) -> Callable[[Any], Any]:
        return lambda scores: scores if any(scores is one for one in made) else method(scores)

    # The first is what nnU-Net calls from 2.6 on, the others what it called before.
    stand_ins = {name: unless_made(getattr(labels, name)) for name in _CHOOSING}
    return Stand(configuration, resampling_fn_probabilities=resampled), Stand(labels, **stand_ins)


def labels_of(
    logits: Tensor | np.ndarray,
    function: Callable[..., Any],
    labels: Any,
    new_shape: Sequence[int],
    spacing: Spacing,
    new_spacing: Spacing,
) -> np.ndarray | None:
    """Return the labels that nnU-Net's resampling and choosing give.

    Args:
        logits: (heads, *spatial), not modified and not copied.
        function: nnU-Net's resampling function with the plans' settings. labels: its label manager.
        new_shape: of the cropped image.
    Returns:
        (*new_shape) uint8 or uint16; None where that is better left to nnU-Net (heads that do not fit, scores that are
        not finite).
    """
    scores = torch.from_numpy(logits) if isinstance(logits, np.ndarray) else logits
    if scores.ndim != 4 or len(scores) != labels.num_segmentation_heads or not scores.is_floating_point():
        return None
    grid = grid_of(function, scores.shape[1:], new_shape, spacing, new_spacing)
    if grid is None:
        return None
    regions = Regions(tuple(labels.regions_class_order), _half_sure()) if labels.has_regions else None
    found = np.zeros(grid.shape, dtype=np.uint8 if len(labels.foreground_labels) < 255 else np.uint16)
    # torch has no arithmetic for uint16; the bits are the same.
    out = torch.from_numpy(found.view(np.uint8 if found.dtype == np.uint8 else np.int16)).to(scores.device)
    rounded = scores.dtype if known_function(function) == "resize" else None
    before = torch.get_num_threads()
    torch.set_num_threads(max(1, min(before, machine_threads())))
    try:
        if not label_map(scores, grid, out, regions=regions, rounded=rounded):
            return None
    finally:
        torch.set_num_threads(before)
    return found if scores.device.type == "cpu" else out.cpu().numpy().view(found.dtype)


@functools.lru_cache(maxsize=1)
def _half_sure() -> float:
    """Return the largest number whose sigmoid is not above 0.5 in single precision."""
    low, high = torch.tensor([0.0, 1.0], dtype=torch.float32, device="cpu")
    while torch.nextafter(low, high) != high:
        middle = (low + high) / 2
        low, high = (low, middle) if torch.sigmoid(middle) > 0.5 else (middle, high)
    return float(low)
