"""Triton's kernels, in its interpreter and compiled for GPUs that are not there, and how they are left out."""

from __future__ import annotations

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from helpers import ROOT
from torch import nn

from nnslim.running import norm_pass
from nnslim.running.norm_pass import NormPass


def run_triton(code: str, **environment: str) -> str:
    pytest.importorskip("triton", reason="Triton, which comes with torch for CUDA, is not installed")
    return run_alone(code, **environment)


def run_alone(code: str, **environment: str) -> str:
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
        z[0] = 100  # a voxel of the border, far from all others
        mean, square = moments(z)
        exact = z.double()
        torch.testing.assert_close(mean, exact.mean(0), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(square, torch.cov(exact.T, correction=0), rtol=1e-4, atol=1e-4)
        assert torch.equal(moments(z)[1], square), "the same numbers each time"
        z[0] = 1
        exact = z.double()
        weight, shift = torch.randn(narrow, wide), torch.randn(wide)
        v, bias = torch.randn(wide, out), torch.randn(out)
        made = torch.empty(rows, out, dtype=kind)
        for added in (bias, None):
            product(z, weight, shift, 0.01, v, added, made)
            y = nn.functional.leaky_relu(exact @ weight.double() + shift.double(), 0.01) @ v.double()
            y = y if added is None else y + added.double()
            assert (made.double() - y).norm() <= close * y.norm()
NormPass.native_kernels = lambda self, z: None
NormPass.fits_gpu = lambda self, z: True  # the interpreter takes tensors on the CPU
for keep in (False, True):
    before, norm = nn.Conv3d(12, 24, 1), nn.InstanceNorm3d(24, affine=True)
    nn.init.uniform_(norm.weight, 0.5, 1.5), nn.init.uniform_(norm.bias, -0.2, 0.2)
    after = [nn.Conv3d(24, 8, 1), nn.Conv3d(24, 5, 1, bias=False)]
    fused = NormPass(before, norm, 0.01, after, keep=keep)
    z = torch.randn(2, 12, 5, 6, 7)
    with torch.no_grad():
        y = nn.functional.leaky_relu(norm(before(z)), 0.01)
        wanted = [conv(y) for conv in after] + [y] * keep
        for kind, close in ((torch.float32, 1e-5), (torch.float16, 2e-3)):  # it takes bfloat16 for integers
            found = fused(z.to(kind))
            assert len(found) == len(wanted) and all(one.dtype == kind for one in found)
            for one, other in zip(found, wanted):
                assert (one.float() - other).norm() <= close * other.norm(), (keep, kind)
    far = (z + 50).half()  # the mean of a channel is far larger than its deviation
    with torch.no_grad():
        y = nn.functional.leaky_relu(norm(before(far.float())), 0.01)
        off = fused(far)[0].float() - after[0](y)
    assert off.mean((0, 2, 3, 4)).abs().max() < 0.01, "no channel is shifted by its rounded weights"
print("done")
"""


def test_triton_kernels_in_the_interpreter_equal_double_precision():
    assert run_triton(_INTERPRETED, TRITON_INTERPRET="1").strip() == "done"


_COMPILED = """
import sys, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from nnslim.running.triton_pass import moments_kernel, product_kernel
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


_UNTOUCHED = """
import sys, torch
from torch import nn
from nnslim.running.engine import Settings, make_engine
from nnslim.running.timing import run_pass
network = nn.Sequential(nn.Conv3d(1, 8, 1), nn.InstanceNorm3d(8), nn.LeakyReLU(), nn.Conv3d(8, 2, 1)).eval()
run_pass(make_engine(network, (1, 1, 4, 4, 4), Settings("eager")), torch.zeros(1, 1, 4, 4, 4))
print(sorted({name for name in sys.modules if "triton" in name.split(".")[-1] and name.startswith("nnslim")}
             | {"nnslim.running.cuda"} & set(sys.modules)))
"""


def test_nothing_of_cuda_is_imported_on_a_cpu():
    assert run_alone(_UNTOUCHED).strip() == "[]"


def test_without_triton_the_pass_is_torchs(monkeypatch):
    layer = NormPass(nn.Conv3d(16, 32, 1), nn.InstanceNorm3d(32), 0.01, [nn.Conv3d(32, 8, 1)], keep=False)
    z = SimpleNamespace(device=torch.device("cuda"), dtype=torch.half, shape=(1, 16, 4, 4, 4))
    monkeypatch.setattr(norm_pass, "has_triton", lambda: False)
    assert not layer.fits_gpu(z)
    pytest.importorskip("triton")
    monkeypatch.setattr(norm_pass, "has_triton", lambda: True)
    assert layer.fits_gpu(z)
    assert not layer.fits_gpu(SimpleNamespace(device=torch.device("cuda"), dtype=torch.float64, shape=z.shape))
    assert not layer.fits_gpu(SimpleNamespace(device=torch.device("cuda"), dtype=torch.half, shape=(1, 65, 4, 4, 4)))
