"""TotalSegmentator's own tables: tasks, classes and organ groups; reading them imports nothing that takes seconds."""

from __future__ import annotations

import importlib
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nnslim.errors import ConfigError, HostError, InputError, nearest
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


def totalseg_table(module: str, name: str) -> Any:
    """Return a table of the installed TotalSegmentator, such as "map_to_binary", "class_map".

    Raises:
        HostError: TotalSegmentator is missing, or of a version without that table.
    """
    version = totalseg_version()
    try:
        return getattr(importlib.import_module(f"totalsegmentator.{module}"), name)
    except (ImportError, AttributeError) as error:
        raise HostError(
            f"TotalSegmentator {version} has no table {module}.{name} that nnslim can read ({error}); "
            "run pip install -U TotalSegmentator"
        ) from error


def find_task(name: str, classes: Sequence[str] = ()) -> Task:
    """Return a task by name: "total", "total_fast", "total_fastest", "lung_vessels" ...

    Args:
        name: of TotalSegmentator's list, with _fast or _fastest where it has such a resolution.
        classes: those wanted; must be its classes.
    Raises:
        HostError: TotalSegmentator is missing, or of a version without that table.
        ConfigError: no such task, resolution or class.
    """
    version, configs = totalseg_version(), totalseg_table("map_tasks_config", "TASK_CONFIGS")
    ending = next((end for end in _MODES if name not in configs and name.endswith(end)), "")
    base, mode = name.removesuffix(ending), _MODES.get(ending, "default")
    if base not in configs:
        raise ConfigError(f"TotalSegmentator {version} has no task '{name}'; {nearest(name, configs)}")
    raw = configs[base]
    modes = raw.get("sub_modes", {"default": raw})
    if mode not in modes:
        known = ", ".join(sorted(base if key == "default" else f"{base}_{key}" for key in modes))
        raise ConfigError(f"TotalSegmentator {version} has no task '{name}'; it has {known}")
    labels = dict(totalseg_table("map_to_binary", "class_map")[base])
    known = set(labels.values())
    if unknown := [wanted for wanted in classes if wanted not in known]:
        raise ConfigError(f"task {base} has no class '{unknown[0]}'; {nearest(unknown[0], known)}")
    if classes and not base.startswith("total"):
        raise ConfigError(f"--roi goes with the tasks total, total_v3 and total_mr only, found {base}")
    chosen = {**totalseg_table("map_tasks_config", "DEFAULT_CONFIG"), **modes[mode]}
    ids = chosen["task_id"]
    return Task(
        base,
        mode,
        labels,
        tuple(ids) if isinstance(ids, list) else (ids,),
        chosen["trainer"],
        chosen["plans"] or "nnUNetPlans",
        chosen["model"],
        tuple(chosen["folds"] or ()),
    )


def task_classes(task: str) -> dict[int, str]:
    """Return the classes of a task such as "total", label to name, without background.

    Raises:
        HostError: TotalSegmentator is missing. InputError: it has no such task.
    """
    known = totalseg_table("map_to_binary", "class_map")
    if task not in known:
        raise InputError(f"'{task}' is neither a dataset.json nor a task of TotalSegmentator; {nearest(task, known)}")
    return dict(known[task])


def organ_groups() -> dict[str, set[str]]:
    """Return class names by group: organs, vertebrae, cardiac, muscles, ribs; of the CT and the MR models together.

    Raises:
        HostError: TotalSegmentator is missing.
    """
    groups: defaultdict[str, set[str]] = defaultdict(set)
    ct, both = totalseg_table("map_to_binary", "class_map_5_parts"), sys.modules["totalsegmentator.map_to_binary"]
    for parts in (ct, getattr(both, "class_map_parts_mr", {})):
        for part, classes in parts.items():
            groups[part.removeprefix("class_map_part_")].update(classes.values())
    # A class may be an organ of one model and a muscle of the other: it stays where the CT model has it.
    placed: set[str] = set()
    for members in groups.values():
        members -= placed
        placed |= members
    return dict(groups)
