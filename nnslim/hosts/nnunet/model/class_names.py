"""Classes and regions of a model, by name."""

from __future__ import annotations

from typing import Any

import numpy as np


def classes_of(label_manager: Any) -> dict[str, tuple[int, ...]]:
    """Return the labels of each class or region, in the order of the model's channels, without background."""
    named = {
        str(name): tuple(int(label) for label in np.unique(value))
        for name, value in label_manager.label_dict.items()
        if name != "ignore"
    }
    foreground = {name: members for name, members in named.items() if members != (0,)}
    if label_manager.has_regions:
        return foreground
    return dict(sorted(foreground.items(), key=lambda item: item[1]))
