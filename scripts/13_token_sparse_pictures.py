"""Draw how deep each token of an image gets in a token-sparse model, or tell how sparse a dataset's classes are.

./run.sh scripts/13_token_sparse_pictures.py depth -m MODEL -i IMAGE_0000.nii.gz -o depth.png
./run.sh scripts/13_token_sparse_pictures.py classes -d nnUNet_raw/DatasetXXX_NAME -o classes.csv
"""

from __future__ import annotations

import argparse
import csv
import json
from pathlib import Path

import nibabel as nib
import numpy as np
import torch

from nnslim.hosts.nnunet.model.trained_model import build_network, read_trained_model
from studies.token_pictures import class_sparsity, depth_map, draw_depth


def depth(model: Path, image: Path, output: Path) -> None:
    """Cut the middle patch out of an image, z-scored, and draw the depth of its tokens."""
    folder = read_trained_model(model)
    network = build_network(folder)
    patch = [int(size) for size in folder.configuration_manager.patch_size]
    values = np.asarray(nib.load(image).dataobj, dtype=np.float32).transpose(2, 1, 0)  # nnU-Net's order of axes
    values = (values - values.mean()) / max(1e-6, values.std())
    space = [max(0, want - have) for want, have in zip(patch, values.shape, strict=True)]
    values = np.pad(values, [(each // 2, each - each // 2) for each in space])
    starts = [(have - want) // 2 for want, have in zip(patch, values.shape, strict=True)]
    cut = values[tuple(slice(start, start + want) for start, want in zip(starts, patch, strict=True))]
    found = depth_map(network, torch.from_numpy(cut.copy())[None, None])[0]
    draw_depth(cut, found, output, axis=0)


def classes(dataset: Path, output: Path, edge: int) -> None:
    """Count the voxels and the tokens of every class."""
    described = json.loads((dataset / "dataset.json").read_text())["labels"]
    names = {value: name for name, value in described.items() if isinstance(value, int) and value > 0}
    files = sorted((dataset / "labelsTr").glob("*.nii.gz"))
    rows = class_sparsity((np.asarray(nib.load(file).dataobj) for file in files), names, edge=edge)
    output.parent.mkdir(parents=True, exist_ok=True)
    with output.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    for row in rows:
        print(row)


def main() -> None:
    """Read the arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["depth", "classes"])
    parser.add_argument("-m", "--model", type=Path, help="depth: token-sparse model folder")
    parser.add_argument("-i", "--image", type=Path, help="depth: image file with one channel")
    parser.add_argument("-d", "--dataset", type=Path, help="classes: raw nnU-Net dataset")
    parser.add_argument("-o", "--output", type=Path, required=True, help="PNG or CSV file")
    parser.add_argument("--edge", type=int, default=8, help="classes: edge of a token's cube, voxels (8)")
    chosen = parser.parse_args()
    if chosen.what == "depth":
        if chosen.model is None or chosen.image is None:
            parser.error("depth needs --model and --image")
        depth(chosen.model, chosen.image, chosen.output)
    else:
        if chosen.dataset is None:
            parser.error("classes needs --dataset")
        classes(chosen.dataset, chosen.output, chosen.edge)


if __name__ == "__main__":
    main()
