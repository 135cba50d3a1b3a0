"""Imports go down the list in docs/architecture.md, files form no circle, and only the hosts know nnU-Net."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT

PACKAGE = ROOT / "nnslim"
HOST_PACKAGES = {
    "nnunetv2",
    "totalsegmentator",
    "dynamic_network_architectures",
    "batchgenerators",
    "batchgeneratorsv2",
}
OF_ALL = ("_version",)  # everything may name the version
OURS = ("nnslim", "benchmarks", "studies")
MARKERS = ("hosts", "hosts.nnunet")  # packages that hold packages, and no code


def names_imported(file: Path) -> list[tuple[str, str]]:
    """Return (module, name) of every `from ... import ...` of our own modules, those inside functions included."""
    nodes = [node for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))) if isinstance(node, ast.ImportFrom)]
    ours = [node for node in nodes if not node.level and (node.module or "").split(".")[0] in OURS]
    return [(node.module, alias.name) for node in ours for alias in node.names]


def order_of(page: str) -> dict[str, int]:
    """Return package or file -> row, from the table whose first column is headed "package"."""
    rows = page.split("| package | holds |")[1].split("\n\n")[0].splitlines()[2:]
    names = [re.findall(r"`([^`]+)`", row.split("|")[1]) for row in rows]
    return {name.strip("/").replace("/", "."): place for place, row in enumerate(names) for name in row}


PAGE_OF_PACKAGES = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
ORDER = order_of(PAGE_OF_PACKAGES)


def row_of(module: str, order: dict[str, int]) -> int | None:
    """Return the row of a module (nnslim.a.b); None where the table does not name it or a package that holds it."""
    inside = module.partition(".")[2]
    if inside in ("", *MARKERS):
        return len(order) if not inside else -1
    if inside in OF_ALL:
        return -1
    parts = inside.split(".")
    found = [".".join(parts[:depth]) for depth in range(len(parts), 0, -1)]
    return next((order[name] for name in found if name in order), None)


def module_of(file: Path, package: Path) -> str:
    """Return the dotted name of a file."""
    return ".".join([package.name, *file.relative_to(package).with_suffix("").parts]).removesuffix(".__init__")


def imports_of(file: Path, package: Path, known: set[str]) -> list[tuple[int, str]]:
    """Return (line, module) of every import, those inside functions and by `import_module("name")` included."""
    found = []
    here = module_of(file, package).split(".")
    folder = here if file.name == "__init__.py" else here[:-1]
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ".".join((folder[: len(folder) - node.level + 1] if node.level else []) + [node.module or ""])
            base = base.strip(".")
            inner = [f"{base}.{alias.name}" for alias in node.names]
            found += [(node.lineno, name if name in known else base) for name in inner]
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = getattr(node.func, "attr", getattr(node.func, "id", ""))
            if called in ("import_module", "__import__") and isinstance(node.args[0].value, str):
                found.append((node.lineno, node.args[0].value))
    return sorted(set(found))


def violations(package: Path, order: dict[str, int]) -> list[str]:
    """Return one line for each import that breaks the rule, and one for each circle of files."""
    files = {module_of(file, package): file for file in sorted(package.rglob("*.py"))}
    broken, graph = [], {}
    for module, file in files.items():
        row, place = row_of(module, order), file.relative_to(package.parent)
        if row is None:
            broken.append(f"{place}: stands in no row of docs/architecture.md")
            continue
        imported = imports_of(file, package, set(files))
        graph[module] = {name for _, name in imported if name in files and name != module}
        for line, name in imported:
            if name.split(".")[0] in HOST_PACKAGES and not module.startswith(f"{package.name}.hosts."):
                broken.append(f"{place}:{line}: {name} may be imported by hosts only")
            if name.split(".")[0] != package.name:
                continue
            other = row_of(name, order)
            if other is None or other > row:
                broken.append(f"{place}:{line}: {name} stands below {module} in docs/architecture.md")
            mine, theirs = module.split(".")[1:3], name.split(".")[1:3]
            both_methods = len(mine) == len(theirs) == 2 and mine[0] == theirs[0] == "methods"
            if both_methods and theirs[1] not in ("base", mine[1]):
                broken.append(f"{place}:{line}: method {mine[1]} imports method {theirs[1]}")
    return broken + [f"circle: {' -> '.join(circle)}" for circle in circles(graph)]


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Return every group of modules that import each other, straight or through others."""
    reached: dict[str, set[str]] = {}
    for start in graph:
        seen, left = set(), [*graph[start]]
        while left:
            if (one := left.pop()) not in seen:
                seen.add(one)
                left += graph.get(one, ())
        reached[start] = seen
    groups = {frozenset(b for b in reached[a] if a in reached.get(b, ())) for a in graph if a in reached[a]}
    return sorted(sorted(group) for group in groups)


def test_package_imports_go_down_without_circles():
    assert len(ORDER) > 20 and len(list(PACKAGE.rglob("*.py"))) > 100
    assert violations(PACKAGE, ORDER) == []


