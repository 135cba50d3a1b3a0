"""Checks on image files that the readers do not make."""

from __future__ import annotations

import logging
import math
import zlib
from collections.abc import Iterator
from contextlib import suppress
from itertools import chain
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

from nnslim.errors import InputError, one_line
from nnslim.files import PACKED, unpacked

_LONGEST = 540  # bytes of a header: of NIfTI-2; NIfTI-1 has 348
_log = logging.getLogger("nnslim")


def check_complete(path: Path) -> None:
    """Refuse a NIfTI file that is not whole; other formats pass unchecked. Cost: one pass of decompression.

    ITK reads a cut .nii.gz without an error and fills the rest with whatever it has, so a half-copied CT would be
    segmented as if it were whole. On a full disk it writes such files, also without an error.

    Raises:
        InputError: no header, damaged compression, or fewer bytes of voxels than the header promises.
    """
    if is_nifti(path) and _scanned(path) is None:
        raise InputError(f"{path.name} cannot be read: it has no NIfTI header")


def check_image(path: Path) -> None:
    """Refuse a NIfTI file that is cut short or damaged, and warn of what else is wrong with it.

    What the model's reader takes is taken; only what is not there cannot be. Other formats pass unchecked, and so does
    a file that is no NIfTI whatever its name: its reader may know it. Cost: one pass of decompression.

    Raises:
        InputError: damaged compression, or fewer bytes of voxels than the header promises.
    """
    if not is_nifti(path):
        return
    notes = []
    if (found := _scanned(path)) is None:
        notes.append("is no NIfTI file")
    else:
        header, bad, more = found
        with path.open("rb") as stream:
            if path.name.lower().endswith(".gz") and stream.read(2) != PACKED:
                notes.append("is not compressed")
        shape = header.get_data_shape()
        spacing = [float(value) for value in header["pixdim"][1 : 1 + min(3, len(shape))]]
        if not all(math.isfinite(value) and value != 0 for value in spacing):
            notes.append(f"has a voxel spacing of {' x '.join(f'{value:g}' for value in spacing)} mm")
        if bad:
            notes.append(f"has {bad:,} of {math.prod(shape):,} voxels that are NaN or infinite")
        if more:
            notes.append(f"has {more:,} bytes behind its voxels")
    if notes:
        _log.warning("%s %s; it is taken as its reader takes it", path.name, ", ".join(notes))


def is_nifti(path: Path) -> bool:
    """Return whether a file is one by its name."""
    return path.name.lower().endswith((".nii", ".nii.gz"))


def count_voxels(path: Path) -> int:
    """Return the voxels of a NIfTI file by its header; of others the bytes, 0 for none."""
    with suppress(OSError, EOFError, zlib.error):
        if is_nifti(path) and (header := _beginning(unpacked(path))[1]) is not None:
            return math.prod(int(size) for size in header.get_data_shape())
    return path.stat().st_size if path.is_file() else 0


def _scanned(path: Path) -> tuple[Any, int, int] | None:
    """Read a file once: NIfTI header, voxels that are not finite, bytes behind the voxels; None for other content."""
    try:
        head, header = _beginning(blocks := unpacked(path))
        if header is None:
            return None
        dtype, offset = header.get_data_dtype(), header["vox_offset"]
        offset = int(offset) if np.isfinite(offset) else 0
        expected = offset + math.prod(max(int(size), 0) for size in header.get_data_shape()) * dtype.itemsize
        size, bad, values = 0, 0, b""
        for block in chain((head,), blocks):
            if dtype.kind in "fc":
                values += block[max(offset - size, 0) : max(expected - size, 0)]
                whole = len(values) // dtype.itemsize
                bad += whole - int(np.count_nonzero(np.isfinite(np.frombuffer(values, dtype, whole))))
                values = values[whole * dtype.itemsize :]
            size += len(block)
    except (nib.spatialimages.HeaderDataError, KeyError):
        return None  # a type of voxels that nobody knows
    except (OSError, EOFError, zlib.error, ValueError) as error:
        raise InputError(f"{path.name} cannot be read: {one_line(error)}") from error
    if size < expected:
        raise InputError(f"{path.name} cannot be read: cut short, {size:,} bytes of voxels and header of {expected:,}")
    return header, bad, size - expected


def _beginning(blocks: Iterator[bytes]) -> tuple[bytes, Any]:
    """Return so many of the blocks that a header is in them, and the header as it is, unrepaired, or None."""
    head, kinds = b"", {348: nib.Nifti1Header, 540: nib.Nifti2Header}
    while len(head) < _LONGEST and (block := next(blocks, b"")):
        head += block
    sizes = [int.from_bytes(head[:4], order) for order in ("little", "big")]
    kind = next((kinds[size] for size in sizes if size in kinds), None)
    if kind is None and head[344:347] in (b"n+1", b"ni1"):
        kind = nib.Nifti1Header
    whole = kind is not None and len(head) >= kind.sizeof_hdr
    return head, kind(head[: kind.sizeof_hdr], check=False) if whole else None
