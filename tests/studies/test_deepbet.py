"""deepbet's network rebuilt as a module tree gives what the wheel's TorchScript gives."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest
import torch

from nnslim.network.cost import measure_cost
from studies.deepbet import (
    BOX_SHAPE,
    NETWORKS,
    LinkNet,
    brain_box,
    load_deepbet,
    load_torchscript,
    prepare,
    read_t1,
)

WHEEL_SHA256 = "1999e2ea00ec48f6233b95b96f3901a962d3f70431c63aeb985e8a49a198473c"


@pytest.fixture(scope="module")
def wheel():
    path = Path(os.environ.get("NNSLIM_DEEPBET", ""))
    if not path.is_file():
        pytest.skip("NNSLIM_DEEPBET does not name deepbet's wheel (pip download deepbet==1.0.2 --no-deps)")
    if hashlib.sha256(path.read_bytes()).hexdigest() != WHEEL_SHA256:
        pytest.skip(f"{path.name} is not the deepbet 1.0.2 wheel that this test knows")
    return path


@pytest.fixture(scope="module")
def t1():
    nilearn = pytest.importorskip("nilearn", reason="nilearn, whose package holds the T1, is not installed")
    path = Path(nilearn.__file__).parent / "datasets" / "data" / "mni_icbm152_t1_tal_nlin_sym_09a_converted.nii.gz"
    if not path.is_file():
        pytest.skip(f"this nilearn has no {path.name}")
    return read_t1(path)


def test_linknet_keeps_the_size_and_its_last_layer_is_the_head():
    network = LinkNet().eval()
    with torch.no_grad():
        assert network(torch.randn(1, 1, 32, 64, 32)).shape == (1, 2, 32, 64, 32)
    assert measure_cost(network, (1, 1, 32, 32, 64)).heads == ("tp_conv2",)


def test_brain_box_takes_the_largest_component_with_a_margin():
    probability = torch.zeros(32, 32, 32)
    probability[8:16, 8:24, 4:24] = 1
    probability[28, 28, 28] = 1
    assert brain_box(probability, (64, 32, 32), margin=0.25) == (slice(12, 36), slice(4, 28), slice(0, 29))


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
def test_rebuilt_network_equals_torchscript_on_a_t1(wheel, t1, name):
    inputs = prepare(t1)
    with torch.no_grad():
        expected, actual = load_torchscript(wheel, name)(inputs), load_deepbet(wheel, name)(inputs).softmax(1)
    assert actual.shape == (1, 2, *BOX_SHAPE)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_bbox_network_finds_a_brain(wheel, t1):
    with torch.no_grad():
        probability = load_deepbet(wheel)(prepare(t1)).softmax(1)[0, 1]
    litres = float((probability > 0.5).float().mean()) * t1.numel() / 1e6  # the T1 is at 1 mm
    assert 1.2 < litres < 2.2
    box = brain_box(probability, t1.shape)
    assert all(0.5 < (part.stop - part.start) / size <= 1 for part, size in zip(box, t1.shape, strict=True))
