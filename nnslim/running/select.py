"""Choose the backend by a short measurement, and remember it."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from nnslim.errors import OutputError
from nnslim.files import make_folder, user_cache, write_json
from nnslim.running.engine import Backend, Settings, candidates, with_fallback
from nnslim.running.processor import cpu_name
from nnslim.running.timing import pass_seconds

_log = logging.getLogger("nnslim")


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
    seconds = dict(zip(made, pass_seconds(list(made.values()), shape), strict=True))
    best = min(seconds, key=seconds.__getitem__)
    _log.info("backend %s: %s", best, ", ".join(f"{name} {value * 1e3:.0f} ms" for name, value in seconds.items()))
    remember(network, shape, settings, best)
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


def remember(network: nn.Module, shape: Sequence[int], settings: Settings, backend: str) -> None:
    """Keep the backend that was the fastest; a cache that cannot be written is no reason to stop."""
    try:
        make_folder(user_cache())
        write_json(user_cache() / "backends.json", {**_memory(), _key(network, shape, settings): backend})
    except (OutputError, OSError) as error:
        _log.debug("the choice is not kept: %s", error)


def machine_threads() -> int:
    """Return the CPUs that this process may use; nnU-Net itself stops at 8."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
