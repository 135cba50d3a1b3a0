"""Checks on image files that the readers do not make."""

from __future__ import annotations

import gzip
import math
import zlib
from pathlib import Path

import nibabel as nib

from nnslim.errors import InputError

_BLOCK = 1 << 20


def check_complete(path: Path) -> None:
    """Refuse a NIfTI file that is cut short; other formats pass unchecked.

    ITK reads a cut .nii.gz without an error and fills the rest with whatever it has, so a half-copied CT would be
    segmented as if it were whole.

    Args:
        path: .nii or .nii.gz file. Cost: one pass of decompression.
    Raises:
        InputError: unreadable header, damaged compression, or fewer bytes of voxels than the header promises.
    """
    compressed = path.name.endswith(".nii.gz")
    if not compressed and path.suffix != ".nii":
        return
    try:
        header = nib.load(path).header
        expected = int(header.get_data_offset()) + math.prod(header.get_data_shape()) * header["bitpix"].item() // 8
        found = _uncompressed_size(path) if compressed else path.stat().st_size
    except (OSError, EOFError, zlib.error, ValueError, nib.filebasedimages.ImageFileError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"{path.name} cannot be read: {reason[:300]}") from error
    if found < expected:
        raise InputError(f"{path.name} cannot be read: cut short, {found:,} bytes of voxels and header of {expected:,}")


def _uncompressed_size(path: Path) -> int:
    size = 0
    with gzip.open(path) as stream:
        while block := stream.read(_BLOCK):
            size += len(block)
    return size
