"""Recover the accuracy of a slim model folder without labels: it learns the answers of the dense model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from nnslim._version import __version__
from nnslim.compression.config import SlimConfig, from_dict
from nnslim.compression.distillation import FoldMean
from nnslim.compression.record import read_record, write_record
from nnslim.compression.recover import Progress, Recovery, recover
from nnslim.compression.storage import StateDict, in_half, stored
from nnslim.errors import ConfigError, ModelError, SpecError
from nnslim.files import sha256_of, whole_folder
from nnslim.hosts.nnunet.cases.calibration_tiles import calibration_of
from nnslim.hosts.nnunet.compress.compress_model import write_slim
from nnslim.hosts.nnunet.model.model_files import find_folds
from nnslim.hosts.nnunet.model.slim_plans import named_after
from nnslim.hosts.nnunet.model.trained_model import TrainedModel, build_network, model_key, read_trained_model
from nnslim.network.spec import apply_spec, spec_of


def distill_config(images: Path, device: str = "auto", *, mirrored: bool | None = None, **recovery: Any) -> SlimConfig:
    """Return the configuration of a distillation, from keys of `RecoveryConfig`; None leaves a key at its default.

    Args:
        mirrored: see `CalibrationConfig`.
    Raises:
        ConfigError: a value out of bounds, or nothing to learn.
    """
    given = {key: value for key, value in recovery.items() if value is not None}
    calibration = {"images": images, "device": device, "mirrored": mirrored}
    config = from_dict({"calibration": calibration, "recovery": given}, "distill")
    if not config.recovery.learns:
        raise ConfigError("distill: there is nothing to do with no steps and no block steps")
    config.calibration.torch_device()  # a missing GPU is named before anything is read
    return config


def read_pair(
    slim: Path, teacher: Path, *, ensemble: bool = False, trust: bool = False
) -> tuple[TrainedModel, TrainedModel]:
    """Return a slim model and the same folds of the dense one that it was made from; with `ensemble`, all its folds.

    Raises:
        ModelError: a folder is unusable, the model is not slim, or the teacher is slim, lacks a fold, or has another
        preprocessing or structure.
    """
    read_record(slim)
    small = read_trained_model(slim, trust=trust)
    same = small.checkpoint_name if find_folds(Path(teacher), small.checkpoint_name) else None
    dense = read_trained_model(teacher, None if ensemble else list(small.checkpoints), same, trust=trust)
    if not small.is_slim or dense.is_slim:
        wrong, kind = (small, "not a slim model") if not small.is_slim else (dense, "a slim model, too")
        raise ModelError(f"{wrong.path} is {kind}; name the slim model with -m, the dense one with --teacher")
    if model_key(small) != model_key(dense) or small.dataset["labels"] != dense.dataset["labels"]:
        raise ModelError(
            f"teacher {dense.path} has other labels or another preprocessing than {small.path}; expected the model "
            "that the slim one was made from"
        )
    # The slim network's own edits must turn the teacher into it.
    network = build_network(small)
    try:
        twin = apply_spec(spec_of(network), build_network(dense))
        problem = _first_difference(network.state_dict(), twin.state_dict())
    except SpecError as error:
        problem = str(error)
    if problem:
        raise ModelError(
            f"teacher {dense.path} is of another structure than the model that {small.path} was made from: {problem}"
        )
    return small, dense


def _first_difference(ours: StateDict, theirs: StateDict) -> str:
    shapes = [{key: tuple(value.shape) for key, value in state.items()} for state in (ours, theirs)]
    for key in sorted({**ours, **theirs}):
        found, expected = (shape.get(key, "absent") for shape in shapes)
        if found != expected:
            return f"{key} is {found} in the slim model, and {expected} with this teacher"
    return ""


def distill_model(
    slim: TrainedModel, dense: TrainedModel, target: Path, config: SlimConfig, *, progress: Progress | None = None
) -> list[Recovery]:
    """Let each fold of a slim model learn from the dense model's fold, write a model folder, and say how each went.

    It holds what the slim folder does, with the new weights in the precision of the old ones. Its nnslim.json gets a
    new entry "recovery" and an entry "distill" with the settings; the agreement, measured on the old weights, is
    left out. An interrupted run continues at the next call: until the folder is written, its state lies beside the
    target, in `.<name>.recovery.fold<N>`. The models are those of `read_pair`, the settings those of `distill_config`.

    Raises:
        InputError: no images, or one that cannot be read. ModelError: a cascade. OutputError: the target exists
        or cannot be written; nothing half-written is left.
    """
    target, device, weights, recoveries = Path(target), config.calibration.torch_device(), [], []
    state = target.with_name(f".{target.name}.recovery")
    settings = json.dumps(config.data_identity(), sort_keys=True)
    ensemble, mean = config.recovery.target == "ensemble", None
    if ensemble and len(dense.checkpoints) < 2:
        raise ConfigError("recovery.target: ensemble learns the mean of several folds; the teacher has only one")
    kept = slim.of_folds(1) if ensemble else slim
    with whole_folder(target) as side:
        with calibration_of(dense, config, progress, needed=True) as data:
            if ensemble:
                mean = FoldMean([build_network(dense, fold).to(device) for fold in dense.checkpoints])
            for number, fold in enumerate(kept.checkpoints):
                teacher, student = (build_network(model, fold).to(device) for model in (dense, slim))
                folds = [(slim, fold), *((dense, one) for one in (dense.checkpoints if ensemble else [fold]))]
                files = [model.path / f"fold_{one}" / model.checkpoint_name for model, one in folds]
                identity = f"{data.fingerprint} {settings} {[sha256_of(file) for file in files]}"
                beside = state.with_name(f"{state.name}.fold{number}")
                learning = {"teacher": mean, "checkpoint": beside, "identity": identity, "progress": progress}
                recoveries.append(recover(teacher, student, data, config.recovery, **learning))
                half = in_half(slim.checkpoints[fold]["network_weights"])
                weights.append(stored(student.to("cpu"), half)[1])
        write_slim(side, kept, weights, named_after(target.name, slim.plans), config.recovery.one_pass)
        if (slim.path / "plan.csv").is_file():
            shutil.copyfile(slim.path / "plan.csv", side / "plan.csv")
        before = read_record(slim.path)
        write_record(
            side,
            before,
            agreement=None,  # measured on the weights from before
            ensemble=list(dense.checkpoints) if ensemble else None,
            recovery=[recovery.to_dict() for recovery in recoveries],
            distill={
                "nnslim": __version__,
                "slim": slim.path.name,
                "teacher": dense.path.name,
                "folds": list(kept.checkpoints),
                "images": data.images,
                "settings": config.recovery.model_dump(mode="json"),
                "earlier": before.get("recovery", []),
            },
        )
    for leftover in target.parent.glob(f"{state.name}.fold*"):
        leftover.unlink(missing_ok=True)
    return recoveries
