"""Read a trained nnU-Net model folder, with every fault named."""

from __future__ import annotations

import copy
import hashlib
import inspect
import json
import os
import pickle
import re
import sys
import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from nnslim.errors import ModelError, NNSlimError, kind_and_line
from nnslim.files import no_memory, read_json_object, save_checkpoint, unreadable, write_json
from nnslim.hosts.nnunet.model.checked_plans import LimitedBuild, check_architecture, check_named
from nnslim.hosts.nnunet.model.compatibility import check_version, nnunet_version
from nnslim.hosts.nnunet.model.model_files import chosen_folds
from nnslim.network.walk import unwrap
from nnslim.optional import name_and_home

# Names that DataParallel, DistributedDataParallel and torch.compile put before a network's own.
_WRAPPERS = re.compile(r"^(?:module\.|_orig_mod\.)+|(?<=\.)_orig_mod\.")
_TRAINER = "nnunetv2.training.nnUNetTrainer.nnUNetTrainer"
_HAS_ALLOW_LIST = hasattr(torch.serialization, "safe_globals")  # torch >= 2.4; older ones load everything or nothing


@dataclass
class TrainedModel:
    """A trained model: plans, dataset description and the checkpoints of its folds.

    Attributes:
        path: trainer__plans__configuration folder.
        plans, dataset: content of plans.json (as stored) and dataset.json.
        checkpoint_name: file name in each fold folder.
        checkpoints: fold -> content of its checkpoint, weights on the CPU.
        configuration: name of the configuration that the checkpoints were trained with.
        trainer_name: class name of the trainer.
        plans_manager, configuration_manager: nnU-Net's readers of the plans.
    """

    path: Path
    plans: dict[str, Any]
    dataset: dict[str, Any]
    checkpoint_name: str
    checkpoints: dict[str, dict[str, Any]]
    configuration: str
    trainer_name: str
    plans_manager: Any
    configuration_manager: Any

    @property
    def weights(self) -> list[dict[str, torch.Tensor]]:
        """State dicts of the folds, in order."""
        return [checkpoint["network_weights"] for checkpoint in self.checkpoints.values()]

    def of_folds(self, count: int) -> TrainedModel:
        """Return the model with its first `count` folds."""
        return replace(self, checkpoints=dict(list(self.checkpoints.items())[:count]))

    def with_plans(self, plans: dict[str, Any], **changes: Any) -> TrainedModel:
        """Return the model with other plans, and other fields that the new plans are to be read with.

        Raises:
            ModelError: nnU-Net cannot read what the plans hold.
        """
        made = replace(self, plans=plans, **changes)
        managers = managers_of(made.path, plans, made.dataset, made.configuration)
        return replace(made, plans_manager=managers[0], configuration_manager=managers[1])

    @property
    def is_slim(self) -> bool:
        """Whether nnslim wrote this folder."""
        name = self.configuration_manager.network_arch_class_name  # older models name another module
        return name.startswith("nnslim.") and name.endswith(".slim_network")


