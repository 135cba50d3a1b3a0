"""Time the surface Dice of nnslim, MONAI and DeepMind on a CT-sized label map of 61 classes, class by class in turn.

The maps are TotalSegmentator's two sample segmentations (full and fast), enlarged smoothly to 512 x 512 x 280 voxels,
the largest classes cut in two until there are 61. MONAI and DeepMind are timed on some of the classes, from the largest
to the smallest, each right after nnslim. nnslim is also timed on all classes, as `nnslim evaluate` works. Everything
runs on one thread; times are CPU seconds (less sensitive to other load on the machine) and wall seconds.

Example: ./run.sh benchmarks/evaluation.py --data ../shared/data/totalsegmentator_samples --classes 8 -o evaluation
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
from scipy import ndimage

from benchmarks.shared import clocked
from nnslim.evaluation.compare import CompareSettings, compare_case, union_box
from nnslim.evaluation.surfaces import surface_distances
from nnslim.files import make_folder
from nnslim.tables import write_table
from studies.command import new_parser, run_command

SPACING = (0.75, 0.75, 1.5)
TOLERANCE = 3.0
Method = Callable[[np.ndarray, np.ndarray, int], float]


def enlarge(labels: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Return (shape) labels with smooth surfaces: each class is interpolated linearly, the largest value wins."""
    zoom = np.array(shape) / labels.shape
    best, result = np.full(shape, 0.5, np.float32), np.zeros(shape, np.uint8)
    for label, found in enumerate(ndimage.find_objects(labels), start=1):
        if found is None:
            continue
        low = [max(0, side.start - 2) for side in found]
        high = [min(size, side.stop + 2) for side, size in zip(found, labels.shape, strict=True)]
        part = (labels[tuple(map(slice, low, high))] == label).astype(np.float32)
        box = tuple(slice(round(a * z), round(b * z)) for a, b, z in zip(low, high, zoom, strict=True))
        for axis, (side, z, start) in enumerate(zip(box, zoom, low, strict=True)):
            place = np.clip((np.arange(side.start, side.stop) + 0.5) / z - 0.5 - start, 0, part.shape[axis] - 1)
            lower = np.minimum(place.astype(int), part.shape[axis] - 2)
            weight = (place - lower).astype(np.float32).reshape([-1 if a == axis else 1 for a in range(3)])
            part = part.take(lower, axis) * (1 - weight) + part.take(lower + 1, axis) * weight
        wins = part > best[box]
        best[box][wins], result[box][wins] = part[wins], label
    return result


def split_until(prediction: np.ndarray, reference: np.ndarray, count: int) -> None:
    """Cut the largest classes of the reference in two at the middle of their first axis, in both maps, in place."""
    while len(sizes := np.bincount(reference.reshape(-1))[1:]) and (sizes > 0).sum() < count:
        label = int(sizes.argmax()) + 1
        new = int(max(reference.max(), prediction.max())) + 1
        profile = (reference == label).sum(axis=(1, 2)).cumsum()
        cut = int(np.searchsorted(profile, profile[-1] / 2))
        for labels in (prediction, reference):
            half = labels[cut:]
            half[half == label] = new


def make_maps(data: Path, shape: tuple[int, ...], count: int) -> tuple[np.ndarray, np.ndarray]:
    """Return prediction and reference."""
    read = [np.asarray(nib.load(data / f"{name}.nii.gz").dataobj) for name in ("example_seg_fast", "example_seg")]
    prediction, reference = (enlarge(labels, shape) for labels in read)
    split_until(prediction, reference, count)
    return prediction, reference


def with_nnslim(prediction: np.ndarray, reference: np.ndarray, label: int) -> float:
    """Surface Dice and HD95, cropped to the class, as `nnslim evaluate` does it (there the boxes are found once)."""
    boxes = [ndimage.find_objects((labels == label).view(np.uint8))[0] for labels in (prediction, reference)]
    box = union_box(*boxes)
    found = surface_distances(prediction[box] == label, reference[box] == label, SPACING)
    found.hausdorff(95)
    return found.surface_dice(TOLERANCE)


def with_monai(prediction: np.ndarray, reference: np.ndarray, label: int, crop: bool) -> float:
    """MONAI's sub-voxel mode: the body of its compute_surface_dice, of which newer releases always crop."""
    from monai.metrics.utils import get_edge_surface_distance

    masks = [torch.from_numpy(labels == label) for labels in (prediction, reference)]
    everywhere = None if crop else torch.ones([size - 1 for size in reference.shape], dtype=torch.bool)
    edges, distances, areas = get_edge_surface_distance(
        *masks, spacing=SPACING, use_subvoxels=True, symmetric=True, mask=everywhere
    )
    chosen = [area[edge] for area, edge in zip(areas, edges, strict=True)]
    near = sum(area[apart <= TOLERANCE].sum() for area, apart in zip(chosen, distances, strict=True))
    return float(near / sum(area.sum() for area in chosen))


