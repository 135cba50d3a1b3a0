"""Choose the backend by a short measurement, and remember it."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from nnslim.errors import OutputError
from nnslim.files import make_folder, user_cache, write_json
from nnslim.running.engine import Backend, Settings, candidates, run, with_fallback
from nnslim.running.processor import cpu_name

_ROUNDS = 3
_MORE_ON_CUDA = 10  # times the rounds: passes take milliseconds there, and the first ones find the clock low
_PATIENCE = 20.0  # seconds
_log = logging.getLogger("nnslim")


def measure(engines: Sequence[nn.Module], shape: Sequence[int], rounds: int = _ROUNDS) -> list[float]:
    """Return the median seconds of a pass of each engine, in alternated rounds after one pass that is not counted.

    Slow engines get fewer rounds: no new one begins after 20 s.

    Args:
        engines: see `make_engine`. shape: (B, C, *patch). rounds: at most; ten times as many on CUDA.
    """
    devices = {parameter.device for engine in engines for parameter in engine.parameters()} or {torch.device("cpu")}
    x = torch.randn(tuple(shape), generator=torch.Generator().manual_seed(0)).to(next(iter(devices)))
    rounds *= _MORE_ON_CUDA if x.is_cuda else 1
    for engine in engines:
        run(engine, x)
    seconds: list[list[float]] = [[] for _ in engines]
    begun = time.perf_counter()
    for number in range(rounds):
        if number and time.perf_counter() - begun > _PATIENCE:
            break
        for mine, engine in zip(seconds, engines, strict=True):
            started = time.perf_counter()
            run(engine, x)
            mine.append(time.perf_counter() - started)
    return [statistics.median(values) for values in seconds]


def remembered(network: nn.Module, shape: Sequence[int], settings: Settings) -> Backend | None:
    """Return the backend that `fastest` found for this architecture, patch, device, threads and torch; None if none."""
    known = _memory().get(_key(network, shape, settings))
    return known if known in candidates(next(network.parameters()).device) else None


def fastest(network: nn.Module, shape: Sequence[int], settings: Settings) -> tuple[nn.Module, str]:
    """Measure the candidates at this patch; return the fastest engine and its backend, which is kept on disk.

    Args:
        network: in eval mode. shape: (B, C, *patch). settings: precision and threads; the backend is not looked at.
    Raises:
        BackendError: no backend runs with that precision.
    """
    device, single = next(network.parameters()).device, settings.precision == "f32"
    if not single and device.type != "cuda":
        return with_fallback(network, shape, Settings("openvino", settings.precision, settings.threads))
    made: dict[str, nn.Module] = {}
    for name in candidates(device):
        if single or name != "stock":
            engine, found = with_fallback(network, shape, Settings(name, settings.precision, settings.threads))
            made.setdefault(found, engine)
    seconds = dict(zip(made, measure(list(made.values()), shape), strict=True))
    best = min(seconds, key=seconds.__getitem__)
    _log.info("backend %s: %s", best, ", ".join(f"{name} {value * 1e3:.0f} ms" for name, value in seconds.items()))
    _remember(_key(network, shape, settings), best)
    return made[best], best


def _key(network: nn.Module, shape: Sequence[int], settings: Settings) -> str:
    device = next(network.parameters()).device
    named = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()
    threads = settings.threads or torch.get_num_threads()
    parts = [str(network), list(shape), device.type, named, threads, settings.precision, torch.__version__]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:24]


def _memory() -> dict[str, Backend]:
    try:
        content: Any = json.loads((user_cache() / "backends.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _remember(key: str, backend: str) -> None:
    try:
        make_folder(user_cache())
        write_json(user_cache() / "backends.json", {**_memory(), key: backend})
    except (OutputError, OSError) as error:
        _log.debug("the choice is not kept: %s", error)


def machine_threads() -> int:
    """Return the CPUs that this process may use; nnU-Net itself stops at 8."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
