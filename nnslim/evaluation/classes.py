"""Which labels make up which class."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from nnslim.errors import InputError, nearest


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
        ending: of the label files, where it is prescribed.
    """

    classes: tuple[LabelClass, ...]
    ignore: int | None = None
    known: frozenset[int] = frozenset()
    ending: str | None = None

    def only(self, wanted: Iterable[str], known: bool = True) -> Classes:
        """Return those that are named, by name or key.

        Args:
            known: whether all of them must exist.
        Raises:
            InputError: one of them does not.
        """
        found = {word: one for one in self.classes for word in (one.name, one.key)}
        unknown = [word for word in wanted if word not in found]
        if known and unknown:
            raise InputError(f"no class '{unknown[0]}'; {nearest(unknown[0], found)}")
        chosen = [found[word] for word in wanted if word in found]
        return replace(self, classes=tuple(one for one in self.classes if one in chosen))


def named_classes(names: Mapping[int, str], ignore: int | None = None, ending: str | None = None) -> Classes:
    """Return classes of one label each.

    Args:
        names: label -> name, background left out. ignore, ending: see `Classes`.
    """
    classes = tuple(LabelClass(name, (label,), str(label)) for label, name in sorted(names.items()))
    return Classes(classes, ignore, frozenset(names), ending)


def numbered_classes(labels: Iterable[int]) -> Classes:
    """Return a class for each label, named by its number."""
    return named_classes({int(label): str(label) for label in labels})


def read_dataset_json(path: Path) -> Classes:
    """Return the classes of an nnU-Net dataset.json, regions and the ignore label included.

    Raises:
        InputError: the file cannot be read, or has no labels that nnU-Net would accept.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        labels = dict(content["labels"])
        listed = {str(name): _members(value) for name, value in labels.items()}
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}; expected nnU-Net's dataset.json") from error
    except (ValueError, TypeError, KeyError) as error:
        raise InputError(
            f'{path} is not nnU-Net\'s dataset.json: expected "labels": {{"background": 0, "name": 1, ...}}'
        ) from error
    ignore = listed.pop("ignore", None)
    if ignore is not None and len(ignore) != 1:
        raise InputError(f"{path}: the ignore label is one number, found {labels['ignore']}")
    known = frozenset(label for members in listed.values() for label in members) - {0}
    regions = any(isinstance(value, list) and len(value) > 1 for value in labels.values())
    foreground = {name: members for name, members in listed.items() if set(members) != {0}}
    if not foreground:
        raise InputError(f"{path} names no label besides the background")
    if regions:
        classes = [LabelClass(name, members, _key(labels[name])) for name, members in foreground.items()]
    else:
        ordered = sorted(foreground.items(), key=lambda item: item[1])
        classes = [LabelClass(name, members, str(members[0])) for name, members in ordered]
    return Classes(tuple(classes), ignore and ignore[0], known, content.get("file_ending"))


def _members(value: Any) -> tuple[int, ...]:
    return tuple(int(label) for label in value) if isinstance(value, list) else (int(value),)


def _key(value: Any) -> str:
    """Return what nnU-Net's `label_or_region_to_key` makes of it: of [1, 2] the text of a tuple, of 3 the number."""
    return str(tuple(int(label) for label in value) if isinstance(value, list) else int(value))