def load_checkpoint(path: Path, *, trust: bool = False) -> dict[str, Any]:
    """Load a checkpoint without running code from it.

    nnU-Net stores numpy numbers and the device beside the weights; these are allowed. Anything else needs `trust`:
    the file is then loaded as nnU-Net does, which runs whatever code it holds.

    Raises:
        ModelError: missing, cut short, with content that could run code, or not to be read now.
    """
    if not path.is_file():
        present = sorted(p.name for p in path.parent.glob("*.pth")) if path.parent.is_dir() else []
        found = f"it has {', '.join(present)}" if present else "it has no checkpoint"
        folds = ", ".join(sorted(p.name for p in path.parents[1].glob("fold_*"))) or "none"
        raise ModelError(f"no {path.name} in {path.parent}: {found}; folds in the model folder: {folds}")
    if not (trust or _HAS_ALLOW_LIST):
        warnings.warn(f"torch {torch.__version__} loads {path.name} without protection", stacklevel=2)
    try:
        with allowed_globals():
            content = torch.load(path, map_location="cpu", weights_only=_HAS_ALLOW_LIST and not trust)
    except pickle.UnpicklingError as error:
        text = str(error)
        lines = text.splitlines()
        if "global" in text.lower() or "weights only load failed" in text.lower():
            refused = next((line.strip() for line in lines if "GLOBAL" in line), lines[0])
            raise ModelError(
                f"{path} holds more than weights and numbers ({refused[:160]}); if you trust where it comes "
                "from, load it as nnU-Net would: --trust-checkpoint, or trust=True"
            ) from error
        raise ModelError(f"{path} is not a readable checkpoint: {lines[0]}") from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, MemoryError) as error:
        raise ModelError(unreadable(path, error)) from error
    missing = {"network_weights", "trainer_name", "init_args"} - set(content if isinstance(content, dict) else ())
    if missing:
        raise ModelError(f"{path} is not an nnU-Net v2 checkpoint: it lacks {', '.join(sorted(missing))}")
    weights = content["network_weights"]
    if not isinstance(weights, dict) or not all(
        isinstance(key, str) and isinstance(value, torch.Tensor) for key, value in weights.items()
    ):
        raise ModelError(f"{path}: 'network_weights' should map names to tensors")
    plain = {_WRAPPERS.sub("", key): value for key, value in weights.items()}
    return {**content, "network_weights": plain} if len(plain) == len(weights) else content


def allowed_globals() -> AbstractContextManager[Any]:
    """Let `torch.load(weights_only=True)` read what nnU-Net stores beside weights: numpy's numbers and a device."""
    if not _HAS_ALLOW_LIST:
        return nullcontext()
    scalar = np.float64(0).__reduce__()[0]
    rebuild = np.zeros(0).__reduce__()[0]
    kinds = {type(np.dtype(code)) for code in "?bBhHiIlLqQefd"}
    places = ("numpy.core.multiarray", "numpy._core.multiarray")  # of numpy 1 and 2
    named = [_under_name(function, place) for place in places for function in (scalar, rebuild)]
    return torch.serialization.safe_globals([*named, np.dtype, np.ndarray, *kinds, torch.device])


def _under_name(function: Callable[..., Any], module: str) -> Callable[..., Any]:
    """Return a function that torch's allow-list files under another module; torch 2.4 and 2.5 take no other names."""

    def alias(*arguments: Any) -> Any:
        return function(*arguments)

    alias.__module__, alias.__name__, alias.__qualname__ = module, function.__name__, function.__name__
    return alias


def read_trained_model(
    path: Path, folds: Sequence[int | str] | None = None, checkpoint_name: str | None = None, *, trust: bool = False
) -> TrainedModel:
    """Read plans, dataset description and the checkpoints of the folds.

    Args:
        path: trainer__plans__configuration folder with plans.json, dataset.json and fold_X.
        folds, checkpoint_name: see `chosen_folds`. trust: see `load_checkpoint`.
    Raises:
        ModelError: whatever is missing, unreadable or not nnU-Net's. HostError: nnU-Net is missing.
    """
    path = Path(path)
    if path.is_dir():
        plans, dataset = read_json_object(path / "plans.json"), read_json_object(path / "dataset.json")
    wanted, name = chosen_folds(path, folds, checkpoint_name)
    checkpoints = {fold: load_checkpoint(path / f"fold_{fold}" / name, trust=trust) for fold in wanted}
    first = next(iter(checkpoints.values()))
    try:
        configuration = first["init_args"]["configuration"]
    except (KeyError, TypeError) as error:
        raise ModelError(f"{path}: the checkpoint does not say its configuration") from error
    managers = managers_of(path, plans, dataset, configuration)
    return TrainedModel(path, plans, dataset, name, checkpoints, configuration, str(first["trainer_name"]), *managers)


def write_model(
    folder: Path,
    plans: dict[str, Any],
    dataset: dict[str, Any],
    checkpoints: Iterable[tuple[str, dict[str, Any]]],
    checkpoint_name: str = "checkpoint_final.pth",
) -> None:
    """Write plans, dataset description and checkpoints (fold, content) into an empty folder, or raise OutputError."""
    write_json(folder / "plans.json", plans)
    write_json(folder / "dataset.json", dataset)
    for fold, content in checkpoints:
        (folder / f"fold_{fold}").mkdir()
        save_checkpoint(content, folder / f"fold_{fold}" / checkpoint_name)


