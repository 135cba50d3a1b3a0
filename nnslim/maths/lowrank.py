"""Low-rank algebra: the partial Tucker (Tucker-2) form of a kernel over its two channel axes, and its ranks' errors."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from nnslim.errors import RankError


@contextmanager
def tensorly_on_torch() -> Iterator[ModuleType]:
    """Give tensorly with its torch backend, in this thread; the backend that the caller has set comes back."""
    import tensorly  # takes 0.4 s, which a prediction need not wait for

    before = tensorly.get_backend()
    tensorly.set_backend("pytorch", local_threadsafe=True)
    try:
        yield tensorly
    finally:  # tensorly's own backend_context would set it for all threads here
        tensorly.set_backend(before, local_threadsafe=True)


def mode_products(
    tensor: Tensor, matrices: Sequence[Tensor], modes: Sequence[int] | None = None, *, transpose: bool = False
) -> Tensor:
    """Return the tensor times one matrix for each of the modes (default: the first axes), by tensorly."""
    with tensorly_on_torch() as tensorly:
        return tensorly.tenalg.multi_mode_dot(tensor, matrices, modes, transpose=transpose)


def unfolded(tensor: Tensor, mode: int) -> Tensor:
    """Return the unfolding of a tensor along one axis, by tensorly: (size of that axis, the rest)."""
    with tensorly_on_torch() as tensorly:
        return tensorly.unfold(tensor, mode)


@dataclass(frozen=True)
class TuckerFactors:
    """W[o, i, *k] ~ sum_ab out[o, a] core[a, b, *k] in_[i, b]; out and in_ have orthonormal columns.

    Attributes:
        out: (O, R_out). in_: (I, R_in). core: (R_out, R_in, *K). All float64.
        error: ||W - W~||_F / ||W||_F, 0 for a kernel of zeros.
    """

    out: Tensor
    core: Tensor
    in_: Tensor
    error: float

    def reconstruct(self) -> Tensor:
        """Return the kernel that the factors stand for, (O, I, *K)."""
        with tensorly_on_torch() as tensorly:
            return tensorly.tucker_to_tensor((self.core, [self.out, self.in_]))


_decomposing = threading.Lock()


@contextmanager
def one_thread() -> Iterator[None]:
    """Run small dense algebra on one thread, one caller at a time."""
    # One thread gives the same bytes on every machine, and small symmetric eigenproblems are up to 400 times slower
    # with several threads when the machine is busy (measured: 4 s against 10 ms for 320 x 320).
    with _decomposing:  # the count is partly global: two threads must not restore each other's
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(threads)


def leading_eigenvectors(gram: Tensor, count: int) -> Tensor:
    """Return the leading eigenvectors of a symmetric matrix, as columns; the largest entry of each is positive."""
    vectors = torch.linalg.eigh(gram)[1].flip(1)[:, :count]
    largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
    return vectors * largest.sign()


def leading_factor(tensor: Tensor, mode: int, count: int) -> Tensor:
    """Return the `count` leading left singular vectors of an unfolding, one side of the truncated HOSVD, as columns."""
    matrix = unfolded(tensor, mode)  # in float64 the squared condition number does no harm to a leading subspace
    return leading_eigenvectors(matrix @ matrix.T, count)


def partial_tucker(
    kernel: Tensor, ranks: tuple[int, int], *, max_sweeps: int = 100, tolerance: float = 1e-4
) -> TuckerFactors:
    """Factor a convolution kernel over its two channel axes by HOOI, started from the truncated HOSVD.

    The result is that of tensorly's `partial_tucker(..., modes=[0, 1], init="svd")`.

    Args:
        kernel: (O, I, *K) with one to three spatial axes, any float type; not modified. Computed in float64.
        ranks: (R_out, R_in), 1 <= R_out <= O and 1 <= R_in <= I.
        max_sweeps: alternating sweeps at most.
        tolerance: stop when the relative error changes by less than this between sweeps.
    Returns:
        TuckerFactors, float64, on the CPU. Deterministic: the same kernel gives the same bytes.
    Raises:
        RankError: a rank is outside its bounds.
    Reference: De Lathauwer, De Moor, Vandewalle, "On the best rank-1 and rank-(R1,...,RN) approximation", 2000.
    """
    for side, rank, size in zip(("output", "input"), ranks, kernel.shape, strict=False):
        if not 1 <= rank <= size:
            raise RankError(f"{side} rank {rank} is outside 1..{size} for a kernel of shape {tuple(kernel.shape)}")
    weight = kernel.detach().to("cpu", torch.float64)
    # The sweeps are ours for speed: tensorly's take an SVD of each unfolding, not the eigenvectors of a small matrix.
    # 320 x 320 x 3^3 to ranks 96, one thread, one run: 4.3 s by tensorly 0.10 on torch, 1.0 s here (ratio 4.1).
    with one_thread():
        norm = float(weight.norm())
        factors = [leading_factor(weight, mode, ranks[mode]) for mode in (0, 1)]
        previous = float("inf")
        for sweep in range(max_sweeps):
            factors[0] = leading_factor(mode_products(weight, factors[1:], [1], transpose=True), 0, ranks[0])
            by_output = mode_products(weight, factors[:1], [0], transpose=True)
            factors[1] = leading_factor(by_output, 1, ranks[1])
            core = mode_products(by_output, factors[1:], [1], transpose=True)
            # Orthonormal factors: the error follows from the norm of the core alone.
            error = max(0.0, 1 - (float(core.norm()) / norm) ** 2) ** 0.5 if norm else 0.0
            if sweep > 1 and abs(previous - error) < tolerance:
                break
            previous = error
    return TuckerFactors(factors[0], core.contiguous(), factors[1], error)


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
        energy = mode_products(weight, factors, transpose=True).square().sum(2)
        kept = torch.nn.functional.pad(energy.cumsum(0).cumsum(1), (1, 0, 1, 0))
        total = float(kept[-1, -1])
        lost = 1 - kept / total if total else torch.zeros_like(kept)
        return cls(lost.clamp(0, 1))

    def error(self, rank_out: int | None, rank_in: int | None) -> float:
        """Return the relative error (not squared) at these ranks; None is full rank."""
        place = tuple(-1 if rank is None else rank for rank in (rank_out, rank_in))
        return math.sqrt(float(self.squared_error[place]))

    def ranks_for_energy(self, energy: float) -> tuple[int, int]:
        """Return for each side alone the smallest rank that keeps this share of the energy, 0 < energy <= 1."""
        allowed = 1 - energy + 1e-12
        sides = (self.squared_error[:, -1], self.squared_error[-1, :])
        out, in_ = (max(1, int((errors <= allowed).nonzero()[0])) for errors in sides)
        return out, in_


def evbmf_rank(matrix: Tensor) -> int:
    """Return the rank of a matrix above the noise by empirical variational Bayes factorisation; 0 for pure noise.

    The noise variance is estimated from the data (Nakajima, Sugiyama, Babacan, Tomioka, "Global analytic solution of
    fully-observed variational Bayesian matrix factorization", JMLR 2013, corollaries 2 and 3).
    """
    values = matrix.detach().to("cpu", torch.float64)
    values = values.T if values.shape[0] > values.shape[1] else values
    rows, columns = values.shape
    with one_thread():
        squares = torch.linalg.eigvalsh(values @ values.T).flip(0).clamp(min=0)
    if float(squares[0]) == 0:
        return 0
    alpha = rows / columns
    tau = 2.5129 * math.sqrt(alpha)  # approximates the root of an equation in alpha (ibid., section 6)
    ceiling = (1 + tau) * (1 + alpha / tau)

    def free_energy(noise: float) -> float:
        x = squares / (columns * noise)
        above, below = x[x > ceiling], x[x <= ceiling]
        tau = ((above - (1 + alpha)) + ((above - (1 + alpha)).square() - 4 * alpha).clamp(min=0).sqrt()) / 2
        value = float((below - below.clamp(min=1e-300).log()).sum())
        value += float((above - tau).sum() + ((tau + 1) / above).log().sum() + alpha * (tau / alpha + 1).log().sum())
        return value

    most = min(math.ceil(rows / (1 + rows / columns)) - 1, rows - 1)
    high = float(squares.sum()) / (rows * columns)
    low = max(float(squares[most]) / (columns * ceiling), float(squares[most:].mean()) / columns, 1e-12 * high)
    for _ in range(3):  # the smallest value on a logarithmic grid, refined twice
        grid = torch.logspace(math.log10(low), math.log10(high), 200, dtype=torch.float64).tolist()
        energies = [free_energy(noise) for noise in grid]
        best = energies.index(min(energies))
        low, high = grid[max(best - 1, 0)], grid[min(best + 1, len(grid) - 1)]
    return int((squares > columns * grid[best] * ceiling).sum())
