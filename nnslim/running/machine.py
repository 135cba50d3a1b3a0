"""This machine, as the system tells it: the processor, memory, and what glibc does with freed memory."""

from __future__ import annotations

import ctypes
import itertools
import json
import logging
import os
import platform
import resource
import sys
import threading
import weakref
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from nnslim.caches import read_kept, user_cache

MEASURED = "backends.json"  # in the cache: the fastest backend of each network
CPU_INFO = Path("/proc/cpuinfo")
_PROCESS = Path("/proc/self")
_GROUP = Path("/sys/fs/cgroup")
_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # glibc's malloc.h
_LARGE = 2**31 - 1
_log = logging.getLogger("nnslim")
_lock = threading.Lock()
_holders = 0


def machine_threads() -> int:
    """Return the threads that this process may use: no more than its CPUs, its container's quota, OMP_NUM_THREADS."""
    asked = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()
    limits = [cpus(), _quota(), int(asked) if asked.isdecimal() else None]
    return max(1, min(limit for limit in limits if limit is not None))


def cpus() -> int:
    """Return how many CPUs this process may run on; a quota lets it run on all of them, for a part of the time."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def measured_backends() -> dict[str, str]:
    """Return which backend was the fastest, by network and machine, as the cache knows it."""
    return json.loads(read_kept(user_cache() / MEASURED) or "{}")


def _quota() -> int | None:
    """Return how many CPUs' time the container has (`docker run --cpus`), rounded up; None without a limit."""
    version_1 = [_GROUP / "cpu" / f"cpu.cfs_{name}_us" for name in ("quota", "period")]
    found = "\n".join(_lines(_GROUP / "cpu.max")).split() or [line for file in version_1 for line in _lines(file)]
    known = len(found) == 2 and all(number.isdecimal() and int(number) for number in found)  # else "max", or -1
    return -(-int(found[0]) // int(found[1])) if known else None


def cpu_flags() -> frozenset[str]:
    """Return the instruction sets, in Linux' words (avx2, avx512_bf16, amx_int8, ...); none on other systems."""
    return frozenset(
        flag for line in _lines(CPU_INFO) if line.startswith(("flags", "Features")) for flag in line.split()[2:]
    )


def cpu_name() -> str:
    """Return the name of the processor."""
    named = (line.partition(":")[2].strip() for line in _lines(CPU_INFO) if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())


def chosen_device(name: str) -> str:
    """Return the device that "auto" stands for, cuda where torch has it and else cpu; any other name as it is."""
    if name != "auto":
        return name
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def has_fast_bfloat16() -> bool:
    """Return whether convolutions in bfloat16 can be faster here than in float32: AVX-512 BF16 or AMX."""
    return not cpu_flags().isdisjoint(("avx512_bf16", "amx_bf16"))


def reset_peak() -> bool:
    """Reset the high-water mark of resident memory; return False where the system cannot."""
    try:
        (_PROCESS / "clear_refs").write_text("5")
    except OSError:
        return False
    return True


def peak_bytes() -> int:
    """Return the high-water mark of resident memory since `reset_peak`, else since the process began."""
    found = _field(_PROCESS / "status", "VmHWM:")
    if found is not None:
        return found
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used if sys.platform == "darwin" else used * 1024


class PeakMeter:
    """Peaks of spans that overlap, from the one high-water mark that a process has. May be used by several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._open: dict[int, int] = {}
        self._handles = itertools.count()

    def begin(self) -> int:
        """Open a span and return its handle."""
        with self._lock:
            self._note()
            self._open[handle := next(self._handles)] = 0
            return handle

    def end(self, handle: int) -> int:
        """Close a span; return the peak of resident memory while it was open, bytes."""
        with self._lock:
            self._note()
            return self._open.pop(handle)

    def _note(self) -> None:
        peak = peak_bytes()
        self._open = {handle: max(found, peak) for handle, found in self._open.items()}
        reset_peak()


def available_bytes() -> int | None:
    """Return what programs can still take without swapping, the limit of a container included; None if unknown."""
    free = _field(Path("/proc/meminfo"), "MemAvailable:")
    try:
        limit, used = (int((_GROUP / f"memory.{name}").read_text()) for name in ("max", "current"))
    except (OSError, ValueError):  # no cgroup v2, or no limit ("max")
        return free
    return limit - used if free is None else min(free, limit - used)


def refuse_beyond(free: int | None) -> None:
    """Let allocations of this process fail beyond `free` more bytes, before the system kills something to make room."""
    data = _field(_PROCESS / "status", "VmData:")
    if free is None or data is None or sys.platform != "linux":
        return
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    wanted = data + free
    resource.setrlimit(resource.RLIMIT_DATA, (wanted if hard == resource.RLIM_INFINITY else min(wanted, hard), hard))


def _field(file: Path, name: str) -> int | None:
    """Return the value of a line `name  123 kB`, in bytes."""
    return next((int(line.split()[1]) * 1024 for line in _lines(file) if line.startswith(name)), None)


def _lines(file: Path) -> list[str]:
    try:
        return file.read_text(encoding="utf-8").splitlines()
    except OSError:
        return []


def heap_can_be_kept() -> bool:
    """Return whether memory comes from glibc's malloc, not from another allocator, and nobody has set it up."""
    chosen = any(name.startswith("MALLOC_") for name in os.environ)
    return not chosen and "glibc.malloc" not in os.environ.get("GLIBC_TUNABLES", "") and _malloc_is_glibcs()


def _malloc_is_glibcs() -> bool:
    """Return whether `malloc` lies in the same library as a function that only glibc has."""
    libc, places = c_library(), []
    for name in ("malloc", "gnu_get_libc_version"):
        if not hasattr(libc, name):  # musl, macOS
            return False
        found = (ctypes.c_void_p * 4)()  # Dl_info: file, its address, symbol, its address
        if not libc.dladdr(ctypes.cast(getattr(libc, name), ctypes.c_void_p), found):
            return False
        places.append(found[1])
    return places[0] == places[1]


@contextmanager
def keep_heap() -> Iterator[bool]:
    """Let glibc serve large tensors from the heap, and keep what is freed, while the block runs.

    By default each tensor above 32 MB gets fresh pages from the kernel, which cost more time than the work that is done
    on them: writing 268 MB into a new tensor took 170 ms, into pages that are there already 20 ms. Costs memory: freed
    blocks stay with the process (2.2 -> 2.9 GB for a forward pass of TotalSegmentator's 1.5 mm network). Nests; at the
    end of the outermost block the defaults are set and free memory is given back. Without glibc nothing happens.

    Yields:
        Whether it is in force.
    """
    global _holders
    if not heap_can_be_kept():
        yield False
        return
    with _lock:
        _holders += 1
        if _holders == 1:
            set_malloc(_LARGE, 0)
    try:
        yield True
    finally:
        with _lock:
            _holders -= 1
            if _holders == 0:
                # glibc has no way to read its settings; these are its documented defaults. Its own adaptation of the
                # threshold stays off for this process, as after any call of mallopt.
                set_malloc(128 * 1024, 65536)
                c_library().malloc_trim(0)


def keep_heap_with(holder: object) -> None:
    """Keep the heap as long as an object lives: who calls it patch by patch has no block to do that in."""
    block = ExitStack()
    block.enter_context(keep_heap())
    weakref.finalize(holder, block.close)


def set_malloc(trim_threshold: int, mmap_max: int) -> None:
    libc = c_library()
    for setting, value in ((_MMAP_MAX, mmap_max), (_TRIM_THRESHOLD, trim_threshold)):
        if not libc.mallopt(setting, value):
            _log.debug("mallopt(%d, %d) was refused", setting, value)


def c_library() -> ctypes.CDLL:
    return ctypes.CDLL(None)
