"""A trained 2D nnU-Net as the start of its 3D twin: a file for `-pretrained_weights`, or a whole model folder."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from nnslim.errors import ConfigError, ModelError
from nnslim.files import make_folder, read_json_object, save_checkpoint, whole_folder
from nnslim.hosts.nnunet.model.trained_model import (
    TrainedModel,
    build_network,
    build_untrained,
    builds_from_plans,
    trainer_class,
    write_model,
)
from nnslim.inflation.inflated_unet import Fit, inflate_unet
from nnslim.inflation.kernels import Mode

Note = Callable[[str], None]


def preprocessed_files(dataset: str, plans: str) -> tuple[Path, Path]:
    """Return plans and dataset.json of a dataset (number or name) in nnUNet_preprocessed.

    Raises:
        ConfigError: the variable is unset. ModelError: no such dataset or plans.
    """
    root = os.environ.get("nnUNet_preprocessed")
    if not root:
        raise ConfigError(f"dataset {dataset} is looked for in nnUNet_preprocessed, which is not set")
    pattern = f"Dataset{int(dataset):03d}_*" if dataset.isdigit() else dataset
    found = [path for path in sorted(Path(root).glob(pattern)) if path.is_dir()]
    if not found:
        raise ModelError(f"no {pattern} in {root}; run nnUNetv2_plan_and_preprocess first")
    file = found[0] / f"{plans}.json"
    if not file.is_file():
        known = ", ".join(path.stem for path in sorted(found[0].glob("*Plans*.json"))) or "none"
        raise ModelError(f"no plans '{plans}' in {found[0]}; it has {known}")
    return file, found[0] / "dataset.json"


def target_of(
    model: TrainedModel, configuration: str, plans: Path | None = None, dataset: Path | None = None
) -> TrainedModel:
    """Return the untrained 3D model that the weights are for.

    Args:
        model: the trained 2D model. configuration: of the 3D plans.
        plans: file; default: those of `model`, which often hold the 3D configurations, too.
        dataset: dataset.json with the channels and labels of the 3D model; default: that of `model`.
    Raises:
        ModelError: a file is missing or not nnU-Net's, or has no such 3D configuration.
    """
    content = model.plans if plans is None else read_json_object(Path(plans))
    labels = model.dataset if dataset is None else read_json_object(Path(dataset))
    where = model.path if plans is None else Path(plans)
    if configuration not in content.get("configurations", {}):
        known = ", ".join(content.get("configurations", {})) or "none"
        raise ModelError(f"{where} has no configuration '{configuration}'; it has {known}")
    made = replace(model, path=model.path if plans is None else where.parent)  # what messages name
    made = made.with_plans(copy.deepcopy(content), dataset=labels, configuration=configuration)
    if len(made.configuration_manager.patch_size) != 3:
        raise ModelError(f"{where}: configuration '{configuration}' is not a 3D one")
    return replace(made, path=model.path)


def inflate_model(
    model: TrainedModel, target: TrainedModel, mode: Mode = "center", *, fit: Fit = "error", seed: int = 0
) -> dict[str, dict[str, Any]]:
    """Make checkpoints of the 3D model from those of the 2D one, a fold each.

    Args:
        model: trained 2D model. target: from `target_of`. mode, fit: see `nnslim.inflation.inflate_unet`.
        seed: for the weights that the 2D model cannot fill (other heads, added channels).
    Returns:
        fold -> checkpoint as nnU-Net writes it, without an optimiser's state. Key `nnslim_inflation` says how it was
        made.
    Raises:
        ModelError: not a dense 2D model whose trainer builds from plans. ConfigError: structures differ.
    """
    if len(model.configuration_manager.patch_size) != 2:
        raise ModelError(f"{model.path}: configuration '{model.configuration}' is not 2D; nothing to inflate")
    if model.is_slim or not builds_from_plans(trainer_class(model.trainer_name)):
        raise ModelError(
            f"{model.path}: only a dense model that nnU-Net builds from its plans can be inflated "
            f"(trainer {model.trainer_name})"
        )
    # Which axis of the 2D model's volumes (0: slices) each axis of the 3D model's is.
    axes = tuple(model.plans["transpose_forward"].index(axis) for axis in target.plans["transpose_forward"])
    made = {}
    for fold, checkpoint in model.checkpoints.items():
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            start = build_untrained(target)
        inflated = inflate_unet(build_network(model, fold), start, mode, axes=axes, fit=fit)
        allowed = checkpoint.get("inference_allowed_mirroring_axes") or ()
        made[fold] = {
            "network_weights": inflated.weights,
            "optimizer_state": None,
            "grad_scaler_state": None,
            "logging": {},
            "_best_ema": None,
            "current_epoch": 0,
            "init_args": {
                "plans": target.plans,
                "configuration": target.configuration,
                "fold": checkpoint["init_args"].get("fold", fold),
                "dataset_json": target.dataset,
                "device": torch.device("cpu"),
            },
            "trainer_name": model.trainer_name,
            # Only axes within slices: 2D training never mirrors the order of slices.
            "inference_allowed_mirroring_axes": tuple(sorted(axes.index(axis + 1) for axis in allowed)),
            "nnslim_inflation": {
                "source": model.path.name,
                "configuration": target.configuration,
                "mode": mode,
                "depth_axis": axes.index(0),
                "notes": list(inflated.notes),
            },
        }
    return made


def write_inflated(
    target: TrainedModel, made: dict[str, dict[str, Any]], *, file: Path | None, folder: Path | None
) -> None:
    """Write inflated checkpoints: one for `nnUNetv2_train -pretrained_weights`, all as a 3D model folder, or both.

    Raises:
        ConfigError: a file is asked for, but there are several folds. OutputError: something cannot be written.
    """
    if file is not None:
        if len(made) != 1:
            raise ConfigError(f"a .pth file holds one fold, the model has {', '.join(made)}: choose one with -f")
        make_folder(file.parent)
        save_checkpoint(next(iter(made.values())), file)
    if folder is not None:
        with whole_folder(folder) as side:
            write_model(side, target.plans, target.dataset, made.items())
