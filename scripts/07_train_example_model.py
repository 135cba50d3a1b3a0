"""Train the hippocampus nnU-Net that ships inside the package (see nnslim/models/hippocampus/MODEL_CARD.md)."""

from __future__ import annotations

import argparse
import os
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--raw", type=Path, required=True, help="folder that holds Dataset004_Hippocampus")
    parser.add_argument("--work", type=Path, required=True, help="folder for preprocessed data and results")
    parser.add_argument("--fold", type=int, default=0, help="fold of splits_final.json (default: 0)")
    parser.add_argument("--epochs", type=int, default=20, help="epochs (default: 20)")
    parser.add_argument("--iterations", type=int, default=50, help="iterations per epoch (default: 50)")
    parser.add_argument("--batch-size", type=int, default=2, help="patches per iteration (default: 2)")
    parser.add_argument("--learning-rate", type=float, default=1e-2, help="initial rate, poly decay (default: 0.01)")
    parser.add_argument("--pretrained", type=Path, help="checkpoint to start from")
    parser.add_argument("--resume", action="store_true", help="go on from checkpoint_latest.pth")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
    parser.add_argument("--ship", type=Path, help="also write the half-precision copy to this new folder")
    parser.add_argument("--threads", type=int, help="torch threads (default: all)")
    args = parser.parse_args()

    for name, path in (
        ("nnUNet_raw", args.raw),
        ("nnUNet_preprocessed", args.work / "preprocessed"),
        ("nnUNet_results", args.work / "results"),
    ):
        os.environ[name] = str(path.resolve())
    os.environ.setdefault("nnUNet_n_proc_DA", "2")

    import torch

    from studies.short_training import ShortTraining, train_short

    if args.threads:
        torch.set_num_threads(args.threads)
    length = ShortTraining(
        epochs=args.epochs,
        iterations=args.iterations,
        batch_size=args.batch_size,
        learning_rate=args.learning_rate,
    )
    folder = train_short(
        4, "3d_fullres", args.fold, length, pretrained=args.pretrained, resume=args.resume, device=args.device
    )
    print(f"trained: {folder}")
    if args.ship:
        from nnslim.hosts.nnunet.model.shipped import write_for_shipping

        write_for_shipping(folder.parent, args.ship)
        print(f"to ship: {args.ship}")


if __name__ == "__main__":
    main()
