"""What is kept of kernels that are, or are not, made of two convolutions along different axes."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from studies.spatial_split import compare, compare_layers, kept_by_split


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_split_keeps_all_of_a_kernel_that_is_one_and_tucker_does_not(axis):
    torch.manual_seed(0)
    inner, outer = torch.randn(4, 16, 3, 3).double(), torch.randn(16, 4, 3).double()
    kernel = torch.einsum("rixy,orz->oizxy", inner, outer).movedim(2, 2 + axis).flatten(2)
    energy = float(kernel.square().sum())
    cost = 4 * (3 * 16 + 9 * 16)
    assert kept_by_split(kernel, cost) == pytest.approx(energy)
    assert kept_by_split(kernel, cost - 1) < 0.99 * energy
    found = compare(kernel, 0.25)  # ranks of 8: 1984 products for each voxel
    assert found["times_fewer"] == pytest.approx(16 * 16 * 27 / (8 * 8 * 27 + 2 * 16 * 8))
    assert found["split"] == pytest.approx(1) == found["both"] and found["tucker"] < 0.9


def test_rows_are_means_over_layers_of_one_shape():
    torch.manual_seed(0)
    layers = [nn.Conv3d(1, 16, 3), nn.Conv3d(16, 16, 3), nn.Conv3d(16, 16, 3), nn.Conv3d(16, 8, 1)]
    (row,) = compare_layers(nn.Sequential(*layers), [0.5])
    each = [compare(layer.weight.detach().double().flatten(2), 0.5)["tucker"] for layer in layers[1:3]]
    assert row["tucker"] == pytest.approx(sum(each) / 2, abs=1e-3) and row["outputs x inputs"] == "16x16"