def managers_of(path: Path, plans: dict[str, Any], dataset: dict[str, Any], configuration: str) -> tuple[Any, Any]:
    """Return nnU-Net's managers of the plans and of one configuration; `path` is the model's, for messages.

    Raises:
        ModelError: the plans lack the configuration, or nnU-Net cannot read what they hold.
    """
    check_version(nnunet_version())
    from nnunetv2.utilities.label_handling.label_handling import determine_num_input_channels
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    where = path / "plans.json"
    configurations = plans.get("configurations")
    if not isinstance(configurations, dict) or configuration not in list(configurations):
        known = ", ".join(configurations) if isinstance(configurations, dict) else ""
        raise ModelError(
            f"{where} has no configuration '{configuration}', which the checkpoint names; it has {known or 'none'}"
        )
    if "labels" not in dataset or not ("channel_names" in dataset or "modality" in dataset):
        raise ModelError(f"{path / 'dataset.json'} lacks 'labels' or 'channel_names'")
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Detected old nnU-Net plans format")
            manager = PlansManager(copy.deepcopy(plans))
            settings = manager.get_configuration(configuration)
        check_architecture({"patch_size": None, **settings.configuration}, f"{where}, configuration {configuration},")
        check_named(manager, settings)
        determine_num_input_channels(manager, settings, dataset)
        manager.get_label_manager(dataset).num_segmentation_heads  # noqa: B018  reads the labels
    except NNSlimError:
        raise
    except Exception as error:  # whatever nnU-Net's readers say to what anybody may have written
        raise ModelError(f"{where} or dataset.json cannot be understood: {kind_and_line(error)}") from error
    return manager, settings


def trainer_class(name: str) -> type:
    """Return nnU-Net's trainer class of that name (its own, or from nnUNet_extTrainer); ModelError without one."""
    with name_and_home():  # matplotlib before 3.11 asks for them
        try:
            from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name as find
        except ImportError:  # before nnU-Net 2.8
            import nnunetv2
            from nnunetv2.utilities.find_class_by_name import recursive_find_python_class

            folder = os.path.join(nnunetv2.__path__[0], "training", "nnUNetTrainer")  # noqa: PTH118
            find = partial(recursive_find_python_class, folder, current_module="nnunetv2.training.nnUNetTrainer")
        from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

    try:
        found = find(name)
    except (RuntimeError, AssertionError, TypeError):  # the last two: something else of that name
        found = None
    if not isinstance(found, type) or not issubclass(found, nnUNetTrainer):
        raise ModelError(
            f"the checkpoint was trained by '{name}', which nnU-Net {nnunet_version()} does not have; if it is yours, "
            "name its folder in the environment variable nnUNet_extTrainer"
        )
    return found


def builds_from_plans(trainer: type) -> bool:
    """Whether the trainer builds its network as nnU-Net's default trainer does, from the plans alone."""
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

    return trainer.build_network_architecture is nnUNetTrainer.build_network_architecture


def channels_and_heads(model: TrainedModel) -> tuple[int, int]:
    """Return input channels (cascade's one-hot channels included) and segmentation heads (regions included)."""
    from nnunetv2.utilities.label_handling.label_handling import determine_num_input_channels

    inputs = determine_num_input_channels(model.plans_manager, model.configuration_manager, model.dataset)
    return inputs, model.plans_manager.get_label_manager(model.dataset).num_segmentation_heads


