"""Compress deepbet's brain-mask network on a real T1 and measure how far the mask moves: a network not of nnU-Net."""

from __future__ import annotations

import argparse
import copy
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--wheel", type=Path, required=True, help="deepbet-1.0.2 wheel (pip download deepbet --no-deps)"
    )
    parser.add_argument("--t1", type=Path, help="T1 image (default: the MNI152 template inside nilearn)")
    parser.add_argument("--rank-factors", type=float, nargs="*", default=[0.5, 0.3, 0.1])
    parser.add_argument("--tiles", type=int, default=4, help="deformed copies to calibrate on (default: 4)")
    parser.add_argument("--tests", type=int, default=3, help="other deformed copies to score on (default: 3)")
    parser.add_argument("--steps", type=int, default=0, help="of recovery, on further deformed copies (default: 0)")
    parser.add_argument("--threads", type=int, help="torch threads (default: all)")
    args = parser.parse_args()

    import torch
    from torch.nn import functional

    from nnslim.compression.calibration import Calibration
    from nnslim.compression.config import RecoveryConfig
    from nnslim.compression.recover import recover
    from nnslim.methods.tucker import TuckerConfig, fit_tucker_network, plan_tucker
    from nnslim.network.cost import measure_cost
    from nnslim.network.spec import SlimSpec, apply_spec
    from studies.deepbet import load_deepbet, prepare, read_t1

    if args.threads:
        torch.set_num_threads(args.threads)
    if args.t1 is None:
        import nilearn

        folder = Path(nilearn.__file__).parent / "datasets" / "data"
        args.t1 = folder / "mni_icbm152_t1_tal_nlin_sym_09a_converted.nii.gz"
    volume = read_t1(args.t1)

    def deformed(seed: int) -> torch.Tensor:
        """Return the volume turned, scaled, shifted and with another contrast; seed 0 is the volume itself."""
        if seed == 0:
            return prepare(volume)
        generator = torch.Generator().manual_seed(seed)
        matrix = torch.eye(3, 4) + 0.12 * (torch.rand(3, 4, generator=generator) - 0.5)
        grid = functional.affine_grid(matrix[None], (1, 1, *volume.shape), align_corners=False)
        moved = functional.grid_sample(volume[None, None], grid, align_corners=False)[0, 0]
        gamma = 0.7 + 0.6 * float(torch.rand(1, generator=generator))
        return prepare((moved / moved.max()).clamp(min=0) ** gamma)

    class Copies(torch.utils.data.Dataset):
        """Copies that are neither fitted to nor scored; (1, X, Y, Z)."""

        def __init__(self, count: int) -> None:
            self.count = count

        def __len__(self) -> int:
            return self.count

        def __getitem__(self, index: int) -> torch.Tensor:
            return deformed(10_001 + index)[0]

    tiles = [deformed(1 + number) for number in range(args.tiles)]
    tests = [deformed(0), *(deformed(1001 + number) for number in range(args.tests))]
    dense = load_deepbet(args.wheel)
    cost = measure_cost(dense, tuple(tiles[0].shape))

    def masks(network: torch.nn.Module) -> list[torch.Tensor]:
        with torch.inference_mode():
            return [network(test).argmax(1) for test in tests]

    def dice(found: torch.Tensor, wanted: torch.Tensor) -> float:
        return float(2 * (found & wanted).sum() / (found.sum() + wanted.sum()))

    wanted = masks(dense)
    print(f"dense: {cost.parameters:,} parameters, {cost.macs() / 1e9:.2f} GMAC", flush=True)
    for factor in args.rank_factors:
        config = TuckerConfig(rank_factor=factor, rank_min=8)
        plan = plan_tucker(dense, config, cost)
        slim = apply_spec(SlimSpec(plan.edits), copy.deepcopy(dense), fill=True).eval()
        after = measure_cost(slim, tuple(tiles[0].shape))
        before = [dice(found, want) for found, want in zip(masks(slim), wanted, strict=True)]
        fit_tucker_network(dense, slim, config, cost, tiles)
        fitted = [dice(found, want) for found, want in zip(masks(slim), wanted, strict=True)]
        line = (
            f"rank factor {factor:g}: {after.parameters:,} parameters, {after.macs() / 1e9:.2f} GMAC; Dice against the "
            f"dense mask, mean (worst): weights only {sum(before) / len(before):.4f} ({min(before):.4f}), "
            f"data-aware {sum(fitted) / len(fitted):.4f} ({min(fitted):.4f})"
        )
        if args.steps:
            data = Calibration(tiles, [deformed(20_001 + number) for number in range(2)], Copies)
            recovery = recover(dense, slim, data, RecoveryConfig(steps=args.steps, mirrored_teacher=False))
            again = [dice(found, want) for found, want in zip(masks(slim), wanted, strict=True)]
            line += (
                f", recovered {sum(again) / len(again):.4f} ({min(again):.4f}), {recovery.seconds:.0f} s, estimated "
                f"drop {recovery.before:.4f} -> {recovery.after:.4f}"
            )
        print(line, flush=True)


if __name__ == "__main__":
    main()
