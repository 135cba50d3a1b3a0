"""The kernels of kernels.c and labels.c, built when nnslim was installed: called on tensors by threads."""

from __future__ import annotations

import ctypes
import functools
import logging
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nnslim.running.machine import cpu_flags

LANES = 8  # floats of one vector; widths are padded to a multiple
WIDEST = 512  # channels that the kernels have room for
_COMPILED = Path(__file__).with_name("compiled")
_log = logging.getLogger("nnslim")


def libraries() -> list[Path]:
    """Return the libraries that this processor can run, the best first; see hatch_build.py for their names."""

    def features(path: Path) -> set[str]:
        return set(path.name.partition(".")[0].split("+")) - {"any"}

    usable = [path for path in _COMPILED.glob("*.so") if features(path) <= cpu_flags()]
    return sorted(usable, key=lambda path: (len(features(path)), ".threads" in path.name, path.name), reverse=True)


@functools.lru_cache(maxsize=1)
def kernels() -> Kernels | None:
    """Return the kernels; None where they are not available, with a message.

    NNSLIM_NATIVE=0 does without them. Everything works without them, several times slower in places.
    """
    if os.environ.get("NNSLIM_NATIVE") == "0":
        return None
    for path in libraries():
        try:
            return Kernels(path)
        except (OSError, AttributeError) as error:  # no OpenMP in this torch, or not a file of this version
            _log.info("%s is not used: %s", path, error)
    _log.info("native kernels are not used: none was built for this processor when nnslim was installed")
    return None


