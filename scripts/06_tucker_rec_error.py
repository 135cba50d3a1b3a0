"""Compute the reconstruction error of each convolution of a trained model over a grid of Tucker ranks.

Example: ./run.sh scripts/06_tucker_rec_error.py -m MODEL -i IMAGES -o errors
"""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="writes errors.csv, and weights, outputs (heat maps) and equal_factor (lines) as .png and .pdf\n"
        "exit code: 0 done, 2 bad arguments or input",
    )
    parser.add_argument("-m", "--model", type=Path, required=True, help="trained model folder, dense")
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder to write; must not exist")
    parser.add_argument(
        "-i", "--images", type=Path, help="unlabelled images: also compute the error of the layers' outputs"
    )
    parser.add_argument("--fold", help="fold whose weights are used (default: the first)")
    parser.add_argument("--step", type=int, help="channels between ranks (default: channels / 16, rounded up)")
    parser.add_argument("--count", type=int, default=8, help="images, at most (default: 8)")
    parser.add_argument("--trust-checkpoint", action="store_true", help="load as nnU-Net does, code included")
    parser.add_argument("-q", "--quiet", action="store_true", help="no progress bar; warnings and errors only")
    return parser


def main() -> int:
    args = make_parser().parse_args()

    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    from nnslim.errors import NNSlimError
    from nnslim.hosts.nnunet.compress.plan_model import error_grid_folder
    from nnslim.hosts.nnunet.model.trained_model import read_trained_model

    logging.basicConfig(format="%(message)s")
    logging.getLogger("nnslim").setLevel(logging.WARNING if args.quiet else logging.INFO)
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"))
    try:
        model = read_trained_model(args.model, args.fold and [args.fold], trust=args.trust_checkpoint)
        console = Console(stderr=True)
        with Progress(*columns, TimeElapsedColumn(), console=console, disable=args.quiet, transient=True) as bar:
            task = bar.add_task("reading", total=None)
            grids = error_grid_folder(
                model,
                args.output,
                images=args.images,
                count=args.count,
                step=args.step,
                progress=lambda what, done, total: bar.update(task, description=what, completed=done, total=total),
            )
    except NNSlimError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    pairs = sum(len(grid.ranks_out) * len(grid.ranks_in) for grid in grids)
    print(f"{len(grids)} layers, {pairs:,} pairs of ranks: {args.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
