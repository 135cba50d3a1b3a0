"""The timer: passes of several programs, alternated, on a CPU or on CUDA."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence

import torch
from torch import Tensor, nn

_ROUNDS = 3


_MORE_ON_CUDA = 10  # times the rounds: passes take milliseconds there, and the first ones find the clock low


_PATIENCE = 20.0  # seconds


def pass_seconds(engines: Sequence[nn.Module], shape: Sequence[int], rounds: int = _ROUNDS) -> list[float]:
    """Return the median seconds of a pass of each engine, in alternated rounds after one pass that is not counted.

    Slow engines get fewer rounds: no new one begins after 20 s.

    Args:
        engines: see `make_engine`. shape: (B, C, *patch). rounds: at most; ten times as many on CUDA.
    """
    devices = {parameter.device for engine in engines for parameter in engine.parameters()} or {torch.device("cpu")}
    x = torch.randn(tuple(shape), generator=torch.Generator().manual_seed(0)).to(next(iter(devices)))
    rounds *= _MORE_ON_CUDA if x.is_cuda else 1
    for engine in engines:
        run_pass(engine, x)
    seconds: list[list[float]] = [[] for _ in engines]
    begun = time.perf_counter()
    for number in range(rounds):
        if number and time.perf_counter() - begun > _PATIENCE:
            break
        for mine, engine in zip(seconds, engines, strict=True):
            started = time.perf_counter()
            run_pass(engine, x)
            mine.append(time.perf_counter() - started)
    return [statistics.median(values) for values in seconds]


def run_pass(engine: nn.Module, x: Tensor) -> Tensor:
    """Run an engine without gradients, under autocast on CUDA as nnU-Net does; waits for the result on CUDA."""
    with torch.inference_mode(), torch.autocast(x.device.type, enabled=x.device.type == "cuda"):
        y = engine(x)
    if x.device.type == "cuda":
        torch.cuda.synchronize(x.device)
    return y
