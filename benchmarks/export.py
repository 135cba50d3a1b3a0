"""Time the export alone: from class scores at the network's resolution to labels on the image's grid.

Each row runs in a process of its own. CPU seconds are reported beside wall seconds, which grow with other load on the
machine. Peak memory counts everything in the process; `own` leaves out the libraries, which all rows load, but counts
the scores that they are given.

Example: ./run.sh benchmarks/export.py --classes 118 25 --size 125 --new-size 250 -o export-times
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from benchmarks.shared import clocked
from nnslim.benchmark.alternated import Candidate, TimedJob, Timing, measure_rounds
from nnslim.benchmark.passes import device_name
from nnslim.files import make_folder, write_json
from nnslim.running.machine import peak_bytes, reset_peak
from nnslim.tables import markdown, write_table
from studies.command import new_parser, run_command

SHAPE = "shape_after_cropping_and_before_resampling"
FINE = 1.5  # mm, of the image
LABEL_ROWS = ("nnU-Net default", "nnU-Net torch", "TotalSegmentator cropped", "nnslim", "nnslim without compiler")
IMAGE_ROWS = ("nnU-Net default", "nnslim")
COLUMNS = ("what", "scores", "classes", "row", "seconds", "cpu_seconds", "peak_mb", "own_mb", "speedup", "memory")
COLUMNS += ("own_memory", "equal")


def organ_scores(classes: int, size: int, seed: int = 0) -> Tensor:
    """(classes, size, size, size) float16: each class is a warped ball somewhere; the first is the background."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.empty((classes, size, size, size), dtype=torch.float16)
    line = torch.arange(size, dtype=torch.float32)
    for number in range(classes):
        bumps = interpolate(torch.randn(1, 1, 9, 9, 9, generator=generator), (size,) * 3, mode="trilinear")[0, 0]
        if number == 0:
            scores[0] = 1 + bumps
            continue
        centre = (0.15 + 0.7 * torch.rand(3, generator=generator)) * size
        radius = size * (0.03 + 0.12 * float(torch.rand(1, generator=generator)))
        away = sum(
            (line - centre[axis]).square().reshape([-1 if n == axis else 1 for n in range(3)]) for axis in range(3)
        )
        scores[number] = (12 - 12 * away.sqrt() / radius).clamp(min=-18) + bumps
    return scores


def noise_scores(classes: int, size: int, seed: int = 0) -> Tensor:
    """(classes, size, size, size) float16: every class competes everywhere, with noise from voxel to voxel."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.empty((classes, size, size, size), dtype=torch.float16)
    for number in range(classes):
        field = interpolate(torch.randn(1, 1, 9, 9, 9, generator=generator), (size,) * 3, mode="trilinear")[0, 0]
        scores[number] = 4 * field + torch.randn(field.shape, generator=generator)
    return scores


SCORES: dict[str, Callable[[int, int], Tensor]] = {"organs": organ_scores, "noise": noise_scores}


def managers(classes: int, row: str, coarse: float) -> tuple[Any, Any, Any]:
    """Return plans, configuration and labels of a model like TotalSegmentator's with that number of classes."""
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    from nnslim.hosts.totalseg.stand_in import LAYOUTS, stand_in_plans

    layout = LAYOUTS[297]
    plans = stand_in_plans(layout, "Dataset000_Export", 4, layout.patch)
    configuration = plans["configurations"]["3d_fullres"]
    configuration["spacing"] = [coarse] * 3
    if row == "nnU-Net torch":
        configuration["resampling_fn_probabilities"] = "resample_torch_fornnunet"
        configuration["resampling_fn_probabilities_kwargs"] = {
            "is_seg": False,
            "force_separate_z": False,
            "num_threads": torch.get_num_threads(),
        }
    labels = {f"class {number}" if number else "background": number for number in range(classes)}
    manager = PlansManager(plans)
    return manager, manager.get_configuration("3d_fullres"), manager.get_label_manager({"labels": labels})


