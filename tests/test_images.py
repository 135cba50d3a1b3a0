"""A cut image is refused; ITK would read it."""

from __future__ import annotations

import nibabel as nib
import numpy as np
import pytest
import SimpleITK

from nnslim.errors import InputError
from nnslim.work.images import check_complete


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
