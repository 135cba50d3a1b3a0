"""Train the hippocampus nnU-Net that ships inside the package (see nnslim/models/hippocampus/MODEL_CARD.md)."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from nnslim.hosts.nnunet.model.shipped import write_for_shipping

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # studies/ is no installed package
from studies.command import new_parser, run_command
from studies.short_training import ShortTraining, add_training_options, train_short, use_folders


def main() -> None:
    parser = new_parser(__doc__)
    add_training_options(parser, 1e-2, "default: 0.01")
    parser.add_argument("--pretrained", type=Path, help="checkpoint to start from")
    parser.add_argument("--ship", type=Path, help="also write the half-precision copy to this new folder")
    args = parser.parse_args()
    use_folders(args)
    os.environ.setdefault("nnUNet_n_proc_DA", "2")
    length = ShortTraining(args.epochs, args.iterations, 10, args.batch_size, args.learning_rate)
    options = {"pretrained": args.pretrained, "resume": args.resume, "device": args.device}
    folder = train_short(4, "3d_fullres", args.fold, length, **options)  # Dataset004_Hippocampus
    print(f"trained: {folder}")
    if args.ship:
        write_for_shipping(folder.parent, args.ship)
        print(f"to ship: {args.ship}")


if __name__ == "__main__":
    run_command(main)
