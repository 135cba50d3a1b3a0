"""The kernels of kernels.c and labels.c: built once by the machine's C compiler, called on tensors by threads."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from nnslim.files import user_cache
from nnslim.running.processor import cpu_flags, cpu_name

LANES = 8  # floats of one vector; widths are padded to a multiple
WIDEST = 512  # channels that the kernels have room for
_SOURCES = (Path(__file__).with_name("kernels.c"), Path(__file__).parents[1] / "resampling" / "labels.c")
_FLAGS = ("-O3", "-march=native", "-ffp-contract=fast", "-fno-math-errno", "-fPIC")
_log = logging.getLogger("nnslim")


def compiler() -> str | None:
    """Return the C compiler to build with: CC, else cc, gcc or clang; None where there is none."""
    named = os.environ.get("CC", "").split()
    return next((found for name in (*named[:1], "cc", "gcc", "clang") if (found := shutil.which(name))), None)


@functools.lru_cache(maxsize=1)
def kernels() -> Kernels | None:
    """Return the kernels, building them where that was not done yet; None where they are not available, with a message.

    NNSLIM_NATIVE=0 does without them. Everything works without them, several times slower in places.
    """
    if os.environ.get("NNSLIM_NATIVE") == "0":
        return None
    problem: Exception | None = None
    for threads in (True, False):
        try:
            return Kernels(ctypes.CDLL(str(built_library(threads))))
        except (OSError, subprocess.SubprocessError) as error:
            problem = problem or error
    _log.info("native kernels are not used: %s", problem)
    return None


def built_library(threads: bool) -> Path:
    """Return the library, built where it is not there yet.

    With threads it calls OpenMP functions without naming a library for them: they are found in the one that torch has
    loaded. So torch's threads do the work, and do not wait actively beside others.

    Raises:
        OSError: no compiler, or it failed.
    """
    chosen = compiler()
    if chosen is None:
        raise OSError("no C compiler found (CC, cc, gcc, clang)")
    flags = (*_FLAGS, "-fopenmp") if threads else _FLAGS
    # The machine's features belong to the key: a cache may be shared by different machines.
    features = " ".join(sorted(cpu_flags())) or cpu_name()
    texts = [source.read_text(encoding="utf-8") for source in _SOURCES]
    parts = (*texts, *flags, chosen, platform.machine(), features)
    key = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
    target = user_cache() / "native" / f"kernels-{key}.so"
    if not target.is_file():
        target.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            made = Path(folder) / "kernels.so"
            compiled = [str(Path(folder) / f"{source.stem}.o") for source in _SOURCES]
            for source, target_file in zip(_SOURCES, compiled, strict=True):
                _run(chosen, *flags, "-c", "-o", target_file, str(source))
            _run(chosen, "-shared", "-o", str(made), *compiled)
            made.replace(target)
    return target


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    if done.returncode:
        message = done.stderr.strip().splitlines() or ["no message"]
        raise OSError(f"{command[0]} failed: {message[-1]}")


class Kernels:
    """Calls with tensors; rows are (N, C) float32 on the CPU, contiguous, C a multiple of LANES unless said."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        for name in ("moments", "pass", "transposed", "conv"):
            getattr(library, f"nnslim_{name}").restype = None
        for name in ("labels", "labels_blocks", "labels_scratch"):
            getattr(library, f"nnslim_{name}").restype = _long
        self.threaded = bool(library.nnslim_has_threads())

    def moments(self, z: Tensor, full: bool) -> tuple[Tensor, Tensor]:
        """Return the mean (C,) and the covariance (C, C) of the rows, or the variances (C,) where not `full`; float64.

        Sums go around the mean of the first rows: the difference of two large numbers would lose digits.
        """
        pivot = z[:4096].mean(0).contiguous()
        channels = len(pivot)
        threads = torch.get_num_threads()
        sums = torch.empty((threads, channels), dtype=torch.float64)
        squares = torch.empty((threads, channels, channels) if full else (threads, channels), dtype=torch.float64)

        def part(number: int, low: int, high: int, threads: int) -> None:
            self._library.nnslim_moments(
                _at(z), _long(low), _long(high), _long(threads), _long(channels), _at(pivot), int(full),
                _at(sums[number]), _at(squares[number]),
            )  # fmt: skip

        used = self._shared(part, len(z))
        mean, square = sums[:used].sum(0) / len(z), squares[:used].sum(0) / len(z)
        square = square - (mean.outer(mean) if full else mean * mean)
        return mean + pivot, square

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
        wide = len(shift)

        def part(number: int, low: int, high: int, threads: int) -> None:
            self._library.nnslim_pass(
                _at(z), _long(low), _long(high), _long(threads), _long(z.shape[1]), _long(wide),
                _at(weight), _at(scale), _at(shift), ctypes.c_float(slope), _long(count), widths, *pointers, _at(keep),
            )  # fmt: skip

        self._shared(part, len(z))

    def transposed(
        self, x: Tensor, weight: Tensor, bias: Tensor, kernel: Sequence[int], add: Tensor | None, out: Tensor
    ) -> None:
        """Fill out = transposed convolution of x, kernel = stride, plus `add`.

        Args:
            x: (D, H, W, C). weight: (C, columns), columns (kd, kh, kw, R) padded. bias: (columns,). kernel: three.
            add, out: (D kd, H kh, W kw, R) for any R.
        """
        size, taps = (ctypes.c_long * 3)(*x.shape[:3]), (ctypes.c_long * 3)(*kernel)

        def part(number: int, low: int, high: int, threads: int) -> None:
            self._library.nnslim_transposed(
                _at(x), _long(low), _long(high), _long(threads), size, _long(x.shape[3]), _at(weight),
                _long(weight.shape[1]), _at(bias), taps, _long(out.shape[3]), _at(add), _at(out),
            )  # fmt: skip

        self._shared(part, x.shape[0] * x.shape[1])

    def conv(self, x: Tensor, weight: Tensor, bias: Tensor, out: Tensor) -> None:
        """Fill out = convolution of x with stride 1 and zero padding to the same size.

        Args:
            x: (D, H, W, C), any C. weight: (kd, kh, kw, C, R). bias: (R,). out: (D, H, W, R).
        """
        size, kernel = (ctypes.c_long * 3)(*x.shape[:3]), (ctypes.c_long * 3)(*weight.shape[:3])
        room = weight.shape[0] * weight.shape[1] * (x.shape[2] + weight.shape[2] - 1) * x.shape[3]
        scratch = torch.empty((torch.get_num_threads(), room))

        def part(number: int, low: int, high: int, threads: int) -> None:
            self._library.nnslim_conv(
                _at(x), _long(low), _long(high), _long(threads), size, _long(x.shape[3]), _at(weight), kernel,
                _long(out.shape[3]), _at(bias), _at(out), _at(scratch[number]),
            )  # fmt: skip

        self._shared(part, x.shape[0] * x.shape[1])

    def labels(self, job: ctypes.Structure) -> bool:
        """Do a `labels.Job`; return whether all scores are finite."""
        at = ctypes.byref(job)
        each, rows = self._library.nnslim_labels_scratch(at), self._library.nnslim_labels_blocks(at)
        threads = max(1, min(torch.get_num_threads(), rows))
        memory = torch.empty(threads * each, dtype=torch.uint8)
        done = [0] * threads

        def part(number: int, low: int, high: int, threads: int) -> None:
            done[number] = self._library.nnslim_labels(
                at, _long(low), _long(high), _long(threads), _at(memory[number * each :])
            )

        self._shared(part, rows, 1)
        return min(done) >= 0

    def _shared(self, part: Callable[[int, int, int, int], None], rows: int, least: int = 64) -> int:
        """Call part(first thread, low, high, threads) until all rows are done; return how many threads worked.

        Args:
            least: rows that are worth a thread.
        """
        threads = max(1, min(torch.get_num_threads(), rows // least))
        if self.threaded or threads == 1:
            part(0, 0, rows, threads)
            return threads
        bounds = [rows * number // threads for number in range(threads + 1)]
        pool = _pool(threads - 1, os.getpid())
        rest = [pool.submit(part, n, bounds[n], bounds[n + 1], 1) for n in range(1, threads)]
        part(0, bounds[0], bounds[1], 1)
        for future in rest:
            future.result()
        return threads


_long = ctypes.c_long


def _at(tensor: Tensor | None) -> ctypes.c_void_p | None:
    return None if tensor is None else ctypes.c_void_p(tensor.data_ptr())


@functools.lru_cache(maxsize=4)
def _pool(threads: int, process: int) -> ThreadPoolExecutor:
    """Return a pool of this process: the threads of a parent do not live on in a fork."""
    return ThreadPoolExecutor(max(threads, 1), thread_name_prefix="nnslim")
