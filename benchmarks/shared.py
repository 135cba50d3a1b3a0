"""What the benchmarks share: networks by name, and a clock for both kinds of seconds."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

_UNTRAINED = {"ts15": False, "ts3": True}  # name -> 3 mm?


def add_network_options(parser: argparse.ArgumentParser, rank_min: int) -> None:
    """Add the options that `point_of` reads."""
    parser.add_argument("--network", default="ts15", help="ts15, ts3 (untrained TotalSegmentator) or a model folder")
    parser.add_argument("--patch", type=int, nargs="+", help="voxels (default: the network's own, 128^3)")
    parser.add_argument("--rank-min", type=int, default=rank_min, help=f"smallest rank (default: {rank_min})")


def point_of(args: argparse.Namespace, **settings: Any) -> Any:
    """Return the point of nnslim's benchmark grid that stands for the chosen network."""
    from nnslim.benchmark.grid import GridPoint

    return GridPoint(
        rank_min=args.rank_min,
        low_resolution=_UNTRAINED.get(args.network, False),
        decompose=args.network not in _UNTRAINED,
        patch=None if args.patch is None else tuple(args.patch),
        model="" if args.network in _UNTRAINED else args.network,
        **settings,
    )


def clocked(work: Callable[[], Any]) -> tuple[Any, dict[str, float]]:
    """Return the result of a call, and its seconds: by the clock, and of the processor over all threads."""
    started, spent = time.perf_counter(), time.process_time()
    result = work()
    return result, {"seconds": time.perf_counter() - started, "cpu_seconds": time.process_time() - spent}
