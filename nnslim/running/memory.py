"""Memory of this process and of the machine, as Linux tells it."""

from __future__ import annotations

import resource
import sys
import threading
from pathlib import Path

_PROCESS = Path("/proc/self")
_GROUP = Path("/sys/fs/cgroup")


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
        """Watch nothing yet."""
        self._lock = threading.Lock()
        self._open: dict[int, int] = {}
        self._next = 0

    def begin(self) -> int:
        """Open a span and return its handle."""
        with self._lock:
            self._note()
            self._next += 1
            self._open[self._next] = 0
            return self._next

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
    try:
        lines = file.read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(name)), None)
