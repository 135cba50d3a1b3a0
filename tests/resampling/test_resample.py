"""Resampling as matrix products against skimage, scipy and torch; labels of the streamed way against the dense one."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
from scipy.ndimage import map_coordinates
from skimage.transform import resize

from nnslim.resampling import labels as labels_module
from nnslim.resampling.labels import Regions, label_map
from nnslim.resampling.resample import (
    grid_like_interpolate,
    grid_like_resize,
    mapped_axis,
    resample,
    spline_axis,
    torch_axis,
    two_taps,
)
from nnslim.running.native import kernels

SIZES = [(1, 1), (1, 7), (7, 1), (5, 5), (8, 16), (16, 8), (13, 29), (29, 13), (70, 131), (131, 70), (3, 200)]


@pytest.mark.parametrize("order", [0, 1, 2, 3])
@pytest.mark.parametrize(("n_in", "n_out"), SIZES)
def test_spline_axis_equals_skimage_on_a_random_row(n_in, n_out, order):
    row = np.random.default_rng(n_in).normal(size=n_in)
    expected = resize(row, (n_out,), order, mode="edge", clip=False, anti_aliasing=False)
    made = spline_axis(n_in, n_out, order).weights.double().numpy() @ row
    np.testing.assert_allclose(made, expected, atol=2e-6)


@pytest.mark.parametrize("order", [0, 1, 3])
@pytest.mark.parametrize(("n_in", "n_out"), SIZES)
def test_mapped_axis_equals_scipy_on_a_random_row(n_in, n_out, order):
    row = np.random.default_rng(n_out).normal(size=n_in)
    where = n_in / n_out * (np.arange(n_out) + 0.5) - 0.5
    expected = map_coordinates(row, where[None], order=order, mode="nearest") if n_in != n_out else row
    made = mapped_axis(n_in, n_out, order).weights.double().numpy() @ row
    np.testing.assert_allclose(made, expected, atol=2e-6)


@pytest.mark.parametrize(("n_in", "n_out"), SIZES)
@pytest.mark.parametrize("order", [0, 1])
def test_two_taps_give_the_matrix_back(n_in, n_out, order):
    axis = spline_axis(n_in, n_out, order)
    at, following, near, far = two_taps(axis)
    matrix = torch.zeros_like(axis.weights)
    rows = torch.arange(n_out)
    matrix[rows, at.long()] += near
    matrix[rows, following.long()] += far
    assert torch.equal(matrix, axis.weights)


def test_two_taps_cubic_spline_has_none():
    assert two_taps(spline_axis(9, 20, 3)) is None


@pytest.mark.parametrize(
    ("shape", "new"), [((9, 12, 7), (20, 5, 7)), ((1, 30, 30), (3, 70, 90)), ((4, 4, 4), (1, 1, 9))]
)
def test_resample_cubic_volume_is_clipped_like_skimage(shape, new):
    volume = np.random.default_rng(1).normal(size=shape)
    volume[volume > 1] = 3  # plateaus: cubic splines overshoot there
    expected = resize(volume, new, 3, mode="edge", clip=True, anti_aliasing=False)
    made = resample(torch.from_numpy(volume.astype(np.float32))[None], grid_like_resize(shape, new, 3))[0].numpy()
    assert made.max() <= np.float32(volume.max())
    np.testing.assert_allclose(made, expected, atol=1e-5 * np.ptp(volume))


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_resample_slices_are_clipped_each_for_itself(axis):
    """Clipping to the range of the whole volume would leave overshoots in the dim slices."""
    shape, new = [11, 12, 13], [18, 19, 20]
    volume = np.random.default_rng(2).normal(size=shape) > 0.3
    volume = volume * np.arange(1, shape[axis] + 1).reshape([-1 if n == axis else 1 for n in range(3)])
    plane = [n for k, n in enumerate(new) if k != axis]
    slices = [
        resize(s, plane, 3, mode="edge", clip=True, anti_aliasing=False) for s in np.moveaxis(volume * 1.0, axis, 0)
    ]
    where = np.round(shape[axis] / new[axis] * (np.arange(new[axis]) + 0.5) - 0.5).astype(int)
    expected = np.moveaxis(np.stack(slices)[where], 0, axis)
    grid = grid_like_resize(shape, new, 3, 0, axis)
    made = resample(torch.from_numpy(volume.astype(np.float32))[None], grid)[0].numpy()
    np.testing.assert_allclose(made, expected, atol=1e-5 * shape[axis])


@pytest.mark.parametrize(("shape", "new"), [((9, 12, 7), (20, 5, 7)), ((5, 66, 70), (9, 140, 150))])
def test_grid_like_interpolate_equals_torch(shape, new):
    volume = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
    expected = torch.nn.functional.interpolate(volume[None], new, mode="trilinear")[0]
    torch.testing.assert_close(resample(volume, grid_like_interpolate(shape, new)), expected, atol=1e-5, rtol=0)


def _scores(classes: int, shape: tuple[int, ...], smooth: bool, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    if not smooth:
        return torch.randn(classes, *shape, generator=generator) * 5
    coarse = torch.randn(1, classes, 4, 4, 4, generator=generator) * 8
    return torch.nn.functional.interpolate(coarse, shape, mode="trilinear")[0]


def _dense(scores: torch.Tensor, grid, rounded, regions: Regions | None = None) -> np.ndarray:
    """What nnU-Net does: all scores on the fine grid, then the best class or the regions, painted in order."""
    fine = resample(scores.float(), grid)
    fine = fine if rounded is None else fine.to(rounded).float()
    if regions is None:
        return fine.numpy().argmax(0)
    made = np.zeros(grid.shape, dtype=int)
    for label, values in zip(regions.labels, fine.numpy(), strict=True):
        made[values > regions.above] = label
    return made


GRIDS = {
    "finer": grid_like_resize((20, 21, 35), (40, 50, 70), 1),
    "coarser": grid_like_resize((50, 41, 90), (7, 20, 33), 1),
    "by slices": grid_like_resize((6, 21, 35), (17, 50, 70), 1, 0, 0),
    "slices of the last axis": grid_like_resize((21, 35, 6), (50, 70, 17), 1, 1, 2),
    "nearest": grid_like_resize((20, 21, 35), (40, 50, 70), 0),
    "same": grid_like_resize((20, 21, 35), (20, 21, 35), 1),
    "one voxel": grid_like_resize((1, 1, 1), (3, 40, 1), 1),
    "torch": grid_like_interpolate((20, 21, 35), (40, 50, 70)),
    "cubic": grid_like_resize((20, 21, 35), (40, 50, 70), 3),
    "cubic by slices": grid_like_resize((21, 6, 35), (50, 17, 70), 3, 0, 1),
}


@pytest.fixture(params=["kernel", "torch"])
def engine(request, monkeypatch):
    if request.param == "torch":
        monkeypatch.setattr(labels_module, "kernels", lambda: None)
    elif kernels() is None:
        pytest.skip("no C compiler")
    return request.param


@pytest.mark.parametrize("smooth", [True, False])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("name", GRIDS)
def test_label_map_equals_dense_argmax(engine, name, dtype, smooth):
    grid = GRIDS[name]
    scores = _scores(11, tuple(axis.size[0] for axis in grid.axes), smooth).to(dtype)
    out = torch.full(grid.shape, 77, dtype=torch.uint8)
    assert label_map(scores, grid, out, rounded=dtype)
    differing = out.numpy() != _dense(scores, grid, dtype)
    assert differing.sum() <= (0 if name in ("nearest", "same") else 1e-4 * differing.size)
    # Where they differ, the two best are equal but for the last digit.
    best = resample(scores.float(), grid).topk(2, 0).values
    assert (best[0] - best[1])[torch.from_numpy(differing)].abs().amax().item() < 1e-2 if differing.any() else True


def test_label_map_ties_go_to_the_first(engine):
    scores = torch.zeros(5, 4, 4, 4)
    scores[2:4] = 1
    out = torch.zeros(9, 8, 40, dtype=torch.uint8)
    label_map(scores, grid_like_resize((4, 4, 4), out.shape, 1), out, rounded=torch.float16)
    assert (out == 2).all()


def test_label_map_rounds_to_half_before_comparing(engine):
    """1 + 2^-12 and 1 are the same number in half precision: the first of them wins there, the greater one without."""
    scores = torch.ones(2, 2, 2, 2)
    scores[1] += 2**-12
    out = torch.zeros(3, 3, 3, dtype=torch.uint8)
    grid = grid_like_resize((2, 2, 2), (3, 3, 3), 1)
    label_map(scores, grid, out, rounded=torch.float16)
    assert (out == 0).all()
    label_map(scores, grid, out)
    assert (out == 1).all()


def test_kernel_rounding_equals_torch_for_all_magnitudes():
    if kernels() is None:
        pytest.skip("no C compiler")
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(4, 30, 30, 30, generator=generator) * torch.logspace(-9, 4, 30)
    values[1] = values[0] * (1 + 3e-4 * torch.randn(30, 30, 30, generator=generator))
    values[2:] = -70000 / 2
    grid = grid_like_resize((30, 30, 30), (30, 30, 30), 1)
    out = torch.zeros(grid.shape, dtype=torch.uint8)
    label_map(values, grid, out, rounded=torch.float16)
    assert np.array_equal(out.numpy(), values.half().float().numpy().argmax(0))


@pytest.mark.parametrize("smooth", [True, False])
@pytest.mark.parametrize("name", ["finer", "coarser", "same", "cubic", "by slices"])
def test_label_map_regions_are_painted_in_order(engine, name, smooth):
    grid = GRIDS[name]
    regions = Regions((4, 1, 300, 2))
    scores = _scores(4, tuple(axis.size[0] for axis in grid.axes), smooth, seed=3).half()
    out = torch.full(grid.shape, 77, dtype=torch.int16)
    assert label_map(scores, grid, out, regions=regions, rounded=torch.float16)
    expected = _dense(scores, grid, torch.float16, regions)
    assert set(np.unique(expected)) == {0, 4, 1, 300, 2}
    assert (out.numpy() != expected).sum() <= 1e-4 * expected.size


def test_label_map_other_layouts_and_targets(engine, monkeypatch):
    """Scores with the classes last, as channels-last networks give them; a target inside a transposed array."""
    grid = GRIDS["finer"]
    scores = _scores(6, (20, 21, 35), True).half()
    expected = torch.zeros(grid.shape, dtype=torch.uint8)
    label_map(scores, grid, expected, rounded=torch.float16)
    last = scores.movedim(0, -1).contiguous().movedim(-1, 0)
    monkeypatch.setattr(labels_module, "_SLICES", 7)
    whole = torch.zeros(80, 60, 45, dtype=torch.uint8)
    label_map(last, grid, whole.permute(2, 1, 0)[2:42, 5:55, 3:73], rounded=torch.float16)
    assert torch.equal(whole.permute(2, 1, 0)[2:42, 5:55, 3:73], expected)
    assert whole.sum() == expected.sum()  # nothing beside it was touched


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_label_map_reports_scores_that_are_not_finite(engine, dtype, value):
    scores = _scores(3, (20, 21, 35), True).to(dtype)
    scores[1, 19, 20, 34] = value
    assert not label_map(scores, GRIDS["finer"], torch.zeros(40, 50, 70, dtype=torch.uint8))


@pytest.mark.parametrize("regions", [None, Regions((3, 1, 2))])
def test_label_map_keeps_to_the_cpu_whatever_torchs_default_device(engine, regions):
    scores = _scores(3, (8, 9, 10), True)
    grid, found = grid_like_interpolate((8, 9, 10), (16, 18, 20)), torch.zeros(16, 18, 20, dtype=torch.uint8)
    expected = torch.zeros_like(found)
    label_map(scores, grid, expected, regions=regions)
    torch_axis.cache_clear()
    with torch.device("meta"):
        assert label_map(scores, grid_like_interpolate((8, 9, 10), (16, 18, 20)), found, regions=regions)
    assert torch.equal(found, expected) and expected.unique().numel() > 1


def test_label_map_needs_a_small_part_of_the_full_scores():
    """60 classes on 120^3: 415 MB of float32 scores. In a process of its own: others leave memory behind."""
    code = """
import torch
from nnslim.resampling.labels import label_map
from nnslim.resampling.resample import grid_like_resize
from nnslim.running.machine import peak_bytes, reset_peak
torch.set_num_threads(1)
scores = torch.randn(60, 40, 40, 40).half()
small = grid_like_resize((40, 40, 40), (41, 41, 41), 1)
label_map(scores, small, torch.zeros(41, 41, 41, dtype=torch.uint8), rounded=torch.float16)  # what is loaded once
out = torch.zeros(120, 120, 120, dtype=torch.uint8).fill_(1)
reset_peak()
before = peak_bytes()
label_map(scores, grid_like_resize((40, 40, 40), (120, 120, 120), 1), out, rounded=torch.float16)
print(peak_bytes() - before)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 20e6
