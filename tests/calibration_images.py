"""Smooth random images of 16 x 16 voxels as calibration data, for tests of recovery and of the search for a budget."""

from __future__ import annotations

import torch
from torch import nn
from torch.utils.data import Dataset

from nnslim.compression.calibration import Calibration

SHAPE = (1, 1, 16, 16)


def smooth(seed):
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(1, 1, 5, 5, generator=generator)
    return nn.functional.interpolate(coarse, SHAPE[2:], mode="bilinear") + 0.1 * torch.randn(SHAPE, generator=generator)


class Patches(Dataset):
    """Patch `index` is the same each time."""

    def __init__(self, length):
        self.length, self.asked = length, []

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        self.asked.append(index)
        return smooth(1000 + index)[0]


def make_data(regions=False, fingerprint="images"):
    held_out = [smooth(seed) for seed in (100, 101, 102)]
    return Calibration([smooth(seed) for seed in range(3)], held_out, Patches, regions, fingerprint, 6)
