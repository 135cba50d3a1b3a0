"""What this machine can do at most: multiply matrices, and move bytes."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from nnslim.running.timing import alternated

_SIDE = 1536  # rows of the matrices: large enough for full speed, 0.1 s on two cores
_BYTES = 1 << 27
_ROUNDS = 5


@dataclass(frozen=True)
class Roofline:
    """Measured limits.

    Attributes:
        gflops: speed of a float32 matrix product, 2 operations per MAC.
        copy_gbs: GB/s read plus written by a copy between tensors that exist.
        threads: CPU threads of torch.
    """

    gflops: float
    copy_gbs: float
    threads: int

    def compute_seconds(self, macs: float) -> float:
        """Return the least time for so many MACs."""
        return 2 * macs / (self.gflops * 1e9)

    def traffic_seconds(self, moved: float) -> float:
        """Return the least time to move so many bytes."""
        return moved / (self.copy_gbs * 1e9)


def measure_roofline(threads: int | None = None, *, side: int = _SIDE, size: int = _BYTES) -> Roofline:
    """Measure a matrix product and a copy; the best of a few rounds. Takes about a second.

    Args:
        threads: torch's if None; put back afterwards.
        side: rows and columns of the matrices. size: bytes of the tensor that is copied.
    """
    before = torch.get_num_threads()
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        left, right = torch.rand(side, side), torch.rand(side, side)
        product = torch.empty(side, side)
        source = torch.ones(size // 4)
        target = torch.zeros(size // 4)  # ones and zeros, so that all pages are there
        works = (lambda: torch.mm(left, right, out=product)), (lambda: target.copy_(source))
        multiply, copy = (min(seconds) for seconds in alternated(works, _ROUNDS))
        return Roofline(2 * side**3 / multiply / 1e9, 2 * size / copy / 1e9, torch.get_num_threads())
    finally:
        torch.set_num_threads(before)
