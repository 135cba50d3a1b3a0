"""Exported files: the same logits without torch, a description to use them by, nothing left where something failed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from nnslim.compression.config import tucker
from nnslim.errors import BackendError, InputError, ModelError, OutputError
from nnslim.hosts.nnunet.compress.compress_model import compress_model
from nnslim.hosts.nnunet.export import export_model as side
from nnslim.hosts.nnunet.export.export_model import ExportSettings, export_model, read_patch
from nnslim.hosts.nnunet.model.trained_model import build_network, input_shape, read_trained_model

pytest.importorskip("onnxruntime")
pytest.importorskip("openvino")
RUNNERS = {
    ".onnx": "import onnxruntime as o; s = o.InferenceSession(sys.argv[1], providers=['CPUExecutionProvider'])\n"
    "y = s.run(['logits'], {'image': x})[0]",
    ".xml": "import openvino as o\n"
    "m = o.Core().compile_model(sys.argv[1], 'CPU', {'INFERENCE_PRECISION_HINT': 'f32', 'INFERENCE_NUM_THREADS': 1})\n"
    "y = m({'image': x})['logits']",
}


def without_torch(file: Path, image: np.ndarray, folder: Path) -> np.ndarray:
    """Run a file in a process that cannot import torch."""
    np.save(folder / "x.npy", image)
    code = (
        "import sys\nsys.modules['torch'] = None\nimport numpy as np\nx = np.load(sys.argv[2])\n"
        f"{RUNNERS[file.suffix]}\nnp.save(sys.argv[3], y)"
    )
    command = [sys.executable, "-c", code, str(file), str(folder / "x.npy"), str(folder / "y.npy")]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    return np.load(folder / "y.npy")


def exported(folder: Path, file: Path, **settings):
    settings.setdefault("format", "onnx" if file.suffix == ".onnx" else "openvino")
    return export_model(read_trained_model(folder), file, ExportSettings(**settings))


@pytest.fixture
def slim(make_model, tmp_path):
    """A Tucker model folder."""
    target = tmp_path / "slim" / "nnUNetTrainer__nnUNetPlans__3d_fullres"
    compress_model(read_trained_model(make_model()), target, tucker(rank_factor=0.5, rank_min=2))
    return target


@pytest.mark.parametrize("ending", [".onnx", ".xml"])
@pytest.mark.parametrize("kind", ["plain", "2d", "residual", "anisotropic", "slim"])
def test_f32_file_runs_without_torch(make_model, request, tmp_path, kind, ending):
    folder = request.getfixturevalue("slim") if kind == "slim" else make_model(kind)
    done = exported(folder, tmp_path / "out" / f"model{ending}")
    model = read_trained_model(folder)
    x = torch.randn(input_shape(model), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        wanted = build_network(model)(x)
    found = without_torch(tmp_path / "out" / f"model{ending}", x.numpy(), tmp_path)
    assert found.shape == tuple(wanted.shape) and found.dtype == np.float32
    assert float((torch.from_numpy(found) - wanted).abs().max() / wanted.std()) < 1e-4
    assert done.parity.passed and done.parity.same_label == 1
    extra = {".xml": ["model.bin"], ".onnx": []}[ending]
    names = sorted([*extra, f"model{ending}", f"model{ending}.json"])
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == names


@pytest.mark.parametrize("ending", [".onnx", ".xml"])
def test_smaller_precisions_make_smaller_files(slim, case_folder, tmp_path, ending):
    sizes, same = {}, {}
    for precision in ("f32", "f16", "int8"):
        done = exported(slim, tmp_path / f"{precision}{ending}", precision=precision, images=case_folder)
        sizes[precision], same[precision] = done.size, done.parity.same_label
        assert done.parity.passed and str(case_folder) in done.parity.line()
        image = np.random.default_rng(0).standard_normal((1, 1, 16, 16, 16)).astype(np.float32)
        assert np.isfinite(without_torch(tmp_path / f"{precision}{ending}", image, tmp_path)).all()
    assert same["f32"] == 1 and same["f16"] > 0.99 and same["int8"] > 0.9
    assert sizes["f16"] < sizes["f32"]


def test_description_is_enough_to_use_the_file(make_model, case_folder, tmp_path):
    folder = make_model("regions", folds=(0, 1))
    done = exported(folder, tmp_path / "m.onnx", images=case_folder)
    assert done.fold == "0" and "fold 0 of 0, 1" in done.lines()[0]
    content = json.loads((tmp_path / "m.onnx.json").read_text())
    assert content["input"] == {
        "name": "image",
        "shape": [1, 1, 16, 16, 16],
        "dtype": "float32",
        "axes": "batch, channel, then space",
    }
    assert content["output"]["shape"] == [1, 2, 16, 16, 16] and content["activation"] == "sigmoid"
    prepared = content["preprocessing"]
    assert prepared["spacing_mm"] == [1.0] * 3 and prepared["normalization_schemes"] == ["ZScoreNormalization"]
    assert content["labels"] == {"background": 0, "whole": [1, 2], "core": 2}
    assert content["regions_class_order"] == [1, 2] and content["mirror_axes"] == [0, 1, 2]
    assert content["parity"]["passed"] and content["parity"]["allowed"]["same_label"] == 0.9999
    assert content["source"]["checkpoint"] == "checkpoint_final.pth" and not content["source"]["slim"]


def test_other_patch_and_made_up_tile(make_model, tmp_path):
    done = exported(make_model(), tmp_path / "m.onnx", patch=(16, 24, 32))
    assert json.loads((tmp_path / "m.onnx.json").read_text())["input"]["shape"] == [1, 1, 16, 24, 32]
    assert "made-up tile (no images were given)" in done.parity.line()


@pytest.mark.parametrize("ending", [".onnx", ".xml"])
def test_bad_parity_leaves_nothing(make_model, tmp_path, monkeypatch, ending):
    inner = side.run_exported
    monkeypatch.setattr(side, "run_exported", lambda file, image: inner(file, image) * 1.1)
    done = exported(make_model(), tmp_path / "out" / f"m{ending}")
    assert not done.files and "FAILED" in done.lines()[-2] and "nothing was written" in done.lines()[-1]
    assert list((tmp_path / "out").iterdir()) == []


def test_faults_are_named_and_leave_nothing(make_model, case_folder, tmp_path, monkeypatch):
    folder, out = make_model(), tmp_path / "out"
    for file, settings, kind, message in (
        ("m.xml", {"format": "onnx"}, InputError, r"m\.xml should end in \.onnx"),
        ("m.onnx", {"format": "tflite"}, InputError, "format 'tflite' is not known"),
        ("m.onnx", {"precision": "bf16"}, InputError, "precision 'bf16' is not exported"),
        ("m.onnx", {"precision": "int8"}, InputError, "int8 needs images"),
        ("m.onnx", {"patch": (16, 16)}, InputError, "expected 3 sizes in voxels"),
        ("m.onnx", {"patch": (15, 16, 16)}, InputError, "does not take the patch"),
        ("m.onnx", {"images": tmp_path / "none"}, InputError, "does not exist"),
    ):
        with pytest.raises(kind, match=message):
            exported(folder, out / file, **settings)
    with pytest.raises(ModelError, match="second stage of a cascade"):
        exported(make_model("cascade", parent="cascade"), out / "m.onnx", images=case_folder)
    for text in ("16,x", "", "0,16,16"):
        with pytest.raises(InputError, match="expected sizes in voxels"):
            read_patch(text)
    assert not out.exists()
    out.mkdir()
    (out / "m.bin").write_text("mine")
    with pytest.raises(OutputError, match=r"m\.bin exists and is not overwritten"):
        exported(folder, out / "m.xml")
    (out / "m.bin").unlink()
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(BackendError, match=r"onnxruntime is not installed; pip install nnslim\[onnx\]"):
        exported(folder, out / "m.onnx")
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(BackendError, match=r"pip install nnslim\[openvino\]"):
        exported(folder, out / "m.xml")
    assert list(out.iterdir()) == []


def test_command(make_model, case_folder, tmp_path, monkeypatch, capfd):
    from nnslim.cli import main

    def run(*arguments, expect: int) -> str:
        monkeypatch.setattr(sys, "argv", ["nnslim", "export", *map(str, arguments)])
        monkeypatch.setattr("rich.console.Console.width", 1000)
        capfd.readouterr()
        with pytest.raises(SystemExit) as end:
            main()
            raise SystemExit(0)
        out, err = capfd.readouterr()
        assert (end.value.code or 0) == expect, f"{out}\n{err}"
        return out + err

    folder = make_model()
    text = run("-m", folder, "-o", tmp_path / "m.onnx", "--format", "onnx", "-i", case_folder, "-q", expect=0)
    assert "passed" in text and f"written: {tmp_path / 'm.onnx'}" in text
    assert "passed" in run("-m", folder, "-o", tmp_path / "m.xml", "--patch", "16,16,24", "-f", "0", expect=0)
    assert "exists and is not overwritten" in run("-m", folder, "-o", tmp_path / "m.onnx", expect=2)
    assert "name a file to write with -o" in run("-m", folder, expect=2)
    assert "fold 0: parity" in run("-m", folder, "--precision", "int8", "-i", case_folder, expect=0)
    monkeypatch.setattr(side, "run_exported", lambda file, image: torch.zeros(1, 3, 16, 16, 16))
    assert "FAILED" in run("-m", folder, "-o", tmp_path / "n.onnx", expect=1)
