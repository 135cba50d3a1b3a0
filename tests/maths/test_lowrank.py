"""Partial Tucker: the same result as tensorly, exact errors, the same bytes on every machine."""

from __future__ import annotations

import itertools
import threading

import pytest
import torch

from nnslim.errors import RankError
from nnslim.maths import lowrank
from nnslim.maths.lowrank import partial_tucker

tensorly = pytest.importorskip("tensorly")
SHAPES = [
    ((12, 10, 3, 3, 3), (5, 4)),
    ((16, 8, 1, 3, 3), (3, 8)),
    ((10, 14, 3, 3), (10, 6)),
    ((8, 8, 2, 2, 2), (1, 1)),
    ((6, 9, 1, 1, 1), (4, 4)),
    ((8, 1, 3, 3, 3), (4, 1)),
    ((1, 7, 3, 3), (1, 3)),
    ((16, 2, 1, 2, 2), (12, 2)),  # output rank beyond the 8 columns of the unfolding
    ((16, 3, 1, 1, 1), (8, 3)),
    ((20, 6, 3, 1, 1), (9, 2)),
]


def made(shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def true_error(kernel, factors):
    return float((kernel.double() - factors.reconstruct()).norm() / kernel.double().norm())


@pytest.mark.filterwarnings("ignore:Trying to compute SVD:UserWarning")  # tensorly's, for ranks beyond the columns
@pytest.mark.parametrize(("shape", "ranks"), SHAPES)
def test_partial_tucker_equals_tensorly(shape, ranks):
    from tensorly.decomposition import partial_tucker as theirs

    kernel = made(shape)
    (core, (out, in_)), errors = theirs(kernel.numpy(), rank=list(ranks), modes=[0, 1], init="svd", tol=1e-4)
    reconstruction = torch.einsum(
        "oa,ab...,ib->oi...", torch.from_numpy(out), torch.from_numpy(core), torch.from_numpy(in_)
    )
    ours = partial_tucker(kernel, ranks)
    torch.testing.assert_close(ours.reconstruct(), reconstruction, rtol=0, atol=1e-9)
    if min(ours.error, errors[-1]) > 1e-6:
        assert ours.error == pytest.approx(float(errors[-1]), abs=1e-9)
    else:  # an exact fit: the root of a difference of norms is known to about 1e-8 only, on both sides
        assert max(ours.error, errors[-1]) < 1e-7


def test_start_is_the_hosvd_of_tensorly():
    kernel = made((12, 10, 3, 3, 3))
    with lowrank.tensorly_on_torch() as tensorly_torch:
        (core, theirs), _ = tensorly_torch.decomposition.partial_tucker(kernel, [5, 4], modes=[0, 1], n_iter_max=0)
    ours = [lowrank.leading_factor(kernel, mode, rank) for mode, rank in enumerate((5, 4))]
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-9)
    torch.testing.assert_close(lowrank.mode_products(kernel, ours, transpose=True), core, rtol=0, atol=1e-9)


def test_backend_that_the_caller_has_set_stays_in_every_thread():
    """Also while a factorisation runs, and where threads have backends of their own."""
    seen, inside, done = {}, threading.Event(), threading.Event()

    def other():
        seen["before"] = tensorly.get_backend()
        with lowrank.tensorly_on_torch():
            seen["inside"] = tensorly.get_backend()
            inside.set()
            done.wait(10)
        partial_tucker(made((6, 5, 3, 3)), (2, 2))
        seen["after"] = tensorly.get_backend()

    tensorly.set_backend("numpy")
    thread = threading.Thread(target=other)
    thread.start()
    assert inside.wait(10)
    assert tensorly.get_backend() == "numpy"
    partial_tucker(made((6, 5, 3, 3)), (2, 2))
    assert tensorly.get_backend() == "numpy"
    done.set()
    thread.join()
    assert seen == {"before": "numpy", "inside": "pytorch", "after": "numpy"}
    assert tensorly.get_backend() == "numpy"
    third = []
    thread = threading.Thread(target=lambda: third.append(tensorly.get_backend()))
    thread.start()
    thread.join()
    assert third == ["numpy"]


@pytest.mark.parametrize(("shape", "ranks"), SHAPES)
def test_partial_tucker_factors_are_orthonormal_and_of_stated_shapes(shape, ranks):
    factors = partial_tucker(made(shape), ranks)
    assert factors.out.shape == (shape[0], ranks[0])
    assert factors.in_.shape == (shape[1], ranks[1])
    assert factors.core.shape == (*ranks, *shape[2:])
    for factor in (factors.out, factors.in_):
        torch.testing.assert_close(
            factor.T @ factor, torch.eye(factor.shape[1], dtype=torch.float64), rtol=0, atol=1e-10
        )
        assert factor.dtype == torch.float64


@pytest.mark.parametrize(("shape", "ranks"), SHAPES)
def test_partial_tucker_error_equals_the_true_one(shape, ranks):
    kernel = made(shape, seed=3)
    factors = partial_tucker(kernel, ranks)
    assert factors.error == pytest.approx(true_error(kernel, factors), abs=1e-7)


