"""The compiled kernels: which are built, which are taken, and what they compute."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch
from helpers import ROOT

import hatch_build
from nnslim.running import native

needs_compiler = pytest.mark.skipif(hatch_build.compiler() is None, reason="no C compiler on this machine")


@needs_compiler
def test_kernels_are_there_where_there_was_a_compiler(monkeypatch):
    native.kernels.cache_clear()
    try:
        assert native.kernels().path == native.libraries()[0], "install nnslim again, or run python hatch_build.py"
        native.kernels.cache_clear()
        monkeypatch.setenv("NNSLIM_NATIVE", "0")
        assert native.kernels() is None
    finally:
        native.kernels.cache_clear()


@needs_compiler
def test_kernels_of_the_features_that_a_processor_has_are_taken_the_best_first(tmp_path, monkeypatch):
    for name in ("avx2+fma.so", "avx2+fma.threads.so", "avx2+fma+avx512f.so", "any.so", "neon.so"):
        (tmp_path / name).write_bytes(b"no library")
    monkeypatch.setattr(native, "_COMPILED", tmp_path)
    monkeypatch.setattr(native, "cpu_flags", lambda: {"avx2", "fma", "sse2"})
    assert [path.name for path in native.libraries()] == ["avx2+fma.threads.so", "avx2+fma.so", "any.so"]
    monkeypatch.setattr(native, "cpu_flags", lambda: {"avx2", "fma", "avx512f"})
    assert native.libraries()[0].name == "avx2+fma+avx512f.so"
    native.kernels.cache_clear()
    try:
        assert native.kernels() is None, "files that are no libraries are passed over"
    finally:
        native.kernels.cache_clear()


@needs_compiler
@pytest.mark.parametrize("path", native.libraries(), ids=lambda path: path.name)
@pytest.mark.parametrize("rows", [1, 63, 64, 1000, 20011])
@pytest.mark.parametrize("channels", [8, 24])
def test_native_moments_and_pass_equal_numpys(rows, channels, path, monkeypatch):
    kernels = native.Kernels(path)
    assert kernels.threaded == (".threads" in path.name)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    rng = np.random.default_rng(rows)
    z = (rng.standard_normal((rows, channels)) + 100).astype("f")  # a mean of a hundred deviations
    mean, covariance = kernels.moments(torch.from_numpy(z), full=True)
    exact = z.astype("d")
    np.testing.assert_allclose(mean, exact.mean(0), rtol=1e-7)
    np.testing.assert_allclose(covariance, np.cov(exact.T, bias=True), atol=2e-5)
    mean, variance = kernels.moments(torch.from_numpy(z), full=False)
    np.testing.assert_allclose(variance, exact.var(0), atol=2e-5)
    w, shift = rng.standard_normal((channels, 16)).astype("f"), rng.standard_normal(16).astype("f")
    products = []
    for width in (8, 25):
        room = ((0, 0), (0, -width % 8))
        v, c = rng.standard_normal((16, width)).astype("f"), rng.standard_normal((1, width)).astype("f")
        padded = torch.from_numpy(np.pad(v, room)), torch.from_numpy(np.pad(c, room)[0])
        products.append((*padded, torch.full((rows, width), float("nan")), v, c))
    keep = torch.full((rows, 16), float("nan"))
    tensors = [torch.from_numpy(a) for a in (z - 100, w, shift)]
    kernels.norm_pass(tensors[0], tensors[1], torch.ones(16), tensors[2], 0.1, [p[:3] for p in products], keep)
    y = (exact - 100) @ w + shift
    y = np.where(y > 0, y, 0.1 * y)
    np.testing.assert_allclose(keep, y, rtol=1e-4, atol=1e-4)
    for _, _, out, v, c in products:
        np.testing.assert_allclose(out, y @ v + c, rtol=1e-4, atol=2e-4)


@needs_compiler
def test_build_where_the_compiler_knows_less_makes_what_it_can(tmp_path, monkeypatch):
    """Apple's clang has no OpenMP, and old compilers lack features; what an earlier version left is removed."""
    for source in hatch_build.SOURCES:
        (tmp_path / source).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / source, tmp_path / source)
    (tmp_path / hatch_build.FOLDER).mkdir()
    (tmp_path / hatch_build.FOLDER / "old.so").write_bytes(b"")
    (tmp_path / "cc").write_text(
        f'#!/bin/sh\ncase "$*" in *-fopenmp*) exit 1;; esac\nexec {hatch_build.compiler()} "$@"\n'
    )
    (tmp_path / "cc").chmod(0o755)
    monkeypatch.setenv("CC", str(tmp_path / "cc"))
    made = hatch_build.build(tmp_path)
    assert made and not any(".threads" in path.name for path in made)
    assert sorted((tmp_path / hatch_build.FOLDER).iterdir()) == sorted(made)
    usable = {path.name for path in native.libraries()}
    (best,) = [native.Kernels(path) for path in made if path.name in usable][-1:]
    assert best.moments(torch.ones(9, 8), full=False)[0].tolist() == [1.0] * 8
    monkeypatch.setattr(hatch_build, "compiler", lambda: None)
    assert hatch_build.build(tmp_path) == [] and not list((tmp_path / hatch_build.FOLDER).iterdir())


@needs_compiler
@pytest.mark.parametrize("path", native.libraries(), ids=lambda path: path.name)
@pytest.mark.parametrize(
    ("inputs", "outputs", "kernel", "size"),
    [
        (8, 8, (3, 3, 3), (5, 7, 30)),
        (16, 8, (3, 3, 3), (4, 5, 128)),
        (5, 16, (1, 3, 5), (3, 9, 33)),
        (24, 8, (5, 3, 3), (6, 5, 47)),
        (8, 8, (3, 3, 3), (3, 3, 7)),
    ],
)
def test_native_convolution_equals_torchs_on_lines_of_any_length(inputs, outputs, kernel, size, path, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    generator = torch.Generator().manual_seed(0)
    x, bias = (torch.randn(*shape, generator=generator) for shape in ((*size, inputs), (outputs,)))
    weight = torch.randn(*kernel, inputs, outputs, generator=generator)
    out = torch.full((*size, outputs), float("nan"))
    native.Kernels(path).conv(x, weight, bias, out)
    moved = x.double().movedim(-1, 0)[None], weight.double().permute(4, 3, 0, 1, 2), bias.double()
    wanted = torch.nn.functional.conv3d(*moved, padding=[edge // 2 for edge in kernel])[0].movedim(0, -1)
    assert float((out - wanted).abs().max()) < 2e-6 * float(wanted.abs().max())
