"""Measure what compression costs in accuracy: weights only, data-aware, recovered, fine-tuned.

Fine-tuning (--stages ... finetuned, with --dataset) needs nnU-Net's variables nnUNet_raw and nnUNet_preprocessed.
"""

from __future__ import annotations

import argparse
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
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
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    parser.add_argument("--no-mirrored-teacher", action="store_true", help="learn the dense answers as they are")
    parser.add_argument("--dataset", help="number or name of the labelled dataset to fine-tune on")
    parser.add_argument("--epochs", type=int, default=4, help="of fine-tuning (default: 4)")
    parser.add_argument("--iterations", type=int, default=60, help="per epoch of fine-tuning (default: 60)")
    parser.add_argument("--finetune-rate", type=float, default=3e-4, help="learning rate of fine-tuning, poly decay")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, help="torch threads (default: all)")
    args = parser.parse_args()

    import torch

    from nnslim.compression.config import from_dict
    from nnslim.hosts.nnunet.train.finetune_settings import FinetuneSettings
    from studies.fidelity import Labelled, fidelity_table

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
            "mirrored_teacher": not args.no_mirrored_teacher,
        },
    }
    settings = {f"rank_factor={factor:g}": {"rank_factor": factor} for factor in args.rank_factors}
    settings |= {f"macs={share:g}": {"macs": share} for share in args.macs}
    configs = {
        name: from_dict({"methods": [{"method": "tucker", "rank_min": args.rank_min, **chosen}], **common})
        for name, chosen in settings.items()
    }
    labelled = None
    if args.dataset is not None:
        tuning = FinetuneSettings(
            epochs=args.epochs,
            iterations=args.iterations,
            validation_iterations=5,
            batch_size=args.batch_size,
            learning_rate=args.finetune_rate,
            schedule="poly",
            seed=args.seed,
        )
        labelled = Labelled(args.dataset, tuning)
    fidelity_table(
        args.model,
        configs,
        args.images,
        args.test_images,
        args.test_labels,
        args.output,
        stages=args.stages,
        labelled=labelled,
        report=lambda line: print(line, flush=True),
    )


if __name__ == "__main__":
    main()
