"""TotalSegmentator's table of tasks, read without importing what takes seconds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nnslim.errors import ConfigError, HostError, nearest
from nnslim.optional import installed_version

_MODES = {"_fastest": "fastest", "_fast": "fast"}


@dataclass(frozen=True)
class Task:
    """One task in one resolution.

    Attributes:
        name: as in TotalSegmentator. mode: "default", "fast" or "fastest".
        classes: label -> name.
        ids: dataset numbers of the models that are run. trainer, plans, configuration, folds: of these.
    """

    name: str
    mode: str
    classes: dict[int, str]
    ids: tuple[int, ...]
    trainer: str
    plans: str
    configuration: str
    folds: tuple[int, ...]

    @property
    def options(self) -> dict[str, Any]:
        """Arguments of `totalsegmentator()`."""
        return {"task": self.name, "fast": self.mode == "fast", "fastest": self.mode == "fastest"}

    def model_folders(self, weights: Path) -> list[Path]:
        """Return the folders of the models below the weights folder, those that are there."""
        name = f"{self.trainer}__{self.plans}__{self.configuration}"
        found = [sorted(weights.glob(f"Dataset{number:03d}_*/{name}")) for number in self.ids]
        return [folder for folders in found for folder in folders[:1]]

    def missing(self, weights: Path) -> list[int]:
        """Return the dataset numbers without a folder below the weights folder."""
        return [number for number in self.ids if not any(weights.glob(f"Dataset{number:03d}_*"))]


def totalseg_version() -> str:
    """Return the version of the installed TotalSegmentator.

    Raises:
        HostError: it is not installed.
    """
    return installed_version("TotalSegmentator", "TotalSegmentator", "'nnslim[ts]'", error=HostError)


def find_task(name: str, classes: Sequence[str] = ()) -> Task:
    """Return a task by name: "total", "total_fast", "total_fastest", "lung_vessels" ...

    Args:
        name: of TotalSegmentator's list, with _fast or _fastest where it has such a resolution.
        classes: those wanted; must be its classes.
    Raises:
        HostError: TotalSegmentator is missing, or of a version without that table.
        ConfigError: no such task, resolution or class.
    """
    version = totalseg_version()
    try:
        from totalsegmentator.map_tasks_config import DEFAULT_CONFIG, TASK_CONFIGS
        from totalsegmentator.map_to_binary import class_map
    except ImportError as error:
        raise HostError(f"TotalSegmentator {version} has no table of tasks that nnslim can read ({error})") from error
    ending = next((end for end in _MODES if name not in TASK_CONFIGS and name.endswith(end)), "")
    base, mode = name.removesuffix(ending), _MODES.get(ending, "default")
    if base not in TASK_CONFIGS:
        raise ConfigError(f"TotalSegmentator {version} has no task '{name}'; {nearest(name, TASK_CONFIGS)}")
    raw = TASK_CONFIGS[base]
    modes = raw.get("sub_modes", {"default": raw})
    if mode not in modes:
        known = ", ".join(sorted(base if key == "default" else f"{base}_{key}" for key in modes))
        raise ConfigError(f"TotalSegmentator {version} has no task '{name}'; it has {known}")
    known = set(class_map[base].values())
    if unknown := [wanted for wanted in classes if wanted not in known]:
        raise ConfigError(f"task {base} has no class '{unknown[0]}'; {nearest(unknown[0], known)}")
    if classes and not base.startswith("total"):
        raise ConfigError(f"--roi goes with the tasks total, total_v3 and total_mr only, found {base}")
    chosen = {**DEFAULT_CONFIG, **modes[mode]}
    ids = chosen["task_id"]
    return Task(
        base,
        mode,
        dict(class_map[base]),
        tuple(ids) if isinstance(ids, list) else (ids,),
        chosen["trainer"],
        chosen["plans"] or "nnUNetPlans",
        chosen["model"],
        tuple(chosen["folds"] or ()),
    )
