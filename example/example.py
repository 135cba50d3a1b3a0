"""Compress the shipped hippocampus model and compare it with the dense one on a real image, in about a minute.

The image is nilearn's MNI152 T1 template (an average of 152 brains), cropped around each hippocampus. Everything is
written to example/output/: NIfTI files, overlay pictures, the slim model folder, result.json.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
from nilearn.datasets import load_mni152_template
from rich.console import Console
from rich.table import Table

from nnslim import NNSlimContext
from nnslim.compression.config import load_config
from nnslim.evaluation.overlap import dice_per_label
from nnslim.figures import overlay
from nnslim.hosts.nnunet.compress.compress_model import compress_model
from nnslim.hosts.nnunet.model.shipped import shipped_model
from nnslim.hosts.nnunet.model.trained_model import input_shape, read_trained_model
from nnslim.hosts.nnunet.predict.directory import predict_folder
from nnslim.hosts.nnunet.predict.load import load_predictor
from nnslim.hosts.nnunet.predict.predict_settings import PredictSettings
from nnslim.running.timing import pass_seconds

PRESET = "tucker-balanced"
OUTPUT = Path(__file__).resolve().parent / "output"
CENTRES_MM = {"left": (-26, -22, -14), "right": (26, -22, -14)}  # MNI space, x to the right, y forward, z up
HALF_SIZE = (20, 28, 20)  # voxels of 1 mm, as large as the crops that the model was trained on


def write_crops(folder: Path) -> None:
    """Write the template around each hippocampus as <side>_0000.nii.gz."""
    template = load_mni152_template(resolution=1)
    folder.mkdir(parents=True)
    for side, centre in CENTRES_MM.items():
        voxel = np.round(nib.affines.apply_affine(np.linalg.inv(template.affine), centre)).astype(int)
        box = tuple(slice(c - h, c + h) for c, h in zip(voxel, HALF_SIZE, strict=True))
        nib.save(template.slicer[box], folder / f"{side}_0000.nii.gz")


def main() -> None:
    """Run the comparison."""
    shutil.rmtree(OUTPUT, ignore_errors=True)
    images, dense_model = OUTPUT / "images", shipped_model()
    slim_model = OUTPUT / "nnUNetTrainer__nnUNetPlansSlim__3d_fullres"
    write_crops(images)

    source = read_trained_model(dense_model)
    slimmed = compress_model(source, slim_model, load_config(PRESET))
    models = {"dense": dense_model, "slim": slim_model}
    for name, model in models.items():
        predict_folder(images, OUTPUT / name, model)

    # The same without writing a model folder: whatever loads a model inside the block gets the slim one.
    with NNSlimContext(PRESET) as slim:
        predict_folder(images, OUTPUT / "context", dense_model)
    print(slim.report)
    made = slim.report.models[0].slimmed
    same_layers = made is not None and made.spec == slimmed.spec
    if not same_layers:  # each compression times the layers, and on a busy machine the timings differ
        print("The context kept other layers dense than the written model, so their results differ a little.")

    networks = [load_predictor(model, None, PredictSettings()).network for model in models.values()]
    seconds = dict(zip(models, pass_seconds(networks, input_shape(source), rounds=9), strict=True))
    counts = {"dense": slimmed.dense, "slim": slimmed.slim}
    sizes = {name: (model / "fold_0" / "checkpoint_final.pth").stat().st_size for name, model in models.items()}
    agreement: dict[str, dict[str, float]] = {}
    for side in CENTRES_MM:
        image = nib.load(images / f"{side}_0000.nii.gz")
        maps = {n: np.asarray(nib.load(OUTPUT / n / f"{side}.nii.gz").dataobj) for n in ("dense", "slim", "context")}
        dice = dice_per_label(maps["dense"], maps["slim"], [1, 2])
        agreement[side] = {"anterior": dice[1], "posterior": dice[2]}
        if same_layers:
            assert np.array_equal(maps["slim"], maps["context"]), "the written model and the context must agree"
        outlines = [("dense", maps["dense"]), ("slim", maps["slim"])]
        overlay(image.get_fdata(), outlines, OUTPUT / f"overlay_{side}.png", title=f"{side} hippocampus, MNI152")

    table = Table(title=f"hippocampus model, {PRESET}, one 40x56x40 patch, {torch.get_num_threads()} CPU threads")
    for column in ("", "parameters", "MACs (G)", "file (MB)", "seconds"):
        table.add_column(column, justify="right")
    for name in models:
        size, macs = f"{sizes[name] / 1e6:.1f}", f"{counts[name].macs / 1e9:.2f}"
        table.add_row(name, f"{counts[name].parameters:,}", macs, size, f"{seconds[name]:.3f}")
    Console().print(table)
    for side, dice in agreement.items():
        print(f"Dice between dense and slim, {side}: " + ", ".join(f"{k} {v:.4f}" for k, v in dice.items()))
    result = {
        name: {"parameters": counts[name].parameters, "macs": counts[name].macs, "file_bytes": sizes[name]}
        | {"seconds_per_patch": seconds[name]}
        for name in models
    }
    (OUTPUT / "result.json").write_text(json.dumps({**result, "dice": agreement, "preset": PRESET}, indent=2) + "\n")
    print(f"written: {OUTPUT}")


if __name__ == "__main__":
    main()
