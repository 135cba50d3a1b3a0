"""Label maps that are cut, broken or not label maps are refused by name; whole ones are read with their grid."""

from __future__ import annotations

import gzip
import struct

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813

from nnslim.errors import InputError
from nnslim.evaluation.label_files import cases_by_name, check_same_grid, pair_cases, read_label_map

AFFINE = np.array([[-0.7, 0, 0, 10], [0, 0.8, 0, -20], [0, 0, 5.0, 30], [0, 0, 0, 1]])


def save(path, values, affine=AFFINE, dtype=None):
    values = np.asarray(values)
    nib.save(nib.Nifti1Image(values.astype(dtype or values.dtype), affine), path)
    return path


@pytest.fixture
def labels():
    return np.random.default_rng(0).integers(0, 4, (11, 9, 7)).astype(np.uint8)


@pytest.mark.parametrize("dtype", ["uint8", "int16", ">i2", "int32", "float32", "float64"])
@pytest.mark.parametrize("ending", [".nii.gz", ".nii"])
def test_read_nifti_any_type_gives_small_integers(tmp_path, labels, dtype, ending):
    read = read_label_map(save(tmp_path / f"a{ending}", labels, dtype=dtype))
    np.testing.assert_array_equal(read.labels, labels)
    assert read.labels.dtype == np.uint8
    assert read.labels.flags.f_contiguous
    assert read.spacing == pytest.approx((0.7, 0.8, 5.0))
    np.testing.assert_allclose(read.affine, AFFINE, rtol=1e-6)


@pytest.mark.parametrize("ending", [".nii.gz", ".mha", ".nrrd"])
def test_read_itk_formats_have_the_grid_that_nibabel_has(tmp_path, labels, ending):
    image = sitk.GetImageFromArray(labels.T)
    image.SetSpacing((0.7, 0.8, 5.0))
    image.SetOrigin((-10.0, 20.0, 30.0))
    image.SetDirection((0.0, -1.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 1.0))
    sitk.WriteImage(image, str(tmp_path / f"a{ending}"))
    sitk.WriteImage(image, str(tmp_path / "b.nii.gz"))
    read, nifti = read_label_map(tmp_path / f"a{ending}"), read_label_map(tmp_path / "b.nii.gz")
    np.testing.assert_array_equal(read.labels, labels)
    check_same_grid(read, nifti)
    np.testing.assert_allclose(read.affine, nifti.affine, atol=1e-5)


def test_read_values_above_255_keep_their_value(tmp_path, labels):
    read = read_label_map(save(tmp_path / "a.nii.gz", labels.astype(np.int32) * 1000))
    assert read.labels.max() == 3000


@pytest.mark.parametrize("share", [0.02, 0.3, 0.7, 0.99])
@pytest.mark.parametrize("ending", [".nii.gz", ".nii"])
def test_read_cut_file_is_refused(tmp_path, labels, ending, share):
    path = save(tmp_path / f"cut é{ending}", labels)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(InputError, match=r"cut é.*cannot be read"):
        read_label_map(path)


def test_read_cut_before_compression_is_refused(tmp_path, labels):
    """A whole .gz of half a file, as a full disk leaves it."""
    content = gzip.decompress(save(tmp_path / "a.nii.gz", labels).read_bytes())
    (tmp_path / "a.nii.gz").write_bytes(gzip.compress(content[:700]))
    with pytest.raises(InputError, match=r"a\.nii\.gz cannot be read"):
        read_label_map(tmp_path / "a.nii.gz")


def test_read_flipped_bit_is_refused(tmp_path):
    path = save(tmp_path / "a.nii.gz", np.random.default_rng(0).integers(0, 255, (20, 20, 20)).astype(np.uint8))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"cannot be read"):
        read_label_map(path)


@pytest.mark.parametrize("ending", [".mha", ".nrrd"])
@pytest.mark.parametrize("share", [0.3, 0.95])
def test_read_cut_itk_file_is_refused(tmp_path, labels, ending, share):
    path = tmp_path / f"a{ending}"
    sitk.WriteImage(sitk.GetImageFromArray(labels), str(path), useCompression=False)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(InputError, match=r"cannot be read"):
        read_label_map(path)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.full((3, 3, 3), 0.5, np.float32), r"values such as 0\.5; a label map has integers"),
        (np.full((3, 3, 3), np.nan, np.float32), r"NaN or infinite"),
        (np.full((3, 3, 3), np.inf, np.float32), r"NaN or infinite"),
        (np.full((3, 3, 3), -1, np.int16), r"value -1; labels are integers in 0\.\.65535"),
        (np.full((3, 3, 3), 70000, np.int32), r"value 70000"),
        (np.ones((3, 3, 3, 2), np.uint8), r"shape \(3, 3, 3, 2\); a label map has two or three axes"),
        (np.ones((3, 3, 3), np.complex64), r"type complex64"),
    ],
)
def test_read_what_is_no_label_map_is_refused(tmp_path, values, message):
    path = tmp_path / "a.nii.gz"
    nib.save(nib.Nifti1Image(values, np.eye(4)), path)
    with pytest.raises(InputError, match=message):
        read_label_map(path)


def test_read_fourth_axis_of_one_is_dropped(tmp_path, labels):
    assert read_label_map(save(tmp_path / "a.nii.gz", labels[..., None])).labels.shape == labels.shape


