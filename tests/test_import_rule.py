"""Imports point down only, and only the hosts know nnU-Net and TotalSegmentator."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT

PACKAGE = ROOT / "nnslim"
STOREYS = {
    **dict.fromkeys(("errors", "_version", "files", "optional", "spec", "lowrank", "cost", "operations", "surgery"), 0),
    **dict.fromkeys(("moments", "streaming", "fitting", "spectra", "knapsack", "running"), 0),
    "methods": 1,
    "inflation": 1,
    "work": 2,
    "hosts": 3,
    **dict.fromkeys(("context", "cli", "commands", "doctor", "__init__", "__main__"), 4),
}
HOST_PACKAGES = {
    "nnunetv2",
    "totalsegmentator",
    "dynamic_network_architectures",
    "batchgenerators",
    "batchgeneratorsv2",
}


def dotted_name(file: Path, package: Path) -> list[str]:
    parts = [package.name, *file.relative_to(package).with_suffix("").parts]
    return parts[:-1] if parts[-1] == "__init__" else parts


def storey(parts: list[str]) -> int | None:
    return STOREYS.get(parts[1] if len(parts) > 1 else "__init__")


def is_module(parts: list[str], package: Path) -> bool:
    path = package.joinpath(*parts[1:])
    return path.is_dir() or path.with_suffix(".py").is_file()


def imports_of(file: Path, package: Path) -> list[tuple[int, list[str]]]:
    """Return (line, dotted parts) of every import, those inside functions and by `import_module("name")` included."""
    found = []
    here = dotted_name(file, package)
    folder = here if file.name == "__init__.py" else here[:-1]
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name.split(".")) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = (folder[: len(folder) - node.level + 1] if node.level else []) + (node.module or "").split(".")
            base = [part for part in base if part]
            for alias in node.names:
                inner = [*base, alias.name]
                deeper = base[0] == package.name and is_module(inner, package)
                found.append((node.lineno, inner if deeper else base))
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = getattr(node.func, "attr", getattr(node.func, "id", ""))
            if called in ("import_module", "__import__") and isinstance(node.args[0].value, str):
                found.append((node.lineno, node.args[0].value.split(".")))
    return found


def violations(package: Path) -> list[str]:
    """Return one line for each import that breaks the rule."""
    broken = []
    for file in sorted(package.rglob("*.py")):
        here = dotted_name(file, package)
        level = storey(here)
        place = file.relative_to(package.parent)
        if level is None:
            broken.append(f"{place}: belongs to no storey; add it to STOREYS in this test")
            continue
        for line, target in imports_of(file, package):
            name = ".".join(target)
            if target[0] in HOST_PACKAGES and level != 3:
                broken.append(f"{place}:{line}: {name} may be imported by hosts only")
            if target[0] != package.name:
                continue
            other = storey(target)
            if other is None or other > level:
                broken.append(f"{place}:{line}: {name} (storey {other}) is above storey {level}")
            both_methods = len(here) > 2 and here[1] == "methods" and len(target) > 2 and target[1] == "methods"
            if both_methods and target[2] not in ("base", here[2]) and here[2] != "base":
                broken.append(f"{place}:{line}: method {here[2]} imports method {target[2]}")
    return broken


def test_package_imports_point_down_only():
    assert len(list(PACKAGE.rglob("*.py"))) > 20
    assert violations(PACKAGE) == []


@pytest.mark.parametrize(
    ("place", "source", "message"),
    [
        ("cost.py", "import nnslim.methods.base\n", "cost.py:1: nnslim.methods.base (storey 1) is above storey 0"),
        ("surgery/walk.py", "from nnslim import spec, work\n", "nnslim.work (storey 2) is above storey 0"),
        ("surgery/walk.py", "from .. import context\n", "nnslim.context (storey 4) is above storey 0"),
        (
            "methods/a/plan.py",
            "from ...work.config import X\n",
            "nnslim.compression.config (storey 2) is above storey 1",
        ),
        ("methods/a/plan.py", "def f():\n    from nnslim.methods.b import X\n", "plan.py:2: method a imports method b"),
        ("work/cache.py", "def f():\n    import nnslim\n", "cache.py:2: nnslim (storey 4) is above storey 2"),
        ("work/cache.py", "def f():\n    import nnunetv2.paths\n", "nnunetv2.paths may be imported by hosts only"),
        ("work/cache.py", "from batchgenerators.x import y\n", "batchgenerators.x may be imported by hosts only"),
        ("context.py", "import totalsegmentator\n", "totalsegmentator may be imported by hosts only"),
        ("spec.py", "import_module('nnslim.hosts')\n", "nnslim.hosts (storey 3) is above storey 0"),
        ("novel.py", "", "novel.py: belongs to no storey"),
    ],
)
def test_checker_planted_import_is_caught(tmp_path, place, source, message):
    package = tmp_path / "nnslim"
    for name in ("__init__", "spec", "context", "methods/base", "methods/b/__init__", "work/config", "hosts/x", place):
        file = package / (name if name.endswith(".py") else f"{name}.py")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(source if name == place else "")
    found = violations(package)
    assert len(found) == 1
    assert message in found[0]


def test_checker_downward_imports_pass(tmp_path):
    package = tmp_path / "nnslim"
    (package / "hosts").mkdir(parents=True)
    (package / "spec.py").write_text("from nnslim import errors\n")
    (package / "errors.py").write_text("import difflib\n")
    (package / "hosts" / "x.py").write_text("import nnunetv2\nfrom nnslim.network.spec import SlimSpec\n")
    assert violations(package) == []


@pytest.mark.parametrize("module", ["nnslim", "nnslim.cli"])
def test_import_fresh_process_loads_neither_torch_nor_hosts(module):
    code = f"import sys, {module}; print(sorted({{'torch', 'numpy', *{HOST_PACKAGES!r}}} & set(sys.modules)))"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=PACKAGE.parent)
    assert ran.stdout.strip() == "[]"
