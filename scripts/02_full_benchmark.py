"""Time a grid of settings into one CSV file; stop it at any time and start it again to resume.

Without options: TotalSegmentator's 1.5 mm network on this machine's CPU, dense and at two rank factors (minutes).
--full measures tucker-cnn's whole grid; --device cuda runs on a GPU.

Example: ./run.sh scripts/02_full_benchmark.py --rank-factors 0.5 0.3 0.1 --resolutions 1.5 3 --threads 1 2 -o grid.csv
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import logging
import os
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

_FACTORS = [0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.7, 0.9]
_BATCHES = 100  # or until memory runs out


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="exit code: 0 done, 1 a row failed (the reason is in the table), 2 bad arguments or input",
    )
    parser.add_argument("-o", "--output", type=Path, default=Path("benchmark_results.csv"), help="CSV; rows are kept")
    parser.add_argument("-m", "--model", type=Path, help="model folder (default: TotalSegmentator's, untrained)")
    parser.add_argument("-i", "--images", type=Path, help="also time whole cases, from reading to writing")
    parser.add_argument("--full", action="store_true", help="all rank factors, rules, networks and batch sizes")
    parser.add_argument("--rank-factors", type=float, nargs="+", help="default: 0.5 0.3")
    parser.add_argument("--rank-min", type=int, default=8)
    parser.add_argument("--rules", nargs="+", choices=["nnslim", "published"], help="default: nnslim")
    parser.add_argument("--tucker", choices=["both", "on", "off"], default="both", help="apply_tucker (default: both)")
    parser.add_argument("--autocast", choices=["both", "on", "off"], help="default: off; on a GPU both")
    parser.add_argument("--resolutions", nargs="+", choices=["1.5", "3"], help="networks, mm (default: 1.5)")
    parser.add_argument("--batch-sizes", type=int, nargs="+", help="each until memory runs out (default: 1)")
    parser.add_argument("--backends", nargs="+", help="stock stock-compile eager compile openvino openvino-plain auto")
    parser.add_argument(
        "--precisions", nargs="+", default=["f32"], help="precisions other than f32 run on openvino only"
    )
    parser.add_argument("--threads", type=int, nargs="+", default=[None], help="CPU threads (default: torch's choice)")
    parser.add_argument("--patch", type=int, nargs="+", help="voxels (default: the network's own)")
    parser.add_argument("--decompose", action="store_true", help="decompose the weights; else random ones")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--rounds", type=int, default=3, help="counted passes of a row (default: 3)")
    parser.add_argument("--retry", action="store_true", help="measure failed rows again")
    parser.add_argument("--dice", type=Path, help="CSV file: Dice by name, or by setting as studies.fidelity writes it")
    parser.add_argument("--ray", action="store_true", help="spread the rows by Ray, one task each")
    parser.add_argument("--ray-address", help="address of a running Ray cluster (default: start one here)")
    parser.add_argument("--cpus-per-row", type=int, help="CPUs reserved for each Ray task (default: a whole node)")
    return parser


def points_of(args: argparse.Namespace) -> list[Any]:
    """Return the points of the grid: dense rows first, then by rank factor."""
    from nnslim.benchmark.grid import GridPoint
    from nnslim.benchmark.passes import Way

    cuda = args.device == "cuda"
    openvino = not cuda and importlib.util.find_spec("openvino") is not None
    defaults = ["stock", "eager", *(["openvino-plain", "openvino"] if openvino else [])]
    if args.full:
        defaults += ["stock-compile", "compile"]
    switch = {"both": [False, True], "on": [True], "off": [False]}
    ways = [
        Way(backend, precision, threads, args.device, autocast)
        for backend, precision, threads, autocast in itertools.product(
            args.backends or defaults,
            args.precisions,
            args.threads,
            switch[args.autocast or ("both" if cuda or args.full else "off")],
        )
        if (precision == "f32" or backend == "openvino") and not (autocast and "openvino" in backend)
    ]
    factors = args.rank_factors or (_FACTORS if args.full else [0.5, 0.3])
    rules = args.rules or (["nnslim", "published"] if args.full else ["nnslim"])
    tucker = [(False, factors[0], rules[0])] if args.tucker != "on" else []
    if args.tucker != "off":
        tucker += [(True, factor, rule) for factor in factors for rule in rules]
    resolutions = args.resolutions or (["1.5", "3"] if args.full and args.model is None else ["1.5"])
    batches = args.batch_sizes or (range(1, _BATCHES + 1) if args.full else [1])
    return [
        GridPoint(
            way,
            batch,
            apply,
            factor,
            args.rank_min,
            rule,
            resolution == "3",
            args.decompose,
            None if args.patch is None else tuple(args.patch),
            "" if args.model is None else str(args.model),
        )
        for batch, resolution, (apply, factor, rule), way in itertools.product(batches, resolutions, tucker, ways)
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    args = make_parser().parse_args(arguments)

    from rich.console import Console

    from nnslim.benchmark.grid import finish_grid, here_pool, measure_point, ray_pool, run_grid, short_names
    from nnslim.benchmark.timings import read_dice, screen_table
    from nnslim.errors import NNSlimError
    from nnslim.hosts.totalseg.grid_points import end_to_end, grid_network

    logging.basicConfig(format="%(message)s")
    screen = Console(highlight=False, width=None if sys.stdout.isatty() else 200)
    cases = None if args.images is None else partial(end_to_end, images=args.images.resolve())
    work = partial(measure_point, build=grid_network, rounds=args.rounds, end_to_end=cases)
    try:
        points = points_of(args)
        dice = None if args.dice is None else read_dice(args.dice)
        cpus = args.cpus_per_row or os.cpu_count() or 1
        pool = ray_pool(work, cpus, args.ray_address) if args.ray else here_pool(work)
        rows = run_grid(points, args.output, pool, retry=args.retry, report=_report)
        finish_grid(points, rows, args.output, dice)
    except NNSlimError as error:
        print(f"nnslim: {error}", file=sys.stderr)
        return 2
    screen.print(screen_table(short_names(rows)))
    print(f"written: {args.output}")
    return int(any(row["status"] == "failed" for row in rows))


def _report(row: dict[str, Any], done: int, total: int) -> None:
    result = f"{row['time_median_ms']:.4g} ms" if row["status"] == "done" else row["reason"]
    print(f"{done}/{total} {row['name']}: {result}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
