"""Speed of token-sparse networks: alternated passes of several ratios, and the time of each stage of one."""

from __future__ import annotations

import re
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nnslim.network.operations import count_operations

# What each module name belongs to; the first pattern that matches a module counts, and what is inside it does not.
STAGES = (
    ("scorer", re.compile(r"\.reduction\.scorers\.\d+$")),
    ("top-k", re.compile(r"\.reduction\.topk$")),
    ("embed", re.compile(r"(^|\.)(patch_embed|patch_embedding|down_projection)$")),
    ("completion", re.compile(r"(^|\.)completion$")),
    ("blocks", re.compile(r"(encoder|eva|vit)\.blocks\.\d+$")),
    ("decoder", re.compile(r"^(decoder|up_projection|encoder[1-4]|decoder[2-5]|out)$")),
)


@dataclass(frozen=True)
class Measured:
    """One network on one backend.

    Attributes:
        name: of the network. macs: of one sample, conventions "torch" and "torchprofile".
        wall, cpu: seconds of a pass over the batch, medians; cpu, over all threads, also tells on a busy machine.
        samples_per_second: batch size / wall.
        stages: CPU seconds of each stage, median; empty where the backend has none.
    """

    name: str
    macs: int
    macs_torchprofile: int
    wall: float
    cpu: float
    samples_per_second: float
    stages: dict[str, float]


def stage_of(name: str) -> str | None:
    """Return the stage that a module belongs to as a whole, or None."""
    return next((stage for stage, pattern in STAGES if pattern.search(name)), None)


@contextmanager
def staged(network: nn.Module, clock: Callable[[], float] = time.process_time) -> Iterator[dict[str, float]]:
    """Add up the seconds of each stage of the passes inside; "rest" is not among them."""
    seconds: dict[str, float] = defaultdict(float)
    handles, started = [], {}

    def begin(module: nn.Module, _: Any) -> None:
        started[id(module)] = clock()

    for name, module in network.named_modules():
        if (stage := stage_of(name)) is None:
            continue

        def end(module: nn.Module, _: Any, __: Any, stage: str = stage) -> None:
            seconds[stage] += clock() - started.pop(id(module))

        handles += [module.register_forward_pre_hook(begin), module.register_forward_hook(end)]
    try:
        yield seconds
    finally:
        for handle in handles:
            handle.remove()


def alternate(
    networks: dict[str, nn.Module],
    image: Tensor,
    rounds: int,
    *,
    engines: dict[str, nn.Module] | None = None,
    around: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> list[Measured]:
    """Run the networks in turn, `rounds` times after one warm-up, and return medians.

    Args:
        networks: by name, in eval mode. image: (B, C, *size), on their device.
        engines: what runs in their place, by the same names; stages are then not told apart.
        around: makes a context for all passes, such as one that chooses the kernel of attention.
    """
    run = engines or networks
    wall, cpu = ({name: [] for name in networks} for _ in range(2))
    stages: dict[str, list[dict[str, float]]] = {name: [] for name in networks}
    with torch.inference_mode(), around():
        for turn in range(rounds + 1):
            for name, network in run.items():
                with staged(network) as seconds:
                    before = time.perf_counter(), time.process_time()
                    network(image)
                    if image.device.type == "cuda":
                        torch.cuda.synchronize()
                    after = time.perf_counter(), time.process_time()
                if turn:
                    wall[name].append(after[0] - before[0])
                    cpu[name].append(after[1] - before[1])
                    stages[name].append(dict(seconds))
    made = []
    for name, network in networks.items():
        cost = count_operations(network, (1, *image.shape[1:]))
        seconds = statistics.median(wall[name])
        kinds = stages[name][0] if engines is None else {}
        made.append(
            Measured(
                name,
                cost.macs(),
                cost.macs("torchprofile"),
                seconds,
                statistics.median(cpu[name]),
                image.shape[0] / seconds,
                {kind: statistics.median(each.get(kind, 0.0) for each in stages[name]) for kind in kinds},
            )
        )
    return made


def rows(measured: Sequence[Measured], backend: str) -> list[dict[str, Any]]:
    """Return CSV rows; the gain is over the first."""
    return [
        {
            "network": each.name,
            "backend": backend,
            "gmacs": round(each.macs / 1e9, 3),
            "gmacs_torchprofile": round(each.macs_torchprofile / 1e9, 3),
            "wall_seconds": round(each.wall, 3),
            "cpu_seconds": round(each.cpu, 3),
            "samples_per_second": round(each.samples_per_second, 4),
            "gain_wall": round(measured[0].wall / each.wall, 2),
            "gain_cpu": round(measured[0].cpu / each.cpu, 2),
            **{f"cpu_{kind}": round(each.stages.get(kind, 0.0), 3) for kind, _ in STAGES},
        }
        for each in measured
    ]
