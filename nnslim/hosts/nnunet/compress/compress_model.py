"""Write a compressed model as an ordinary nnU-Net model folder, which stock nnU-Net loads."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from nnslim._version import __version__
from nnslim.compression.compress_network import Slimmed, compress
from nnslim.compression.config import SlimConfig
from nnslim.compression.guard import Guard
from nnslim.compression.record import read_record, write_record
from nnslim.compression.recover import Progress
from nnslim.compression.storage import bytes_of, in_half
from nnslim.errors import ConfigError, ModelError, SlowerError
from nnslim.files import whole_folder
from nnslim.hosts.nnunet.cases.calibration_tiles import calibration_of
from nnslim.hosts.nnunet.cases.prepared_images import Source
from nnslim.hosts.nnunet.model.planned import built_from_plans
from nnslim.hosts.nnunet.model.slim_plans import base_of, named_after, slim_plans, with_changed_plans
from nnslim.hosts.nnunet.model.trained_model import (
    TrainedModel,
    build_network,
    builds_from_plans,
    input_shape,
    read_trained_model,
    trainer_class,
    write_model,
)
from nnslim.methods.base import write_decisions
from nnslim.network.cost import Counts, measure_cost
from nnslim.network.spec import SlimSpec


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
    back). The optimiser's state is left out, because its tensors no longer exist. Without a method the plans do not
    change, so a copy in half precision needs no nnslim.

    An interrupted recovery continues at the next call: until the folder is written, its state lies beside the target,
    in `.<name>.recovery.fold<N>`.

    Args:
        target: folder to write; must not exist, or be empty.
        images: folder of unlabelled calibration images; overrides that of the configuration.
        allow_slower: write the model as planned even if it is slower than the dense one on this machine.
    Raises:
        SlowerError: no slim form of the model is faster here, and `run.guard` is on.
        ModelError: the model is slim already (other than by its widths), or its trainer builds the network without
            the plans. Neither matters where the configuration names no method.
        OutputError: the target exists or cannot be written; no half-written folder is left.
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
    network, before = base_of(model) if config.active else (build_network(model), ())
    config = config.with_images(images).judged_as(bool(Source.of(model).mirror_axes))
    target, once = Path(target), config.active and config.recovery.one_pass
    state = target.with_name(f".{target.name}.recovery")
    guard = None
    if config.run.measures:
        guard = Guard(config.run.settings(), config.calibration.torch_device(), not allow_slower)
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
                guard=guard,
            )
        if slimmed.refused:
            raise SlowerError(
                f"the slim model would be slower here: {slimmed.speed}; nothing is written. Compress harder, or use "
                "--allow-slower if the model is meant for another machine"
            )
        slimmed = replace(slimmed, spec=SlimSpec((*before, *slimmed.spec.edits)))
        changed: dict[str, Any] = {}
        if given is not model:
            slimmed = replace(slimmed, dense=Counts.of(measure_cost(network, input_shape(given))))
            pair = [one.configuration_manager for one in (given, model)]
            spacing = [[float(size) for size in one.spacing] for one in pair]  # mm, before and after
            patch = [[int(size) for size in one.patch_size] for one in pair]  # voxels
            changed = {"resolution": {"spacing": spacing, "patch": patch}}
        written = model.of_folds(len(slimmed.weights))
        write_slim(side, written, slimmed.weights, named_after(target.name, slim_plans(model, slimmed.spec)), once)
        sizes = [sum(map(bytes_of, one.weights)) for one in (model, slimmed)]
        files = [_checkpoint_bytes(one, folder) for one, folder in ((model, model.path), (written, side))]
        slimmed = replace(slimmed, weight_bytes=tuple(sizes), file_bytes=tuple(files))
        if len(written.checkpoints) < len(model.checkpoints):
            changed["ensemble"] = list(model.checkpoints)
        write_record(side, _record(model, slimmed, config), **changed)
        if config.active:
            write_decisions(slimmed.decisions, side / "plan.csv")
        if config.run.precision == "int8":
            _calibrate_int8(side, list(written.checkpoints), config, progress)
    for leftover in target.parent.glob(f"{state.name}.fold*"):
        leftover.unlink(missing_ok=True)
    return slimmed


def write_slim(
    folder: Path,
    model: TrainedModel,
    weights: Iterable[Mapping[str, Tensor]],
    plans: dict[str, Any],
    once: bool = False,
) -> None:
    """Write a model with slim weights, one state dict for each fold, and without the optimiser's state.

    With `once` nnU-Net is told never to mirror: the network gives the mirrored answer in one pass.
    """
    checkpoints = []
    for (fold, checkpoint), state in zip(model.checkpoints.items(), weights, strict=True):
        init = checkpoint["init_args"]
        made = {"network_weights": state, "optimizer_state": None, "grad_scaler_state": None}
        made["init_args"] = {**init, "plans": plans} if isinstance(init, dict) and "plans" in init else init
        made |= {"inference_allowed_mirroring_axes": None} if once else {}
        checkpoints.append((fold, {**checkpoint, **made}))
    write_model(folder, plans, model.dataset, checkpoints, model.checkpoint_name)


def _calibrate_int8(side: Path, folds: list[str], config: SlimConfig, progress: Progress | None) -> None:
    from nnslim.hosts.nnunet.export.export_model import keep_int8

    images = config.calibration.images
    if images is None:
        raise ConfigError("int8 is calibrated on images: name a folder of them (-i, or calibration.images)")
    made = keep_int8(read_trained_model(side, folds), images, seed=config.calibration.seed, progress=progress)
    for fold, checked in made.items():
        if not checked.passed:
            raise ModelError(f"fold {fold}: the int8 model is too far from the one it was made from: {checked}")


def _checkpoint_bytes(model: TrainedModel, folder: Path) -> int:
    return sum((folder / f"fold_{fold}" / model.checkpoint_name).stat().st_size for fold in model.checkpoints)


def _record(model: TrainedModel, slimmed: Slimmed, config: SlimConfig) -> dict[str, Any]:
    """Return the content of nnslim.json: versions, source, settings, spec, counts, decisions, sizes, measured speed.

    A copy of a slim model in another precision keeps that model's record.
    """
    (dense, slim), (dense_file, slim_file) = slimmed.weight_bytes, slimmed.file_bytes
    stored = {
        "precision": "half" if in_half(slimmed.weights[0]) else "single",
        "weight_bytes": slim,
        "checkpoint_bytes": slim_file,
        "source_weight_bytes": dense,
        "source_checkpoint_bytes": dense_file,  # nnU-Net's hold the optimiser's state, too
        "folds": len(slimmed.weights),
        "agreement": slimmed.half_agreement,
    }
    if model.is_slim and not config.active:
        return {**read_record(model.path, required=False), "nnslim": __version__, "stored": stored}
    return {
        "nnslim": __version__,
        "source": model.path.name,
        "dataset": model.plans.get("dataset_name"),
        "configuration": model.configuration,
        "checkpoint": model.checkpoint_name,
        "folds": list(model.checkpoints)[: len(slimmed.weights)],
        "config": config.model_dump(mode="json"),
        "spec": slimmed.spec.to_dict(),
        "speed": slimmed.speed.to_dict() if slimmed.speed else None,
        "stored": stored,
        **{key: value for key, value in slimmed.summary().items() if key != "half_agreement"},
    }