def prepare_labels(row: str, scores: Path, new_size: int, threads: int, folder: Path) -> Candidate:
    """Return the candidate that makes labels of saved scores in one way, and keeps them in `folder`."""
    torch.set_num_threads(threads)
    logits = np.load(scores)
    classes, size = logits.shape[:2]
    coarse = FINE * new_size / size
    plans, configuration, labels = managers(classes, row, coarse)
    properties = {
        "spacing": [FINE] * 3,
        "shape_before_cropping": (new_size,) * 3,
        "bbox_used_for_cropping": [[0, new_size]] * 3,
        SHAPE: (new_size,) * 3,
    }
    more: dict[str, Any] = {"num_threads_torch": threads}
    if row.startswith("nnslim"):
        import nnslim.resampling.labels as ours
        from nnslim.hosts.nnunet.cases import write_labels as module

        if row != "nnslim":
            ours.kernels = lambda: None  # type: ignore[assignment]
        ours.kernels()
    elif row.startswith("Total"):
        from totalsegmentator import nnunet_runtime_patches as module

        more["use_cropped_logits_resampling"] = True
    else:
        from nnunetv2.inference import export_prediction as module
    convert = module.convert_predicted_logits_to_segmentation_with_correct_shape
    small = {**properties, **dict.fromkeys(("shape_before_cropping", SHAPE), (9,) * 3)}
    small["bbox_used_for_cropping"] = [[0, 9]] * 3
    convert(logits[:, :7, :7, :7].copy(), plans, configuration, labels, small, **more)  # imports

    work = partial(convert, logits, plans, configuration, labels, properties, **more)
    return candidate_of(work, logits, folder / f"{row}.npy")


def candidate_of(work: Callable[[], np.ndarray], given: np.ndarray, target: Path) -> Candidate:
    """Return the candidate that times the work on an array and keeps what it makes."""

    def run() -> dict[str, float]:
        made, took = clocked(work)
        np.save(target, made)
        return took

    reset_peak()
    return Candidate(run, {"shape": list(given.shape), "libraries": peak_bytes() - given.nbytes})


def prepare_image(row: str, size: int, new_size: int, threads: int, folder: Path) -> Candidate:
    """Return the candidate that resamples an image of `size` to `new_size` in one way."""
    torch.set_num_threads(threads)
    from nnslim.hosts.nnunet.cases.resampling_functions import lean_configuration

    configuration = managers(118, row, FINE * size / new_size)[1]
    if row == "nnslim":
        configuration = lean_configuration(configuration)
    resample = configuration.resampling_fn_data
    generator = torch.Generator().manual_seed(0)
    field = interpolate(torch.randn(1, 1, 40, 40, 40, generator=generator), (size,) * 3, mode="trilinear")[0]
    image = (field + 0.1 * torch.randn(field.shape, generator=generator)).numpy()
    new_spacing = [FINE * size / new_size] * 3
    resample(image[:, :7, :7, :7].copy(), (9,) * 3, [FINE] * 3, new_spacing)  # imports

    work = partial(resample, image, (new_size,) * 3, [FINE] * 3, new_spacing)
    return candidate_of(work, image, folder / f"{row}.npy")


