"""How much of a brain parcellation of 160 outputs survives compression (HighRes3DNet); for docs/results.md.

./run.sh -m studies.parcellation --package highresnet-0.3.2.tar.gz -o parcellation.csv
The package comes from `pip download highresnet==0.3.2 --no-deps --no-binary :all:`; it holds the network (MIT) and
trained weights. Images are deformed and re-exposed copies of the T1 template inside nilearn. Compared are label maps of
crops that were neither fitted to nor learned from: Dice to the dense network's map, for each class that has 200 voxels
there. Rows that the file has are kept; the compressed weights are written beside it.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import tarfile
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from nnslim.compression.calibration import Calibration
from nnslim.compression.config import RecoveryConfig
from nnslim.compression.recover import recover
from nnslim.errors import InputError
from nnslim.files import temporary_folder
from nnslim.methods.tucker import TuckerConfig, fit_tucker_network, plan_tucker
from nnslim.network.cost import Cost, measure_cost
from nnslim.network.spec import SlimSpec, apply_spec
from nnslim.tables import markdown
from studies.command import new_parser, run_command
from studies.deepbet import read_t1, template
from studies.table import GrowingTable

_CLASSES = 160
_LEAST = 200  # voxels of a class in the dense network's map, for its Dice to count
_TILES, _HELD_OUT, _PATCHES, _TESTS = 1, 501, 5001, 1001  # first seeds of the images, which are never shared


def load_network(package: Path) -> nn.Module:
    """Return the network with its weights, in eval mode: (B, 1, X, Y, Z) to (B, 160, X, Y, Z) logits.

    Raises:
        InputError: the file is not that source package.
    """
    with temporary_folder() as folder:
        try:
            with tarfile.open(package) as archive:
                archive.extractall(folder, filter="data")
            code = next(folder.glob("*/highresnet/highresnet.py"))
            weights = next(folder.glob("*/highres3dnet_*.pth"))
        except (OSError, tarfile.TarError, StopIteration) as error:
            raise InputError(f"{package} is not the source package of highresnet 0.3.2: {error!r}") from error
        spec = importlib.util.spec_from_file_location("highresnet_of_package", code)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        network = module.HighRes3DNet(in_channels=1, out_channels=_CLASSES, add_dropout_layer=True)
        network.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
    return network.eval()


def deformed_crop(volume: Tensor, size: int, seed: int) -> Tensor:
    """Return a crop (1, size, size, size) of a copy with another shape, contrast and bias field.

    Intensities are z-scored over the head. The crop is drawn from those that show the head in 60 % of their voxels.
    """
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.eye(3, 4) + 0.15 * (torch.rand(3, 4, generator=generator) - 0.5)
    grid = functional.affine_grid(matrix[None], (1, 1, *volume.shape), align_corners=False)
    coarse = 0.05 * torch.randn(1, 3, 5, 6, 5, generator=generator)
    grid = grid + _stretched(coarse, volume.shape).permute(0, 2, 3, 4, 1)
    moved = functional.grid_sample(volume[None, None], grid, align_corners=False)[0, 0]
    moved = (moved / moved.max()).clamp(min=0) ** float(0.7 + 0.6 * torch.rand(1, generator=generator))
    moved = moved * _stretched(1 + 0.2 * (torch.rand(1, 1, 3, 3, 3, generator=generator) - 0.5), volume.shape)[0, 0]
    head = moved > moved.mean()
    moved = (moved - moved[head].mean()) / moved[head].std()
    while True:
        corner = [int(torch.randint(0, have - size + 1, (1,), generator=generator)) for have in volume.shape]
        part = tuple(slice(start, start + size) for start in corner)
        if head[part].float().mean() > 0.6:
            return moved[part][None]


def _stretched(coarse: Tensor, shape: Sequence[int]) -> Tensor:
    return functional.interpolate(coarse, tuple(shape), mode="trilinear", align_corners=True)


class Crops(torch.utils.data.Dataset):
    """Deformed crops (1, size, size, size) that recovery learns from."""

    def __init__(self, volume: Tensor, size: int, count: int) -> None:
        self._volume, self._size, self._count = volume, size, count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Tensor:
        return deformed_crop(self._volume, self._size, _PATCHES + index)


@torch.inference_mode()
def label_maps(network: nn.Module, images: Sequence[Tensor]) -> list[Tensor]:
    """Return (X, Y, Z) label maps of (1, X, Y, Z) images."""
    return [network(image[None]).argmax(1)[0] for image in images]


def class_dices(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> np.ndarray:
    """Return Dice of each pair of a map and a class that has `_LEAST` voxels in the wanted map."""
    return np.array(
        [
            float(2 * ((one == label) & (want == label)).sum() / ((one == label).sum() + (want == label).sum()))
            for one, want in zip(found, wanted, strict=True)
            for label in want.unique().tolist()
            if (want == label).sum() >= _LEAST
        ]
    )


def row_of(name: str, network: nn.Module, cost: Cost, tests: Any, seconds: float) -> dict[str, Any]:
    """Return one row of the table."""
    after = measure_cost(network, tests.shape)
    dices = np.sort(class_dices(label_maps(network, tests.images), tests.wanted))
    return {
        "row": name,
        "macs_share": round(after.macs() / cost.macs(), 4),
        "parameters": after.parameters,
        "dice_mean": round(dices.mean(), 4),
        "dice_median": round(float(np.median(dices)), 4),
        "dice_worst_ten": round(dices[:10].mean(), 4),
        "classes": len(dices),
        "seconds": round(seconds),
    }


def rows_of_factor(
    factor: float, dense: nn.Module, cost: Cost, tests: Any, data: Calibration, args: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    """Yield the rows of a rank factor: weights only, fitted, recovered; seconds are those of compression so far."""
    config, work = TuckerConfig(rank_factor=factor, rank_min=8, fit={"samples": args.samples}), args.output.parent
    started = time.perf_counter()
    slim = apply_spec(SlimSpec(plan_tucker(dense, config, cost).edits), copy.deepcopy(dense), fill=True).eval()
    spent = time.perf_counter() - started
    yield row_of(f"{factor:g} weights", slim, cost, tests, spent)
    started = time.perf_counter()
    fit_tucker_network(dense, slim, config, cost, data.tiles)
    spent += time.perf_counter() - started
    yield row_of(f"{factor:g} fitted", slim, cost, tests, spent)
    settings = RecoveryConfig(steps=args.steps, batch_size=1, learning_rate=args.rate, mirrored_teacher=False)
    recovery = recover(dense, slim, data, settings, checkpoint=work / f"{factor:g}.recovery")
    torch.save(slim.state_dict(), work / f"{factor:g}.pt")
    yield row_of(f"{factor:g} recovered", slim, cost, tests, spent + recovery.seconds)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = new_parser(__doc__)
    parser.add_argument("--package", type=Path, required=True, help="highresnet-0.3.2.tar.gz")
    parser.add_argument("-o", "--output", type=Path, required=True, help="CSV file")
    parser.add_argument("--rank-factors", type=float, nargs="+", default=[0.7, 0.5, 0.3], help="(0.7 0.5 0.3)")
    parser.add_argument("--steps", type=int, default=300, help="steps of recovery (300)")
    parser.add_argument("--rate", type=float, default=2e-4, help="learning rate of recovery (0.0002)")
    parser.add_argument("--patch", type=int, default=48, help="edge of what is fitted to and learned from, voxels (48)")
    parser.add_argument("--tiles", type=int, default=4, help="crops to fit to (4)")
    parser.add_argument("--samples", type=int, default=60000, help="positions per layer to fit to (60000)")
    parser.add_argument("--crop", type=int, default=64, help="edge of the test crops, voxels (64)")
    parser.add_argument("--tests", type=int, default=4, help="test crops (4)")
    parser.add_argument("--threads", type=int, help="torch threads (default: all)")
    args = parser.parse_args(arguments)
    if args.threads:
        torch.set_num_threads(args.threads)
    volume, dense, table = read_t1(template()), load_network(args.package), GrowingTable(args.output, "row")
    shape = (1, 1, *(args.crop,) * 3)
    cost = measure_cost(dense, shape)
    images = [deformed_crop(volume, args.crop, _TESTS + number) for number in range(args.tests)]
    tests = SimpleNamespace(images=images, wanted=label_maps(dense, images), shape=shape)
    fitted, held_out = (
        [deformed_crop(volume, args.patch, first + number)[None] for number in range(args.tiles)]
        for first in (_TILES, _HELD_OUT)
    )
    data = Calibration(fitted, held_out, partial(Crops, volume, args.patch))
    for factor in args.rank_factors:
        if (f"{factor:g} recovered",) not in table:
            for row in rows_of_factor(factor, dense, cost, tests, data, args):
                if (row["row"],) not in table:
                    table.add(row)
    print(markdown(table.rows))


if __name__ == "__main__":
    run_command(main)
