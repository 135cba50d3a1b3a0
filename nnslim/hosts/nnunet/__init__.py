"""nnU-Net v2: its model folders, its predictor, its trainer."""

from __future__ import annotations

from importlib import import_module
from types import SimpleNamespace
from typing import Any

# Modules that the plans of older models name, as in `nnslim.hosts.nnunet.network.slim_network`. They are gone; their
# names are found in `nnslim.architectures`, which is imported by name because it stands above this package.
_ARCHITECTURES = "nnslim.architectures"
_FORMER = ("network", "planned", "inflation")


def __getattr__(name: str) -> Any:
    if name not in _FORMER:
        raise AttributeError(f"module 'nnslim.hosts.nnunet' has no attribute '{name}'")
    found = import_module(_ARCHITECTURES)
    return SimpleNamespace(window=found) if name == "inflation" else found
