"""Prediction inside nnU-Net's predictor, and of directories."""

from __future__ import annotations

from importlib import import_module
from typing import Any

_HOMES = {"PredictSettings": "predict_settings", "load_predictor": "load", "predict_folder": "directory"}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    # Lazy: settings must be read without torch.
    if name in _HOMES:
        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
