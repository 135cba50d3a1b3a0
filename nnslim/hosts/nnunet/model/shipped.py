"""The trained model that ships inside the package: real weights without a download."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nnslim.compression.storage import half_precision
from nnslim.errors import ModelError
from nnslim.files import whole_folder
from nnslim.hosts.nnunet.model.trained_model import read_trained_model, write_model

_MODELS = Path(__file__).resolve().parents[3] / "models"
MODEL_FOLDER_NAME = "nnUNetTrainer__nnUNetPlans__3d_fullres"


def shipped_model(name: str = "hippocampus") -> Path:
    """Return the model folder of a shipped model; MODEL_CARD.md beside it says what it is.

    Raises:
        ModelError: there is no such model in this installation.
    """
    folder = _MODELS / name / MODEL_FOLDER_NAME
    if not folder.is_dir():
        known = ", ".join(sorted(path.parent.name for path in _MODELS.glob(f"*/{MODEL_FOLDER_NAME}"))) or "none"
        raise ModelError(f"nnslim ships no model '{name}'; known: {known}")
    return folder


def write_for_shipping(model: Path, target: Path) -> None:
    """Write a copy of a trained model as small as possible: weights in float16.

    The optimiser's state, training curves and the plans of other configurations are left out.

    Raises:
        ModelError: not a model folder. OutputError: the target exists or cannot be written.
    """
    source = read_trained_model(model)
    configuration = source.plans["configurations"][source.configuration]
    plans = {**source.plans, "configurations": {source.configuration: configuration}}

    def kept(checkpoint: dict[str, Any]) -> dict[str, Any]:
        return {
            "network_weights": half_precision(checkpoint["network_weights"]),
            "trainer_name": source.trainer_name,
            "init_args": {"configuration": source.configuration, "fold": checkpoint["init_args"].get("fold")},
            "inference_allowed_mirroring_axes": checkpoint["inference_allowed_mirroring_axes"],
        }

    with whole_folder(Path(target)) as side:
        checkpoints = ((fold, kept(content)) for fold, content in source.checkpoints.items())
        write_model(side, plans, source.dataset, checkpoints, source.checkpoint_name)