def table_rows(what: str, scores: str, classes: int, timings: Sequence[Timing], folder: Path) -> list[dict[str, Any]]:
    """Return one row per timing; speed, memory and agreement relative to the first."""
    rows: list[dict[str, Any]] = []
    first = np.load(folder / f"{timings[0].name}.npy", mmap_mode="r") if timings[0].results else None
    for timing in timings:
        row: dict[str, Any] = {"what": what, "scores": scores, "classes": classes, "row": timing.name}
        if not timing.results:
            rows.append(row | {"equal": timing.error or "no result"})
            continue
        best = min(timing.results, key=lambda result: result["cpu_seconds"])
        row |= {"seconds": round(min(result["seconds"] for result in timing.results), 2)}
        row |= {"cpu_seconds": round(best["cpu_seconds"], 2), "peak_mb": round(timing.peak_memory / 1e6)}
        row["own_mb"] = round((timing.peak_memory - timing.facts["libraries"]) / 1e6)
        if rows and "seconds" in rows[0]:
            row["speedup"] = round(rows[0]["seconds"] / row["seconds"], 1)
            row["memory"] = round(row["peak_mb"] / rows[0]["peak_mb"], 3)
            row["own_memory"] = round(row["own_mb"] / max(1, rows[0]["own_mb"]), 3)
        if first is not None:
            mine = np.load(folder / f"{timing.name}.npy", mmap_mode="r")
            same = mine == first if what == "labels" else np.abs(mine - first) <= 1e-5 * np.ptp(first)
            row["equal"] = f"{same.mean():.6%}"
        rows.append(row)
    return rows


def make_parser() -> argparse.ArgumentParser:
    parser = new_parser(__doc__)
    parser.add_argument(
        "--classes", type=int, nargs="*", default=[118, 25], help="class counts, 118 (3 mm) and 25 known"
    )
    parser.add_argument("--scores", nargs="+", default=["organs"], choices=list(SCORES), help="kinds of scores")
    parser.add_argument("--size", type=int, default=125, help="voxels along each axis of the scores (default: 125)")
    parser.add_argument("--new-size", type=int, default=250, help="voxels of the image, 1.5 mm each (default: 250)")
    parser.add_argument("--rows", nargs="+", default=list(LABEL_ROWS[:4]), choices=LABEL_ROWS)
    parser.add_argument(
        "--image", type=int, default=0, metavar="SIZE", help="also resample an image from SIZE to --size"
    )
    parser.add_argument("--rounds", type=int, default=1, help="passes of each row, alternated (default: 1)")
    parser.add_argument("--threads", type=int, default=2, help="processor threads (default: 2)")
    parser.add_argument("-o", "--output", type=Path, default=Path("export-times"), help="folder of the tables")
    return parser


def main() -> None:
    args = make_parser().parse_args()
    rows: list[dict[str, Any]] = []
    say = partial(print, file=sys.stderr, flush=True)
    make_folder(args.output)
    options = {"warmups": 0, "patience": 6 * 3600.0, "limit_memory": False}

    def run(what: str, scores: str, classes: int, jobs: Sequence[TimedJob], folder: Path) -> None:
        timings = measure_rounds(
            jobs, args.rounds, progress=lambda *state: say(what, scores, classes, *state), **options
        )
        rows.extend(table_rows(what, scores, classes, timings, folder))
        facts = {"processor": device_name(), "threads": args.threads, "rounds": args.rounds, "rows": rows}
        write_json(args.output / "export.json", facts | {"size": args.size, "new_size": args.new_size})
        write_table(rows, args.output / "export.csv", COLUMNS)
        text = markdown(rows, COLUMNS)
        (args.output / "export.md").write_text(text, encoding="utf-8")
        print(text)

    for scores in args.scores:
        for classes in args.classes:
            with tempfile.TemporaryDirectory() as name:
                folder = Path(name)
                np.save(folder / "scores.npy", SCORES[scores](classes, args.size).numpy())
                given = (folder / "scores.npy", args.new_size, args.threads, folder)
                jobs = [TimedJob(row, partial(prepare_labels, row, *given)) for row in args.rows]
                run("labels", scores, classes, jobs, folder)
    if args.image:
        with tempfile.TemporaryDirectory() as name:
            given = (args.image, args.size, args.threads, Path(name))
            jobs = [TimedJob(row, partial(prepare_image, row, *given)) for row in IMAGE_ROWS]
            run("image", "", 1, jobs, Path(name))


if __name__ == "__main__":
    run_command(main)
