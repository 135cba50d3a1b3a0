"""Unlabelled images of a user, through nnU-Net's preprocessing, as calibration tiles and augmented patches."""

from __future__ import annotations

import hashlib
import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from nnslim.compression.calibration import Calibration, Judged, Logits, Patches
from nnslim.compression.config import SlimConfig
from nnslim.compression.distillation import Axes, flip, mirrors
from nnslim.errors import ConfigError, InputError
from nnslim.files import output_error, sha256_of, temporary_folder
from nnslim.hosts.nnunet.cases.preprocess import check_stage, list_cases, preprocess_case
from nnslim.hosts.nnunet.model.trained_model import classes_of

_FRESH = 24  # images, at most, on which fitted plans are compared
_PATCH_VALUES = 2**26  # probabilities of a patch that are augmented with it, at most
_IMAGE_VALUES = 2**29  # probabilities of an image that are predicted once, at most: 2 GB
_FLAT = 0.02  # a tile whose spread is below this share of the image's shows padding or air


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
            _save(path, np.ascontiguousarray(data, dtype=np.float32))
            if progress is not None:
                progress(number, len(names))
        yield PreparedImages(source, paths)


def _save(path: Path, array: np.ndarray) -> None:
    try:
        np.save(path, array)
    except OSError as error:
        raise output_error(path.parent, error) from error


class ImageTiles:
    """Tiles of nnU-Net's sliding window, the same ones each time; implements `nnslim.surgery.streaming.Tiles`.

    Mirrored, each tile is followed by one of its mirror images: test-time mirroring shows the network what the images
    alone never do.
    """

    def __init__(self, images: PreparedImages, per_image: int, *, seed: int = 0, mirrored: bool = False) -> None:
        """Choose tiles.

        Args:
            per_image: tiles of each image at most, chosen by the seed among those that show more than air.
            mirrored: follow each by a mirror image, along one or more of the axes that the model may be mirrored along.
        """
        self._images = images
        self._chosen = [
            (number, corner)
            for number in range(len(images))
            for corner in _corners(images.load(number), images.source, per_image, seed * 7919 + number)
        ]
        rng = np.random.default_rng(seed)
        self._flips = [_some(images.source.mirror_axes if mirrored else None, rng) for _ in self._chosen]

    def __len__(self) -> int:
        return len(self._chosen) + sum(bool(flipped) for flipped in self._flips)

    def __iter__(self) -> Iterator[Tensor]:
        for (number, corner), flipped in zip(self._chosen, self._flips, strict=True):
            tile = torch.from_numpy(_cut(self._images.load(number), corner, self._images.source.patch))[None]
            yield tile
            if flipped:
                yield tile.flip([axis + 2 for axis in flipped])


def _some(axes: Sequence[int] | None, rng: np.random.Generator) -> tuple[int, ...]:
    """Return one or more of the axes, all choices alike; none where there are none."""
    if not axes:
        return ()
    chosen = int(rng.integers(1, 2 ** len(axes)))
    return tuple(axis for bit, axis in enumerate(axes) if chosen >> bit & 1)


def _corners(image: np.ndarray, source: Source, count: int, seed: int) -> list[tuple[int, ...]]:
    """Return the lower corners of some tiles, in the image's own voxels; a 2D tile is a slice of one voxel."""
    corners, patch = _windows(image, source), source.patch
    shuffled = [corners[number] for number in np.random.default_rng(seed).permutation(len(corners))]
    spread = float(np.std(image)) * _FLAT
    return list(islice((one for one in shuffled if _cut(image, one, patch).std() > spread), count)) or shuffled[:1]


def _windows(image: np.ndarray, source: Source) -> list[tuple[int, ...]]:
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


def _add(total: Tensor, tile: Tensor, corner: Sequence[int], patch: Sequence[int]) -> None:
    """Add (C, *patch) to (C, *spatial) where the window lies."""
    flat = len(patch) < total.ndim - 1
    take, put = _overlap(corner, (1, *patch) if flat else patch, total.shape[1:])
    total[take] += (tile[:, None] if flat else tile)[put]


def _cut(image: np.ndarray, corner: Sequence[int], patch: Sequence[int]) -> np.ndarray:
    """Return (C, *patch) from a corner that may lie outside; what is outside is 0, as nnU-Net pads."""
    flat = len(patch) < image.ndim - 1
    window = (1, *patch) if flat else tuple(patch)
    made = np.zeros((image.shape[0], *window), dtype=np.float32)
    take, put = _overlap(corner, window, image.shape[1:])
    made[put] = image[take]
    return made[:, 0] if flat else made


