"""Low-rank algebra: the partial Tucker (Tucker-2) form of a convolution kernel over its two channel axes."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from nnslim.errors import RankError


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
        return torch.einsum("oa,ab...,ib->oi...", self.out, self.core, self.in_)


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
    """Return the `count` leading eigenvectors of a symmetric matrix as columns, each with its largest entry positive.

    The left singular vectors of a short, wide unfolding M are the eigenvectors of M M^T. In float64 the squared
    condition number does no harm to a leading subspace.
    """
    vectors = torch.linalg.eigh(gram)[1].flip(1)[:, :count]
    largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
    return vectors * largest.sign()


def partial_tucker(
    kernel: Tensor, ranks: tuple[int, int], *, max_sweeps: int = 100, tolerance: float = 1e-4
) -> TuckerFactors:
    """Factor a convolution kernel over its two channel axes by HOOI, started from the truncated HOSVD.

    The result is that of tensorly's `partial_tucker(..., modes=[0, 1], init="svd")`, which takes a full SVD of each
    unfolding in each sweep: 125 s for one 320 x 320 x 3^3 kernel, against about one second here.

    Args:
        kernel: (O, I, *K) with one to three spatial axes, any float type; not modified. Computed in float64.
        ranks: (R_out, R_in), 1 <= R_out <= O and 1 <= R_in <= I.
        max_sweeps: most alternating sweeps.
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
    weight = kernel.detach().to("cpu", torch.float64).flatten(2)
    with one_thread():
        total = float(weight.square().sum())
        out = leading_eigenvectors(torch.einsum("oik,pik->op", weight, weight), ranks[0])
        in_ = leading_eigenvectors(torch.einsum("oik,ojk->ij", weight, weight), ranks[1])
        previous = float("inf")
        for sweep in range(max_sweeps):
            by_input = torch.einsum("oik,ib->obk", weight, in_)
            out = leading_eigenvectors(torch.einsum("obk,pbk->op", by_input, by_input), ranks[0])
            by_output = torch.einsum("oik,oa->aik", weight, out)
            in_ = leading_eigenvectors(torch.einsum("aik,ajk->ij", by_output, by_output), ranks[1])
            core = torch.einsum("aik,ib->abk", by_output, in_)
            # Orthonormal factors: the error follows from the norm of the core alone.
            error = (max(0.0, 1 - float(core.square().sum()) / total) if total else 0.0) ** 0.5
            if sweep > 1 and abs(previous - error) < tolerance:
                break
            previous = error
    return TuckerFactors(out, core.unflatten(2, kernel.shape[2:]), in_.contiguous(), error)
