"""Groups of classes, such as ribs or vertebrae, for pictures with many classes."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import yaml

from nnslim.errors import InputError, nearest

OTHER = "other"


def read_groups(path: Path, class_names: Collection[str], shown: Collection[str]) -> dict[str, list[str]]:
    """Read `group: [class, ...]` from YAML or JSON; a class that is in none comes to "other".

    Args:
        class_names: of the evaluation; names in the file must be among them. shown: those that get into a group.
    Raises:
        InputError: the file cannot be read, is no such mapping, or names a class that does not exist.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))  # JSON is YAML
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}; expected YAML or JSON") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is neither YAML nor JSON: {' '.join(str(error).split())[:200]}") from error
    if not _is_groups(content):
        raise InputError(f"{path}: expected 'group: [class, class, ...]' lines")
    groups = {str(name): [str(member) for member in members] for name, members in content.items()}
    for members in groups.values():
        for name in members:
            if name not in class_names:
                raise InputError(f"{path}: no class '{name}'; {nearest(name, class_names)}")
    return group_classes(groups, shown)


def group_classes(groups: Mapping[str, Collection[str]], class_names: Collection[str]) -> dict[str, list[str]]:
    """Return the classes of each group that has any, in the order of `class_names`; the rest is "other"."""
    placed = {name: [one for one in class_names if one in members] for name, members in groups.items()}
    rest = [one for one in class_names if not any(one in members for members in placed.values())]
    return {name: members for name, members in (*placed.items(), (OTHER, rest)) if members}


def _is_groups(content: Any) -> bool:
    return isinstance(content, dict) and bool(content) and all(isinstance(one, list) for one in content.values())
