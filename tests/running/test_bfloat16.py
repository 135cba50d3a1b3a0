"""Where bfloat16 may be computed: which networks, on which processors."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from nnslim.errors import BackendError
from nnslim.running import machine
from nnslim.running.bfloat16 import bfloat16_is_safe, has_fast_bfloat16, passes_in_bfloat16
from nnslim.running.engine import Settings, check_precision, make_engine, with_fallback

CPUINFO = (
    "processor : 0\nmodel name\t: Some CPU @ 2 GHz\nflags\t\t: fpu avx2 {}\n\nprocessor : 1\nmodel name\t: Some CPU\n"
)


@pytest.mark.parametrize(
    ("kind", "shape", "safe"),
    [
        ("plain3d", (1, 1, 16, 16, 16), True),
        ("plain3d", (2, 1, 16, 16, 4), False),  # halved twice: 4 -> 2 -> 1, the last time by a stride of 2
        ("plain3d", (1, 1, 4, 16, 16), True),  # one voxel high is not one voxel wide
        ("residual3d", (1, 1, 16, 16, 4), False),
        ("anisotropic", (1, 1, 4, 16, 16), True),
        ("anisotropic", (1, 1, 4, 16, 4), False),
        ("plain2d", (1, 1, 16, 4), True),  # the fault is one of 3D convolutions
    ],
)
@pytest.mark.parametrize("training", [False, True])
def test_network_is_safe_where_no_strided_convolution_ends_one_voxel_wide(tiny_net, kind, shape, safe, training):
    network = tiny_net(kind, deep_supervision=training).train(training)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    assert bfloat16_is_safe(network, shape) is safe
    assert network.training is training
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


@pytest.mark.parametrize(
    ("layer", "safe"),
    [
        (nn.Conv3d(1, 1, 3, stride=(1, 1, 3), padding=1), False),
        (nn.Conv3d(1, 1, 3, stride=(3, 3, 1), padding=(1, 1, 0)), True),  # width 3 -> 1 without a stride
        (nn.Conv3d(1, 1, 1, stride=(1, 1, 2)), True),  # width 3 -> 2
        (nn.ConvTranspose3d(1, 1, (1, 1, 2), stride=(1, 1, 2), padding=(0, 0, 1)), True),  # transposed: not affected
    ],
)
def test_single_layers(layer, safe):
    assert bfloat16_is_safe(layer, (1, 1, 3, 3, 3)) is safe


def test_called_without_a_layer_and_paths_that_depend_on_values():
    class Bare(nn.Module):
        def forward(self, x):
            return nn.functional.conv3d(x, x.new_ones(1, 1, 3, 3, 3), stride=2)

    class Depends(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    assert not bfloat16_is_safe(Bare(), (1, 1, 3, 3, 3))
    assert bfloat16_is_safe(Bare(), (1, 1, 5, 5, 5))
    assert not bfloat16_is_safe(Depends(), (1, 1, 3, 3, 3)), "what cannot be followed is not safe"


@pytest.mark.parametrize(("flags", "fast"), [("avx512f", False), ("avx512_bf16", True), ("amx_tile amx_bf16", True)])
def test_processor_is_read_from_the_system(tmp_path, monkeypatch, flags, fast):
    (tmp_path / "cpuinfo").write_text(CPUINFO.format(flags))
    monkeypatch.setattr(machine, "CPU_INFO", tmp_path / "cpuinfo")
    assert has_fast_bfloat16() is fast
    assert machine.cpu_name() == "Some CPU @ 2 GHz"
    assert "avx2" in machine.cpu_flags() and "fpu" in machine.cpu_flags()
    monkeypatch.setattr(machine, "CPU_INFO", tmp_path / "none")
    assert not has_fast_bfloat16() and machine.cpu_name() != ""


# --- precisions that are asked for ---------------------------------------------------------------------------------


@pytest.fixture
def able(monkeypatch):
    """Say what OpenVINO finds the processor able to compute in."""
    pytest.importorskip("openvino")

    def say(*names: str) -> None:
        class Core:
            def get_property(self, device: str, name: str) -> list[str]:
                return list(names)

        monkeypatch.setattr("openvino.Core", Core)

    return say


def test_precision_that_the_processor_lacks_is_refused_with_what_it_has(tiny_net, able):
    network, shape = tiny_net("plain3d"), (1, 1, 16, 16, 16)
    able("FP32", "INT8")
    for precision in ("bf16", "f16"):
        with pytest.raises(BackendError, match=f"{precision} is not available: this processor computes in FP32, INT8"):
            check_precision(network, shape, Settings("openvino", precision))
    for backend in ("eager", "stock", "compile"):
        with pytest.raises(BackendError, match=f"precision bf16 needs the openvino backend, found {backend}"):
            make_engine(network, shape, Settings(backend, "bf16"))
    check_precision(network, shape, Settings("eager", "f32"))
    check_precision(network, shape, Settings("auto", "int8"))


def test_bf16_is_refused_where_a_convolution_would_go_wrong(tiny_net, able):
    network = tiny_net("plain3d")
    able("FP32", "BF16", "FP16")
    check_precision(network, (1, 1, 16, 16, 16), Settings("openvino", "bf16"))
    check_precision(network, (1, 1, 16, 16, 4), Settings("openvino", "f16"))
    for run in (check_precision, make_engine, with_fallback):
        with pytest.raises(BackendError, match=r"bf16 is refused for the patch \(16, 16, 4\).*--precision f32"):
            run(network, (1, 1, 16, 16, 4), Settings("openvino", "bf16"))


@pytest.mark.parametrize("wanted", [True, False])
def test_passes_are_in_bfloat16_inside_the_block_alone(tiny_net, wanted):
    network = tiny_net("plain3d", deep_supervision=True).train()
    x = torch.randn(1, 1, 16, 16, 16)
    whole = [output.detach() for output in network(x)]
    with pytest.raises(KeyError), passes_in_bfloat16(network, wanted):
        inside = network(x)
        raise KeyError
    for found, exact in zip(inside, whole, strict=True):
        assert found.dtype == torch.float32 and found.requires_grad
        assert torch.equal(found, exact) is not wanted
        assert (found - exact).norm() < 0.05 * exact.norm()
    for after in (network, copy.deepcopy(network)):
        assert "forward" not in vars(after)
        assert all(torch.equal(found, exact) for found, exact in zip(after(x), whole, strict=True))
