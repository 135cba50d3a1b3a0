"""Recover the accuracy of a slim model folder without labels: it learns the answers of the dense model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nnslim._version import __version__
from nnslim.compression.calibration import Calibration
from nnslim.compression.config import SlimConfig, from_dict
from nnslim.compression.recover import Progress, Recovery, recover
from nnslim.compression.storage import StateDict, in_half, stored
from nnslim.errors import ConfigError, ModelError, SpecError
from nnslim.files import save_checkpoint, sha256_of, whole_folder, write_json
from nnslim.hosts.nnunet.cases.calibration_tiles import calibration_of
from nnslim.hosts.nnunet.compress.compress_model import slim_checkpoint
from nnslim.hosts.nnunet.model.model_files import find_folds, slim_record
from nnslim.hosts.nnunet.model.trained_model import TrainedModel, build_network, model_key, read_trained_model
from nnslim.network.spec import apply_spec, spec_of

_STALE = ("agreement",)  # entries of nnslim.json that were measured on the weights from before


def distill_config(images: Path, device: str = "auto", **recovery: Any) -> SlimConfig:
    """Return the configuration of a distillation.

    Args:
        images: folder of unlabelled images. device: auto, cpu or cuda.
        recovery: keys of `RecoveryConfig`; None leaves a key at its default.
    Raises:
        ConfigError: a value out of bounds, or nothing to learn.
    """
    given = {key: value for key, value in recovery.items() if value is not None}
    raw = {
        "methods": [{"method": "tucker"}],  # any: images are only read for a configuration that does something
        "calibration": {"images": images, "device": device},
        "recovery": given,
    }
    config = from_dict(raw, "distill")
    if not config.recovery.learns:
        raise ConfigError("distill: there is nothing to do with no steps and no block steps")
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device cuda was asked for, but torch finds no CUDA device; use --device cpu")
    return config


def read_pair(slim: Path, teacher: Path, *, trust: bool = False) -> tuple[TrainedModel, TrainedModel]:
    """Return a slim model and the same folds of the dense one that it was made from.

    Raises:
        ModelError: an unusable folder, a model that is not slim, a teacher that is, lacks a fold, sees other
        voxels or is of another structure.
    """
    slim_record(slim)
    small = read_trained_model(slim, trust=trust)
    same = small.checkpoint_name if find_folds(Path(teacher), small.checkpoint_name) else None
    dense = read_trained_model(teacher, list(small.checkpoints), same, trust=trust)
    if not small.is_slim or dense.is_slim:
        wrong, kind = (small, "not a slim model") if not small.is_slim else (dense, "a slim model, too")
        raise ModelError(f"{wrong.path} is {kind}; name the slim model with -m, the dense one with --teacher")
    if model_key(small) != model_key(dense) or small.dataset["labels"] != dense.dataset["labels"]:
        raise ModelError(
            f"teacher {dense.path} has other labels or another preprocessing than {small.path}; expected the model "
            "that the slim one was made from"
        )
    _check_structure(small, dense)
    return small, dense


def _check_structure(small: TrainedModel, dense: TrainedModel) -> None:
    """Refuse a teacher that does not become the slim network by the slim network's own edits."""
    network = build_network(small)
    twin = build_network(dense)
    try:
        twin = apply_spec(spec_of(network), twin)
        problem = _first_difference(network.state_dict(), twin.state_dict())
    except SpecError as error:
        problem = str(error)
    if problem:
        raise ModelError(
            f"teacher {dense.path} is of another structure than the model that {small.path} was made from: {problem}"
        )


def _first_difference(ours: StateDict, theirs: StateDict) -> str:
    shapes = [{key: tuple(value.shape) for key, value in state.items()} for state in (ours, theirs)]
    for key in sorted(set(shapes[0]) | set(shapes[1])):
        found, expected = (shape.get(key, "absent") for shape in shapes)
        if found != expected:
            return f"{key} is {found} in the slim model, and {expected} with this teacher"
    return ""


