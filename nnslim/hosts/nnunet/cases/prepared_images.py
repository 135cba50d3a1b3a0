"""Unlabelled images of a user, through nnU-Net's preprocessing, and the windows in which nnU-Net reads them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from nnslim.errors import InputError
from nnslim.files import output_error, sha256_of, temporary_folder
from nnslim.hosts.nnunet.cases.preprocess import check_stage, list_cases, preprocess_case


@dataclass(frozen=True)
class Source:
    """What preprocessing needs of a model, whether it is a folder or a loaded predictor.

    Attributes:
        plans_manager, configuration_manager, dataset_json, label_manager: nnU-Net's.
        mirror_axes: axes along which the model was trained to be mirrored, None for none.
    """

    plans_manager: Any
    configuration_manager: Any
    dataset_json: dict[str, Any]
    label_manager: Any
    mirror_axes: tuple[int, ...] | None

    @classmethod
    def of(cls, model: Any) -> Source:
        """Return the source of a TrainedModel or of an initialised nnUNetPredictor."""
        if hasattr(model, "checkpoints"):
            first = next(iter(model.checkpoints.values()))
            dataset, axes = model.dataset, first.get("inference_allowed_mirroring_axes")
        else:
            dataset, axes = model.dataset_json, model.allowed_mirroring_axes
        labels = model.plans_manager.get_label_manager(dataset)
        return cls(
            model.plans_manager, model.configuration_manager, dataset, labels, None if axes is None else tuple(axes)
        )

    @property
    def patch(self) -> tuple[int, ...]:
        """Patch size, voxels; two numbers for a 2D configuration."""
        return tuple(int(size) for size in self.configuration_manager.patch_size)

    @property
    def regions(self) -> bool:
        """Whether the channels are regions that may overlap."""
        return bool(self.label_manager.has_regions)


@dataclass(frozen=True)
class PreparedImages:
    """Preprocessed images on disk; only one is in memory at a time."""

    source: Source
    paths: Sequence[Path]

    def __len__(self) -> int:
        return len(self.paths)

    def load(self, number: int) -> np.ndarray:
        """Return image `number` as a read-only map of its file, (C, *spatial) float32."""
        return np.load(self.paths[number], mmap_mode="r")

    def part(self, start: int, stop: int | None = None) -> PreparedImages:
        """Return some of the images."""
        return PreparedImages(self.source, self.paths[start:stop])

    @property
    def fingerprint(self) -> str:
        """Hash of the preprocessed images, which is what the weights depend on."""
        return hashlib.sha256("".join(map(sha256_of, self.paths)).encode()).hexdigest()


@contextmanager
def prepare_images(
    source: Source, images: Path, count: int, *, seed: int = 0, progress: Callable[[int, int], None] | None = None
) -> Iterator[PreparedImages]:
    """Preprocess up to `count` images of a folder as nnU-Net does before prediction, for the time of a `with` block.

    Args:
        source: the model's settings.
        images: folder of `<case>_0000<ending>` files, else of `<case><ending>` files that hold all channels.
        count: how many cases; chosen by the seed where there are more.
        progress: called with (cases done, cases in all).
    Raises:
        InputError: no images, or one that cannot be read. ModelError: a cascade. OutputError: disk full.
    """
    check_stage(source, None)
    images, ending = Path(images), source.dataset_json["file_ending"]
    try:
        cases = list_cases(images, ending).cases
    except InputError:
        plain = sorted(images.glob(f"*{ending}")) if images.is_dir() else [images]
        if not plain or not images.exists():
            raise
        cases = {path.name.removesuffix(ending): [path] for path in plain}
    names = sorted(cases)
    if len(names) > count:
        chosen = np.random.default_rng(seed).permutation(len(names))[:count]
        names = [names[number] for number in sorted(chosen)]
    with temporary_folder() as folder:
        paths = [folder / f"{number:04d}.npy" for number in range(1, len(names) + 1)]
        for number, (name, path) in enumerate(zip(names, paths, strict=True), start=1):
            data, _ = preprocess_case(source, cases[name], None)
            save_image(path, np.ascontiguousarray(data, dtype=np.float32))
            if progress is not None:
                progress(number, len(names))
        yield PreparedImages(source, paths)


def save_image(path: Path, array: np.ndarray) -> None:
    """Write an array to a temporary .npy file; an OutputError names the folder."""
    try:
        np.save(path, array)
    except OSError as error:
        raise output_error(path.parent, error) from error


def windows_of(image: np.ndarray, source: Source) -> list[tuple[int, ...]]:
    """Return the lower corners of all tiles of nnU-Net's sliding window."""
    from nnunetv2.inference.sliding_window_prediction import compute_steps_for_sliding_window

    patch, size = source.patch, image.shape[1:]
    slices = size[: len(size) - len(patch)]  # the axis along which a 2D configuration goes slice by slice
    window = (*(1 for _ in slices), *patch)
    padded = tuple(max(have, want) for have, want in zip(size, window, strict=True))
    steps = [list(range(length)) for length in slices]
    steps += compute_steps_for_sliding_window(padded[len(slices) :], patch, 0.5)
    grid = np.stack(np.meshgrid(*steps, indexing="ij"), -1).reshape(-1, len(size))
    corners = grid - np.array([(want - have) // 2 for want, have in zip(padded, size, strict=True)])
    return list(map(tuple, corners.tolist()))


def _overlap(
    corner: Sequence[int], window: Sequence[int], size: Sequence[int]
) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
    """Return the part of an image that a window covers, and the part of the window that lies in the image."""
    take, put = [slice(None)], [slice(None)]
    for start, length, have in zip(corner, window, size, strict=True):
        low, high = max(start, 0), min(start + length, have)
        take.append(slice(low, max(low, high)))
        put.append(slice(low - start, max(low, high) - start))
    return tuple(take), tuple(put)


def add_window(total: Tensor, tile: Tensor, corner: Sequence[int], patch: Sequence[int]) -> None:
    """Add (C, *patch) to (C, *spatial) where the window lies."""
    flat = len(patch) < total.ndim - 1
    take, put = _overlap(corner, (1, *patch) if flat else patch, total.shape[1:])
    total[take] += (tile[:, None] if flat else tile)[put]


def cut_window(image: np.ndarray, corner: Sequence[int], patch: Sequence[int]) -> np.ndarray:
    """Return (C, *patch) from a corner that may lie outside; what is outside is 0, as nnU-Net pads."""
    flat = len(patch) < image.ndim - 1
    window = (1, *patch) if flat else tuple(patch)
    made = np.zeros((image.shape[0], *window), dtype=np.float32)
    take, put = _overlap(corner, window, image.shape[1:])
    made[put] = image[take]
    return made[:, 0] if flat else made
