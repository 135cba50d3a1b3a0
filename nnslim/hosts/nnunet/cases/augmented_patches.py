"""What recovery learns from: patches with nnU-Net's own augmentation, and the dense network's predictions of images."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor, nn

from nnslim.compression.calibration import Logits, Patches
from nnslim.compression.distillation import Axes, flip, mirrors
from nnslim.hosts.nnunet.cases.prepared_images import (
    PreparedImages,
    Source,
    add_window,
    cut_window,
    save_image,
    windows_of,
)

_PATCH_VALUES = 2**26  # probabilities of a patch that are augmented with it, at most
_IMAGE_VALUES = 2**29  # probabilities of an image that are predicted once, at most: 2 GB


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
                cut = cut_window(image, corner, self._initial)
                if self._answers is None:
                    return self._transform(cut)[0]
                return self._transform(cut, cut_window(self._answers.load(number), corner, self._initial))
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
class DenseAnswers:
    """Predictions of whole images, as nnU-Net makes them; see `Calibration.answered`."""

    images: PreparedImages
    seed: int

    def __post_init__(self) -> None:
        self._made: dict[int, tuple[nn.Module, PreparedImages]] = {}

    def __call__(self, dense: nn.Module, logits: Logits, axes: tuple[int, ...], most: int) -> Patches | None:
        if not takes_probabilities() or not self._fits():
            return None
        if id(dense) not in self._made:
            windows = [windows_of(self.images.load(number), self.images.source) for number in range(len(self.images))]
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
                tile = torch.from_numpy(cut_window(image, corner, patch))[None].to(device)
                answer = torch.stack([flip(logits(flip(tile, way)), way)[0].float().cpu() for way in ways]).mean(0)
                total = torch.zeros(len(answer), *image.shape[1:]) if total is None else total
                add_window(total, answer * weight, corner, patch)
                add_window(weights[None], weight[None], corner, patch)
            total /= weights
            likely = total.sigmoid() if self.images.source.regions else total.softmax(0)
            paths.append(path.with_name(f"{path.stem}.answer.npy"))
            save_image(paths[-1], likely.half().numpy())
        return PreparedImages(self.images.source, paths)
