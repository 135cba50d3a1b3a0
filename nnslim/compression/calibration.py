"""What compression sees of a user's unlabelled images; a host makes it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn
from torch.utils.data import Dataset

from nnslim.surgery.streaming import Tiles

Logits = Callable[[Tensor], Tensor]  # (1, C, *patch) to (1, heads, *patch)
Patches = Callable[[int], Dataset]
Judged = Literal["plain", "mirrored", "one pass"]  # see `Referee`


@dataclass(frozen=True)
class Calibration:
    """Unlabelled data in the form that each step needs. Images stay on disk; one tile is in memory at a time.

    Attributes:
        tiles: for statistics.
        held_out: for measuring agreement with the dense network; with 4 images or more, nothing is learned from them.
        fresh: for comparing plans that are fitted but not learned: images that were not fitted to, if there are
            enough; None for `held_out`.
        patches: number of patches -> augmented patches to learn from; patch `index` is the same each time.
        regions: the network's channels are regions that may overlap.
        fingerprint: hash of the images' content.
        images: how many there are.
        mirror_axes: spatial axes along which the model may be mirrored.
        judged: the answer that the user will take, see `Referee`.
        seed: the configuration's.
        class_names: in the order of the network's channels, without background.
        answered: (dense network, its logits, axes to mirror along, forward passes at most) -> like `patches`, with the
            dense network's prediction of the whole image, (heads, *patch) probabilities, beside each patch; None where
            that would take more passes or too much space. The prediction is made once for each network.
    """

    tiles: Tiles
    held_out: Tiles
    patches: Patches
    regions: bool = False
    fingerprint: str = ""
    images: int = 0
    mirror_axes: tuple[int, ...] = ()
    judged: Judged = "plain"
    seed: int = 0
    class_names: tuple[str, ...] = ()
    fresh: Tiles | None = None
    answered: Callable[[nn.Module, Logits, tuple[int, ...], int], Patches | None] | None = None