def build_untrained(model: TrainedModel) -> nn.Module:
    """Build the network of a model folder through its trainer, as nnU-Net's predictor does.

    Raises:
        ModelError: the trainer is unknown, or the architecture cannot be built.
    """
    inputs, heads = channels_and_heads(model)
    settings = model.configuration_manager
    by_plans = model.trainer_name == "nnUNetTrainer" and _TRAINER not in sys.modules  # importing it takes seconds
    build = None if by_plans else trainer_class(model.trainer_name).build_network_architecture
    try:
        with LimitedBuild(model.path):
            if build is None:
                return unwrap(_from_plans(settings, inputs, heads))
            if "plans_manager" in inspect.signature(build).parameters:
                return unwrap(build(model.plans_manager, settings, inputs, heads, enable_deep_supervision=False))
            # nnU-Net 2.3.1 to 2.6; some of them write into the arguments
            network = build(
                settings.network_arch_class_name,
                copy.deepcopy(settings.network_arch_init_kwargs),
                settings.network_arch_init_kwargs_req_import,
                inputs,
                heads,
                enable_deep_supervision=False,
            )
            return unwrap(network)
    except NNSlimError:
        raise
    except Exception as error:  # networks check their arguments, which anybody may have written, in many ways
        raise _does_not_fit(model, error) from error


def _from_plans(settings: Any, inputs: int, heads: int) -> nn.Module:
    """Build what nnU-Net's default trainer builds."""
    from nnunetv2.utilities.get_network_from_plans import get_network_from_plans

    kwargs = copy.deepcopy(settings.network_arch_init_kwargs)
    required = settings.network_arch_init_kwargs_req_import
    name = settings.network_arch_class_name
    return get_network_from_plans(name, kwargs, required, inputs, heads, allow_init=True, deep_supervision=False)


def build_network(model: TrainedModel, fold: str | None = None) -> nn.Module:
    """Build the network of a model folder, with the weights of one fold (the first by default), in eval mode.

    Raises:
        ModelError: the architecture cannot be built, or the weights do not fit it.
    """
    network = build_untrained(model)
    try:
        weights = model.weights[0] if fold is None else model.checkpoints[fold]["network_weights"]
        network.load_state_dict({key: value.float() for key, value in weights.items()})
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        raise _does_not_fit(model, error) from error
    return network.eval()


def _does_not_fit(model: TrainedModel, error: Exception) -> ModelError:
    if no_memory(error):
        return ModelError(f"{model.path}: there is not enough memory for its network")
    lines = str(error).splitlines() or [type(error).__name__]
    return ModelError(
        f"{model.path}: the network '{model.configuration_manager.network_arch_class_name}' cannot be built or does "
        f"not fit its checkpoint: {' '.join(line.strip() for line in lines[:2])}"
    )


def input_shape(model: TrainedModel) -> tuple[int, ...]:
    """Return (1, channels, *patch), voxels."""
    return (1, channels_and_heads(model)[0], *model.configuration_manager.patch_size)


_PREPROCESSING = ("preprocessor_name", "spacing", "normalization_schemes", "use_mask_for_norm")
_PREPROCESSING += ("resampling_fn_data", "resampling_fn_data_kwargs", "resampling_fn_seg", "resampling_fn_seg_kwargs")


def preprocessing_key(plans: dict[str, Any], settings: dict[str, Any]) -> str:
    """Return 8 hexadecimal digits that are equal for plans that make the same voxels of the same image.

    `settings` are one of the configurations of the plans, inheritance resolved.
    """
    values = {key: settings.get(key) for key in _PREPROCESSING}
    values["transpose_forward"] = plans.get("transpose_forward")
    if "CTNormalization" in settings.get("normalization_schemes", ()):  # the one scheme that looks at the dataset
        names = [f"foreground_intensity_properties_{which}" for which in ("per_channel", "by_modality")]
        values["intensities"] = plans.get(names[0]) or plans.get(names[1])
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:8]


def model_key(model: TrainedModel) -> str:
    """Return the `preprocessing_key` of a model's own configuration."""
    return preprocessing_key(model.plans, model.configuration_manager.configuration)


def classes_of(label_manager: Any) -> dict[str, tuple[int, ...]]:
    """Return the labels of each class or region, in the order of the model's channels, without background."""
    named = {name: value for name, value in label_manager.label_dict.items() if name != "ignore"}
    members = {str(name): tuple(int(label) for label in np.unique(value)) for name, value in named.items()}
    foreground = {name: labels for name, labels in members.items() if labels != (0,)}
    if label_manager.has_regions:
        return foreground
    return dict(sorted(foreground.items(), key=lambda item: item[1]))
