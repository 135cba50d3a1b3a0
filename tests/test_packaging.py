"""What is installed, and what the README promises."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from helpers import ROOT

import hatch_build


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """The folder of the wheel and the source distribution, built by the project's own back end without a network."""
    folder = tmp_path_factory.mktemp("built")
    command = [sys.executable, "-m", "hatchling", "build", "-d", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def wheel(built) -> Path:
    return next(built.glob("*.whl"))


def test_studies_are_in_the_source_distribution_and_not_in_the_wheel(built, wheel):
    with tarfile.open(next(built.glob("*.tar.gz"))) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    sources = {p.relative_to(ROOT).as_posix() for p in (ROOT / "studies").glob("*.*")}
    assert {"studies/README.md", "studies/table.py"} <= sources <= names
    assert {"scripts/07_train_example_model.py", "run.sh"} <= names
    assert not any(name.startswith(("studies", "scripts", "tests")) for name in zipfile.ZipFile(wheel).namelist())


def test_wheel_holds_every_module_preset_and_the_model(wheel):
    """tucker-cnn's wheel lacked a sub-package that its main module imports."""
    names = set(zipfile.ZipFile(wheel).namelist())
    sources = {p.relative_to(ROOT).as_posix() for p in (ROOT / "nnslim").rglob("*.py")}
    assert sources <= names
    assert {f"nnslim/report/html/{p.name}" for p in (ROOT / "nnslim" / "report" / "html").iterdir()} <= names
    assert {f"nnslim/configs/{p.name}" for p in (ROOT / "configs").glob("*.yml")} <= names
    assert any(name.endswith("fold_0/checkpoint_final.pth") for name in names)
    assert wheel.stat().st_size < 15e6


def test_wheel_holds_the_kernels_for_any_python_and_each_set_of_features(wheel):
    names = [name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".so")]
    if hatch_build.compiler() is None:
        assert not names and wheel.name.endswith("-py3-none-any.whl")
    else:
        sets = hatch_build.FEATURES.get(platform.machine(), ((),))
        assert len(names) == 2 * len(sets) and all(name.startswith(hatch_build.FOLDER) for name in names)
        assert re.search(r"-py3-none-(?!any)\w+\.whl$", wheel.name)


def test_source_distribution_builds_and_without_a_compiler_gives_python_alone(built, tmp_path):
    with tarfile.open(next(built.glob("*.tar.gz"))) as archive:
        archive.extractall(tmp_path, filter="data")
    (source,) = tmp_path.iterdir()
    for number, path in enumerate((os.environ["PATH"], str(tmp_path))):
        environment = {**os.environ, "PATH": path, "CC": ""}
        command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path / f"{number}")]
        done = subprocess.run(command, cwd=source, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
    (whole,), (plain,) = ((tmp_path / number).glob("*.whl") for number in "01")
    assert [name for name in zipfile.ZipFile(whole).namelist() if name.endswith(".so")] or not hatch_build.compiler()
    assert plain.name.endswith("-py3-none-any.whl") and "built without its kernels" in done.stdout + done.stderr
    assert not [name for name in zipfile.ZipFile(plain).namelist() if name.endswith(".so")]


def test_unpacked_wheel_imports_and_finds_presets_and_model_without_the_source_tree(wheel, tmp_path):
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "import nnslim; assert nnslim.__file__.startswith(sys.argv[1]), nnslim.__file__\n"
        "from nnslim.compression.config import load_config, presets\n"
        "assert load_config('tucker-balanced').active and 'tucker-small' in presets()\n"
        "from nnslim.hosts.nnunet.model.shipped import shipped_model\n"
        "assert str(shipped_model()).startswith(sys.argv[1])\n"
        "assert 'totalsegmentator' not in sys.modules\n"
    )
    done = subprocess.run(
        [sys.executable, "-I", "-c", code, str(tmp_path / "site")], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr


def test_metadata_names_python_versions_extras_and_licence(wheel):
    with zipfile.ZipFile(wheel) as archive:
        name = next(n for n in archive.namelist() if n.endswith("METADATA"))
        text = archive.read(name).decode()
    assert "Requires-Python: <3.14,>=3.10" in text and "License-Expression: Apache-2.0" in text
    assert {"ts", "openvino", "ray", "example", "test"} <= set(re.findall(r"Provides-Extra: (\S+)", text))
    for package in ("nnunetv2", "torch", "tensorly", "monai", "batchgenerators", "simpleitk", "pandas"):
        assert re.search(rf"Requires-Dist: {package}\b", text, re.IGNORECASE), package


def test_shipped_model_is_small_and_has_a_card():
    folder = ROOT / "nnslim" / "models" / "hippocampus"
    assert sum(p.stat().st_size for p in folder.rglob("*") if p.is_file()) <= 12e6
    card = (folder / "MODEL_CARD.md").read_text()
    for word in ("CC-BY-SA 4.0", "Medical Segmentation Decathlon", "07_train_example_model.py", "Dice"):
        assert word in card, word


def test_readme_shows_both_commands_and_its_first_code_within_15_lines():
    lines = (ROOT / "README.md").read_text().splitlines()
    assert any(line.startswith("```") for line in lines[:15])
    text = "\n".join(lines)
    assert "./run.sh example/example.py" in text and "./run.sh -m pytest" in text
    assert "./run.sh -m pytest" in (ROOT / ".ci" / "run").read_text()


def _python_blocks(name: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / name).read_text(), re.DOTALL)


def test_readme_python_blocks_run(tmp_path, monkeypatch):
    """tucker-cnn's README raised. Every block of ours runs, with a stand-in for the one download it needs."""
    blocks = _python_blocks("README.md")
    assert len(blocks) >= 2
    prelude = (
        "import os, sys\n"
        f"os.chdir({str(tmp_path)!r})\n"
        "from unittest import mock\n"
        "import totalsegmentator.python_api as api\n"
        # TotalSegmentator's weights are no part of a test machine: its call is recorded, all else is real.
        "api.totalsegmentator = mock.Mock()\n"
    )
    for block in blocks:
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", prelude + block], capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, f"{block}\n{done.stderr[-1500:]}"


def test_run_sh_help_of_every_script():
    for script in sorted((ROOT / "scripts").glob("[0-9]*.py")):  # the others are shared by these
        done = subprocess.run(
            [sys.executable, str(script), "--help"], capture_output=True, text=True, timeout=120, cwd=ROOT
        )
        assert done.returncode == 0 and "usage:" in done.stdout.lower(), script
