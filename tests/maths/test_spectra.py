"""What each pair of ranks would cost, and the rank above the noise."""

from __future__ import annotations

import pytest
import torch

from nnslim.maths.fitting import whitened
from nnslim.maths.lowrank import Spectrum, evbmf_rank, partial_tucker


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def truncated_error(kernel, rank_out, rank_in):
    """Relative error of the truncated HOSVD, by two full SVDs and a projection."""
    weight = kernel.flatten(2)
    out = torch.linalg.svd(weight.flatten(1))[0][:, :rank_out]
    in_ = torch.linalg.svd(weight.transpose(0, 1).flatten(1))[0][:, :rank_in]
    kept = torch.einsum("op,pik,ij->ojk", out @ out.T, weight, in_ @ in_.T)
    return float((weight - kept).norm() / weight.norm())


@pytest.mark.parametrize("shape", [(7, 5, 9), (4, 9, 3, 3), (6, 6, 1)], ids=str)
def test_spectrum_error_equals_the_truncated_hosvd(shape):
    kernel = random(*shape)
    spectrum = Spectrum.of(kernel.flatten(2))
    for out in range(1, shape[0] + 1):
        for in_ in range(1, shape[1] + 1):
            assert spectrum.error(out, in_) == pytest.approx(truncated_error(kernel, out, in_), abs=1e-7)
    assert spectrum.error(None, 2) == spectrum.error(shape[0], 2)
    assert spectrum.error(3, None) == spectrum.error(3, shape[1])


def test_spectrum_is_monotone_one_without_ranks_and_zero_at_full():
    errors = Spectrum.of(random(8, 6, 9)).squared_error
    assert errors.shape == (9, 7)
    assert (errors.diff(dim=0) <= 1e-12).all() and (errors.diff(dim=1) <= 1e-12).all()
    assert (errors[0] == 1).all() and (errors[:, 0] == 1).all()
    assert float(errors[-1, -1]) == pytest.approx(0, abs=1e-12)
    assert float(errors[2, 2]) > 0.1


def test_spectrum_is_an_upper_bound_of_the_iterated_decomposition():
    kernel = random(8, 6, 9, seed=3)
    spectrum = Spectrum.of(kernel)
    for ranks in ((2, 2), (4, 3), (7, 1)):
        assert partial_tucker(kernel, ranks).error <= spectrum.error(*ranks) + 1e-12


def test_spectrum_scale_does_not_matter_and_zeros_lose_nothing():
    kernel = random(5, 4, 3)
    torch.testing.assert_close(Spectrum.of(1e-4 * kernel).squared_error, Spectrum.of(kernel).squared_error)
    assert not Spectrum.of(torch.zeros(5, 4, 3)).squared_error.any()


@pytest.mark.parametrize("energy", [0.3, 0.8, 0.95, 0.999, 1.0])
def test_ranks_for_energy_are_the_smallest_that_keep_it(energy):
    kernel = random(8, 6, 9) * torch.logspace(0, -2, 8).double()[:, None, None]
    ranks = Spectrum.of(kernel).ranks_for_energy(energy)
    for axis, rank in enumerate(ranks):
        squares = torch.linalg.svdvals(kernel.transpose(0, axis).flatten(1)).square()
        kept = squares.cumsum(0) / squares.sum()
        assert kept[rank - 1] >= energy - 1e-9
        assert rank == 1 or kept[rank - 2] < energy


def test_ranks_for_energy_of_a_low_rank_kernel_are_its_ranks():
    kernel = torch.einsum("oa,abk,ib->oik", random(12, 3), random(3, 4, 9, seed=1), random(10, 4, seed=2))
    assert Spectrum.of(kernel).ranks_for_energy(1.0) == (3, 4)
    assert Spectrum.of(torch.zeros(5, 4, 3)).ranks_for_energy(0.9) == (1, 1)


def noisy(rank, rows, columns, noise, seed=0):
    signal = random(rows, rank, seed=seed) @ random(rank, columns, seed=seed + 1)
    return signal + noise * random(rows, columns, seed=seed + 2)


@pytest.mark.parametrize("rank", [1, 8])
@pytest.mark.parametrize("shape", [(40, 120), (64, 64)], ids=str)
@pytest.mark.parametrize("noise", [1e-3, 0.5])
def test_evbmf_rank_finds_the_planted_rank(rank, shape, noise):
    assert evbmf_rank(noisy(rank, *shape, noise)) == rank


@pytest.mark.parametrize("shape", [(120, 40), (32, 288)], ids=str)
@pytest.mark.parametrize("seed", range(2))
def test_evbmf_rank_of_noise_is_zero(shape, seed):
    assert evbmf_rank(random(*shape, seed=seed)) == 0


def test_evbmf_rank_is_blind_to_scale_and_orientation_and_takes_zeros():
    matrix = noisy(4, 30, 70, 0.3)
    assert {evbmf_rank(m) for m in (matrix, 1e6 * matrix, 1e-6 * matrix, matrix.T, matrix.float())} == {4}
    assert evbmf_rank(torch.zeros(5, 9)) == 0
    assert 0 <= evbmf_rank(random(1, 9)) <= 1


def test_evbmf_rank_component_below_the_noise_is_not_found():
    assert evbmf_rank(noisy(3, 60, 90, 100.0)) == 0


def test_whitened_squared_entries_are_the_expected_output_energy():
    kernel, metric = random(4, 3, 5), torch.diag(random(4, seed=1).exp())
    sides = [random(size, size, seed=size) for size in (3, 5)]
    channels, taps = (side @ side.T for side in sides)
    weight = metric @ kernel.flatten(1)
    wanted = float(torch.einsum("op,pq,oq->", weight, torch.kron(channels, taps), weight))
    assert float(whitened(kernel, channels, taps, metric)[0].square().sum()) == pytest.approx(wanted, rel=1e-9)


def test_whitened_spectrum_predicts_the_error_of_the_outputs():
    kernel, metric = random(6, 5, 4), torch.eye(6, dtype=torch.float64)
    side = random(5, 2, seed=1)
    channels, taps = side @ side.T, torch.eye(4, dtype=torch.float64)  # inputs that live in two directions
    spectrum = Spectrum.of(whitened(kernel, channels, taps, metric)[0])
    assert spectrum.error(None, 2) < 1e-4 < 0.1 < spectrum.error(None, 1)
    assert Spectrum.of(kernel).error(None, 2) > 0.3  # the weights alone do not show it
