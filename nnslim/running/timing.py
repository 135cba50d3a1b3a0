"""The timer: several pieces of work in alternated rounds, on a CPU or on CUDA."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:  # programs without torch are timed too
    import torch
    from torch import Tensor, nn

_ROUNDS = 3
_MORE_ON_CUDA = 10  # times the rounds: passes take milliseconds there, and the first ones find the clock low
_PATIENCE = 20.0  # seconds
Result = TypeVar("Result")


def timed(
    work: Callable[[], Result], device: torch.device | None = None, clock: Callable[[], float] = time.perf_counter
) -> tuple[float, Result]:
    """Return the seconds that a call takes, and its result.

    Args:
        device: where it runs; a CUDA device is waited for.
        clock: time.process_time counts the processor's seconds instead.
    """
    started = clock()
    result = work()
    if device is not None and device.type == "cuda":
        import torch

        torch.cuda.synchronize(device)
    return clock() - started, result


def alternated(
    works: Sequence[Callable[[], Any]],
    rounds: int = _ROUNDS,
    *,
    warmups: int = 1,
    patience: float = math.inf,
    device: torch.device | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> list[list[float]]:
    """Call the works in turn, A B C A B C ..., and return the seconds of the counted calls of each.

    What else the machine does then falls on all of them alike.

    Args:
        rounds: counted calls of each, at most.
        warmups: calls of each before that.
        patience: seconds after which no further round begins; one is always done.
        device, clock: see `timed`.
    """
    seconds: list[list[float]] = [[] for _ in works]
    for _ in range(warmups):
        for work in works:
            timed(work, device)
    begun = time.perf_counter()
    for number in range(rounds):
        if number and time.perf_counter() - begun > patience:
            break
        for mine, work in zip(seconds, works, strict=True):
            mine.append(timed(work, device, clock)[0])
    return seconds


def pass_seconds(engines: Sequence[nn.Module], shape: Sequence[int], rounds: int = _ROUNDS) -> list[float]:
    """Return the median seconds of a pass of each engine; slow engines get fewer rounds, within 20 s.

    Args:
        engines: see `make_engine`. shape: (B, C, *patch). rounds: at most; ten times as many on CUDA.
    """
    import torch

    device = next((parameter.device for engine in engines for parameter in engine.parameters()), "cpu")
    x = torch.randn(tuple(shape), generator=torch.Generator("cpu").manual_seed(0), device="cpu").to(device)
    works = [lambda engine=engine: run_pass(engine, x) for engine in engines]
    seconds = alternated(works, rounds * (_MORE_ON_CUDA if x.is_cuda else 1), patience=_PATIENCE)
    return [statistics.median(values) for values in seconds]


def run_pass(engine: nn.Module, x: Tensor) -> Tensor:
    """Run an engine without gradients, under autocast on CUDA as nnU-Net does; waits for the result on CUDA."""
    import torch

    with torch.inference_mode(), torch.autocast(x.device.type, enabled=x.device.type == "cuda"):
        y = engine(x)
    if x.is_cuda:
        torch.cuda.synchronize(x.device)
    return y
