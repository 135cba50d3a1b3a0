"""Measure what compression costs in accuracy: rank factors and budgets, weights only / data-aware / recovered."""

from __future__ import annotations

import argparse
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-m", "--model", type=Path, required=True, help="dense nnU-Net model folder")
    parser.add_argument("-i", "--images", type=Path, required=True, help="unlabelled images for calibration, recovery")
    parser.add_argument("--test-images", type=Path, required=True, help="images to score on")
    parser.add_argument("--test-labels", type=Path, required=True, help="their label maps")
    parser.add_argument("-o", "--output", type=Path, required=True, help="CSV file; finished rows are kept")
    parser.add_argument("--rank-factors", type=float, nargs="*", default=[0.7, 0.5, 0.4, 0.3, 0.2, 0.1, 0.05])
    parser.add_argument("--macs", type=float, nargs="*", default=[], help="budgets, shares of the dense MACs")
    parser.add_argument("--rank-min", type=int, default=8, help="smallest rank (default: 8)")
    parser.add_argument("--stages", nargs="*", default=["weights", "data", "recovered"])
    parser.add_argument("--calibration-images", type=int, default=8)
    parser.add_argument("--tiles-per-image", type=int, default=1)
    parser.add_argument("--recovery-images", type=int, default=40)
    parser.add_argument("--steps", type=int, default=400, help="of logit distillation (default: 400)")
    parser.add_argument("--block-steps", type=int, default=0)
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--learning-rate", type=float, default=1.5e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, help="torch threads (default: all)")
    args = parser.parse_args()

    import torch

    from nnslim.hosts.nnunet.fidelity import fidelity_table
    from nnslim.work.config import from_dict

    if args.threads:
        torch.set_num_threads(args.threads)
    common = {
        "calibration": {
            "count": args.calibration_images,
            "tiles_per_image": args.tiles_per_image,
            "seed": args.seed,
            "device": "cpu",
        },
        "recovery": {
            "steps": args.steps,
            "block_steps": args.block_steps,
            "batch_size": args.batch_size,
            "learning_rate": args.learning_rate,
            "images": args.recovery_images,
        },
    }
    settings = {f"rank_factor={factor:g}": {"rank_factor": factor} for factor in args.rank_factors}
    settings |= {f"macs={share:g}": {"macs": share} for share in args.macs}
    configs = {
        name: from_dict({"methods": [{"method": "tucker", "rank_min": args.rank_min, **chosen}], **common})
        for name, chosen in settings.items()
    }
    fidelity_table(
        args.model,
        configs,
        args.images,
        args.test_images,
        args.test_labels,
        args.output,
        stages=args.stages,
        report=lambda line: print(line, flush=True),
    )


if __name__ == "__main__":
    main()
