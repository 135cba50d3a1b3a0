"""The CUDA side, as far as a machine without a GPU can test it, and the rest where there is one.

Triton's kernels run in its interpreter, and are compiled for GPUs that are not there. The forms of a graph run on the
CPU, in single precision and under autocast.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from nnslim.errors import BackendError
from nnslim.running import select
from nnslim.running.cuda import Graphed, variants
from nnslim.running.engine import Settings, check_precision, make_engine, rewritten
from nnslim.running.norm_pass import NormPass
from nnslim.running.runner import Runner
from nnslim.work.compress import compress
from nnslim.work.config import tucker

ROOT = Path(__file__).resolve().parents[1]
SHAPES = {"plain3d": (1, 1, 16, 16, 16), "anisotropic": (1, 1, 4, 16, 16), "plain2d": (2, 1, 16, 16)}
CUDA = torch.device("cuda")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


def slim_net(tiny_net, kind: str) -> nn.Module:
    dense = tiny_net(kind, features=(8, 16, 24))
    config = tucker(rank_factor=0.5, rank_min=4, transposed=True)
    return compress(dense, [dense.state_dict()], config, SHAPES[kind]).network.eval()


def run_triton(code: str, **environment: str) -> str:
    pytest.importorskip("triton")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        capture_output=True,
        text=True,
        timeout=600,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


_INTERPRETED = """
import torch
from torch import nn
from nnslim.running.norm_pass import NormPass
from nnslim.running.triton_pass import fits, moments, product
torch.manual_seed(0)
assert fits(64, [128, 3]) and not fits(65, [8]) and not fits(8, [8, 129])
for rows, narrow, wide, out in [(1000, 16, 40, 24), (65, 20, 33, 7), (1, 5, 8, 3)]:
    for kind, close in ((torch.float32, 2e-6), (torch.float16, 2e-3)):
        z = (torch.randn(rows, narrow) @ torch.randn(narrow, narrow) + 3 * torch.randn(narrow)).to(kind)
        mean, square = moments(z)
        exact = z.double()
        torch.testing.assert_close(mean, exact.mean(0), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(square, torch.cov(exact.T, correction=0), rtol=1e-4, atol=1e-4)
        assert torch.equal(moments(z)[1], square), "the same numbers each time"
        weight, shift = torch.randn(narrow, wide), torch.randn(wide)
        v, bias = torch.randn(wide, out), torch.randn(out)
        made = torch.empty(rows, out, dtype=kind)
        for added in (bias, None):
            product(z, weight, shift, 0.01, v, added, made)
            y = nn.functional.leaky_relu(exact @ weight.double() + shift.double(), 0.01) @ v.double()
            y = y if added is None else y + added.double()
            assert (made.double() - y).norm() <= close * y.norm()
NormPass._fits = lambda self, z: None
NormPass._fits_gpu = lambda self, z: True  # the interpreter takes tensors on the CPU
for keep in (False, True):
    before, norm = nn.Conv3d(12, 24, 1), nn.InstanceNorm3d(24, affine=True)
    nn.init.uniform_(norm.weight, 0.5, 1.5), nn.init.uniform_(norm.bias, -0.2, 0.2)
    after = [nn.Conv3d(24, 8, 1), nn.Conv3d(24, 5, 1, bias=False)]
    fused = NormPass(before, norm, 0.01, after, keep=keep)
    z = torch.randn(2, 12, 5, 6, 7)
    with torch.no_grad():
        y = nn.functional.leaky_relu(norm(before(z)), 0.01)
        wanted = [conv(y) for conv in after] + [y] * keep
        for kind, close in ((torch.float32, 1e-4), (torch.float16, 2e-2)):
            found = fused(z.to(kind))
            assert len(found) == len(wanted) and all(one.dtype == kind for one in found)
            for one, other in zip(found, wanted):
                torch.testing.assert_close(one.float(), other, rtol=close, atol=close)
print("done")
"""


def test_triton_kernels_in_the_interpreter_equal_double_precision():
    assert run_triton(_INTERPRETED, TRITON_INTERPRET="1").strip() == "done"


_COMPILED = """
import sys, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from nnslim.running.triton_kernels import moments_kernel, product_kernel
target = GPUTarget("cuda", int(sys.argv[1]), 32)
for kind in sys.argv[2].split(","):
    data = {name: "*" + kind for name in ("z", "weight", "v", "out")}
    rest = {name: "*fp32" for name in ("pivot", "sums", "squares", "shift", "bias")} | {"rows": "i32", "each": "i32"}
    known = {**data, **rest, "slope": "fp32"}
    for kernel, sizes in (
        (moments_kernel, {"C": 16, "CP": 16, "BLOCK": 64}),
        (product_kernel, {"R": 16, "C": 40, "K": 24, "RP": 16, "KP": 32, "CB": 32, "BLOCK": 64}),
    ):
        signature = {name: known.get(name, "constexpr") for name in kernel.arg_names}
        made = triton.compile(ASTSource(kernel, signature, sizes), target=target)
        assert len(made.asm["cubin"]) > 1000
        print(kind, "mma" in made.asm["ptx"])
"""


@pytest.mark.parametrize(
    ("capability", "kinds"),
    [
        ("80", "fp16"),
        *(
            pytest.param(one, kinds, marks=pytest.mark.slow)
            for one, kinds in (("75", "fp16,fp32"), ("80", "bf16,fp32"), ("90", "fp16,bf16"), ("120", "fp16,bf16"))
        ),
    ],
)
def test_triton_kernels_compile_for_gpus_that_are_not_here(tmp_path, capability, kinds):
    code = f"import sys; sys.argv[1:] = [{capability!r}, {kinds!r}]\n{_COMPILED}"
    lines = run_triton(code, TRITON_CACHE_DIR=str(tmp_path), TRITON_DEFAULT_FP_FUSION="1").split("\n")[:-1]
    assert len(lines) == 2 * len(kinds.split(","))
    if capability == "80":
        assert "fp16 True" in lines or "bf16 True" in lines, "16 bits are multiplied by the tensor cores"


# --- forms of a graph ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", list(SHAPES))
@torch.no_grad()
def test_all_forms_of_a_graph_compute_the_same(tiny_net, kind):
    network, x = slim_net(tiny_net, kind), torch.randn(SHAPES[kind])
    forms = variants(rewritten(network, SHAPES[kind]))
    assert list(forms) == ["plain", "channels last", "folded"]
    assert any(isinstance(module, NormPass) for module in forms["folded"].modules())
    assert not any(isinstance(module, NormPass) for module in forms["plain"].modules())
    wanted = network(x)
    for name, form in forms.items():
        torch.testing.assert_close(form(x), wanted, rtol=1e-4, atol=1e-4 * float(wanted.std()), msg=name)
        with torch.autocast("cpu", torch.bfloat16):  # types that do not fit each other are an error here, too
            found = form(x)
        assert found.dtype == torch.bfloat16 and (found.float() - wanted).norm() < 0.05 * wanted.norm(), name


@torch.no_grad()
def test_statistics_in_sixteen_bits_are_summed_in_more(tiny_net):
    """65504 is the largest number of float16: sums over a volume are beyond it."""
    norm = nn.InstanceNorm2d(1)
    z = (torch.randn(1, 1, 300, 300) + 5).half()
    (found,) = NormPass(None, norm, 1.0, [], keep=True)(z)
    wanted = norm(z.float())
    assert (found.float() - wanted).abs().max() < 0.02


@torch.no_grad()
def test_recorded_pass_on_a_cpu_is_the_network(tiny_net):
    network, x = tiny_net("plain3d"), torch.randn(SHAPES["plain3d"])
    recorded = Graphed(network)
    assert torch.equal(recorded(x), network(x)) and recorded._graph is None


@pytest.mark.slow
@torch.no_grad()
def test_compiled_graph_equals_the_network(tiny_net):
    """torch.compile with the CPU's inductor, of the same graph that is compiled on CUDA."""
    network, x = slim_net(tiny_net, "plain3d"), torch.randn(SHAPES["plain3d"])
    compiled = make_engine(network, tuple(x.shape), Settings("compile"))
    torch.testing.assert_close(compiled(x), network(x), rtol=1e-4, atol=1e-5)


# --- precision ----------------------------------------------------------------------------------------------------


def test_precisions_on_cuda(tiny_net, monkeypatch):
    network, shape = tiny_net("plain3d"), SHAPES["plain3d"]
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "Some GPU")
    for able in (True, False):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True, able=able: able)
        check_precision(network, shape, Settings("eager", "f16"), CUDA)
        if able:
            check_precision(network, (1, 1, 16, 16, 4), Settings("auto", "bf16"), CUDA)  # a fault of CPUs alone
        else:
            with pytest.raises(BackendError, match="bf16 is not to be had: Some GPU lacks it"):
                check_precision(network, shape, Settings("auto", "bf16"), CUDA)
    with pytest.raises(BackendError, match="f16 on CUDA needs eager, compile or auto, found stock"):
        check_precision(network, shape, Settings("stock", "f16"), CUDA)
    with pytest.raises(BackendError, match="int8 needs the openvino backend, which runs on the CPU, found cuda"):
        check_precision(network, shape, Settings("auto", "int8"), CUDA)