class AugmentedPatches(torch.utils.data.Dataset):
    """Random patches with the augmentation that nnU-Net trains with; patch `index` is the same each time.

    With `answers`, (heads, *spatial) probabilities of each image, a patch comes with its probabilities, which are
    rotated, scaled and mirrored with it. Outside the image is background.
    """

    def __init__(
        self, images: PreparedImages, length: int, *, seed: int = 0, answers: PreparedImages | None = None
    ) -> None:
        self._images, self._length, self._seed, self._answers = images, length, seed, answers
        self._transform, self._initial = _transforms(images.source)

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Tensor | tuple[Tensor, Tensor]:
        """Return (C, *patch) float32, with answers a pair of it and of (heads, *patch)."""
        if not 0 <= index < self._length:
            raise IndexError(index)
        state = np.random.get_state()
        with torch.random.fork_rng(devices=[]):
            seed = (self._seed * 1_000_003 + index) % 2**32
            rng = np.random.default_rng(seed)
            np.random.seed(seed)  # nnU-Net's transforms draw from the global generators
            torch.manual_seed(seed)
            try:
                number = int(rng.integers(len(self._images)))
                image = self._images.load(number)
                corner = _random_corner(image.shape[1:], self._initial, rng)
                cut = _cut(image, corner, self._initial)
                if self._answers is None:
                    return self._transform(cut)[0]
                return self._transform(cut, _cut(self._answers.load(number), corner, self._initial))
            finally:
                np.random.set_state(state)


