"""Unlabelled images of a user as calibration data: tiles to fit on, patches to learn from, tiles to be judged on."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nnslim.compression.calibration import Calibration, Judged
from nnslim.compression.config import SlimConfig
from nnslim.errors import ConfigError, InputError
from nnslim.hosts.nnunet.cases.augmented_patches import AugmentedPatches, DenseAnswers
from nnslim.hosts.nnunet.cases.prepared_images import PreparedImages, Source, cut_window, prepare_images, windows_of
from nnslim.hosts.nnunet.model.trained_model import classes_of

_FRESH = 24  # images, at most, on which fitted plans are compared
_FLAT = 0.02  # a tile whose spread is below this share of the image's shows padding or air


class ImageTiles:
    """Tiles of nnU-Net's sliding window, the same ones each time; implements `nnslim.surgery.streaming.Tiles`.

    Mirrored, each tile is followed by one of its mirror images: test-time mirroring shows the network what the images
    alone never do.

    Attributes:
        known: what was found out from these tiles, by all that it depends on, for whoever asks again.
    """

    def __init__(self, images: PreparedImages, per_image: int, *, seed: int = 0, mirrored: bool = False) -> None:
        """Choose tiles.

        Args:
            per_image: tiles of each image at most, chosen by the seed among those that show more than air.
            mirrored: follow each by a mirror image, along one or more of the axes that the model may be mirrored along.
        """
        self._images, self.known = images, {}
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
            tile = torch.from_numpy(cut_window(self._images.load(number), corner, self._images.source.patch))[None]
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
    corners, patch = windows_of(image, source), source.patch
    shuffled = [corners[number] for number in np.random.default_rng(seed).permutation(len(corners))]
    spread = float(np.std(image)) * _FLAT
    return (
        list(islice((one for one in shuffled if cut_window(image, one, patch).std() > spread), count)) or shuffled[:1]
    )


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
    target = config.recovery.target
    if config.recovery.one_pass and needed and settings.images is None:
        raise ConfigError(
            f"recovery.target: {target} is learned from images: name a folder of them (-i, calibration.images)"
        )
    if settings.images is None or not needed:
        yield None
        return
    # Learning and judging want images of their own; a sixth of them is for judging.
    count = settings.count + config.recovery.images if learns else settings.count
    source = Source.of(model)
    if target == "mirrored" and not source.mirror_axes:
        raise ConfigError("recovery.target: mirrored has nothing to learn: this model is never mirrored")
    mirrored = bool(source.mirror_axes) and settings.mirrored is not False
    once = target == "mirrored" or (target == "ensemble" and mirrored)
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
            DenseAnswers(learned, settings.seed),
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
