"""What the processor is called and can do, as the system says it."""

from __future__ import annotations

import platform
from pathlib import Path

_FILE = Path("/proc/cpuinfo")


def cpu_flags() -> frozenset[str]:
    """Return the instruction sets, in Linux' words (avx2, avx512_bf16, amx_int8, ...); none on other systems."""
    return frozenset(flag for line in _lines() if line.startswith(("flags", "Features")) for flag in line.split()[2:])


def cpu_name() -> str:
    """Return the name of the processor."""
    named = (line.partition(":")[2].strip() for line in _lines() if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())


def has_fast_bfloat16() -> bool:
    """Return whether convolutions in bfloat16 can be faster here than in float32: AVX-512 BF16 or AMX."""
    return not cpu_flags().isdisjoint(("avx512_bf16", "amx_bf16"))


def _lines() -> list[str]:
    try:
        return _FILE.read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
