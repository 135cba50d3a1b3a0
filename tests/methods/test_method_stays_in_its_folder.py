"""Nothing imports a single method but the method itself, the names of saved architectures, and the trainers."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from helpers import ROOT

PACKAGE = ROOT / "nnslim"
ALLOWED = ("architectures.py", "hosts/nnunet/model/planned.py", "hosts/nnunet/train/")  # saved names, and trainers


def imported(file: Path) -> set[str]:
    """Return the dotted names that a file imports, also inside functions."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "import_module":
            found |= {str(value.value) for value in node.args if isinstance(value, ast.Constant)}
    return found


def strangers(package: Path) -> list[str]:
    """Return "file: method" for every import of a method from outside its folder."""
    methods = {path.parent.name for path in (package / "methods").glob("*/__init__.py")}
    broken = []
    for file in sorted(package.rglob("*.py")):
        place = file.relative_to(package).as_posix()
        for name in () if place.startswith(ALLOWED) else imported(file):
            parts = name.split(".")
            inside = parts[:2] == ["nnslim", "methods"] and len(parts) > 2 and parts[2] in methods
            if inside and not place.startswith(f"methods/{parts[2]}/"):
                broken.append(f"{place}: {parts[2]}")
    return sorted(set(broken))


def test_no_file_outside_a_method_imports_it():
    assert strangers(PACKAGE) == []


@pytest.mark.parametrize(
    ("place", "source", "found"),
    [
        ("compression/recover.py", "from nnslim.methods.a import X\n", ["compression/recover.py: a"]),
        ("compression/recover.py", "def f():\n    from nnslim.methods import a\n", ["compression/recover.py: a"]),
        ("methods/b/plan.py", "import nnslim.methods.a.plan\n", ["methods/b/plan.py: a"]),
        ("context.py", "importlib.import_module('nnslim.methods.a')\n", ["context.py: a"]),
        ("methods/a/plan.py", "import nnslim.methods.a.edit\n", []),
        ("hosts/nnunet/train/trainer.py", "import nnslim.methods.a.edit\n", []),
        ("compression/recover.py", "from nnslim.methods.base import Plan\n", []),
    ],
)
def test_planted_import_is_found(tmp_path, place, source, found):
    for name in ("methods/a/__init__.py", "methods/b/__init__.py", "methods/base.py", place):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(source if name == place else "")
    assert strangers(tmp_path) == found
