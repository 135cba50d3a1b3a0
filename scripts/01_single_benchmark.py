"""Time one forward pass in one setting: MACs by layer, parameters, milliseconds, peak memory.

Example: ./run.sh scripts/01_single_benchmark.py --rank-factor 0.3 --backend openvino
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path


def add_setting(parser: argparse.ArgumentParser) -> None:
    """Add the options of one setting."""
    parser.add_argument("-m", "--model", type=Path, help="model folder (default: TotalSegmentator's untrained network)")
    parser.add_argument("--3mm", dest="low_resolution", action="store_true", help="the 3 mm network, not 1.5 mm")
    parser.add_argument("--patch", type=int, nargs="+", help="voxels (default: the network's own)")
    parser.add_argument("--dense", action="store_true", help="without Tucker")
    parser.add_argument("--rank-factor", type=float, default=0.3, help="share of the channels kept (default: 0.3)")
    parser.add_argument("--rank-min", type=int, default=8, help="smallest rank (default: 8)")
    parser.add_argument("--rule", choices=["nnslim", "published"], default="nnslim", help="published: every layer")
    parser.add_argument("--decompose", action="store_true", help="decompose the weights; else random ones")
    parser.add_argument("--backend", default="eager", help="stock, eager, compile, openvino, auto, stock-compile, ...")
    parser.add_argument("--precision", default="f32", help="f32, bf16, f16, int8")
    parser.add_argument("--threads", type=int, help="CPU threads")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--autocast", action="store_true")
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5, help="counted passes (default: 5)")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_setting(parser)
    args = parser.parse_args(arguments)

    from rich.console import Console

    from nnslim.benchmark.grid import GridPoint, measure_points, short_names
    from nnslim.benchmark.passes import Way
    from nnslim.benchmark.timings import cost_table, screen_table
    from nnslim.errors import NNSlimError
    from nnslim.hosts.totalseg.grid_points import grid_network
    from nnslim.network.cost import measure_cost

    logging.basicConfig(format="%(message)s")
    screen = Console(highlight=False, width=None if sys.stdout.isatty() else 180)
    try:
        point = GridPoint(
            Way(args.backend, args.precision, args.threads, args.device, args.autocast),
            batch_size=args.batch_size,
            apply_tucker=not args.dense,
            rank_factor=args.rank_factor,
            rank_min=args.rank_min,
            rule=args.rule,
            low_resolution=args.low_resolution,
            decompose=args.decompose,
            patch=None if args.patch is None else tuple(args.patch),
            model="" if args.model is None else str(args.model),
        )
        network, shape = grid_network(point)
        screen.print(cost_table(measure_cost(network, shape)))
        ((row,), _) = measure_points([point], lambda _: (network, shape), args.rounds)
    except NNSlimError as error:
        print(f"nnslim: {error}", file=sys.stderr)
        return 2
    screen.print(screen_table(short_names([row])))
    if row["status"] == "failed":
        print(f"nnslim: {row['reason']}", file=sys.stderr)
        return 1
    print(f"forward pass: {row['exec_time_mean']:.2f} ms, standard deviation {row['exec_time_std']:.2f} ms")
    return 0


if __name__ == "__main__":
    sys.exit(main())