def distill_model(
    slim: TrainedModel, dense: TrainedModel, target: Path, config: SlimConfig, *, progress: Progress | None = None
) -> list[Recovery]:
    """Let each fold of a slim model learn from the dense model's fold, and write a new model folder.

    It holds what the slim folder does, with the new weights in the precision of the old ones. Its nnslim.json gets the
    new entry "recovery" and an entry "distill" with the settings; an agreement that was measured on the old weights is
    left out. Interrupted, it goes on where it stopped at the next call: its state lies beside the target, in
    `.<name>.recovery.fold<N>`, until the folder is written.

    Args:
        slim, dense: from `read_pair`.
        target: folder to write; must not exist, or be empty.
        config: from `distill_config`.
        progress: called with (what is done, units done, units in all).
    Returns:
        How it went, for each fold.
    Raises:
        InputError: no images, or one that cannot be read. ModelError: a cascade. OutputError: the target exists
        or cannot be written; nothing half-written is left.
    """
    target = Path(target)
    state = target.with_name(f".{target.name}.recovery")
    recoveries = []
    with whole_folder(target) as side:
        for name in ("dataset.json", "plan.csv"):
            if (slim.path / name).is_file():
                shutil.copyfile(slim.path / name, side / name)
        plans = _named(slim.plans, target.name)
        write_json(side / "plans.json", plans)
        with calibration_of(dense, config, progress) as data:
            for number, (fold, checkpoint) in enumerate(slim.checkpoints.items()):
                beside = state.with_name(f"{state.name}.fold{number}")
                weights, recovery = _fold(slim, dense, fold, data, config, beside, progress)
                (side / f"fold_{fold}").mkdir()
                made = slim_checkpoint(checkpoint, weights, plans)
                save_checkpoint(made, side / f"fold_{fold}" / slim.checkpoint_name)
                recoveries.append(recovery)
        write_json(side / "nnslim.json", _record(slim, dense, config, data, recoveries))
    for leftover in target.parent.glob(f"{state.name}.fold*"):
        leftover.unlink(missing_ok=True)
    return recoveries


def _fold(
    slim: TrainedModel,
    dense: TrainedModel,
    fold: str,
    data: Calibration,
    config: SlimConfig,
    checkpoint: Path,
    progress: Progress | None,
) -> tuple[StateDict, Recovery]:
    device = torch.device("cuda" if config.calibration.device != "cpu" and torch.cuda.is_available() else "cpu")
    student, teacher = _network(slim, fold).to(device), _network(dense, fold).to(device)
    files = [model.path / f"fold_{fold}" / model.checkpoint_name for model in (slim, dense)]
    settings = {"calibration": config.identity()["calibration"], "recovery": config.identity()["recovery"]}
    identity = f"{data.fingerprint} {json.dumps(settings, sort_keys=True)} {[sha256_of(file) for file in files]}"
    recovery = recover(
        teacher, student, data, config.recovery, checkpoint=checkpoint, identity=identity, progress=progress
    )
    half = in_half(slim.checkpoints[fold]["network_weights"])
    return stored(student.to("cpu"), half)[1], recovery


def _network(model: TrainedModel, fold: str) -> nn.Module:
    network = build_network(model)
    network.load_state_dict({key: value.float() for key, value in model.checkpoints[fold]["network_weights"].items()})
    return network.eval()


def _named(plans: dict[str, Any], folder_name: str) -> dict[str, Any]:
    """Give the plans the name in a folder called trainer__plans__configuration, by which nnU-Net looks for it."""
    parts = folder_name.split("__")
    return {**plans, "plans_name": parts[1]} if len(parts) == 3 and parts[1] else plans


def _record(
    slim: TrainedModel, dense: TrainedModel, config: SlimConfig, data: Calibration, recoveries: list[Recovery]
) -> dict[str, Any]:
    kept = {key: value for key, value in slim_record(slim.path).items() if key not in _STALE}
    return {
        **kept,
        "recovery": [recovery.to_dict() for recovery in recoveries],
        "distill": {
            "nnslim": __version__,
            "slim": slim.path.name,
            "teacher": dense.path.name,
            "folds": list(slim.checkpoints),
            "images": data.images,
            "settings": config.recovery.model_dump(mode="json"),
            "earlier": kept.get("recovery", []),
        },
    }