def test_partial_tucker_error_falls_with_rank():
    kernel = made((12, 12, 3, 3, 3))
    errors = [partial_tucker(kernel, (rank, rank)).error for rank in range(1, 13)]
    assert all(later < earlier for earlier, later in itertools.pairwise(errors))
    assert errors[0] > 0.9
    assert errors[-1] < 1e-7


@pytest.mark.parametrize("shape", [(6, 5, 3, 3, 3), (6, 5, 3, 3), (4, 1, 3, 3, 3), (1, 1, 1, 1)])
def test_partial_tucker_full_rank_reconstructs_the_kernel(shape):
    kernel = made(shape)
    factors = partial_tucker(kernel, shape[:2])
    torch.testing.assert_close(factors.reconstruct(), kernel, rtol=0, atol=1e-12)


def test_partial_tucker_kernel_of_that_rank_is_found_exactly():
    parts = made((12, 3), 1), made((3, 2, 3, 3, 3), 2), made((10, 2), 3)
    kernel = torch.einsum("oa,ab...,ib->oi...", *parts)
    factors = partial_tucker(kernel, (3, 2))
    torch.testing.assert_close(factors.reconstruct(), kernel, rtol=0, atol=1e-10)
    assert factors.error < 1e-7


def test_partial_tucker_kernel_of_zeros_gives_zeros_without_error():
    factors = partial_tucker(torch.zeros(4, 3, 3, 3, 3), (2, 2))
    assert factors.error == 0
    assert torch.equal(factors.reconstruct(), torch.zeros(4, 3, 3, 3, 3, dtype=torch.float64))
    assert torch.isfinite(factors.out).all()


@pytest.mark.parametrize(
    ("ranks", "message"),
    [
        ((0, 2), r"output rank 0 is outside 1\.\.6 for a kernel of shape \(6, 4, 3, 3\)"),
        ((7, 2), r"output rank 7 is outside 1\.\.6"),
        ((6, 0), r"input rank 0 is outside 1\.\.4"),
        ((6, 5), r"input rank 5 is outside 1\.\.4"),
        ((-1, 2), r"output rank -1 is outside"),
    ],
)
def test_partial_tucker_rank_outside_bounds_raises(ranks, message):
    with pytest.raises(RankError, match=message):
        partial_tucker(made((6, 4, 3, 3)), ranks)


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_partial_tucker_bytes_do_not_depend_on_threads(threads):
    kernel = made((48, 40, 3, 3, 3))
    results = []
    for count in (1, 2, 1, 4):
        torch.set_num_threads(count)
        factors = partial_tucker(kernel, (12, 10))
        results.append(b"".join(t.contiguous().numpy().tobytes() for t in (factors.out, factors.core, factors.in_)))
        assert torch.get_num_threads() == count
    assert len(set(results)) == 1


def test_partial_tucker_failure_inside_restores_the_thread_count(threads, monkeypatch):
    def broken(gram, count):
        assert torch.get_num_threads() == 1
        raise RuntimeError("no eigenvectors")

    monkeypatch.setattr(lowrank, "leading_eigenvectors", broken)
    torch.set_num_threads(2)
    with pytest.raises(RuntimeError, match="no eigenvectors"):
        partial_tucker(made((4, 4, 3, 3)), (2, 2))
    assert torch.get_num_threads() == 2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_partial_tucker_low_precision_input_is_computed_in_float64(dtype):
    kernel = made((10, 8, 3, 3, 3), dtype=dtype)
    kept = kernel.clone()
    factors = partial_tucker(kernel, (4, 3))
    exact = partial_tucker(kernel.double(), (4, 3))
    assert torch.equal(factors.core, exact.core)
    assert factors.core.dtype == torch.float64
    assert torch.equal(kernel, kept)


def test_partial_tucker_parameter_input_gives_tensors_without_gradient():
    kernel = torch.nn.Parameter(made((6, 5, 3, 3), dtype=torch.float32))
    factors = partial_tucker(kernel, (3, 3))
    assert not factors.core.requires_grad
    assert not factors.out.requires_grad


def test_partial_tucker_non_contiguous_input_gives_the_same_result():
    kernel = made((5, 9, 3, 3)).transpose(0, 1)
    assert not kernel.is_contiguous()
    torch.testing.assert_close(
        partial_tucker(kernel, (4, 3)).reconstruct(),
        partial_tucker(kernel.contiguous(), (4, 3)).reconstruct(),
        rtol=0,
        atol=1e-12,
    )


@pytest.mark.parametrize(
    ("settings", "sweeps"), [({"tolerance": 1.0}, 3), ({"max_sweeps": 1}, 1), ({"tolerance": 0.0, "max_sweeps": 7}, 7)]
)
def test_partial_tucker_sweeps_are_at_least_three_unless_capped(monkeypatch, settings, sweeps):
    calls = []
    leading = lowrank.leading_eigenvectors
    monkeypatch.setattr(
        lowrank, "leading_eigenvectors", lambda gram, count: calls.append(count) or leading(gram, count)
    )
    factors = partial_tucker(made((6, 5, 3, 3)), (3, 2), **settings)
    assert calls == [3, 2] * (1 + sweeps)  # the start, then each sweep, over both sides
    assert 0 < factors.error < 1