class Kernels:
    """Calls with tensors; rows are (N, C) float32 on the CPU, contiguous, C a multiple of LANES unless said."""

    def __init__(self, path: Path) -> None:
        """Load a library; an OSError or AttributeError where that cannot be done."""
        self.path = path
        self._library = library = ctypes.CDLL(str(path))
        for name in ("moments", "pass", "transposed", "conv"):
            getattr(library, f"nnslim_{name}").restype = None
        for name in ("labels", "labels_blocks", "labels_scratch"):
            getattr(library, f"nnslim_{name}").restype = ctypes.c_long
        self.threaded = bool(library.nnslim_has_threads())

    def moments(self, z: Tensor, full: bool) -> tuple[Tensor, Tensor]:
        """Return the mean (C,) and the covariance (C, C) of the rows, or the variances (C,) where not `full`; float64.

        Sums go around the mean of the first rows: the difference of two large numbers would lose digits.
        """
        pivot = z[:4096].mean(0).contiguous()
        channels = len(pivot)
        sums = torch.empty((torch.get_num_threads(), channels), dtype=torch.float64, device="cpu")
        squares = sums.new_empty((*sums.shape, channels) if full else sums.shape)
        used = len(self._call("moments", z, len(z), channels, pivot, ctypes.c_int(full), each=(sums, squares)))
        mean, square = sums[:used].sum(0) / len(z), squares[:used].sum(0) / len(z)
        return mean + pivot, square - (mean.outer(mean) if full else mean * mean)

    def norm_pass(
        self,
        z: Tensor,
        weight: Tensor | None,
        scale: Tensor,
        shift: Tensor,
        slope: float,
        products: Sequence[tuple[Tensor, Tensor, Tensor]],
        keep: Tensor | None,
    ) -> None:
        """Fill y = act(z weight + shift), or act(z scale + shift) without weight, and out = y v + c for each product.

        Args:
            z: (N, C). weight: (C, C'). scale, shift: (C',). slope: of the activation, at most 1.
            products: (v, c, out): (C', R padded), (R padded,), (N, R) for any R.
            keep: (N, C') for y, or None.
        """
        count = len(products)
        widths = (ctypes.c_long * max(count, 1))(*[out.shape[1] for _, _, out in products])
        pointers = [(ctypes.c_void_p * max(count, 1))(*[item[n].data_ptr() for item in products]) for n in range(3)]
        layers = (z.shape[1], len(shift), weight, scale, shift, ctypes.c_float(slope))
        self._call("pass", z, len(z), *layers, count, widths, *pointers, keep)

    def transposed(
        self, x: Tensor, weight: Tensor, bias: Tensor, kernel: Sequence[int], add: Tensor | None, out: Tensor
    ) -> None:
        """Fill out = transposed convolution of x, kernel = stride, plus `add`.

        Args:
            x: (D, H, W, C). weight: (C, columns), columns (kd, kh, kw, R) padded. bias: (columns,). kernel: three.
            add, out: (D kd, H kh, W kw, R) for any R.
        """
        size, taps = (ctypes.c_long * 3)(*x.shape[:3]), (ctypes.c_long * 3)(*kernel)
        columns, rows = weight.shape[1], x.shape[0] * x.shape[1]
        self._call("transposed", x, rows, size, x.shape[3], weight, columns, bias, taps, out.shape[3], add, out)

    def conv(self, x: Tensor, weight: Tensor, bias: Tensor, out: Tensor) -> None:
        """Fill out = convolution of x with stride 1 and zero padding to the same size.

        Args:
            x: (D, H, W, C), any C. weight: (kd, kh, kw, C, R). bias: (R,). out: (D, H, W, R).
        """
        size, kernel = (ctypes.c_long * 3)(*x.shape[:3]), (ctypes.c_long * 3)(*weight.shape[:3])
        room = weight.shape[0] * weight.shape[1] * (x.shape[2] + weight.shape[2] + 16) * x.shape[3]
        scratch = x.new_empty((torch.get_num_threads(), room))
        given = (size, x.shape[3], weight, kernel, out.shape[3], bias, out)
        self._call("conv", x, x.shape[0] * x.shape[1], *given, each=(scratch,))

    def labels(self, job: ctypes.Structure) -> bool:
        """Do a `labels.Job`; return whether all scores are finite."""
        at = ctypes.byref(job)
        size, rows = self._library.nnslim_labels_scratch(at), self._library.nnslim_labels_blocks(at)
        memory = torch.empty((max(1, min(torch.get_num_threads(), rows)), size), dtype=torch.uint8, device="cpu")
        return min(self._call("labels", at, rows, each=(memory,), least=1)) >= 0

    def _call(self, name: str, first: Any, rows: int, *rest: Any, each: Sequence[Tensor] = (), least: int = 64) -> list:
        """Call a kernel until all rows are done; return what it returned, once for each thread that worked.

        Args:
            first, rest: arguments; between them come the first and last row and the number of the kernel's own threads.
            each: tensors with an item for each thread, the last arguments.
            least: rows that are worth a thread.
        """
        threads = max(1, min(torch.get_num_threads(), rows // least))

        def part(number: int, low: int, high: int, threads: int) -> Any:
            items = (tensor[number] for tensor in each)
            given = (_argument(value) for value in (first, low, high, threads, *rest, *items))
            return getattr(self._library, f"nnslim_{name}")(*given)

        if self.threaded or threads == 1:
            return [part(0, 0, rows, threads)] * threads
        bounds = [rows * number // threads for number in range(threads + 1)]
        pool = _pool(threads - 1, os.getpid())
        others = [pool.submit(part, n, bounds[n], bounds[n + 1], 1) for n in range(1, threads)]
        return [part(0, bounds[0], bounds[1], 1), *(future.result() for future in others)]


def _argument(value: Any) -> Any:
    """Return a value as C takes it: a tensor by its address, an int as a long."""
    if isinstance(value, Tensor):
        if value.device.type != "cpu":  # its address would end the process
            raise TypeError(f"the kernels work on tensors on the CPU, found one on {value.device}")
        return ctypes.c_void_p(value.data_ptr())
    return ctypes.c_long(value) if isinstance(value, int) else value


@functools.lru_cache(maxsize=4)
def _pool(threads: int, process: int) -> ThreadPoolExecutor:
    """Return a pool of this process: the threads of a parent do not live on in a fork."""
    return ThreadPoolExecutor(max(threads, 1), thread_name_prefix="nnslim")
