"""Train dense and token-sparse networks alike on a dataset of nnUNet_raw and write Dice, MACs and seconds as CSV.

./run.sh scripts/14_token_sparse_table.py -d 4 -o table.csv --epochs 8 --iterations 40
Rows that the file has are kept: a run that was interrupted goes on.
"""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

from studies.short_training import ShortTraining
from studies.token_sparse_table import default_runs, measure_table


def main() -> None:
    """Read the arguments and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-d", "--dataset", type=int, required=True, help="number of a dataset in nnUNet_raw")
    parser.add_argument("-o", "--output", type=Path, required=True, help="CSV file; models lie beside it")
    parser.add_argument("-f", "--fold", type=int, default=0, help="fold of splits_final.json (0)")
    parser.add_argument("--epochs", type=int, default=8, help="of every training (8)")
    parser.add_argument("--iterations", type=int, default=40, help="steps per epoch (40)")
    parser.add_argument("--batch-size", type=int, default=4, help="patches per step (4)")
    parser.add_argument("--rate", type=float, default=1e-3, help="learning rate (1e-3)")
    parser.add_argument("--cases", type=int, default=20, help="validation cases to predict (20)")
    parser.add_argument("--only", nargs="+", help="names of rows; default: all")
    chosen = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    length = ShortTraining(chosen.epochs, chosen.iterations, 4, chosen.batch_size, chosen.rate)
    runs = [run for run in default_runs() if chosen.only is None or run.name in chosen.only]
    chosen.output.parent.mkdir(parents=True, exist_ok=True)
    measure_table(chosen.dataset, chosen.fold, length, runs, chosen.output, cases=chosen.cases)


if __name__ == "__main__":
    main()
