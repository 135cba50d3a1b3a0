"""Pictures, speed and dataset conversions of the token-sparse method."""

from __future__ import annotations

import json

import nibabel as nib
import numpy as np
import pytest
import torch

from nnslim.errors import ConfigError, InputError
from nnslim.methods.token_sparse.unetr import TokenSparseUNETR
from studies.public_datasets import convert_brats, convert_btcv
from studies.token_pictures import class_sparsity, depth_map, draw_depth
from studies.token_speed import alternate, rows


def tiny(**changes):
    torch.manual_seed(0)
    settings = {"dim": 24, "depth": 9, "heads": 2, "features": 4, "decoder": "x8", "locations": (2, 4), "ratios": 0.5}
    return TokenSparseUNETR(1, 3, (32, 32, 32), **{**settings, **changes}).eval()


def test_depth_map_counts_the_stages_that_tokens_live_through(tmp_path):
    depth = depth_map(tiny(), torch.randn(2, 1, 32, 32, 32))
    assert depth.shape == (2, 4, 4, 4)
    assert [np.bincount(each.ravel()).tolist() for each in depth] == [[32, 16, 16]] * 2
    draw_depth(np.zeros((32, 32, 32)), depth[0], tmp_path / "depth.png")
    assert (tmp_path / "depth.png").read_bytes()[:4] == b"\x89PNG"
    with pytest.raises(ConfigError, match="drops tokens"):
        depth_map(tiny(ratios=0.0), torch.randn(1, 1, 32, 32, 32))


def test_class_sparsity_counts_voxels_and_cubes():
    label = np.zeros((16, 16, 17), np.uint8)
    label[0, 0, 0], label[8:, 8:, 8:16] = 1, 2
    found = {row["name"]: row for row in class_sparsity([label, label], {1: "one", 2: "two"})}
    assert found["one"]["percent_of_tokens"] == 12.5 == found["two"]["percent_of_tokens"]
    assert found["any foreground"]["percent_of_tokens"] == 25.0
    assert found["two"]["percent_of_voxels"] == pytest.approx(100 * 512 / label.size, abs=1e-3)


def test_speed_rows_hold_macs_samples_and_every_stage():
    networks = {"dense": tiny(ratios=0.0), "sparse": tiny()}
    table = rows(alternate(networks, torch.randn(2, 1, 32, 32, 32), 2), "eager")
    dense, sparse = table
    assert dense["gain_wall"] == dense["gain_cpu"] == 1.0
    assert sparse["gmacs"] < dense["gmacs"] and dense["gmacs"] < dense["gmacs_torchprofile"]
    assert dense["samples_per_second"] == pytest.approx(2 / dense["wall_seconds"], rel=0.1)  # samples, not batches
    assert dense["cpu_scorer"] == dense["cpu_top-k"] == dense["cpu_completion"] == 0
    assert {"cpu_embed", "cpu_blocks", "cpu_scorer", "cpu_top-k", "cpu_completion", "cpu_decoder"} <= set(sparse)


def save(path, values):
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(values, np.diag([1.5, 1.5, 2.0, 1.0])), path)


def test_btcv_becomes_an_nnunet_dataset_with_transunets_split(tmp_path):
    for number in (*range(1, 11), *range(21, 41)):
        save(tmp_path / "in" / "img" / f"img{number:04d}.nii.gz", np.full((4, 5, 6), number, np.int16))
        save(tmp_path / "in" / "label" / f"label{number:04d}.nii.gz", np.full((4, 5, 6), number % 14, np.uint8))
    convert_btcv(tmp_path / "in", tmp_path / "out")
    (fold,) = json.loads((tmp_path / "out" / "splits_final.json").read_text())
    assert (len(fold["train"]), len(fold["val"])) == (18, 12)
    assert fold["val"][:5] == ["btcv_0001", "btcv_0002", "btcv_0003", "btcv_0004", "btcv_0008"]
    described = json.loads((tmp_path / "out" / "dataset.json").read_text())
    assert len(described["labels"]) == 14 and described["labels"]["pancreas"] == 11 and described["numTraining"] == 30
    for name in fold["train"] + fold["val"]:
        image = nib.load(tmp_path / "out" / "imagesTr" / f"{name}_0000.nii.gz")
        label = nib.load(tmp_path / "out" / "labelsTr" / f"{name}.nii.gz")
        assert np.asarray(image.dataobj)[0, 0, 0] % 14 == np.asarray(label.dataobj)[0, 0, 0]
        assert np.allclose(image.affine, label.affine)


def test_brats_becomes_an_nnunet_dataset_with_regions(tmp_path):
    for number in range(1, 11):
        values = np.stack([np.full((4, 5, 6), 10 * number + channel, np.int16) for channel in range(4)], axis=-1)
        save(tmp_path / "in" / "imagesTr" / f"BRATS_{number:03d}.nii.gz", values)
        save(tmp_path / "in" / "labelsTr" / f"BRATS_{number:03d}.nii.gz", np.full((4, 5, 6), number % 4, np.uint8))
    convert_brats(tmp_path / "in", tmp_path / "out")
    described = json.loads((tmp_path / "out" / "dataset.json").read_text())
    assert described["labels"]["enhancing_tumor"] == 3 and described["regions_class_order"] == [1, 2, 3]
    for channel in range(4):
        part = nib.load(tmp_path / "out" / "imagesTr" / f"BRATS_007_{channel:04d}.nii.gz")
        assert part.shape == (4, 5, 6) and np.asarray(part.dataobj)[0, 0, 0] == 70 + channel
        assert np.allclose(part.affine, np.diag([1.5, 1.5, 2.0, 1.0]))
    folds = json.loads((tmp_path / "out" / "splits_final.json").read_text())
    assert sorted(name for fold in folds for name in fold["val"]) == [f"BRATS_{n:03d}" for n in range(1, 11)]
    assert all(not set(fold["train"]) & set(fold["val"]) for fold in folds)
    from nnunetv2.utilities.label_handling.label_handling import LabelManager

    manager = LabelManager(described["labels"], described["regions_class_order"])
    assert manager.has_regions and manager.num_segmentation_heads == 3


def test_dataset_faults_are_named_and_leave_nothing(tmp_path):
    with pytest.raises(InputError, match="RawData/Training"):
        convert_btcv(tmp_path, tmp_path / "out")
    save(tmp_path / "in" / "img" / "img0001.nii.gz", np.zeros((4, 5, 6), np.int16))
    with pytest.raises(InputError, match=r"label0001.nii.gz is missing"):
        convert_btcv(tmp_path / "in", tmp_path / "out")
    save(tmp_path / "in" / "label" / "label0001.nii.gz", np.full((4, 5, 6), 14, np.uint8))
    with pytest.raises(InputError, match=r"expected 0..13"):
        convert_btcv(tmp_path / "in", tmp_path / "out")
    save(tmp_path / "in" / "label" / "label0001.nii.gz", np.zeros((4, 5, 7), np.uint8))
    with pytest.raises(InputError, match="is a grid of"):
        convert_btcv(tmp_path / "in", tmp_path / "out")
    save(tmp_path / "b" / "imagesTr" / "BRATS_001.nii.gz", np.zeros((4, 5, 6), np.int16))
    with pytest.raises(InputError, match=r"expected \(X, Y, Z, 4\)"):
        convert_brats(tmp_path / "b", tmp_path / "out")
    assert not (tmp_path / "out").exists()
