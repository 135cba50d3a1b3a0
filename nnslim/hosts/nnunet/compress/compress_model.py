"""Write a compressed model as an ordinary nnU-Net model folder, which stock nnU-Net loads."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nnslim._version import __version__
from nnslim.compression.compress_network import Slimmed, compress
from nnslim.compression.config import SlimConfig
from nnslim.compression.guard import Guard
from nnslim.compression.recover import Progress
from nnslim.compression.storage import bytes_of, in_half
from nnslim.errors import ConfigError, ModelError, SlowerError
from nnslim.files import read_json, save_checkpoint, whole_folder, write_json
from nnslim.hosts.nnunet.cases.calibration_tiles import calibration_of
from nnslim.hosts.nnunet.model.changed_plans import in_architecture, resolutions, with_changed_plans
from nnslim.hosts.nnunet.model.planned import built_from_plans
from nnslim.hosts.nnunet.model.pruned import spec_in_plans, trained_base
from nnslim.hosts.nnunet.model.slim_plans import with_architecture
from nnslim.hosts.nnunet.model.trained_model import (
    TrainedModel,
    build_network,
    builds_from_plans,
    input_shape,
    read_trained_model,
    trainer_class,
)
from nnslim.methods.decision_table import write_decisions
from nnslim.network.cost import Counts, measure_cost
from nnslim.network.spec import SlimSpec, spec_of


def compress_model(
    model: TrainedModel,
    target: Path,
    config: SlimConfig,
    *,
    images: Path | None = None,
    progress: Progress | None = None,
    allow_slower: bool = False,
) -> Slimmed:
    """Compress all folds of a model with one spec and write the slim model folder.

    The folder holds plans.json (the architecture names nnslim and carries the spec), dataset.json, the checkpoints
    under the names they had, nnslim.json (what was done, per layer) and plan.csv (the ranks, to be edited and passed
    back). Optimiser state is left out: it belongs to tensors that are gone. Without a method the plans stay as they
    are, so that a copy in half precision needs no nnslim.

    Recovery that is interrupted goes on where it stopped at the next call: its state lies beside the target, in
    `.<name>.recovery.fold<N>`, until the folder is written.

    Args:
        model: from `read_model_folder`.
        target: folder to write; must not exist, or be empty.
        config: the methods, and how data are used.
        images: folder of unlabelled calibration images, in place of the one that the configuration names.
        progress: called with (what is done, units done, units in all).
        allow_slower: write the model as it was planned, also where it is slower than the dense one on this machine.
    Raises:
        SlowerError: no slim form of the model is faster here, and `run.guard` is on.
        ModelError: already slim (otherwise than by widths), or a trainer that builds its network without the
            plans; both are no hindrance where the configuration names no method.
        OutputError: the target exists or cannot be written; nothing half-written is left.
    """
    if (training := config.training) is not None:
        raise ConfigError(
            f"{training.method} works while a network trains: use nnslim train --method {training.method} (with "
            "--start MODEL for a trained one)"
        )
    model = built_from_plans(model) if config.active else model
    given, model = model, with_changed_plans(model, config)
    if config.active and not builds_from_plans(trainer_class(model.trainer_name)):
        raise ModelError(
            f"{model.path}: trainer {model.trainer_name} builds its network itself, not from plans.json, so stock "
            "nnU-Net could not load a slim folder; use NNSlimContext (or nnslim run) for this model"
        )
    network, before = build_network(model), ()
    if model.is_slim and config.active:
        network, before = trained_base(model, network)
    config, target = config.with_images(images), Path(target)
    state = target.with_name(f".{target.name}.recovery")
    with whole_folder(target) as side:
        with calibration_of(model, config, progress) as data:
            slimmed = compress(
                network,
                model.weights,
                config,
                input_shape(model),
                data=data,
                progress=progress,
                checkpoint=state,
                guard=_guard(config, allow_slower),
            )
        if slimmed.refused:
            raise SlowerError(
                f"the slim model would be slower here: {slimmed.speed}; nothing is written. Compress harder, or "
                "allow it (--allow-slower) where the model is meant for another machine"
            )
        slimmed = replace(slimmed, spec=SlimSpec((*before, *slimmed.spec.edits)))
        if given is not model:
            slimmed = replace(slimmed, dense=Counts.of(measure_cost(network, input_shape(given))))
        plans = slim_plans(model, slimmed.spec, target.name)
        write_json(side / "plans.json", plans)
        write_json(side / "dataset.json", model.dataset)
        for (fold, checkpoint), weights in zip(model.checkpoints.items(), slimmed.weights, strict=True):
            (side / f"fold_{fold}").mkdir()
            path = side / f"fold_{fold}" / model.checkpoint_name
            save_checkpoint(slim_checkpoint(checkpoint, weights, plans), path)
        slimmed = replace(slimmed, file_bytes=(_checkpoint_bytes(model, model.path), _checkpoint_bytes(model, side)))
        made = record(model, slimmed, config)
        write_json(side / "nnslim.json", made if given is model else {**made, "resolution": resolutions(given, model)})
        if config.active:
            write_decisions(slimmed.decisions, side / "plan.csv")
        if config.run.precision == "int8":
            _calibrate_int8(side, list(model.checkpoints), config, progress)
    for leftover in target.parent.glob(f"{state.name}.fold*"):
        leftover.unlink(missing_ok=True)
    return slimmed


def write_network(model: TrainedModel, network: nn.Module, target: Path) -> None:
    """Write a slim network that was made from the model's first fold as a model folder with that fold alone.

    Args:
        model: the dense model.
        network: carries its SlimSpec.
        target: folder to write; must not exist, or be empty.
    Raises:
        OutputError: the target exists or cannot be written.
    """
    fold, checkpoint = next(iter(model.checkpoints.items()))
    with whole_folder(Path(target)) as side:
        plans = slim_plans(model, spec_of(network) or SlimSpec(), Path(target).name)
        write_json(side / "plans.json", plans)
        write_json(side / "dataset.json", model.dataset)
        (side / f"fold_{fold}").mkdir()
        made = slim_checkpoint(checkpoint, network.state_dict(), plans)
        save_checkpoint(made, side / f"fold_{fold}" / model.checkpoint_name)


def _calibrate_int8(side: Path, folds: list[str], config: SlimConfig, progress: Progress | None) -> None:
    from nnslim.hosts.nnunet.export.int8_models import keep_int8

    images = config.calibration.images
    if images is None:
        raise ConfigError("int8 is calibrated on images: name a folder of them (-i, or calibration.images)")
    for fold, checked in keep_int8(
        read_trained_model(side, folds), images, seed=config.calibration.seed, progress=progress
    ).items():
        if not checked.passed:
            raise ModelError(f"fold {fold}: the int8 model is too far from the one it was made from: {checked}")


def _guard(config: SlimConfig, allow_slower: bool) -> Guard | None:
    device = "cuda" if config.calibration.device != "cpu" and torch.cuda.is_available() else "cpu"
    return Guard(config.run.settings(), torch.device(device), not allow_slower) if config.run.guard else None


def slim_plans(model: TrainedModel, spec: SlimSpec, folder_name: str) -> dict[str, Any]:
    """Return the plans with the slim architecture in the trained configuration, or as they are if there is none to add.

    A target named trainer__plans__configuration gives the plans their name,
    so that `totalsegmentator(plans=...)` and `nnUNetv2_predict -p` find the folder.
    """
    plans = copy.deepcopy(model.plans)
    if spec.edits and spec != spec_in_plans(model):
        plans, rest = in_architecture(model, spec)
        plans = with_architecture(plans, model.configuration, rest) if rest.edits else plans
    parts = folder_name.split("__")
    if len(parts) == 3 and parts[1]:
        plans["plans_name"] = parts[1]
    return plans


def slim_checkpoint(checkpoint: dict[str, Any], weights: dict[str, Any], plans: dict[str, Any]) -> dict[str, Any]:
    """Return a checkpoint with slim weights, everything else of nnU-Net's as it was but for the optimiser's state."""
    made = {**checkpoint, "network_weights": weights, "optimizer_state": None, "grad_scaler_state": None}
    init = made["init_args"]
    if isinstance(init, dict) and "plans" in init:
        made["init_args"] = {**init, "plans": plans}
    return made


def _checkpoint_bytes(model: TrainedModel, folder: Path) -> int:
    return sum((folder / f"fold_{fold}" / model.checkpoint_name).stat().st_size for fold in model.checkpoints)


def record(model: TrainedModel, slimmed: Slimmed, config: SlimConfig) -> dict[str, Any]:
    """Return the content of nnslim.json: versions, source, settings, spec, counts, decisions, sizes, measured speed.

    A copy of a slim model in another precision keeps what was recorded of it.
    """
    dense, slim = slimmed.file_bytes or (None, None)
    first = slimmed.weights[0]
    stored = {
        "precision": "half" if in_half(first) else "single",
        "weight_bytes": sum(map(bytes_of, slimmed.weights)),
        "checkpoint_bytes": slim,
        "source_weight_bytes": sum(map(bytes_of, model.weights)),
        "source_checkpoint_bytes": dense,  # nnU-Net's hold the optimiser's state, too
        "agreement": slimmed.half_agreement,
    }
    if model.is_slim and not config.active:
        return {**read_json(model.path / "nnslim.json"), "nnslim": __version__, "stored": stored}
    return {
        "nnslim": __version__,
        "source": model.path.name,
        "dataset": model.plans.get("dataset_name"),
        "configuration": model.configuration,
        "checkpoint": model.checkpoint_name,
        "folds": list(model.checkpoints),
        "config": config.model_dump(mode="json"),
        "spec": slimmed.spec.to_dict(),
        "speed": slimmed.speed.to_dict() if slimmed.speed else None,
        "stored": stored,
        **{key: value for key, value in slimmed.summary().items() if key != "half_agreement"},
    }
