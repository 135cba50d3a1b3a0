"""How much of 3x3x3 kernels Tucker keeps, and two convolutions of 1x3x3 and 3x1x1, at equal cost; for docs/results.md.

./run.sh -m studies.spatial_split -m MODEL --rank-factors 0.5 0.25
A kernel (O, I, 3, 3, 3) may be split into R kernels (I, 1, 3, 3) and O x R of (3, 1, 1), by any of its three axes
(Jaderberg et al., BMVC 2014, in 3D), alone or inside a Tucker chain of larger ranks. Printed are shares of the weights'
energy, the mean over a network's layers of each shape.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas
import torch
from torch import Tensor, nn

from nnslim.hosts.nnunet.model.trained_model import build_network, read_trained_model
from nnslim.maths.lowrank import partial_tucker
from nnslim.network.walk import LayerIndex
from nnslim.tables import markdown
from studies.command import new_parser, run_command
from studies.parcellation import load_network

_WIDER = (1.25, 1.5, 2.0, 3.0, 100.0)  # ranks of the chain around a split core, over those of the chain without


def kept_by_split(core: Tensor, cost: float) -> float:
    """Return the most energy that a split along one axis keeps of (O, I, 27), at a cost in products for each voxel."""
    outputs, inputs = core.shape[:2]
    rank = int(cost / (3 * outputs + 9 * inputs))
    if rank < 1:
        return 0.0
    grid = core.unflatten(2, (3, 3, 3))
    sides = [grid.movedim(axis, 1).flatten(0, 1).flatten(1) for axis in (2, 3, 4)]
    return max(float(torch.linalg.svdvals(side)[:rank].square().sum()) for side in sides)


def compare(kernel: Tensor, factor: float) -> dict[str, float]:
    """Return the shares of a kernel's energy (O, I, 27) that each way keeps at the cost of a rank factor."""
    outputs, inputs, taps = kernel.shape
    ranks = [min(size, max(8, round(size * factor))) for size in (outputs, inputs)]
    cost = ranks[0] * ranks[1] * taps + outputs * ranks[0] + inputs * ranks[1]
    energy = float(kernel.square().sum())
    both = 0.0
    for wider in _WIDER:
        larger = [min(size, round(rank * wider)) for size, rank in zip((outputs, inputs), ranks, strict=True)]
        chain = sum(size * rank for size, rank in zip((outputs, inputs), larger, strict=True) if rank < size)
        both = max(both, kept_by_split(partial_tucker(kernel, tuple(larger)).core, cost - chain))
    tucker = float(partial_tucker(kernel, tuple(ranks)).core.square().sum())
    found = {"tucker": tucker, "split": kept_by_split(kernel, cost), "both": both}
    return {"times_fewer": outputs * inputs * taps / cost} | {name: value / energy for name, value in found.items()}


def compare_layers(network: nn.Module, factors: Sequence[float]) -> list[dict[str, Any]]:
    """Return a row for each shape of 3x3x3 convolution and each factor."""
    rows = []
    for layer in LayerIndex(network).of_type(nn.Conv3d):
        kernel = layer.module.weight.detach().double().flatten(2)
        if tuple(layer.module.kernel_size) == (3, 3, 3) and kernel.shape[1] > 8:
            shape = f"{kernel.shape[0]}x{kernel.shape[1]}"
            rows += [
                {"outputs x inputs": shape, "rank_factor": factor, **compare(kernel, factor)} for factor in factors
            ]
    means = pandas.DataFrame(rows).groupby(["rank_factor", "outputs x inputs"], sort=False).mean().round(3)
    return means.reset_index().to_dict("records")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = new_parser(__doc__)
    parser.add_argument("-m", "--model", type=Path, help="dense nnU-Net model folder")
    parser.add_argument("--package", type=Path, help="instead: highresnet-0.3.2.tar.gz, see studies.parcellation")
    parser.add_argument("--rank-factors", type=float, nargs="+", default=[0.5, 0.25], help="(0.5 0.25)")
    args = parser.parse_args(arguments)
    if (args.model is None) == (args.package is None):
        parser.error("give one of --model and --package")
    network = load_network(args.package) if args.package else build_network(read_trained_model(args.model))
    print(markdown(compare_layers(network, args.rank_factors)))


if __name__ == "__main__":
    run_command(main)
