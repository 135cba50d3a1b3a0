"""Find which prediction belongs to which reference."""

from __future__ import annotations

import unicodedata
from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple

from nnslim.errors import InputError
from nnslim.evaluation.label_files import PICTURES, VOLUMES, ending_of

_INNER = "segmentations"  # where TotalSegmentator's training data have the masks of a subject


class Pairing(NamedTuple):
    """Cases by name.

    Attributes:
        pairs: name -> (prediction, reference): a label map, or a folder of one mask per class, each.
        missing: references without a prediction. extra: predictions without a reference.
    """

    pairs: dict[str, tuple[Path, Path]]
    missing: tuple[str, ...] = ()
    extra: tuple[str, ...] = ()


def pair_cases(
    predictions: Path, references: Path, ending: str | None = None, class_names: Collection[str] = ()
) -> Pairing:
    """Pair by name: `<case><ending>` label maps, or `<case>/<class>.nii.gz` masks as TotalSegmentator writes them.

    Two single files belong together whatever their names, and so do a file and the folder of one case.

    Args:
        predictions, references: folders, or one file each.
        ending: the label maps' ending; other files are left out. None: all that can be read.
        class_names: a folder whose files all have these names holds the masks of one case.
    Raises:
        InputError: a folder is missing or empty, two files claim one case, or no name fits.
    """
    predicted, known = (cases_by_name(Path(place), ending, class_names) for place in (predictions, references))
    single = any(Path(place).is_file() for place in (predictions, references))
    if single and len(predicted) == len(known) == 1:
        name, reference = next(iter(known.items()))
        return Pairing({name: (next(iter(predicted.values())), reference)})
    pairs = {name: (predicted[name], known[name]) for name in known if name in predicted}
    if not pairs:
        raise InputError(
            f"no prediction in {predictions} has the name of a reference in {references}; "
            f"found, for example, {next(iter(predicted))} and {next(iter(known))}"
        )
    missing = tuple(name for name in known if name not in predicted)
    return Pairing(pairs, missing, tuple(name for name in predicted if name not in known))


def cases_by_name(place: Path, ending: str | None = None, class_names: Collection[str] = ()) -> dict[str, Path]:
    """Return the label map, or the folder of masks, of each case, sorted by name.

    Raises:
        InputError: see `pair_cases`.
    """
    if place.is_file():
        if ending_of(place) is None:
            raise InputError(f"{place} is no label map; known endings: {', '.join(VOLUMES + PICTURES)}")
        return {case_name(place): place}
    if not place.is_dir():
        raise InputError(f"{place} does not exist; expected a folder of label maps, or one of them")
    files = label_files(place, ending)
    if files and class_names and {case_name(file) for file in files} <= set(class_names):
        return {_plain(place.resolve().name): place}
    if not files:  # beside label maps, folders are something else (pictures, results after postprocessing)
        files = [inner for entry in sorted(place.iterdir()) if entry.is_dir() and (inner := _mask_folder(entry))]
    if not files:
        expected = f"<case>{ending or '.nii.gz'}"
        raise InputError(f"{place} holds no label map; expected {expected}, or <case>/<class>.nii.gz")
    return dict(sorted(_by_name(files, "case").items()))


def label_files(folder: Path, ending: str | None = None) -> list[Path]:
    """Return the label maps right inside a folder, hidden files left out; pictures only where there is nothing else."""
    files = [entry for entry in sorted(folder.iterdir()) if entry.is_file() and not entry.name.startswith(".")]
    if ending is not None:
        return [file for file in files if file.name.endswith(ending)]
    return [file for file in files if ending_of(file, VOLUMES)] or [file for file in files if ending_of(file, PICTURES)]


def mask_files(folder: Path) -> dict[str, Path]:
    """Return the volume of each class in a folder of masks, by the name of the class.

    Raises:
        InputError: two files have the name of one class.
    """
    return _by_name([file for file in label_files(folder) if ending_of(file, VOLUMES)], "class")


def _by_name(files: list[Path], what: str) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for file in files:
        if (name := case_name(file)) in found:
            raise InputError(f"{what} {name} is there twice: {found[name]} and {file}; keep one of them")
        found[name] = file
    return found


def case_name(path: Path) -> str:
    """Return the name of a case from its file or folder, in one form for accented letters (NFC)."""
    if path.is_dir():
        return _plain(path.parent.name if path.name == _INNER else path.name)
    return _plain(path.name.removesuffix(ending_of(path) or ""))


def _mask_folder(folder: Path) -> Path | None:
    """Return the folder, or the one inside it, that holds masks; None for other folders."""
    if folder.name.startswith("."):
        return None
    inner = folder / _INNER
    return next((place for place in (inner, folder) if place.is_dir() and mask_files(place)), None)


def _plain(name: str) -> str:
    return unicodedata.normalize("NFC", name)
