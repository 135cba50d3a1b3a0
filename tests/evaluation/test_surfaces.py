"""Surface Dice and HD95 are those of DeepMind's surface-distance, whatever the spacing, the crop and the border."""

from __future__ import annotations

import itertools
import warnings

import nibabel as nib
import numpy as np
import pytest
from scipy import ndimage

from nnslim.errors import InputError
from nnslim.evaluation.surfaces import element_areas, surface_distances

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # old names of SciPy
    import surface_distance
    from surface_distance import lookup_tables

SPACINGS = ((1.0, 1.0, 1.0), (0.7, 0.8, 5.0), (3.0, 0.5, 1.5), (0.976562, 0.976562, 2.5))
TOLERANCES = (0.0, 0.5, 1.0, 2.0, 3.0, 7.3)


def deepmind(reference, prediction, spacing, tolerances):
    """Return surface Dice at each tolerance, HD95 and HD."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        found = surface_distance.compute_surface_distances(reference, prediction, spacing)
    dices = [surface_distance.compute_surface_dice_at_tolerance(found, tolerance) for tolerance in tolerances]
    return dices, *(surface_distance.compute_robust_hausdorff(found, percent) for percent in (95, 100))


def assert_like_deepmind(reference, prediction, spacing, tolerances=TOLERANCES):
    dices, hausdorff, largest = deepmind(reference, prediction, spacing, tolerances)
    found = surface_distances(prediction, reference, spacing)
    assert [found.surface_dice(tolerance) for tolerance in tolerances] == pytest.approx(dices, abs=1e-9)
    assert found.hausdorff(95) == pytest.approx(hausdorff, abs=1e-9)
    assert found.largest() == pytest.approx(largest, abs=1e-9)


def random_pair(generator, axes):
    """Return two blobs that have something in common, up to the border of a small box, with many different shapes."""
    shape = tuple(generator.integers(1, 22, axes))
    base = generator.normal(size=shape)
    pair = []
    for _ in range(2):
        field = ndimage.gaussian_filter(base + 0.5 * generator.normal(size=shape), generator.uniform(0, 2))
        mask = field >= np.quantile(field, generator.uniform(0.3, 0.95))
        pair.append(mask)
    return pair


@pytest.mark.parametrize("seed", range(10))
def test_surface_dice_random_masks_equal_deepmind(seed):
    generator = np.random.default_rng(seed)
    for number in range(20):
        axes = 2 if number % 5 == 0 else 3
        spacing = generator.uniform(0.3, 5, axes) if number % 2 else generator.choice([0.5, 0.7, 1, 1.5, 3, 5], axes)
        reference, prediction = random_pair(generator, axes)
        assert_like_deepmind(reference, prediction, spacing, (*TOLERANCES, generator.uniform(0, 6)))


@pytest.mark.data
@pytest.mark.parametrize("spacing", [(3.0, 3.0, 3.0), (0.8, 0.9, 4.0)])
def test_surface_dice_totalsegmentator_classes_equal_deepmind(data_root, spacing):
    folder = data_root / "data" / "totalsegmentator_samples"
    maps = [np.asarray(nib.load(folder / f"{name}.nii.gz").dataobj) for name in ("example_seg", "example_seg_fast")]
    labels = [label for label in np.unique(maps[0])[1:] if (maps[1] == label).any()]
    assert len(labels) == 40
    for label in labels:
        assert_like_deepmind(maps[0] == label, maps[1] == label, spacing, (1.0, 3.0))


@pytest.mark.data
def test_surface_dice_hippocampus_equal_deepmind(data_root):
    files = sorted((data_root / "data" / "Dataset004_Hippocampus" / "labelsTs").glob("*.nii.gz"))
    maps = [np.asarray(nib.load(file).dataobj) for file in files]
    for number, (one, other) in enumerate(itertools.pairwise(maps)):
        shape = tuple(slice(min(sizes)) for sizes in zip(one.shape, other.shape, strict=True))
        for label in (1, 2):
            assert_like_deepmind(one[shape] == label, other[shape] == label, SPACINGS[number % 4], (1.0, 2.0, 5.0))


@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (0.7, 0.8, 5.0)])
def test_element_areas_equal_deepmind(spacing):
    areas = element_areas(spacing)
    np.testing.assert_allclose(areas, lookup_tables.create_table_neighbour_code_to_surface_area(spacing), rtol=1e-14)
    lengths = lookup_tables.create_table_neighbour_code_to_contour_length(spacing[1:])
    np.testing.assert_allclose(element_areas(spacing[1:]), lengths, rtol=1e-14)


@pytest.mark.parametrize(
    ("spacing", "tolerance"),
    [
        ((0.7, 0.8, 5.0), 5.0),
        ((0.6, 0.6, 0.6), 3.0),
        ((0.7, 0.7, 0.7), 3.5),
        ((0.1, 0.1, 0.3), 0.3),
        ((1.5, 2, 2.5), 2.5),
    ],
)
def test_surface_dice_tolerance_is_a_distance_that_rounds_both_ways_equals_deepmind(spacing, tolerance):
    for seed in range(12):
        pair = np.random.default_rng(seed).random((2, 16, 16, 12)) < 0.004
        if pair[0].any() and pair[1].any():
            assert_like_deepmind(*pair, spacing, (tolerance,))


def cube(shape, start, size):
    mask = np.zeros(shape, bool)
    mask[tuple(slice(a, a + b) for a, b in zip(start, size, strict=True))] = True
    return mask


def test_surface_dice_shifted_plates_is_the_share_of_the_near_side():
    """Two half spaces, cut at x = 5 and x = 8: all elements are 3 voxels of 0.5 mm from the other plane."""
    reference, prediction = np.zeros((2, 20, 6, 6), bool)
    reference[:5], prediction[:8] = True, True
    inner = surface_distances(prediction[:, 2:4, 2:4], reference[:, 2:4, 2:4], (0.5, 1, 1))
    assert set(np.round(inner.to_reference, 9)) <= {0, 0.5, 1.0, 1.5, *np.round(np.hypot(0.5 * np.arange(4), 1), 9)}
    assert inner.to_reference.max() == pytest.approx(1.5)
    assert inner.surface_dice(1.5) == 1
    assert inner.surface_dice(1.49) < 1


def test_surface_dice_one_voxel_apart_hand_computed():
    """Single voxels, 3 mm apart: eight corners each, 1/8 |(1,1,1)| mm^2 every one; the inner corners are 2 mm apart."""
    reference, prediction = cube((9, 3, 3), (1, 1, 1), (1, 1, 1)), cube((9, 3, 3), (4, 1, 1), (1, 1, 1))
    found = surface_distances(prediction, reference, (1, 1, 1))
    np.testing.assert_allclose(found.prediction_areas, np.full(8, np.sqrt(3) / 8))
    np.testing.assert_array_equal(np.sort(found.to_reference), [2] * 4 + [3] * 4)
    assert [found.surface_dice(tolerance) for tolerance in (1.99, 2, 2.99, 3)] == [0, 0.5, 0.5, 1]
    assert found.hausdorff(95) == 3
    assert found.hausdorff(40) == 2


def test_surface_dice_uses_the_spacing_of_each_axis():
    for axis in range(3):
        shift = [1, 1, 1]
        shift[axis] = 2
        reference, prediction = cube((6, 6, 6), (1, 1, 1), (2, 2, 2)), cube((6, 6, 6), shift, (2, 2, 2))
        spacing = [1.0, 1.0, 1.0]
        spacing[axis] = 4.0
        found = surface_distances(prediction, reference, spacing)
        assert found.hausdorff(100) == 4
        assert found.surface_dice(3.9) < 1
        assert found.surface_dice(4) == 1


@pytest.mark.parametrize("spacing", SPACINGS)
def test_surface_distances_crop_and_margin_change_nothing(spacing):
    generator = np.random.default_rng(3)
    small = generator.random((2, 7, 8, 6)) < 0.4
    large = np.zeros((2, 30, 25, 20), bool)
    large[:, 11:18, 9:17, 6:12] = small
    for tolerance in TOLERANCES:
        dices = {surface_distances(*pair, spacing).surface_dice(tolerance) for pair in (small, large)}
        assert max(dices) - min(dices) < 1e-12
    assert surface_distances(*small, spacing).hausdorff() == surface_distances(*large, spacing).hausdorff()


def test_surface_distances_reordered_axes_change_nothing():
    generator = np.random.default_rng(4)
    pair = generator.random((2, 9, 7, 8)) < 0.5
    expected = surface_distances(*pair, (0.7, 1.1, 3)).surface_dice(1.0)
    turned = pair.transpose(0, 3, 1, 2)[:, ::-1]
    assert surface_distances(*turned, (3, 0.7, 1.1)).surface_dice(1.0) == pytest.approx(expected, abs=1e-12)


def test_surface_distances_equal_masks_are_at_zero():
    mask = np.random.default_rng(5).random((6, 6, 6)) < 0.5
    found = surface_distances(mask, mask, (1, 2, 3))
    assert found.surface_dice(0) == 1
    assert found.hausdorff(100) == 0


def test_surface_distances_empty_masks():
    mask, empty = cube((5, 5, 5), (1, 1, 1), (2, 2, 2)), np.zeros((5, 5, 5), bool)
    assert np.isnan(surface_distances(empty, empty, (1, 1, 1)).surface_dice(1))
    for pair in ((mask, empty), (empty, mask)):
        found = surface_distances(*pair, (1, 1, 1))
        assert found.surface_dice(1e9) == 0
        assert np.isnan(found.hausdorff())


def test_surface_distances_wrong_input_is_refused():
    mask = np.ones((3, 3, 3), bool)
    with pytest.raises(InputError, match=r"one shape"):
        surface_distances(mask, mask[:2], (1, 1, 1))
    with pytest.raises(InputError, match=r"spacing per axis"):
        surface_distances(mask, mask, (1, 1))
    for spacing in ((1, 0, 1), (1, -1, 1), (1, float("nan"), 1)):
        with pytest.raises(InputError, match=r"positive spacings"):
            surface_distances(mask, mask, spacing)


@pytest.mark.parametrize(("spacing", "expected"), [((1.0, 1.0, 1.0), 10.63), ((2.0, 1.0), 4 * np.pi)])
def test_compactness_of_a_ball_is_the_smallest_and_an_empty_mask_has_none(spacing, expected):
    grid = np.stack(np.meshgrid(*[np.arange(-20, 21) * size for size in spacing], indexing="ij"))
    ball, empty = (grid**2).sum(0) < 18**2, np.zeros(grid.shape[1:], bool)
    ragged = ball & (np.random.default_rng(0).random(ball.shape) < 0.9)
    counts = int(ragged.sum()), int(ball.sum())
    found, smallest = surface_distances(ragged, ball, spacing).compactness(*counts)
    assert smallest == pytest.approx(expected, rel=0.2) and found > 1.5 * smallest
    alone = surface_distances(empty, ball, spacing)
    assert np.isnan(alone.compactness(0, counts[1])[0]) and alone.compactness(0, counts[1])[1] == smallest
    assert np.isnan(alone.largest())