def _random_corner(size: Sequence[int], patch: Sequence[int], rng: np.random.Generator) -> list[int]:
    """Return a corner as nnU-Net's loader draws it: anywhere inside, or centred on an axis that is too short."""
    window = (1, *patch) if len(patch) < len(size) else patch
    return [
        int(rng.integers(0, have - want + 1)) if have > want else -((want - have) // 2)
        for have, want in zip(size, window, strict=True)
    ]


def _transforms(source: Source) -> tuple[Callable[..., tuple[Tensor, Tensor | None]], tuple[int, ...]]:
    """Return nnU-Net's training transforms for an image without labels, and the size of patch that they start from.

    A second argument, (heads, *patch) probabilities, goes where the image goes.
    """
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

    patch = source.patch
    stand_in = SimpleNamespace(
        configuration_manager=source.configuration_manager, print_to_log_file=lambda *words, **options: None
    )
    rotation, dummy_2d, initial, _ = nnUNetTrainer.configure_rotation_dummyDA_mirroring_and_inital_patch_size(stand_in)
    made = nnUNetTrainer.get_training_transforms(
        patch,
        rotation,
        None,
        source.mirror_axes,
        dummy_2d,
        use_mask_for_norm=source.configuration_manager.use_mask_for_norm,
        foreground_labels=source.label_manager.foreground_labels,
    )

    def transform(image: np.ndarray, likely: np.ndarray | None = None) -> tuple[Tensor, Tensor | None]:
        labels = np.zeros((1, *image.shape[1:]), dtype=np.int16)
        if not takes_probabilities():
            found = made(data=image[None], seg=labels[None])["data"][0]
            return torch.as_tensor(found, dtype=torch.float32), None
        given = {} if likely is None else {"regression_target": torch.from_numpy(likely)}
        found = made(image=torch.from_numpy(image), segmentation=torch.from_numpy(labels), **given)
        if likely is None:
            return found["image"], None
        likely = found["regression_target"].clamp(0, 1)
        if not source.regions:
            likely[0] = (1 - likely[1:].sum(0)).clamp_min(0)
        return found["image"], likely

    return transform, tuple(int(size) for size in initial)


def takes_probabilities() -> bool:
    """Whether nnU-Net's transforms can take probabilities along; before 2.5 they are those of batchgenerators."""
    return find_spec("batchgeneratorsv2") is not None


@dataclass
class _Answers:
    """Predictions of whole images, as nnU-Net makes them; see `Calibration.answered`."""

    images: PreparedImages
    seed: int

    def __post_init__(self) -> None:
        self._made: dict[int, tuple[nn.Module, PreparedImages]] = {}

    def __call__(self, dense: nn.Module, logits: Logits, axes: tuple[int, ...], most: int) -> Patches | None:
        if not takes_probabilities() or not self._fits():
            return None
        if id(dense) not in self._made:
            windows = [_windows(self.images.load(number), self.images.source) for number in range(len(self.images))]
            count = sum(map(len, windows))
            ways = next((ways for few in (None, 4, 2) if count * len(ways := mirrors(axes, few)) <= most), None)
            if ways is None:
                return None
            self._made = {id(dense): (dense, self._predicted(dense, logits, ways, windows))}  # one at a time: disk
        answers = self._made[id(dense)][1]
        return lambda length: AugmentedPatches(self.images, length, seed=self.seed, answers=answers)

    def _fits(self) -> bool:
        """Whether the predictions take little enough memory and disk, and patches of them little enough time."""
        heads = self.images.source.label_manager.num_segmentation_heads
        sizes = [heads * self.images.load(number)[0].size for number in range(len(self.images))]
        free = shutil.disk_usage(self.images.paths[0].parent).free
        patch = heads * math.prod(self.images.source.patch)
        return patch <= _PATCH_VALUES and max(sizes) <= _IMAGE_VALUES and 2 * 2 * sum(sizes) < free

    def _predicted(
        self, dense: nn.Module, logits: Logits, ways: Sequence[Axes], windows: Sequence[Sequence[Sequence[int]]]
    ) -> PreparedImages:
        """Write the probabilities of each image beside it, in half precision."""
        from nnunetv2.inference.sliding_window_prediction import compute_gaussian

        device, patch = next(dense.parameters()).device, self.images.source.patch
        weight = torch.as_tensor(compute_gaussian(patch, dtype=torch.float32, device=torch.device("cpu")))
        paths = []
        for path, corners in zip(self.images.paths, windows, strict=True):
            image = np.load(path, mmap_mode="r")
            total, weights = None, torch.zeros(image.shape[1:])
            for corner in corners:
                tile = torch.from_numpy(_cut(image, corner, patch))[None].to(device)
                answer = torch.stack([flip(logits(flip(tile, way)), way)[0].float().cpu() for way in ways]).mean(0)
                total = torch.zeros(len(answer), *image.shape[1:]) if total is None else total
                _add(total, answer * weight, corner, patch)
                _add(weights[None], weight[None], corner, patch)
            total /= weights
            likely = total.sigmoid() if self.images.source.regions else total.softmax(0)
            paths.append(path.with_name(f"{path.stem}.answer.npy"))
            _save(paths[-1], likely.half().numpy())
        return PreparedImages(self.images.source, paths)


@contextmanager
def calibration_of(
    model: Any,
    config: SlimConfig,
    progress: Callable[[str, int, int], None] | None = None,
    *,
    needed: bool | None = None,
) -> Iterator[Calibration | None]:
    """Yield the calibration data that a configuration asks for, None where it names no images; clean up at the end.

    Args:
        model: a TrainedModel or an initialised nnUNetPredictor.
        config: `calibration.images` names the folder.
        progress: called with ("images", done, in all).
        needed: False yields None; by default images are read where the configuration changes or rounds the weights.
    Raises:
        InputError: no images, or one that cannot be read. ModelError: a cascade.
        ConfigError: the mirrored answer is to be learned, without images or for a model that is never mirrored.
    """
    needed = config.active or config.store == "half" if needed is None else needed
    settings = config.calibration
    learns = config.recovery.learns or any(entry.settings.drop_limit is not None for entry in config.methods)
    once = config.recovery.target == "mirrored"
    if once and needed and settings.images is None:
        raise ConfigError(
            "recovery.target: mirrored is learned from images: name a folder of them (-i, calibration.images)"
        )
    if settings.images is None or not needed:
        yield None
        return
    # Learning and judging want images of their own; a sixth of them is for judging.
    count = settings.count + config.recovery.images if learns else settings.count
    source = Source.of(model)
    if once and not source.mirror_axes:
        raise ConfigError("recovery.target: mirrored has nothing to learn: this model is never mirrored")
    mirrored = bool(source.mirror_axes) and settings.mirrored is not False
    judged: Judged = "one pass" if once else "mirrored" if mirrored else "plain"
    step = None if progress is None else partial(progress, "images")
    with prepare_images(source, settings.images, count, seed=settings.seed, progress=step) as images:
        held = (len(images) // 6 if len(images) >= 6 else int(len(images) >= 4)) if learns else 0
        learned = images.part(0, len(images) - held)
        unseen = images.part(len(images) - held) if held else images
        tiles = partial(ImageTiles, per_image=settings.tiles_per_image)
        unfitted = min(len(images) - settings.count, _FRESH)
        yield Calibration(
            tiles(learned.part(0, settings.count), seed=settings.seed, mirrored=judged == "mirrored"),
            tiles(unseen, seed=settings.seed + 1),
            lambda length: AugmentedPatches(learned, length, seed=settings.seed),
            source.regions,
            images.fingerprint,
            len(images),
            source.mirror_axes or (),
            judged,
            settings.seed,
            tuple(classes_of(source.label_manager)),
            ImageTiles(images.part(len(images) - unfitted), 1, seed=settings.seed + 1) if unfitted > held else None,
            _Answers(learned, settings.seed),
        )


def images_fingerprint(config: SlimConfig) -> str:
    """Return a hash of the files that a configuration names as images, "" where it names none.

    By name, size and time of change: reading hundreds of CTs to look into the cache would cost more than it saves.

    Raises:
        InputError: the folder does not exist.
    """
    if config.calibration.images is None:
        return ""
    folder = Path(config.calibration.images)
    if not folder.exists():
        raise InputError(f"{folder} does not exist; expected a folder of calibration images")
    files = sorted(path for path in folder.iterdir() if path.is_file()) if folder.is_dir() else [folder]
    lines = (f"{path.name} {(stat := path.stat()).st_size} {stat.st_mtime_ns}\n" for path in files)
    return hashlib.sha256("".join(lines).encode()).hexdigest()
