"""Train one of the networks that are measured beside the shipped one; for docs/results.md.

./run.sh -m studies.second_models --model resenc --raw RAW --work WORK
resenc: a ResidualEncoderUNet on Dataset004_Hippocampus.
acdc2d, acdc3d: nnU-Net's own 2d and 3d_fullres networks on Dataset027_ACDC, but with 128x128 voxels in plane, which a
CPU can train.
manyclass: a small PlainConvUNet for the 41 classes of Dataset941_DeformedCT, which is written on first use from a
labelled CT (--image, --labels).
brain: a PlainConvUNet of four stages for the 32 classes of Dataset943_Brain, which is written on first use: images
made from brain label maps (--maps). Its last four maps are for testing.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nnslim.hosts.nnunet.model.trained_model import trainer_class
from studies.command import new_parser, run_command
from studies.deformed_dataset import write_brain_dataset, write_deformed_dataset
from studies.short_training import (
    ShortTraining,
    add_training_options,
    copy_weights,
    preprocess_once,
    seed_training,
    train_short,
    use_folders,
)


def use_residual_encoder(settings: dict[str, Any]) -> None:
    """Turn the plain U-Net of a configuration into a ResidualEncoderUNet with its stages, widths and patch."""
    architecture = settings["architecture"]
    arguments = architecture["arch_kwargs"]
    architecture["network_class_name"] = "dynamic_network_architectures.architectures.unet.ResidualEncoderUNet"
    del arguments["n_conv_per_stage"]
    # nnU-Net's planner has 1, 3, 4, 6; a CPU can train these.
    arguments["n_blocks_per_stage"] = [1, 2, 2, 2]
    arguments["n_conv_per_stage_decoder"] = [1, 1, 1]


def use_small_patch(settings: dict[str, Any]) -> None:
    """Give a configuration a patch and widths that a CPU can train with 42 output channels."""
    settings["patch_size"] = [32, 64, 80]
    settings["architecture"]["arch_kwargs"] |= {
        "n_stages": 4,
        "features_per_stage": [16, 32, 64, 128],
        "kernel_sizes": [[3, 3, 3]] * 4,
        "strides": [[1, 1, 1], [2, 2, 2], [2, 2, 2], [2, 2, 2]],
        "n_conv_per_stage": [2, 2, 2, 2],
        "n_conv_per_stage_decoder": [2, 2, 2],
    }


def use_brain_patch(settings: dict[str, Any]) -> None:
    """Give a configuration nnU-Net's own widths, but four stages and a patch that a CPU can train with."""
    use_small_patch(settings)
    settings["patch_size"] = [48, 64, 48]
    settings["architecture"]["arch_kwargs"]["features_per_stage"] = [32, 64, 128, 256]


def use_narrow_patch(settings: dict[str, Any]) -> None:
    """Cut the patch to 128x128 voxels in plane; the network is the same."""
    settings["patch_size"] = [*settings["patch_size"][:-2], 128, 128]


def trainer_of(model: str) -> type:
    """Return the trainer class; stock nnU-Net has one of the name that it stores."""
    if model not in _ONE_SIDED:
        return trainer_class("nnUNetTrainer")
    # Left and right classes differ, so that mirrored images would be wrong. nnU-Net's SGD leaves all small classes at
    # Dice 0 for the few hundred iterations that a CPU affords; its Adam variant does not.
    base, adam = trainer_class("nnUNetTrainerNoMirroring"), trainer_class("nnUNetTrainerAdam")
    return type(base.__name__, (base,), {"configure_optimizers": adam.configure_optimizers})


_ONE_SIDED = ("manyclass", "brain")
# dataset number, configuration, plans, their edit, initial learning rate
MODELS = {
    "resenc": (4, "3d_fullres", "nnUNetResEncPlans", use_residual_encoder, 1e-2),
    "manyclass": (941, "3d_fullres", "nnUNetSmallPlans", use_small_patch, 1e-3),
    "brain": (943, "3d_fullres", "nnUNetBrainPlans", use_brain_patch, 1e-3),
    "acdc2d": (27, "2d", "nnUNetNarrowPlans", use_narrow_patch, 1e-2),
    "acdc3d": (27, "3d_fullres", "nnUNetNarrow3dPlans", use_narrow_patch, 1e-2),
}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = new_parser(__doc__)
    parser.add_argument("--model", choices=MODELS, required=True)
    add_training_options(parser, None, "0.01; manyclass, by Adam: 0.001")
    parser.add_argument("--image", type=Path, help="manyclass, first use: the CT, e.g. example_ct_sm.nii.gz")
    parser.add_argument("--labels", type=Path, help="manyclass, first use: its labels, e.g. example_seg.nii.gz")
    parser.add_argument("--maps", type=Path, help="brain, first use: folder of label maps, training_seg_*.nii.gz")
    parser.add_argument(
        "--cases",
        type=int,
        nargs=2,
        help="images for training and testing; manyclass: in all (60 12), brain: of each map (4 2)",
    )
    parser.add_argument("--float32", action="store_true", help="full precision (default: bfloat16 autocast)")
    parser.add_argument("--seed", type=int, default=0, help="fixes weights, augmentation and deformation (default: 0)")
    parser.add_argument("--copy-to", type=Path, help="also write a copy without optimiser state to this new folder")
    args = parser.parse_args(arguments)
    dataset, configuration, plans_name, edit_plans, learning_rate = MODELS[args.model]

    use_folders(args)
    os.environ["nnUNet_n_proc_DA"] = "1"  # nnU-Net's planner does not take 0

    deformed = args.raw / "Dataset941_DeformedCT"
    if args.model == "manyclass" and not (deformed / "dataset.json").is_file():
        if not (args.image and args.labels):
            parser.error(f"{deformed} does not exist; give --image and --labels to write it")
        write_deformed_dataset(args.image, args.labels, deformed, *(args.cases or (60, 12)), seed=args.seed)
    brain = args.raw / "Dataset943_Brain"
    if args.model == "brain" and not (brain / "dataset.json").is_file():
        maps = sorted(args.maps.glob("*.nii.gz")) if args.maps else []
        if not maps:
            parser.error(f"{brain} does not exist; give --maps, a folder of label maps, to write it")
        write_brain_dataset(maps, brain, *(args.cases or (4, 2)), seed=args.seed)
    preprocess_once(dataset, configuration, processes=1)
    seed_training(args.seed)
    length = ShortTraining(
        epochs=args.epochs,
        iterations=args.iterations,
        validation_iterations=5,
        batch_size=args.batch_size,
        learning_rate=args.learning_rate or learning_rate,
        bfloat16=not args.float32,
    )
    folder = train_short(
        dataset,
        configuration,
        args.fold,
        length,
        plans_name=plans_name,
        edit_plans=edit_plans,
        trainer_base=trainer_of(args.model),
        resume=args.resume,
        device=args.device,
    )
    print(f"trained: {folder}")
    if args.copy_to:
        copy_weights(folder, args.copy_to)
        print(f"copy: {args.copy_to}")


if __name__ == "__main__":
    run_command(main)
