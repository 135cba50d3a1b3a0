"""What a model folder says without loading its weights; this module imports nothing slow."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

from nnslim.errors import ModelError
from nnslim.files import sha256_of

CHECKPOINTS = ("checkpoint_final.pth", "checkpoint_best.pth")


def find_folds(path: Path, checkpoint_name: str) -> list[str]:
    """Return the folds that have the checkpoint: numbers in order, else "all"."""
    folds = [p.parent.name.removeprefix("fold_") for p in path.glob(f"fold_*/{checkpoint_name}")]
    numbers = sorted((fold for fold in folds if fold.isdigit()), key=int)
    return numbers or [fold for fold in folds if fold == "all"]


def chosen_folds(path: Path, folds: Sequence[int | str] | None, checkpoint_name: str | None) -> tuple[list[str], str]:
    """Return the folds and the checkpoint name that a user means.

    Args:
        path: model folder. folds: every fold that has the checkpoint if None.
        checkpoint_name: checkpoint_final.pth if there is one, else checkpoint_best.pth, if None.
    Raises:
        ModelError: no such folder, or no fold has the checkpoint.
    """
    if not path.is_dir():
        raise ModelError(f"{path} is not a folder; expected a trained nnU-Net model folder with plans.json")
    name = checkpoint_name or next((name for name in CHECKPOINTS if find_folds(path, name)), CHECKPOINTS[0])
    wanted = [str(fold) for fold in folds] if folds is not None else find_folds(path, name)
    if not wanted:
        raise ModelError(f"{path} has no fold_X folder with {name}")
    return wanted, name


def content_digest(path: Path, folds: Sequence[str], checkpoint_name: str) -> str:
    """Return the SHA-256 of what a model folder predicts with: plans, description and the checkpoints of the folds.

    Cost: one read of the checkpoints. A file that is missing counts as such.
    """
    digest = hashlib.sha256()
    for name in ("plans.json", "dataset.json", *(f"fold_{fold}/{checkpoint_name}" for fold in folds)):
        file = path / name
        digest.update(f"{name} {sha256_of(file) if file.is_file() else 'missing'}\n".encode())
    return digest.hexdigest()