@pytest.mark.parametrize("size", [0.0, float("nan")])
def test_read_spacing_that_is_no_length_is_refused(tmp_path, labels, size):
    path = save(tmp_path / "a.nii", labels)
    content = bytearray(path.read_bytes())
    struct.pack_into("<f", content, 76 + 4 * 2, size)  # pixdim[2]
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"spacing \(0\.7, (0|nan), 5\) mm; expected positive"):
        read_label_map(path)


def test_read_colours_and_what_is_absent_are_refused(tmp_path):
    sitk.WriteImage(sitk.GetImageFromArray(np.zeros((4, 5, 3), np.uint8), isVector=True), str(tmp_path / "a.png"))
    with pytest.raises(InputError, match=r"3 values per pixel"):
        read_label_map(tmp_path / "a.png")
    with pytest.raises(InputError, match=r"b\.nii\.gz does not exist"):
        read_label_map(tmp_path / "b.nii.gz")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m, a: (m[1:], a), r"differ in shape: \(11, 9, 7\) and \(10, 9, 7\)"),
        (
            lambda m, a: (m, a @ np.diag((1, 1, 1.1, 1))),
            r"differ in spacing: \(0\.7, 0\.8, 5\) and \(0\.7, 0\.8, 5\.5\)",
        ),
        (lambda m, a: (m, a + np.array((0, 0, 0, 2))), r"lie up to"),
        (lambda m, a: (m, np.diag((-1, 1, 1, 1)) @ a), r"lie up to .* mm apart \(LAS and RAS\)"),
    ],
)
def test_check_same_grid_names_both_files_and_values(tmp_path, labels, change, message):
    values, affine = change(labels, AFFINE.copy())
    affine[3] = (0, 0, 0, 1)
    first = read_label_map(save(tmp_path / "one.nii.gz", labels))
    second = read_label_map(save(tmp_path / "other.nii.gz", values, affine))
    with pytest.raises(InputError, match=rf"one\.nii\.gz and .*other\.nii\.gz .*{message}"):
        check_same_grid(first, second)


def test_check_same_grid_rounding_passes(tmp_path, labels):
    first = read_label_map(save(tmp_path / "one.nii.gz", labels))
    check_same_grid(first, read_label_map(save(tmp_path / "other.nii.gz", labels, AFFINE * (1 + 1e-6))))


def touch(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return folder


def test_pair_cases_tells_missing_and_extra(tmp_path):
    predictions = touch(tmp_path / "p", "b.nii.gz", "a.nii.gz", "x.nii.gz", "dataset.json", ".a.nii.gz", "p.png")
    references = touch(tmp_path / "g", "a.nii.gz", "b.nii.gz", "c d ü.nii.gz")
    found = pair_cases(predictions, references)
    assert list(found.pairs) == ["a", "b"]
    assert found.missing == ("c d ü",)
    assert found.extra == ("x",)


def test_pair_cases_accents_in_either_form_are_one_name(tmp_path):
    found = pair_cases(
        touch(tmp_path / "p", "Z\u0075\u0308rich 1.nii.gz"), touch(tmp_path / "g", "Z\u00fcrich 1.nii.gz")
    )
    assert list(found.pairs) == ["Z\u00fcrich 1"]


def test_pair_cases_single_files_need_no_common_name(tmp_path):
    touch(tmp_path, "fast.nii.gz", "full.nii.gz")
    found = pair_cases(tmp_path / "fast.nii.gz", tmp_path / "full.nii.gz")
    assert found.pairs == {"full": (tmp_path / "fast.nii.gz", tmp_path / "full.nii.gz")}


def test_find_cases_folders_of_masks(tmp_path):
    touch(
        tmp_path, "s1/liver.nii.gz", "s2/segmentations/liver.nii.gz", "s2/ct.nii.gz", "s3/notes.txt", ".s4/liver.nii.gz"
    )
    assert cases_by_name(tmp_path) == {"s1": tmp_path / "s1", "s2": tmp_path / "s2" / "segmentations"}


def test_find_cases_names_that_are_classes_are_masks_of_one_case(tmp_path):
    folder = touch(tmp_path / "seg", "liver.nii.gz", "spleen.nii.gz")
    assert cases_by_name(folder, class_names=("liver", "spleen", "aorta")) == {"seg": folder}
    assert set(cases_by_name(folder, class_names=("liver",))) == {"liver", "spleen"}


def test_find_cases_prescribed_ending_leaves_out_the_rest(tmp_path):
    touch(tmp_path, "a.nii.gz", "a.png", "b.png")
    assert set(cases_by_name(tmp_path)) == {"a"}
    assert set(cases_by_name(tmp_path, ".png")) == {"a", "b"}


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ((), r"g holds no label map; expected <case>\.nii\.gz"),
        (("readme.txt",), r"g holds no label map"),
        (("a.nii.gz", "a.nii"), r"case a is there twice: .*a\.nii and .*a\.nii\.gz"),
        (("b.nii.gz",), r"no prediction in .*p has the name of a reference in .*g; found, for example, a and b"),
    ],
)
def test_pair_cases_what_cannot_be_paired_is_named(tmp_path, files, message):
    predictions, references = touch(tmp_path / "p", "a.nii.gz"), tmp_path / "g"
    references.mkdir()
    touch(references, *files)
    with pytest.raises(InputError, match=message):
        pair_cases(predictions, references)
    with pytest.raises(InputError, match=r"does not exist"):
        pair_cases(predictions, tmp_path / "nowhere")
