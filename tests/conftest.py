"""Tiny networks and folders that the tests share."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from dynamic_network_architectures.architectures.unet import PlainConvUNet, ResidualEncoderUNet
from torch import nn

REPOSITORY = Path(__file__).resolve().parents[1]
# kind: (class, spatial axes, kernel size of each stage, stride of each stage, patch in voxels)
_KINDS = {
    "plain3d": (PlainConvUNet, 3, [3, 3, 3], [1, 2, 2], (16, 16, 16)),
    "plain2d": (PlainConvUNet, 2, [3, 3, 3], [1, 2, 2], (16, 16)),
    "residual3d": (ResidualEncoderUNet, 3, [3, 3, 3], [1, 2, 2], (16, 16, 16)),
    "anisotropic": (
        PlainConvUNet,
        3,
        [(1, 3, 3), (1, 3, 3), (3, 3, 3)],
        [(1, 1, 1), (1, 2, 2), (2, 2, 2)],
        (4, 16, 16),
    ),
}
_CONV = {2: nn.Conv2d, 3: nn.Conv3d}
_NORM = {2: nn.InstanceNorm2d, 3: nn.InstanceNorm3d}


def _tiny_net(
    kind: str,
    deep_supervision: bool = False,
    *,
    channels: int = 1,
    classes: int = 3,
    features: tuple[int, ...] = (6, 8, 12),
    seed: int = 0,
) -> nn.Module:
    maker, axes, kernels, strides, _ = _KINDS[kind]
    depth = "n_blocks_per_stage" if maker is ResidualEncoderUNet else "n_conv_per_stage"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = maker(
            input_channels=channels,
            n_stages=len(features),
            features_per_stage=list(features),
            conv_op=_CONV[axes],
            kernel_sizes=kernels,
            strides=strides,
            num_classes=classes,
            n_conv_per_stage_decoder=1,
            conv_bias=True,
            norm_op=_NORM[axes],
            norm_op_kwargs={"eps": 1e-5, "affine": True},
            nonlin=nn.LeakyReLU,
            nonlin_kwargs={"inplace": True},
            deep_supervision=deep_supervision,
            **{depth: [1, 2, 1]},
        )
        for module in network.modules():  # trained norms are not ones and zeros
            if isinstance(module, _NORM[axes]):
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.uniform_(module.bias, -0.2, 0.2)
    return network.eval()


@pytest.fixture(scope="session")
def tiny_net() -> Callable[..., nn.Module]:
    """Factory: tiny_net(kind, deep_supervision=False, channels=1, classes=3, features=(6, 8, 12), seed=0), eval mode.

    Kinds: plain3d, plain2d, residual3d (skip projections without bias), anisotropic (kernels 1x3x3, strides 1x2x2).
    """
    return _tiny_net


@pytest.fixture(scope="session")
def tiny_shape() -> Callable[..., tuple[int, ...]]:
    """Factory: tiny_shape(kind, channels=1) gives (1, channels, *patch), voxels."""
    return lambda kind, channels=1: (1, channels, *_KINDS[kind][4])


@pytest.fixture(scope="session")
def data_root() -> Path:
    """Folder of the test data: NNSLIM_DATA, else `shared` beside the repository."""
    root = Path(os.environ.get("NNSLIM_DATA") or REPOSITORY.parent / "shared")
    if not (root / "data" / "Dataset004_Hippocampus").is_dir():
        pytest.skip(f"no data/Dataset004_Hippocampus in {root}; set NNSLIM_DATA to the folder that holds data/")
    return root


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    """Tiny tensors: a second thread only costs time, above all on a busy machine."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory):
    """Keep every test, and every process that a test starts, away from the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NNSLIM_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield
