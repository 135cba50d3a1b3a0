"""Loaded models that outlive the predictor that loaded them: the next one of the same folder gets them at once.

TotalSegmentator makes a new predictor, and reads its weights again, for every image and every one of its parts.
"""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from typing import Any

# What initialize_from_trained_model_folder sets, in every version that we know.
_LOADED = (
    "plans_manager",
    "configuration_manager",
    "list_of_parameters",
    "network",
    "dataset_json",
    "trainer_name",
    "allowed_mirroring_axes",
    "label_manager",
)


class KeptPredictors:
    """What predictors have loaded, the latest used last. One network serves all predictors that share it, in turn."""

    def __init__(self, limit: int = 8) -> None:
        """Set how many models are kept, the latest used; TotalSegmentator has five parts and a rough one."""
        self._kept: OrderedDict[tuple[Any, ...], dict[str, Any]] = OrderedDict()
        self._limit = limit

    def give(self, predictor: Any, key: tuple[Any, ...]) -> bool:
        """Hand the predictor what is kept under the key; return whether there was anything."""
        if key not in self._kept:
            return False
        self._kept.move_to_end(key)
        for name, value in self._kept[key].items():
            setattr(predictor, name, value)
        return True

    def keep(self, predictor: Any, key: tuple[Any, ...]) -> None:
        """Keep what the predictor has loaded."""
        self._kept[key] = {name: getattr(predictor, name) for name in _LOADED}
        while len(self._kept) > self._limit:
            self._kept.popitem(last=False)

    def clear(self) -> None:
        """Let go of everything."""
        self._kept.clear()


def loading_key(predictor: Any, folder: str, folds: Any, checkpoint_name: str) -> tuple[Any, ...]:
    """Return what decides the content of a loaded predictor: the folder, its files as they are now, the device."""
    path = Path(folder).resolve()
    files = sorted(path.glob("*.json")) + sorted(path.glob(f"fold_*/{checkpoint_name}"))
    state = tuple((str(file), (stat := file.stat()).st_mtime_ns, stat.st_size) for file in files)
    wanted = folds if folds is None or isinstance(folds, (str, int)) else tuple(folds)
    return str(path), wanted, checkpoint_name, str(predictor.device), state
