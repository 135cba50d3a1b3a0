"""Find, pair and read label maps: whole files only, integers only, with their place in the patient."""

from __future__ import annotations

import io
import itertools
import unicodedata
import zlib
from collections.abc import Collection
from pathlib import Path
from typing import Any, NamedTuple

import nibabel as nib
import numpy as np
import SimpleITK as sitk  # noqa: N813

from nnslim.errors import InputError, one_line
from nnslim.files import check_name, read_json, unpacked

NIFTI = (".nii.gz", ".nii")
VOLUMES = (*NIFTI, ".mha", ".mhd", ".nrrd")
TIFFS = (".tif", ".tiff")
PICTURES = (".png", *TIFFS, ".bmp")
_NIBABEL = (nib.filebasedimages.ImageFileError, nib.spatialimages.HeaderDataError, nib.wrapstruct.WrapStructError)
_LARGEST = 65535
_NEAR = 0.01  # voxels between the corners of two grids that are the same but for rounding
_LPS_TO_RAS = np.diag((-1.0, -1.0, 1.0, 1.0))


class LabelMap(NamedTuple):
    """A label map and its grid.

    Attributes:
        path: file.
        labels: (X, Y) or (X, Y, Z) uint8 or uint16, in the order of the file: the first axis is the fastest in memory.
        spacing: mm per voxel along each axis.
        affine: (4, 4), voxel index to mm towards right, anterior, superior.
    """

    path: Path
    labels: np.ndarray
    spacing: tuple[float, ...]
    affine: np.ndarray


def ending_of(path: Path, known: tuple[str, ...] = VOLUMES + PICTURES) -> str | None:
    """Return the ending of a file if it is a known one, in the file's own spelling."""
    return next((path.name[-len(end) :] for end in known if path.name.lower().endswith(end)), None)


def read_label_map(path: Path) -> LabelMap:
    """Read a label map in any format of nnU-Net's readers.

    Args:
        path: NIfTI is read by nibabel, everything else by ITK.
    Raises:
        InputError: the file is cut short or damaged; four axes or colours; values that are no integers in 0..65535;
        a spacing that is not positive.
    """
    values, spacing, affine = read_volume(path)
    if values.ndim not in (2, 3):
        raise InputError(f"{path} has shape {values.shape}; a label map has two or three axes")
    if not all(np.isfinite(size) and size > 0 for size in spacing):
        raise InputError(f"{path} has spacing {_numbers(spacing)} mm; expected positive numbers")
    if not np.isfinite(affine).all():
        raise InputError(f"{path} has an affine with values that are not finite")
    return LabelMap(path, _as_labels(values, path), tuple(float(size) for size in spacing), affine)


def check_same_grid(first: LabelMap, second: LabelMap) -> None:
    """Raise an InputError, with both files and values, where shape, spacing, orientation or place differ."""
    both = f"{first.path} and {second.path}"
    if first.labels.shape != second.labels.shape:
        raise InputError(f"{both} differ in shape: {first.labels.shape} and {second.labels.shape}")
    if not np.allclose(first.spacing, second.spacing, rtol=1e-3, atol=0):
        raise InputError(f"{both} differ in spacing: {_numbers(first.spacing)} and {_numbers(second.spacing)}")
    ends = [(0, size - 1) for size in (*first.labels.shape, 1)[:3]]
    corners = np.array([(*corner, 1) for corner in itertools.product(*ends)], float).T
    apart = float(np.linalg.norm((first.affine - second.affine)[:3] @ corners, axis=0).max())
    if apart > _NEAR * min(first.spacing):
        directions = ["".join(nib.aff2axcodes(one.affine)) for one in (first, second)]
        turned = f" ({directions[0]} and {directions[1]})" if directions[0] != directions[1] else ""
        raise InputError(
            f"{both} have one shape but lie up to {apart:.3g} mm apart{turned}; "
            "expected predictions in the grid of their references"
        )


def _numbers(values: Any) -> str:
    return "(" + ", ".join(f"{float(value):.4g}" for value in values) + ")"


