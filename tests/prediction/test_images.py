"""What readers would take with a wrong meaning is refused."""

from __future__ import annotations

import gzip
import struct

import nibabel as nib
import numpy as np
import pytest
import SimpleITK

from nnslim.errors import InputError
from nnslim.files import unpacked
from nnslim.prediction.images import check_complete, check_image, count_voxels


@pytest.fixture(params=["nii.gz", "nii"])
def image(request, tmp_path):
    path = tmp_path / f"image.{request.param}"
    voxels = np.random.default_rng(0).integers(-1000, 1000, (20, 21, 22)).astype(np.int16)
    nib.save(nib.Nifti1Image(voxels, np.eye(4)), path)
    return path


def test_check_complete_whole_file_passes(image):
    before = image.read_bytes()
    check_complete(image)
    assert image.read_bytes() == before


@pytest.mark.parametrize("keep", [0.98, 0.5, 0.01, 0.0])
def test_check_complete_cut_file_is_refused(image, keep):
    image.write_bytes(image.read_bytes()[: int(image.stat().st_size * keep)])
    with pytest.raises(InputError, match=rf"{image.name} cannot be read"):
        check_complete(image)


def test_check_complete_damaged_byte_is_refused(tmp_path):
    path = tmp_path / "image.nii.gz"
    nib.save(nib.Nifti1Image(np.random.default_rng(0).random((20, 20, 20)), np.eye(4)), path)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)
    with pytest.raises(InputError, match="cannot be read"):
        check_complete(path)


def test_check_complete_other_formats_pass_unchecked(tmp_path):
    SimpleITK.WriteImage(SimpleITK.GetImageFromArray(np.zeros((3, 3, 3), np.uint8)), str(tmp_path / "image.mha"))
    assert check_complete(tmp_path / "image.mha") is None


def _with_bytes(path, offset: int, value: bytes) -> None:
    raw = bytearray(gzip.decompress(path.read_bytes()))
    raw[offset : offset + len(value)] = value
    path.write_bytes(gzip.compress(bytes(raw)))


def test_check_image_passes_what_is_whole(image):
    check_image(image)
    assert count_voxels(image) == 20 * 21 * 22


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_check_image_counts_voxels_that_are_no_numbers(tmp_path, caplog, dtype):
    """ITK reads them as 0; the second and third lie beyond the first block that is read."""
    path, voxels = tmp_path / "image.nii.gz", np.zeros((70, 80, 90), dtype)
    for place, value in (((0, 0, 0), np.nan), ((69, 79, 89), np.inf), ((1, 2, 80), -np.inf)):
        voxels[place] = value
    nib.save(nib.Nifti1Image(voxels, np.eye(4)), path)
    check_complete(path)
    check_image(path)
    assert "image.nii.gz has 3 of 504,000 voxels that are NaN or infinite; it is taken" in caplog.text


def test_check_image_names_a_spacing_that_is_no_length(tmp_path, caplog):
    path = tmp_path / "image.nii.gz"
    for value, said in ((0.0, "1 x 0 x 1"), (np.nan, "1 x nan x 1"), (np.inf, "1 x inf x 1")):
        nib.save(nib.Nifti1Image(np.zeros((3, 4, 5), np.int16), np.eye(4)), path)
        _with_bytes(path, 84, struct.pack("<f", value))
        check_image(path)
        assert f"has a voxel spacing of {said} mm; it is taken" in caplog.text
    caplog.clear()
    nib.save(nib.Nifti1Image(np.zeros((3, 4, 5), np.int16), np.diag([-1, -2, 3, 1])), path)
    check_image(path)
    assert not caplog.text


def test_check_image_leaves_other_content_to_the_reader_and_says_so(tmp_path, caplog):
    for content in (b"", b"this is no image" * 100):
        (tmp_path / "image.nii.gz").write_bytes(content)
        check_image(tmp_path / "image.nii.gz")
        with pytest.raises(InputError, match=r"image.nii.gz cannot be read: it has no NIfTI header"):
            check_complete(tmp_path / "image.nii.gz")
    assert caplog.text.count("image.nii.gz is no NIfTI file; it is taken as its reader takes it") == 2
    assert count_voxels(tmp_path / "image.nii.gz") == 1600


def test_count_voxels_of_a_type_that_nobody_knows(image):
    """nibabel does not load such a file; listing a folder that holds one must not end the run."""
    raw = bytearray(b"".join(unpacked(image)))
    struct.pack_into("<h", raw, 70, 999)
    image.write_bytes(raw)
    assert count_voxels(image) == 20 * 21 * 22
