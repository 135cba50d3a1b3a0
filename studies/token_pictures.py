"""How deep each token of an image gets in a token-sparse model, and how sparse classes are; for docs/token_sparse.md.

./run.sh -m studies.token_pictures depth -m MODEL -i IMAGE_0000.nii.gz -o depth.png
./run.sh -m studies.token_pictures classes -d nnUNet_raw/DatasetXXX_NAME -o classes.csv
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from torch import Tensor, nn

from nnslim.errors import ConfigError
from nnslim.figures import new_figure, own_style, save_figure
from nnslim.files import make_folder
from nnslim.hosts.nnunet.model.trained_model import build_network, read_trained_model
from nnslim.methods.token_sparse.reduction import TokenReduction
from nnslim.methods.token_sparse.sequence import Sequence3d
from nnslim.tables import write_table
from studies.command import new_parser, run_command
from studies.table import shown


def depth_map(network: nn.Module, image: Tensor) -> np.ndarray:
    """Return (B, *grid) integers: the number of stages that each token lived through.

    Args:
        network: token-sparse, in eval mode, dropping tokens. image: (B, C, *size).
    Raises:
        ConfigError: the network drops no tokens.
    """
    found = [module for module in network.modules() if isinstance(module, TokenReduction)]
    if len(found) != 1 or not found[0].active or found[0].mode != "drop":
        raise ConfigError("token_sparse: a depth map needs one encoder that drops tokens, with a ratio above 0")
    seen: list[Sequence3d] = []
    hook = found[0].register_forward_hook(lambda _, __, now: seen.append(now))
    try:
        with torch.no_grad():
            network(image)
    finally:
        hook.remove()
    now = seen[-1]
    length = sum(where.shape[1] for where in now.group_positions) + now.length
    depth = torch.full((image.shape[0], now.prefix + length), len(found[0].locations))
    for stage, where in zip(now.stages, now.group_positions, strict=True):
        depth.scatter_(1, where.cpu(), stage)
    return depth[:, now.prefix :].reshape(image.shape[0], *grid_of(image.shape[2:], length)).numpy()


def grid_of(size: Sequence[int], tokens: int) -> tuple[int, ...]:
    """Return the tokens along each axis for cubic patches."""
    edge = round((np.prod([int(each) for each in size]) / tokens) ** (1 / 3))
    return tuple(int(each) // edge for each in size)


@own_style
def draw_depth(image: np.ndarray, depth: np.ndarray, path: Path, *, axis: int = 2) -> None:
    """Draw three slices of an image (X, Y, Z), with and without the depth of its tokens (*grid) over them, as a PNG."""
    edges = [size // count for size, count in zip(image.shape, depth.shape, strict=True)]
    full = depth.repeat(edges[0], 0).repeat(edges[1], 1).repeat(edges[2], 2)
    figure = new_figure((9, 6))
    axes = figure.subplots(2, 3)
    for column, share in enumerate((0.3, 0.5, 0.7)):
        where = int(image.shape[axis] * share)
        for row, over in enumerate((False, True)):
            panel = axes[row, column]
            panel.imshow(np.take(image, where, axis).T, cmap="gray", origin="lower")
            if over:
                drawn = panel.imshow(
                    np.take(full, where, axis).T, cmap="viridis", alpha=0.5, origin="lower", vmin=0, vmax=depth.max()
                )
            panel.set_axis_off()
            panel.set_title(f"slice {where}")
    figure.colorbar(drawn, ax=axes, label="stages that a token lived through")
    make_folder(path.parent)
    save_figure(figure, path)


def class_sparsity(labels: Iterable[np.ndarray], names: Mapping[int, str], *, edge: int = 8) -> list[dict[str, Any]]:
    """Return, for each class and for any foreground, its share of all voxels and of all tokens, in percent.

    Args:
        labels: (X, Y, Z) label maps. names: by label, without background. edge: of a token's cube, voxels; what is left
            over at the far ends does not count as a token.
    """
    voxels, tokens = dict.fromkeys([*names, 0], 0), dict.fromkeys([*names, 0], 0)
    all_voxels = all_tokens = 0
    for label in labels:
        whole = label[tuple(slice(size // edge * edge) for size in label.shape)]
        x, y, z = (size // edge for size in whole.shape)
        cubes = whole.reshape(x, edge, y, edge, z, edge)
        all_voxels, all_tokens = all_voxels + label.size, all_tokens + x * y * z
        for value in voxels:  # 0 stands for any foreground here
            voxels[value] += int(((label == value) if value else (label > 0)).sum())
            tokens[value] += int(((cubes == value) if value else (cubes > 0)).any(axis=(1, 3, 5)).sum())
    return [
        {
            "label": value,
            "name": names.get(value, "any foreground"),
            "percent_of_voxels": round(100 * voxels[value] / max(1, all_voxels), 3),
            "percent_of_tokens": round(100 * tokens[value] / max(1, all_tokens), 3),
        }
        for value in [*names, 0]
    ]


def _depth(model: Path, image: Path, output: Path) -> None:
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


def _classes(dataset: Path, output: Path, edge: int) -> None:
    """Count the voxels and the tokens of every class."""
    described = json.loads((dataset / "dataset.json").read_text())["labels"]
    names = {value: name for name, value in described.items() if isinstance(value, int) and value > 0}
    files = sorted((dataset / "labelsTr").glob("*.nii.gz"))
    rows = class_sparsity((np.asarray(nib.load(file).dataobj) for file in files), names, edge=edge)
    make_folder(output.parent)
    write_table(rows, output)
    for row in rows:
        print(shown(row))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = new_parser(__doc__)
    parser.add_argument("what", choices=["depth", "classes"])
    parser.add_argument("-m", "--model", type=Path, help="depth: token-sparse model folder")
    parser.add_argument("-i", "--image", type=Path, help="depth: image file with one channel")
    parser.add_argument("-d", "--dataset", type=Path, help="classes: raw nnU-Net dataset")
    parser.add_argument("-o", "--output", type=Path, required=True, help="PNG or CSV file")
    parser.add_argument("--edge", type=int, default=8, help="classes: edge of a token's cube, voxels (8)")
    chosen = parser.parse_args(arguments)
    if chosen.what == "depth":
        if chosen.model is None or chosen.image is None:
            parser.error("depth needs --model and --image")
        _depth(chosen.model, chosen.image, chosen.output)
    else:
        if chosen.dataset is None:
            parser.error("classes needs --dataset")
        _classes(chosen.dataset, chosen.output, chosen.edge)


if __name__ == "__main__":
    run_command(main)
