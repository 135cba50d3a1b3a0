"""Which labels make up which class, and which classes stand together in pictures."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from nnslim.errors import InputError, nearest
from nnslim.files import read_yaml


@dataclass(frozen=True)
class LabelClass:
    """A label, or a region of several.

    Attributes:
        name: "spleen"; the number where no names are known.
        members: labels that the class consists of.
        key: as nnU-Net writes it in summary.json: "1", or "(1, 2)" for a region.
    """

    name: str
    members: tuple[int, ...]
    key: str


@dataclass(frozen=True)
class Classes:
    """The classes that are compared.

    Attributes:
        classes: in the order of the output, without background.
        ignore: label of voxels in the reference that do not count.
        known: all labels that may occur, those of classes that were not asked for included.
        ending: ending of the label files, where it is prescribed.
    """

    classes: tuple[LabelClass, ...]
    ignore: int | None = None
    known: frozenset[int] = frozenset()
    ending: str | None = None

    def only(self, wanted: Iterable[str], known: bool = True) -> Classes:
        """Return those that are named, by name or key; one that does not exist is an InputError if `known`."""
        found = {word: one for one in self.classes for word in (one.name, one.key)}
        unknown = [word for word in wanted if word not in found]
        if known and unknown:
            raise InputError(f"no class '{unknown[0]}'; {nearest(unknown[0], found)}")
        chosen = [found[word] for word in wanted if word in found]
        return replace(self, classes=tuple(one for one in self.classes if one in chosen))


def named_classes(names: Mapping[int, str]) -> Classes:
    """Return classes of one label each, from label -> name without the background."""
    classes = tuple(LabelClass(name, (label,), str(label)) for label, name in sorted(names.items()))
    return Classes(classes, known=frozenset(names))


def read_dataset_json(path: Path) -> Classes:
    """Return the classes of a dataset.json, regions and the ignore label included.

    Raises:
        InputError: the file cannot be read, or has no labels that nnU-Net would accept.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        labels = dict(content["labels"])
        members = {
            name: tuple(map(int, value if isinstance(value, list) else [value])) for name, value in labels.items()
        }
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}; expected nnU-Net's dataset.json") from error
    except (ValueError, TypeError, KeyError) as error:
        raise InputError(
            f'{path} is not nnU-Net\'s dataset.json: expected "labels": {{"background": 0, "name": 1, ...}}'
        ) from error
    ignore = members.pop("ignore", ())
    if len(ignore) > 1:
        raise InputError(f"{path}: the ignore label is one number, found {labels['ignore']}")
    regions = any(len(one) > 1 for one in members.values())
    classes = [
        # As nnU-Net makes the key: [1, 2] gives the text of a tuple, 3 the number.
        LabelClass(name, one, str(one if regions and isinstance(labels[name], list) else one[0]))
        for name, one in members.items()
        if set(one) != {0}
    ]
    if not classes:
        raise InputError(f"{path} names no label besides the background")
    if not regions:
        classes.sort(key=lambda one: one.members)
    known = frozenset(label for one in members.values() for label in one) - {0}
    return Classes(tuple(classes), ignore[0] if ignore else None, known, content.get("file_ending"))


def read_groups(path: Path, class_names: Collection[str], shown: Collection[str]) -> dict[str, list[str]]:
    """Read groups of classes, such as ribs or vertebrae, `group: [class, ...]` in YAML or JSON.

    Args:
        class_names: those that the file may name. shown: those that get into a group, "other" if no group names them.
    Raises:
        InputError: the file cannot be read, is no such mapping, or names a class that does not exist.
    """
    content = read_yaml(path)
    if not (isinstance(content, dict) and content and all(isinstance(one, list) for one in content.values())):
        raise InputError(f"{path}: expected 'group: [class, class, ...]' lines")
    groups = {str(name): [str(member) for member in members] for name, members in content.items()}
    for name in (name for members in groups.values() for name in members):
        if name not in class_names:
            raise InputError(f"{path}: no class '{name}'; {nearest(name, class_names)}")
    return group_classes(groups, shown)


def group_classes(groups: Mapping[str, Collection[str]], class_names: Collection[str]) -> dict[str, list[str]]:
    """Return the classes of each group that has any, in the order of `class_names`; the rest is "other"."""
    placed = {name: [one for one in class_names if one in members] for name, members in groups.items()}
    rest = [one for one in class_names if not any(one in members for members in placed.values())]
    return {name: members for name, members in (*placed.items(), ("other", rest)) if members}
