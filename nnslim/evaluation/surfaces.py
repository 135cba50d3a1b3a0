"""Distances between the surfaces of two masks, as DeepMind's surface-distance defines them.

Why not a library: in one run of `benchmarks/evaluation.py` (docs/evaluation.md) DeepMind's own package took 2.1 times
the CPU seconds of this file, and it uses names that SciPy and NumPy are dropping. MONAI's sub-voxel mode took 3.3 times
as long and is not equal: it rounds to float32, so an element exactly at the tolerance may change sides. Here the work
is proportional to the surface, not to the volume.

Reference: Nikolov et al., Clinically Applicable Segmentation of Head and Neck Anatomy for Radiotherapy, JMIR 2021;
https://github.com/google-deepmind/surface-distance (Apache-2.0), whose areas the table below reproduces.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from scipy import ndimage
from scipy.spatial import KDTree

from nnslim.errors import InputError

# The 256 ways to fill the eight corners of a 2x2x2 cube are, but for rotation, mirroring and exchange of inside and
# outside, these (marching cubes). Each: code of the filled corners -> (normal, how often) of its triangles, in eighths
# of a voxel.
_CASES = {
    0b0000_0001: (((1, 1, 1), 1),),
    0b0000_0011: (((1, 1, 0), 4),),
    0b0000_0110: (((1, 1, 1), 2),),
    0b0000_0111: (((1, 0, 0), 4), ((1, 1, 1), 3)),
    0b0000_1111: (((1, 0, 0), 8),),
    0b0001_0110: (((1, 1, 1), 3),),
    0b0001_0111: (((1, 1, 1), 6),),
    0b0001_1000: (((1, 1, 1), 2),),
    0b0001_1001: (((0, 1, 1), 4), ((1, 1, 1), 1)),
    0b0001_1011: (((0, 1, 1), 2), ((1, 0, 1), 2), ((1, 1, 1), 4)),
    0b0001_1110: (((1, 0, 0), 4), ((1, 1, 1), 4)),
    0b0011_1100: (((1, 1, 0), 8),),
    0b0110_1001: (((1, 1, 1), 4),),
}
_TIE = 1e-9  # relative; distances as near as that to the tolerance may be rounded to either side
_LEAF = 32  # points; the tree is asked once only, so building it must be cheap


class SurfaceDistances(NamedTuple):
    """Surface elements of two masks.

    Attributes:
        to_reference: mm from each element of the prediction to the nearest one of the reference; infinite where the
            reference is empty. to_prediction: the other way round.
        prediction_areas, reference_areas: mm^2 of each element (mm in 2D), in the same order.
        prediction_points, reference_points: (elements, axes) voxel corners, the lowest of both at 0.
        spacing: mm per voxel along each axis.
    """

    to_reference: np.ndarray
    to_prediction: np.ndarray
    prediction_areas: np.ndarray
    reference_areas: np.ndarray
    prediction_points: np.ndarray
    reference_points: np.ndarray
    spacing: tuple[float, ...]

    def surface_dice(self, tolerance: float) -> float:
        """Return the share of both surfaces that lies within `tolerance` mm of the other one (NSD).

        NaN where both masks are empty, 0 where one of them is.
        """
        total = self.prediction_areas.sum() + self.reference_areas.sum()
        if not total:
            return float("nan")
        points = (self.prediction_points, self.reference_points)
        near = self.prediction_areas[self._within(self.to_reference, *points, tolerance)].sum()
        near += self.reference_areas[self._within(self.to_prediction, *reversed(points), tolerance)].sum()
        return float(near / total)

    def hausdorff(self, percent: float = 95.0) -> float:
        """Return the distance in mm that `percent` of the area keeps, for the worse of the two directions.

        This is `compute_robust_hausdorff` of DeepMind's surface-distance, which weights elements by their area; MONAI
        counts voxels instead. NaN where a mask is empty: there is no distance then.
        """
        if not len(self.to_reference) or not len(self.to_prediction):
            return float("nan")
        directions = ((self.to_reference, self.prediction_areas), (self.to_prediction, self.reference_areas))
        return max(_percentile(distances, areas, percent) for distances, areas in directions)

    def largest(self) -> float:
        """Return the Hausdorff distance in mm: the largest of all. NaN where a mask is empty."""
        if not len(self.to_reference) or not len(self.to_prediction):
            return float("nan")
        return float(max(self.to_reference.max(), self.to_prediction.max()))

    def compactness(self, predicted: int, reference: int) -> tuple[float, float]:
        """Return surface^1.5 / volume of prediction and reference: 10.6 for a ball, 12.6 for a disk (length^2 / area).

        Args:
            predicted, reference: their voxels; NaN where there is none.
        """
        axes = len(self.spacing)
        sides = ((self.prediction_areas, predicted), (self.reference_areas, reference))
        volumes = [voxels * float(np.prod(self.spacing)) for _, voxels in sides]
        made = [float(areas.sum()) ** (axes / (axes - 1)) for areas, _ in sides]
        return tuple(one / volume if volume else float("nan") for one, volume in zip(made, volumes, strict=True))

    def _within(self, distances: np.ndarray, points: np.ndarray, others: np.ndarray, tolerance: float) -> np.ndarray:
        """Return which elements are within the tolerance, as a distance transform would decide.

        Two elements of the other surface may be equally near, but rounded one up and one down: at a spacing of
        (0.7, 0.8) mm both 5 mm and 2 x 0.7 by 6 x 0.8 mm. Where the tolerance is that distance, the choice between them
        decides; DeepMind's is the distance transform's. It is asked in these rare cases only.
        """
        doubtful = (np.abs(distances - tolerance) <= _TIE * tolerance) & (distances > 0)
        if doubtful.any() and not _is_exact(self.spacing):
            outside = np.ones(np.maximum(points.max(axis=0), others.max(axis=0)) + 1, bool)
            outside[tuple(others.T)] = False
            distances = ndimage.distance_transform_edt(outside, sampling=self.spacing)[tuple(points.T)]
        return distances <= tolerance


def surface_distances(prediction: np.ndarray, reference: np.ndarray, spacing: Sequence[float]) -> SurfaceDistances:
    """Return the distances between the surfaces of two masks; what lies outside of the arrays is background.

    Both may be cropped to a box that holds all of both: the result does not change.

    Args:
        prediction, reference: booleans of one shape, two or three axes.
        spacing: mm per voxel along each axis.
    Raises:
        InputError: other shapes, or a spacing that is not positive and finite.
    Cost: a few passes over the bytes, and a k-d tree query for each element that is not on both surfaces.
    """
    if prediction.shape != reference.shape or prediction.ndim != len(spacing):
        found = f"{prediction.shape}, {reference.shape} and {len(spacing)} spacings"
        raise InputError(f"masks of one shape and a spacing per axis are expected, found {found}")
    spacing = tuple(float(size) for size in spacing)
    table = element_areas(spacing)
    codes = [_neighbour_codes(mask) for mask in (prediction, reference)]
    shape = codes[0].shape
    flat = [code.reshape(-1) for code in codes]
    places = [np.flatnonzero(_is_surface(code, len(table))) for code in flat]
    areas = [table[code[place]] for code, place in zip(flat, places, strict=True)]
    shared = [_is_surface(flat[1 - one][places[one]], len(table)) for one in (0, 1)]
    points = [np.stack(np.unravel_index(place, shape), axis=1) for place in places]
    if any(len(one) for one in points):
        lowest = np.min([one.min(axis=0) for one in points if len(one)], axis=0)
        points = [one - lowest for one in points]
    distances = [_nearest(points[one], points[1 - one], shared[one], spacing) for one in (0, 1)]
    return SurfaceDistances(*distances, *areas, *points, spacing)


@lru_cache(maxsize=64)
def element_areas(spacing: tuple[float, ...]) -> np.ndarray:
    """Return the area in mm^2 of the surface through a cube of eight voxels, by the code of the filled ones.

    Args:
        spacing: mm per voxel; of two numbers the table is of the length in mm of the contour through four pixels.
    Returns:
        (256,) or (16,) float64, read-only. Corner (a, b, c) has bit 7 - 4a - 2b - c, pixel (a, b) bit 3 - 2a - b.
    Raises:
        InputError: not two or three numbers, or one that is not positive and finite.
    """
    if len(spacing) not in (2, 3) or not all(np.isfinite(size) and size > 0 for size in spacing):
        raise InputError(f"two or three positive spacings in mm are expected, found {spacing}")
    if len(spacing) == 2:
        corner = np.hypot(*spacing) / 2
        half = [0, corner, corner, spacing[1], corner, spacing[0], 2 * corner, corner]
        table = np.array(half + half[::-1])
    else:
        table = _triangle_areas(np.array(spacing))
    table.flags.writeable = False
    return table


def _triangle_areas(spacing: np.ndarray) -> np.ndarray:
    table = np.zeros(256)
    faces = spacing.prod() / spacing  # mm^2 of a voxel's face across each axis
    for code, triangles in _CASES.items():
        corners = np.unpackbits(np.uint8(code)).reshape(2, 2, 2)
        for axes in itertools.permutations(range(3)):
            area = sum(count / 8 * np.linalg.norm(np.take(normal, axes) * faces) for normal, count in triangles)
            for mirrored in itertools.product((slice(None), slice(None, None, -1)), repeat=3):
                turned = int(np.packbits(corners.transpose(axes)[mirrored]).item())
                table[turned] = table[255 - turned] = area
    return table


def _neighbour_codes(mask: np.ndarray) -> np.ndarray:
    """Return the uint8 code of the 2 x 2 (x 2) voxels around each voxel corner, those outside included: shape + 1."""
    codes = np.zeros([size + 2 for size in mask.shape], np.uint8)
    codes[(slice(1, -1),) * mask.ndim] = mask
    for axis in reversed(range(mask.ndim)):  # pairs along one axis, then pairs of pairs
        low, high = [slice(None)] * mask.ndim, [slice(None)] * mask.ndim
        low[axis], high[axis] = slice(None, -1), slice(1, None)
        codes = codes[tuple(low)] << (1 << (mask.ndim - 1 - axis)) | codes[tuple(high)]
    return codes


def _is_surface(codes: np.ndarray, count: int) -> np.ndarray:
    # 0 is all outside, count - 1 all inside. In uint8 0 - 1 wraps to 255, so one comparison tells both.
    return codes - np.uint8(1) < count - 2


def _nearest(points: np.ndarray, others: np.ndarray, shared: np.ndarray, spacing: Sequence[float]) -> np.ndarray:
    """Return mm from each of (count, axes) points to the nearest of the others, where the `shared` ones are, too."""
    distances = np.zeros(len(points))
    asked = points[~shared]
    if not len(asked):
        return distances
    if not len(others):
        return np.full(len(points), np.inf)
    tree = KDTree(others * spacing, leafsize=_LEAF, compact_nodes=False, balanced_tree=False)
    found = others[tree.query(asked * spacing)[1]]
    # Not the tree's distance: whole voxels times spacing is what a distance transform computes, to the last bit.
    distances[~shared] = np.sqrt((((found - asked) * spacing) ** 2).sum(axis=1))
    return distances


def _is_exact(spacing: Sequence[float]) -> bool:
    """True if whole voxels times spacing, their squares and the sums of these are free of rounding in float64."""
    return all(size < 8 and (size * 1024).is_integer() for size in spacing)


def _percentile(distances: np.ndarray, areas: np.ndarray, percent: float) -> float:
    order = np.argsort(distances)
    cumulated = np.cumsum(areas[order]) / areas.sum()
    return float(distances[order[min(np.searchsorted(cumulated, percent / 100), len(order) - 1)]])