def read_volume(path: Path, *, grey: bool = False) -> tuple[np.ndarray, tuple[float, ...], np.ndarray]:
    """Return the values of an image or label map, spacing (mm) as the header has it, and affine (RAS), unchecked.

    Args:
        grey: take the mean of several values per pixel, as of colours, and the first of several volumes.
    Raises:
        InputError: the file is cut short, damaged, of no known format, or has several values per pixel.
    """
    try:
        return _read_nifti(path, grey) if ending_of(path, NIFTI) else _read_itk(path, grey)
    except FileNotFoundError as error:
        raise InputError(f"{path} does not exist") from error
    except (OSError, EOFError, ValueError, RuntimeError, zlib.error, *_NIBABEL) as error:
        raise InputError(f"{path} cannot be read: {one_line(error)}") from error


def _read_nifti(path: Path, grey: bool) -> tuple[np.ndarray, tuple[float, ...], np.ndarray]:
    # The whole stream, and by nibabel: the sum at its end is then checked, and nibabel counts the voxels. ITK reads a
    # file that is cut short without an error.
    content = b"".join(unpacked(path))
    second = 540 in (int.from_bytes(content[:4], order) for order in ("little", "big"))
    kind = nib.Nifti2Image if second else nib.Nifti1Image
    image = kind.from_bytes(content)
    # A header that nibabel has checked shows a spacing of 0 as 1.
    header = kind.header_class.from_fileobj(io.BytesIO(content), check=False)
    del content
    values = np.asanyarray(image.dataobj)
    while values.ndim > 3 and (values.shape[-1] == 1 or grey):
        values = values[..., 0]
    return values, header.get_zooms()[: values.ndim], np.asarray(image.affine, float)


def _read_itk(path: Path, grey: bool) -> tuple[np.ndarray, tuple[float, ...], np.ndarray]:
    check_name(path)
    image = sitk.ReadImage(str(path))
    values = sitk.GetArrayFromImage(image)
    if (count := image.GetNumberOfComponentsPerPixel()) != 1:
        if not grey:
            raise ValueError(f"{count} values per pixel; a label map has one")
        values = values.mean(-1)
    # nnU-Net keeps the spacing of a 3D TIFF, slowest axis first, in a file beside it.
    stored = ending_of(path, TIFFS) and read_json(path.with_suffix(".json")).get("spacing")
    if isinstance(stored, list) and len(stored) == image.GetDimension():
        image.SetSpacing([float(size) for size in stored[::-1]])
    size, side = image.GetDimension(), slice(min(image.GetDimension(), 3))
    affine = np.eye(4)
    affine[side, side] = (np.reshape(image.GetDirection(), (size, size)) * image.GetSpacing())[side, side]
    affine[side, 3] = image.GetOrigin()[side]
    return values.T, image.GetSpacing(), _LPS_TO_RAS @ affine


def _as_labels(values: np.ndarray, path: Path) -> np.ndarray:
    """Return the values in the smallest unsigned type."""
    if values.dtype.kind not in "biuf":
        raise InputError(f"{path} has values of type {values.dtype}; a label map has integers")
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        raise InputError(f"{path} has NaN or infinite values; a label map has integers")
    if values.dtype.kind == "f" and (broken := values != np.rint(values)).any():
        raise InputError(f"{path} has values such as {values[broken].flat[0]:.6g}; a label map has integers")
    low, high = values.min(initial=0), values.max(initial=0)
    if low < 0 or high > _LARGEST:
        raise InputError(f"{path} has the value {low if low < 0 else high:g}; labels are integers in 0..{_LARGEST}")
    kind = np.uint8 if high < 256 else np.uint16
    return np.asfortranarray(values.astype(kind, order="K", copy=False))


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
    """Return the label map, or the folder of masks, of each case, sorted by name; errors as for `pair_cases`."""
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
    """Return the volume of each class in a folder of masks; two files of one class are an InputError."""
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
