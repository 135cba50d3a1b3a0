"""Checks on image files that the readers do not make."""

from __future__ import annotations

import gzip
import math
import zlib
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

from nnslim.errors import InputError, one_line

_BLOCK = 1 << 20


def check_complete(path: Path) -> None:
    """Refuse a NIfTI file that is cut short; other formats pass unchecked. Cost: one pass of decompression.

    ITK reads a cut .nii.gz without an error and fills the rest with whatever it has, so a half-copied CT would be
    segmented as if it were whole. On a full disk it writes such files, also without an error.

    Raises:
        InputError: unreadable header, damaged compression, or fewer bytes of voxels than the header promises.
    """
    if is_nifti(path):
        _scanned(path, finite=False)


def check_image(path: Path) -> None:
    """Refuse a NIfTI file that readers would misread; other formats pass unchecked. Cost: one pass of decompression.

    ITK silently takes 1 mm for a spacing of zero or NaN, and 0 for voxels that are NaN; nnU-Net cannot write what
    belongs to a 4D file.

    Raises:
        InputError: what `check_complete` refuses, a fourth axis, a spacing that is not a positive number, or voxels
        that are NaN or infinite.
    """
    if not is_nifti(path):
        return
    header, bad = _scanned(path, finite=True)
    shape = [int(size) for size in header.get_data_shape()]
    if math.prod(shape[3:]) > 1:
        raise InputError(
            f"{path.name} has {len(shape)} axes ({' x '.join(map(str, shape))} voxels); expected 3, and a file of its "
            "own for each channel or time"
        )
    spacing = [float(value) for value in header["pixdim"][1 : 1 + min(3, len(shape))]]
    if not all(math.isfinite(value) and value != 0 for value in spacing):
        text = " x ".join(f"{value:g}" for value in spacing)
        raise InputError(f"{path.name} has a voxel spacing of {text} mm; expected positive numbers")
    if bad:
        raise InputError(not_finite(path, bad, math.prod(shape)))


def not_finite(path: Path, bad: int, total: int) -> str:
    """Return the message for voxels that are not finite."""
    return f"{path.name} has {bad:,} of {total:,} voxels that are NaN or infinite; expected finite numbers"


def is_nifti(path: Path) -> bool:
    """Return whether a file is one by its name."""
    return path.name.endswith((".nii", ".nii.gz"))


def count_voxels(path: Path) -> int:
    """Return the voxels of a NIfTI file by its header; of others the bytes, 0 for none."""
    try:
        if is_nifti(path):
            return math.prod(int(size) for size in nib.load(path).header.get_data_shape())
    except (OSError, EOFError, zlib.error, ValueError, nib.filebasedimages.ImageFileError):
        pass
    return path.stat().st_size if path.is_file() else 0


def _scanned(path: Path, *, finite: bool) -> tuple[Any, int]:
    """Read a NIfTI file once; return its header as it is, and how many voxels are not finite where that is asked."""
    try:
        kind = type(nib.load(path).header)
        with gzip.open(path) if path.name.endswith(".gz") else path.open("rb") as stream:
            header = kind.from_fileobj(stream, check=False)  # checked, it would come repaired
            stream.seek(0)
            offset, dtype = int(header.get_data_offset()), header.get_data_dtype()
            expected = offset + math.prod(int(size) for size in header.get_data_shape()) * dtype.itemsize
            head = stream.read(offset)
            size, bad = len(head), 0
            while block := stream.read(_BLOCK):
                if finite and dtype.kind == "f":
                    usable = min(len(block), expected - size) // dtype.itemsize
                    bad += usable - int(np.count_nonzero(np.isfinite(np.frombuffer(block, dtype, max(usable, 0)))))
                size += len(block)
    except (OSError, EOFError, zlib.error, ValueError, nib.filebasedimages.ImageFileError) as error:
        raise InputError(f"{path.name} cannot be read: {one_line(error)}") from error
    if size < expected:
        raise InputError(f"{path.name} cannot be read: cut short, {size:,} bytes of voxels and header of {expected:,}")
    return header, bad
