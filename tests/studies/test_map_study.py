"""Feature maps saved, clusters found where they are and only there, and pictures."""

from __future__ import annotations

import csv

import numpy as np
import pytest
import torch
from matplotlib.image import imread
from torch import nn

from nnslim.errors import InputError
from nnslim.methods.sauron.feature_maps import feature_maps, save_maps
from nnslim.surgery.channels import channel_map
from studies.map_study import clusterability, draw_maps, load_maps, write_clusterability


def test_maps_are_those_after_norm_and_activation_and_go_round(tiny_net, tiny_shape, tmp_path):
    network, shape = tiny_net("residual3d").train(), tiny_shape("residual3d")
    x = torch.randn(*shape)
    maps = feature_maps(network, x)
    assert set(maps) == set(channel_map(network, shape).groups) and network.training
    stem = next(name for name in maps if "stem" in name)
    with torch.no_grad():
        expected = network.eval().encoder.stages[0](network.encoder.stem(x))[0]  # one group: the last of its maps
    assert np.array_equal(maps[stem], expected.numpy())
    save_maps(maps, tmp_path / "fms")
    read = load_maps(tmp_path / "fms")
    assert read.keys() == maps.keys() and all(np.array_equal(read[name], maps[name]) for name in maps)
    with pytest.raises(InputError, match="holds no feature maps"):
        load_maps(tmp_path)


def test_redundant_filters_cluster_and_different_ones_do_not(tmp_path):
    rng = np.random.default_rng(0)
    kinds = rng.standard_normal((3, 6, 6, 6))
    near = np.concatenate([kind + 0.01 * rng.standard_normal((4, 6, 6, 6)) for kind in kinds])
    far = rng.standard_normal((12, 6, 6, 6))
    same = np.ones((5, 4, 4))
    rows = clusterability({"near": near, "far": far, "few": far[:3], "same": same})
    found = {row.layer: row for row in rows}
    assert set(found) == {"near", "far", "same"}
    assert found["near"].clusters == 3 and found["near"].silhouette > 0.9
    assert found["near"].redundant == pytest.approx(1 - 3 / 12)
    assert found["far"].redundant == 0 and found["far"].silhouette < 0.25
    assert found["near"].hopkins > 0.8 > found["far"].hopkins
    assert found["same"].redundant == 0
    assert rows == clusterability({"near": near, "far": far, "few": far[:3], "same": same})
    write_clusterability(rows, tmp_path / "clusters.csv")
    with (tmp_path / "clusters.csv").open() as stream:
        assert [row["layer"] for row in csv.DictReader(stream)] == ["near", "far", "same"]


def test_picture_shows_every_map(tmp_path):
    maps = np.zeros((10, 8, 8, 4), dtype=np.float32)
    maps[:, 2:6, 2:6] = 1
    draw_maps(maps, tmp_path / "maps.png", title="last layer")
    picture = imread(tmp_path / "maps.png")[..., :3]
    draw_maps(maps[:, :, :, 0], tmp_path / "flat.png", title="last layer")
    assert np.array_equal(picture, imread(tmp_path / "flat.png")[..., :3])  # the middle slice
    assert picture.std() > 0.1


def test_one_channel_networks_are_no_obstacle():
    network = nn.Sequential(nn.Conv2d(1, 1, 3, padding=1), nn.ReLU(), nn.Conv2d(1, 2, 1)).eval()
    assert feature_maps(network, torch.randn(1, 1, 8, 8))["0"].shape == (1, 8, 8)
