"""The levers for embedded boards on a trained model, one by one and composed, as CSV: one row each.

./run.sh scripts/17_embedded_table.py -m MODEL -i imagesTs -g labelsTs -d 4 -o table.csv --iterations 250
Rows that the file has are kept: a run that was interrupted goes on. Models lie beside the file, in <name>.work.
"""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

from nnslim.errors import NNSlimError
from studies.embedded_table import ROWS, TableSettings, measure_rows


def main() -> int:
    """Read the arguments and measure; 2 for input that cannot be used."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-m", "--model", type=Path, required=True, help="dense model folder")
    parser.add_argument("-i", "--images", type=Path, required=True, help="test images")
    parser.add_argument("-g", "--labels", type=Path, required=True, help="their labels")
    parser.add_argument("-o", "--output", type=Path, required=True, help="CSV file")
    parser.add_argument("-d", "--dataset", help="number or name to fine-tune on; default: nothing is fine-tuned")
    parser.add_argument("--iterations", type=int, default=250, help="of fine-tuning (250)")
    parser.add_argument("--batch-size", type=int, help="of fine-tuning; default: the plans'")
    parser.add_argument("--rate", type=float, default=1e-3, help="learning rate of fine-tuning (1e-3)")
    parser.add_argument("--calibration", type=Path, help="images for int8 and folding; default: the test images")
    parser.add_argument("--cases", type=int, default=1000, help="test images, at most (1000)")
    parser.add_argument("--repeats", type=int, default=9, help="timed forward passes; the median counts (9)")
    parser.add_argument("--only", nargs="+", choices=[row.name for row in ROWS], help="rows; default: all")
    chosen = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    settings = TableSettings(
        chosen.model,
        chosen.images,
        chosen.labels,
        chosen.output.with_suffix(".work"),
        chosen.dataset,
        chosen.iterations,
        chosen.batch_size,
        chosen.rate,
        chosen.cases,
        chosen.repeats,
        chosen.calibration,
        [row for row in ROWS if chosen.only is None or row.name in chosen.only],
    )
    try:
        measure_rows(settings, chosen.output)
    except NNSlimError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
