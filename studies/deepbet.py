"""How far compression moves the brain mask of deepbet's network, which is not nnU-Net's, on a T1; for docs/results.md.

./run.sh -m studies.deepbet --wheel deepbet-1.0.2-py3-none-any.whl
The wheel (MIT licence) comes from `pip download deepbet==1.0.2 --no-deps`; deepbet itself is not needed. It ships
TorchScript, which cannot be edited, so the network is rebuilt here as a module tree. Its two networks (one finds the
head's bounding box, one segments inside) are the same LinkNet with instance norms that have no parameters.
"""

from __future__ import annotations

import copy
import io
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
from scipy import ndimage
from torch import Tensor, nn
from torch.nn import functional

from nnslim.compression.calibration import Calibration
from nnslim.compression.config import RecoveryConfig
from nnslim.compression.recover import recover
from nnslim.methods.tucker import TuckerConfig, fit_tucker_network, plan_tucker
from nnslim.network.cost import measure_cost
from nnslim.network.spec import SlimSpec, apply_spec
from studies.command import new_parser, run_command

NETWORKS = ("bbox_model", "model")
BOX_SHAPE, MASK_SHAPE = (128, 128, 128), (256, 256, 256)  # what deepbet resamples to before each network


def _conv(inputs: int, outputs: int, size: int, stride: int = 1) -> nn.Conv3d:
    return nn.Conv3d(inputs, outputs, size, stride, padding=size // 2, bias=False)


def _conv_norm_act(conv: nn.Module) -> nn.Sequential:
    return nn.Sequential(conv, nn.InstanceNorm3d(conv.out_channels), nn.ReLU())


class _Block(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        first = _conv_norm_act(_conv(inputs, outputs, 3, stride))
        self.double_conv = nn.Sequential(*first, _conv(outputs, outputs, 3), nn.InstanceNorm3d(outputs))
        self.act = nn.ReLU()
        self.downsample = nn.Identity()
        if stride > 1:
            self.downsample = nn.Sequential(_conv(inputs, outputs, 1, stride), nn.InstanceNorm3d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.double_conv(x) + self.downsample(x))


def _down(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    return nn.Sequential(OrderedDict(block1=_Block(inputs, outputs, stride), block2=_Block(outputs, outputs, 1)))


class _Up(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        inner = inputs // 4
        self.conv1 = _conv_norm_act(_conv(inputs, inner, 1))
        self.tp_conv = _conv_norm_act(nn.ConvTranspose3d(inner, inner, 3, stride, 1, stride - 1, bias=False))
        self.conv2 = _conv_norm_act(_conv(inner, outputs, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(self.tp_conv(self.conv1(x)))


class LinkNet(nn.Module):
    """deepbet's network, with the names of its state dict. (B, 1, X, Y, Z), sizes divisible by 32, to (B, 2, X, Y, Z).

    It returns logits, so that compression sees the last layer as the head; deepbet's own output is their softmax(1),
    whose channel 1 is the probability of brain.
    """

    def __init__(self) -> None:
        super().__init__()
        self.init = nn.Sequential(*_conv_norm_act(_conv(1, 16, 7, 2)), nn.MaxPool3d(3, 2, padding=1))
        self.down0, self.down1 = _down(16, 16, 1), _down(16, 32, 2)
        self.down2, self.down3 = _down(32, 64, 2), _down(64, 128, 2)
        self.up0, self.up1, self.up2, self.up3 = _Up(128, 64, 2), _Up(64, 32, 2), _Up(32, 16, 2), _Up(16, 16, 1)
        self.tp_conv1 = _conv_norm_act(nn.ConvTranspose3d(16, 8, 3, 2, 1, 1))
        self.conv = _conv_norm_act(nn.Conv3d(8, 8, 3, padding=1))
        self.tp_conv2 = nn.ConvTranspose3d(8, 2, 2, 2)

    def forward(self, x: Tensor) -> Tensor:
        skips = [self.init(x)]
        for down in (self.down0, self.down1, self.down2):
            skips.append(down(skips[-1]))
        x = self.down3(skips[-1])
        for up in (self.up0, self.up1, self.up2, self.up3):
            x = up(x) + skips.pop()
        return self.tp_conv2(self.conv(self.tp_conv1(x)))


def load_torchscript(wheel: Path, name: str = "bbox_model") -> torch.jit.ScriptModule:
    """Return a network as the wheel holds it, on the CPU; `name` is one of NETWORKS."""
    with zipfile.ZipFile(wheel) as archive:
        content = archive.read(f"data/models/{name}.pt")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch 2.15 retires TorchScript
        return torch.jit.load(io.BytesIO(content), map_location="cpu").eval()


def load_deepbet(wheel_or_state: Path, name: str = "bbox_model") -> LinkNet:
    """Return one of deepbet's two networks in eval mode.

    Args:
        wheel_or_state: deepbet's wheel, or a file that torch.save wrote of the state dict.
        name: one of NETWORKS; for a wheel.
    """
    if Path(wheel_or_state).suffix == ".whl":
        state = load_torchscript(wheel_or_state, name).state_dict()
    else:
        state = torch.load(wheel_or_state, map_location="cpu", weights_only=True)
    network = LinkNet()
    network.load_state_dict(state)
    return network.eval()


def read_t1(path: Path) -> Tensor:
    """Return a T1 image as deepbet reads it: (X, Y, Z), closest to RAS."""
    volume = nib.as_closest_canonical(nib.load(path)).get_fdata(dtype=np.float32)
    return torch.nan_to_num(torch.from_numpy(volume[..., 0] if volume.ndim == 4 else volume))


def template() -> Path:
    """Return the MNI152 T1 template at 1 mm that nilearn holds."""
    import nilearn

    return Path(nilearn.__file__).parent / "datasets" / "data" / "mni_icbm152_t1_tal_nlin_sym_09a_converted.nii.gz"


def prepare(volume: Tensor, box: tuple[slice, ...] | None = None) -> Tensor:
    """Return network input as deepbet makes it: the whole volume at once, resampled and normalised.

    Args:
        volume: from `read_t1`.
        box: None for "bbox_model" (input of BOX_SHAPE); the `brain_box` for "model" (input of MASK_SHAPE).
    """
    x = small = functional.interpolate(volume[None, None], BOX_SHAPE, mode="nearest-exact")
    if box is not None:
        x = functional.interpolate(volume[box][None, None], MASK_SHAPE, mode="nearest-exact")
    low, high = small.quantile(0.005), small.quantile(0.995)
    x = ((x - low) / (high - low)).clamp(0, 1)
    return 0.226 * (x - x.mean()) / x.std() + 0.449


def brain_box(probability: Tensor, shape: Sequence[int], margin: float = 0.1) -> tuple[slice, ...]:
    """Return the box of the largest component of the first network's mask, widened, in a volume of the given shape."""
    parts, _ = ndimage.label(probability.numpy() > 0.5, np.ones((3, 3, 3)))
    mask = parts == np.bincount(parts[parts > 0]).argmax()
    box = []
    for axis, size in enumerate(shape):
        inside = np.flatnonzero(mask.mean(tuple({0, 1, 2} - {axis})) > 0.02)
        scale = size / mask.shape[axis]
        centre = round(scale * (inside[-1] + 1 + inside[0]) / 2)
        half = round((1 + 2 * margin) * scale * (inside[-1] + 1 - inside[0])) / 2
        box.append(slice(max(0, int(centre - half)), min(size, int(centre + half))))
    return tuple(box)


def deformed(volume: Tensor, seed: int) -> Tensor:
    """Return network input made of the volume turned, scaled, shifted and with another contrast."""
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.eye(3, 4) + 0.12 * (torch.rand(3, 4, generator=generator) - 0.5)
    grid = functional.affine_grid(matrix[None], (1, 1, *volume.shape), align_corners=False)
    moved = functional.grid_sample(volume[None, None], grid, align_corners=False)[0, 0]
    gamma = 0.7 + 0.6 * float(torch.rand(1, generator=generator))
    return prepare((moved / moved.max()).clamp(min=0) ** gamma)


class Copies(torch.utils.data.Dataset):
    """Deformed copies (1, X, Y, Z) of a volume that are neither fitted to nor scored."""

    def __init__(self, volume: Tensor, count: int) -> None:
        self._volume, self._count = volume, count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Tensor:
        return deformed(self._volume, 10_001 + index)[0]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = new_parser(__doc__)
    parser.add_argument("--wheel", type=Path, required=True, help="deepbet's wheel, version 1.0.2")
    parser.add_argument("--t1", type=Path, help="T1 image (default: the MNI152 template inside nilearn)")
    parser.add_argument("--rank-factors", type=float, nargs="*", default=[0.5, 0.3, 0.1])
    parser.add_argument("--tiles", type=int, default=4, help="deformed copies to calibrate on (default: 4)")
    parser.add_argument("--tests", type=int, default=3, help="other deformed copies to score on (default: 3)")
    parser.add_argument("--steps", type=int, default=0, help="steps of recovery, on further copies (default: 0)")
    parser.add_argument("--threads", type=int, help="torch threads (default: all)")
    args = parser.parse_args(arguments)
    if args.threads:
        torch.set_num_threads(args.threads)
    volume = read_t1(args.t1 or template())
    tiles = [deformed(volume, 1 + number) for number in range(args.tiles)]
    tests = [prepare(volume), *(deformed(volume, 1001 + number) for number in range(args.tests))]
    dense = load_deepbet(args.wheel)
    cost = measure_cost(dense, tuple(tiles[0].shape))

    def masks(network: nn.Module) -> list[Tensor]:
        with torch.inference_mode():
            return [network(test).argmax(1) for test in tests]

    def dice(network: nn.Module) -> str:
        pairs = zip(masks(network), wanted, strict=True)
        values = [float(2 * (found & want).sum() / (found.sum() + want.sum())) for found, want in pairs]
        return f"{sum(values) / len(values):.4f} ({min(values):.4f})"

    wanted = masks(dense)
    print(f"dense: {cost.parameters:,} parameters, {cost.macs() / 1e9:.2f} GMAC", flush=True)
    for factor in args.rank_factors:
        config = TuckerConfig(rank_factor=factor, rank_min=8)
        slim = apply_spec(SlimSpec(plan_tucker(dense, config, cost).edits), copy.deepcopy(dense), fill=True).eval()
        after, before = measure_cost(slim, tuple(tiles[0].shape)), dice(slim)
        fit_tucker_network(dense, slim, config, cost, tiles)
        line = (
            f"rank factor {factor:g}: {after.parameters:,} parameters, {after.macs() / 1e9:.2f} GMAC; Dice against the "
            f"dense mask, mean (worst): weights only {before}, data-aware {dice(slim)}"
        )
        if args.steps:
            held_out = [deformed(volume, 20_001 + number) for number in range(2)]
            data = Calibration(tiles, held_out, partial(Copies, volume))
            recovery = recover(dense, slim, data, RecoveryConfig(steps=args.steps, mirrored_teacher=False))
            line += (
                f", recovered {dice(slim)}, {recovery.seconds:.0f} s, estimated "
                f"drop {recovery.before:.4f} -> {recovery.after:.4f}"
            )
        print(line, flush=True)


if __name__ == "__main__":
    run_command(main)
