"""TotalSegmentator's own tables: the classes of its tasks, and the organ groups that its models are split into."""

from __future__ import annotations

from typing import Any

from nnslim.errors import HostError, InputError, nearest


def task_classes(task: str) -> dict[int, str]:
    """Return the classes of a task such as "total", label to name, without background.

    Raises:
        HostError: TotalSegmentator is missing. InputError: it has no such task.
    """
    known = _tables().class_map
    if task not in known:
        raise InputError(f"'{task}' is neither a dataset.json nor a task of TotalSegmentator; {nearest(task, known)}")
    return dict(known[task])


def organ_groups() -> dict[str, set[str]]:
    """Return class names by group: organs, vertebrae, cardiac, muscles, ribs; of the CT and the MR models together.

    Raises:
        HostError: TotalSegmentator is missing.
    """
    tables = _tables()
    groups: dict[str, set[str]] = {}
    for parts in (tables.class_map_5_parts, getattr(tables, "class_map_parts_mr", {})):
        for part, classes in parts.items():
            groups.setdefault(part.removeprefix("class_map_part_"), set()).update(classes.values())
    # A class may be an organ of one model and a muscle of the other: it stays where the CT model has it.
    placed: set[str] = set()
    for members in groups.values():
        members -= placed
        placed |= members
    return groups


def _tables() -> Any:
    try:
        from totalsegmentator import map_to_binary
    except ImportError as error:
        raise HostError(f"TotalSegmentator's classes cannot be read ({error}); run pip install nnslim[ts]") from error
    return map_to_binary