def test_every_row_of_the_table_is_there():
    assert [name for name in ORDER if not list(PACKAGE.glob(f"{name.replace('.', '/')}*"))] == []


def test_ways_through_the_code_name_files_and_what_they_define():
    section = PAGE_OF_PACKAGES.split("## Four ways through the code")[1].split("\n## ")[0]
    for line in re.findall(r"^\d+\. (.*)$", section, re.MULTILINE):
        files = [PACKAGE / name for name in re.findall(r"`([\w/]+\.py)`", line)]
        assert files and all(file.is_file() for file in files), line
        defined = {node.name for file in files for node in ast.parse(file.read_text()).body if hasattr(node, "name")}
        named = set(re.findall(r"`(\w+)`", line)) - {"preprocess_case"}  # of the way before
        assert named <= defined, (line, named - defined)


def test_nothing_imports_the_studies():
    text = "\n".join(file.read_text(encoding="utf-8") for file in PACKAGE.rglob("*.py"))
    assert not re.search(r"^\s*(from|import) studies\b", text, re.MULTILINE)


PAGE = """
| package | holds |
| --- | --- |
| `errors` `files` | base |
| `network/` | one network |
| `methods/` | methods |
| `work/` | work |
| `hosts/x/` | a host |
| `context` | what users call |

"""


@pytest.mark.parametrize(
    ("place", "source", "message"),
    [
        ("files.py", "import nnslim.methods.base\n", "files.py:1: nnslim.methods.base stands below nnslim.files"),
        ("network/walk.py", "from nnslim import errors, work\n", "nnslim.work stands below nnslim.network.walk"),
        ("network/walk.py", "from .. import context\n", "nnslim.context stands below"),
        ("methods/a/plan.py", "from ...work.config import X\n", "nnslim.work.config stands below"),
        ("methods/a/plan.py", "def f():\n    from nnslim.methods.b import X\n", "plan.py:2: method a imports method b"),
        ("work/cache.py", "def f():\n    import nnslim\n", "cache.py:2: nnslim stands below"),
        ("work/cache.py", "def f():\n    import nnunetv2.paths\n", "nnunetv2.paths may be imported by hosts only"),
        ("work/cache.py", "from batchgenerators.x import y\n", "batchgenerators.x may be imported by hosts only"),
        ("context.py", "import totalsegmentator\n", "totalsegmentator may be imported by hosts only"),
        ("errors.py", "import_module('nnslim.hosts.x')\n", "nnslim.hosts.x stands below"),
        ("novel.py", "", "novel.py: stands in no row"),
        ("work/config.py", "from nnslim.work import other\n", "circle: nnslim.work.config -> nnslim.work.other"),
        ("work/config.py", "def f():\n    from nnslim.work.other import X\n", "circle: nnslim.work.config"),
    ],
)
def test_checker_planted_import_is_caught(tmp_path, place, source, message):
    package = tmp_path / "nnslim"
    given = {"work/other.py": "from nnslim.work.config import X\n"} if "other" in source else {"work/other.py": ""}
    names = ("__init__", "errors", "files", "context", "methods/base", "methods/b/__init__", "work/config", "hosts/x/y")
    packages = ("work/__init__", "network/__init__", "hosts/x/__init__")
    for name in (*names, *packages, place, *given):
        file = package / (name if name.endswith(".py") else f"{name}.py")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(source if name == place else given.get(name, ""))
    found = violations(package, order_of(PAGE))
    assert len(found) == 1
    assert message in found[0]


def test_checker_downward_imports_pass(tmp_path):
    package = tmp_path / "nnslim"
    (package / "hosts" / "x").mkdir(parents=True)
    (package / "files.py").write_text("from nnslim import errors\n")
    (package / "errors.py").write_text("import difflib\n")
    (package / "hosts" / "x" / "y.py").write_text("import nnunetv2\nfrom nnslim.files import SlimSpec\n")
    assert violations(package, order_of(PAGE)) == []


@pytest.mark.parametrize("module", ["nnslim", "nnslim.cli"])
def test_import_fresh_process_loads_neither_torch_nor_hosts(module):
    heavy = {"torch", "numpy", "pandas", "tensorly", *HOST_PACKAGES}
    code = f"import sys, {module}; print(sorted({heavy!r} & set(sys.modules)))"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=PACKAGE.parent)
    assert ran.stdout.strip() == "[]"


def holds(module: str, name: str) -> bool:
    """Return whether a module has something of that name, or is a package with a module of that name."""
    found = importlib.import_module(module)
    in_package = hasattr(found, "__path__") and importlib.util.find_spec(f"{module}.{name}") is not None
    return hasattr(found, name) or in_package


@pytest.mark.parametrize("folder", [*OURS, "scripts", "example"])
def test_names_imported_inside_functions_exist(folder):
    """What a test never calls, such as a benchmark of peers, would otherwise fail at its users."""
    files = sorted((ROOT / folder).rglob("*.py"))
    named = [(str(file.relative_to(ROOT)), *pair) for file in files for pair in names_imported(file)]
    assert [one for one in named if not holds(*one[1:])] == []