def with_deepmind(prediction: np.ndarray, reference: np.ndarray, label: int) -> float:
    """DeepMind's surface-distance, which crops by itself."""
    import surface_distance

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = surface_distance.compute_surface_distances(reference == label, prediction == label, SPACING)
    return surface_distance.compute_surface_dice_at_tolerance(found, TOLERANCE)


def whole_case(prediction: np.ndarray, reference: np.ndarray, folder: Path) -> tuple[float, float]:
    """Read two files and compare all classes: Dice, NSD and HD95. Return CPU seconds and seconds by the clock."""
    files = []
    for name, labels in (("prediction", prediction), ("reference", reference)):
        files.append(folder / f"{name}.nii.gz")
        nib.save(nib.Nifti1Image(labels, np.diag((*SPACING, 1))), files[-1])
    _, took = clocked(lambda: compare_case("case", *files, CompareSettings(tolerance=TOLERANCE)))
    return took["cpu_seconds"], took["seconds"]


def time_classes(
    prediction: np.ndarray, reference: np.ndarray, chosen: list[int], sizes: np.ndarray
) -> list[dict[str, float]]:
    """Return a row per class: NSD, CPU seconds and seconds by the clock of each method."""
    methods: dict[str, Method] = {
        "nnslim": with_nnslim,
        "monai uncropped": partial(with_monai, crop=False),
        "monai": partial(with_monai, crop=True),
        "deepmind": with_deepmind,
    }
    small = np.zeros((2, 8, 8, 8), np.uint8)
    small[:, 2:5, 2:5, 2:5] = 1
    for method in methods.values():
        method(*small, 1)  # imports
    rows = []
    for label in chosen:
        row: dict[str, float] = {"label": int(label), "voxels": int(sizes[label])}
        for name, method in methods.items():
            found, took = clocked(partial(method, prediction, reference, label))
            row |= {f"{name}: NSD": float(found), f"{name}: cpu s": took["cpu_seconds"], f"{name}: s": took["seconds"]}
        rows.append(row)
        print({key: round(value, 8) for key, value in row.items()}, flush=True)
    return rows


def main() -> None:
    parser = new_parser(__doc__)
    parser.add_argument(
        "--data", type=Path, required=True, help="folder of example_seg.nii.gz and example_seg_fast.nii.gz"
    )
    parser.add_argument("--shape", type=int, nargs=3, default=(512, 512, 280), help="voxels")
    parser.add_argument("--classes", type=int, default=8, help="number of classes that the others are timed on (8)")
    parser.add_argument("-o", "--output", type=Path, default=Path("evaluation"), help="folder to write")
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", category=FutureWarning, module="monai")
    make_folder(args.output)
    prediction, reference = make_maps(args.data, tuple(args.shape), 61)
    sizes = np.bincount(reference.reshape(-1))
    labels = [label for label in np.argsort(-sizes) if label and sizes[label] and (prediction == label).any()]
    chosen = [labels[round(place)] for place in np.linspace(0, len(labels) - 1, args.classes)]
    rows = time_classes(prediction, reference, chosen, sizes)
    write_table(rows, args.output / "evaluation.csv")
    count = int((sizes[1:] > 0).sum())
    cpu, wall = whole_case(prediction, reference, args.output)
    print(f"nnslim, {count} classes, reading, Dice, NSD and HD95: {cpu:.1f} CPU s, {wall:.1f} s")
    for name in ("monai uncropped", "monai", "deepmind"):
        times = {unit: sum(row[f"{name}: {unit}"] for row in rows) for unit in ("cpu s", "s")}
        own = {unit: sum(row[f"nnslim: {unit}"] for row in rows) for unit in times}
        apart = max(abs(row[f"{name}: NSD"] - row["nnslim: NSD"]) for row in rows)
        ratios = ", ".join(f"{times[unit] / own[unit]:.1f}x ({unit})" for unit in times)
        print(f"{name}, {len(rows)} classes: {times['cpu s']:.1f} CPU s, {ratios} nnslim's; NSD up to {apart:.1e} off")
    each = float(np.mean([row["monai uncropped: cpu s"] for row in rows]))
    print(f"monai uncropped, that mean for all {count}: {each * count:.0f} CPU s, {each * count / cpu:.0f}x nnslim's")


if __name__ == "__main__":
    run_command(main)
