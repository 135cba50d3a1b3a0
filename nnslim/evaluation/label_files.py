"""Read label maps: whole files only, integers only, with their place in the patient."""

from __future__ import annotations

import gzip
import io
import itertools
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import nibabel as nib
import numpy as np
import SimpleITK as sitk  # noqa: N813

from nnslim.errors import InputError

NIFTI = (".nii.gz", ".nii")
VOLUMES = (*NIFTI, ".mha", ".mhd", ".nrrd")
PICTURES = (".png", ".tif", ".tiff", ".bmp")
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
    """Refuse two label maps whose voxels lie elsewhere.

    Raises:
        InputError: shape, spacing, orientation or place differ; both files and both values are named.
    """
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


def read_volume(path: Path) -> tuple[np.ndarray, tuple[float, ...], np.ndarray]:
    """Return the values of an image or label map, spacing (mm) as the header has it, and affine (RAS), unchecked.

    Raises:
        InputError: the file is cut short, damaged, or of no known format.
    """
    try:
        return _read_nifti(path) if ending_of(path, NIFTI) else _read_itk(path)
    except FileNotFoundError as error:
        raise InputError(f"{path} does not exist") from error
    except (OSError, EOFError, ValueError, RuntimeError, zlib.error, nib.filebasedimages.ImageFileError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"{path} cannot be read: {reason[:300]}") from error


def _read_nifti(path: Path) -> tuple[np.ndarray, tuple[float, ...], np.ndarray]:
    # The whole stream, and by nibabel: gzip then checks the sum at its end, and nibabel the number of voxels. ITK reads
    # a file that is cut short without an error.
    content = gzip.decompress(path.read_bytes()) if path.name.lower().endswith(".gz") else path.read_bytes()
    kind = type(nib.load(path))
    image = kind.from_bytes(content)
    # A header that nibabel has checked shows a spacing of 0 as 1.
    header = kind.header_class.from_fileobj(io.BytesIO(content), check=False)
    del content
    values = np.asanyarray(image.dataobj)
    while values.ndim > 3 and values.shape[-1] == 1:
        values = values[..., 0]
    return values, header.get_zooms()[: values.ndim], np.asarray(image.affine, float)


def _read_itk(path: Path) -> tuple[np.ndarray, tuple[float, ...], np.ndarray]:
    image = sitk.ReadImage(str(path))
    if image.GetNumberOfComponentsPerPixel() != 1:
        raise ValueError(f"{image.GetNumberOfComponentsPerPixel()} values per pixel; a label map has one")
    size, side = image.GetDimension(), slice(min(image.GetDimension(), 3))
    affine = np.eye(4)
    affine[side, side] = (np.reshape(image.GetDirection(), (size, size)) * image.GetSpacing())[side, side]
    affine[side, 3] = image.GetOrigin()[side]
    return sitk.GetArrayFromImage(image).T, image.GetSpacing(), _LPS_TO_RAS @ affine


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
