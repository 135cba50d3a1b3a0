"""The error of every pair of ranks, from one decomposition of a kernel."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from nnslim.maths.lowrank import leading_factor, mode_products, one_thread


@dataclass(frozen=True)
class Spectrum:
    """Relative squared error of the truncated HOSVD of one kernel, for every pair of ranks.

    Attributes:
        squared_error: (O + 1, I + 1); entry [a, b] is ||W - W_ab||^2 / ||W||^2 at ranks (a, b), in the metric in which
            the kernel was given. 1 where a rank is 0, 0 at full rank.
    """

    squared_error: Tensor

    @classmethod
    def of(cls, kernel: Tensor) -> Spectrum:
        """Decompose once: HOSVD factors are nested, so the core's energy below (a, b) is what ranks (a, b) keep.

        Args:
            kernel: (O, I, taps), in units in which squared entries add up to error (see `fitting.whitened`).
        """
        weight = kernel.detach().to("cpu", torch.float64)
        with one_thread():
            factors = [leading_factor(weight, mode, weight.shape[mode]) for mode in (0, 1)]
        core = mode_products(weight, factors, transpose=True)
        energy = core.square().sum(2)
        kept = torch.zeros(energy.shape[0] + 1, energy.shape[1] + 1, dtype=torch.float64)
        kept[1:, 1:] = energy.cumsum(0).cumsum(1)
        total = float(kept[-1, -1])
        lost = 1 - kept / total if total else torch.zeros_like(kept)
        return cls(lost.clamp(0, 1))

    def error(self, rank_out: int | None, rank_in: int | None) -> float:
        """Return the relative error (not squared) at these ranks; None is full rank."""
        outputs, inputs = (size - 1 for size in self.squared_error.shape)
        a = outputs if rank_out is None else rank_out
        b = inputs if rank_in is None else rank_in
        return math.sqrt(float(self.squared_error[a, b]))

    def ranks_for_energy(self, energy: float) -> tuple[int, int]:
        """Return for each side alone the smallest rank that keeps this share of the energy, 0 < energy <= 1."""
        allowed = 1 - energy + 1e-12
        out = int((self.squared_error[:, -1] <= allowed).nonzero()[0])
        in_ = int((self.squared_error[-1, :] <= allowed).nonzero()[0])
        return max(1, out), max(1, in_)


def evbmf_rank(matrix: Tensor) -> int:
    """Return the rank that empirical variational Bayes matrix factorisation finds above the noise.

    The noise variance is estimated from the data (Nakajima, Sugiyama, Babacan, Tomioka, "Global analytic solution of
    fully-observed variational Bayesian matrix factorization", JMLR 2013, corollaries 2 and 3).

    Args:
        matrix: (rows, columns), any orientation.
    Returns:
        The number of singular values above the threshold; 0 for pure noise.
    """
    values = matrix.detach().to("cpu", torch.float64)
    if values.shape[0] > values.shape[1]:
        values = values.T
    rows, columns = values.shape
    with one_thread():
        squares = torch.linalg.eigvalsh(values @ values.T).flip(0).clamp(min=0)
    if float(squares[0]) == 0:
        return 0
    alpha = rows / columns
    tau = 2.5129 * math.sqrt(alpha)  # approximates the root of an equation in alpha (ibid., section 6)
    ceiling = (1 + tau) * (1 + alpha / tau)
    low, high = _noise_bounds(squares, rows, columns, ceiling)
    noise = _smallest(lambda value: _free_energy(value, squares, rows, columns, alpha, ceiling), low, high)
    return int((squares > columns * noise * ceiling).sum())


def _noise_bounds(squares: Tensor, rows: int, columns: int, ceiling: float) -> tuple[float, float]:
    most = min(math.ceil(rows / (1 + rows / columns)) - 1, rows - 1)
    tail = squares[most:]
    low = max(float(squares[most]) / (columns * ceiling), float(tail.mean()) / columns)
    high = float(squares.sum()) / (rows * columns)
    return max(low, 1e-12 * high), high


def _free_energy(noise: float, squares: Tensor, rows: int, columns: int, alpha: float, ceiling: float) -> float:
    x = squares / (columns * noise)
    above = x[x > ceiling]
    below = x[x <= ceiling]
    tau = ((above - (1 + alpha)) + ((above - (1 + alpha)).square() - 4 * alpha).clamp(min=0).sqrt()) / 2
    value = float((below - below.clamp(min=1e-300).log()).sum())
    value += float((above - tau).sum() + ((tau + 1) / above).log().sum() + alpha * (tau / alpha + 1).log().sum())
    return value


def _smallest(function: Callable[[float], float], low: float, high: float, steps: int = 200) -> float:
    """Return the argument of the smallest value, on a logarithmic grid that is refined twice."""
    for _ in range(3):
        grid = torch.logspace(math.log10(low), math.log10(high), steps, dtype=torch.float64).tolist()
        best = min(range(steps), key=lambda number: function(grid[number]))
        low, high = grid[max(best - 1, 0)], grid[min(best + 1, steps - 1)]
    return grid[best]