# --- with a GPU ---------------------------------------------------------------------------------------------------


@needs_gpu
@pytest.mark.parametrize("kind", list(SHAPES))
@pytest.mark.parametrize("precision", ["f32", "bf16"])
@torch.inference_mode()
def test_eager_engine_on_cuda_equals_the_network(tiny_net, kind, precision):
    network, x = slim_net(tiny_net, kind).to(CUDA), torch.randn(SHAPES[kind], device=CUDA)
    engine = make_engine(network, tuple(x.shape), Settings("eager", precision))
    wanted, found = network(x), engine(x)
    assert engine._graph is not None, "recorded"
    assert (found.float() - wanted).norm() < 0.05 * wanted.norm()
    again = engine(2 * x)
    assert not torch.equal(again, found) and (engine(x) - found).abs().max() == 0, "outputs are the caller's own"
    wider = torch.randn(3, *x.shape[1:], device=CUDA)
    assert (engine(wider).float() - network(wider)).norm() < 0.05 * network(wider).norm()


@needs_gpu
@torch.inference_mode()
def test_triton_pass_on_cuda_equals_torch():
    before, norm, after = nn.Conv3d(16, 64, 1), nn.InstanceNorm3d(64, affine=True), nn.Conv3d(64, 24, 1)
    layer = NormPass(before, norm, 0.01, [after], keep=True).to(CUDA)
    z = torch.randn(2, 16, 24, 24, 24, device=CUDA)
    wide = nn.functional.leaky_relu(norm.to(CUDA)(before.to(CUDA)(z)), 0.01)
    assert layer._fits_gpu(z)
    for kind, close in ((torch.float32, 1e-3), (torch.half, 2e-2)):
        for found, wanted in zip(layer(z.to(kind)), (after.to(CUDA)(wide), wide), strict=True):
            assert (found.float() - wanted).norm() < close * wanted.norm()


@needs_gpu
@torch.inference_mode()
def test_auto_on_cuda_measures_and_gives_the_same(tiny_net, tmp_path, monkeypatch):
    monkeypatch.setenv("NNSLIM_CACHE", str(tmp_path))
    network, x = slim_net(tiny_net, "plain3d").to(CUDA), torch.randn(SHAPES["plain3d"], device=CUDA)
    engine, name = select.fastest(network, tuple(x.shape), Settings())
    assert name in ("stock", "eager", "compile")
    wanted = network(x)
    assert (select.run(engine, x).float() - wanted).norm() < 0.05 * wanted.norm()
    held = Runner(network, Settings("eager"))
    with torch.autocast("cuda"):
        assert (held(x).float() - wanted).norm() < 0.05 * wanted.norm()
