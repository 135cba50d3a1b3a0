"""Run the tests of the context, of directories and of the command with several nnU-Net versions.

./run.sh scripts/16_version_matrix.py -o nnunet-versions                                              # all versions
./run.sh scripts/16_version_matrix.py -o nnunet-versions --versions 2.5.2 -- -n 0 -k cascade         # options of pytest
Each has an environment (5 GB) in that folder, with a PyTorch of its time. uv makes it; it looks for Python on the PATH.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # studies/ is no installed package
from nnslim.errors import InputError
from nnslim.files import make_folder
from studies.command import new_parser, run_command

ROOT = Path(__file__).resolve().parents[1]
# nnU-Net -> Python, and what is installed with it
VERSIONS = {
    "2.3.1": ("3.10", "torch==2.1.2", "numpy<2"),
    "2.5.2": ("3.11", "torch==2.5.1"),
    "2.6.4": ("3.11", "torch==2.6.0"),
    "2.7.0": ("3.12", "torch==2.8.0"),
    "2.8.1": ("3.11", "torch"),
}
TESTS = ("test_context.py", "test_cli.py", "test_signals.py", "hosts/nnunet/test_in_process.py")
TESTS += ("hosts/nnunet/test_predict_folder.py", "hosts/nnunet/test_compress_model.py", "hosts/nnunet/test_streamed.py")
TOOLS = ("pytest>=8", "pytest-xdist>=3.5", "nilearn>=0.14")


def environment(folder: Path, version: str) -> Path:
    """Return the Python of the environment for a version; it is made, or completed, where that is needed."""
    uv = Path(sys.executable).with_name("uv")
    if not uv.is_file():
        raise InputError(f"{uv} is not there; install it with pip install uv")
    number, *pinned = VERSIONS.get(version, ("3.11", "torch"))
    place = folder / f"nnunet-{version}"
    python = place / "bin" / "python"
    commands = [] if python.is_file() else [["venv", "--quiet", "--python", number, place]]
    wanted = [f"nnunetv2=={version}", *pinned, "-e", ROOT, *TOOLS]
    commands.append(["pip", "install", "--quiet", "--compile-bytecode", "--python", python, *wanted])
    for command in commands:
        if subprocess.run([uv, *map(str, command)], check=False).returncode:
            raise InputError(f"{place} cannot be made: see what uv says above")
    return python


def tested(folder: Path, version: str, options: list[str]) -> tuple[str, bool]:
    """Return a row of the table, and whether all tests passed."""
    python, log, counts = environment(folder, version), folder / f"{version}.log", folder / f"{version}.xml"
    counts.unlink(missing_ok=True)
    show = "import platform, torch, numpy; print(platform.python_version(), torch.__version__, numpy.__version__)"
    installed = subprocess.run([python, "-c", show], capture_output=True, text=True, check=True).stdout.split()
    command = [python, "-m", "pytest", "-m", "slow or not slow", "-rs", f"--junitxml={counts}", *options]
    command += ["-W", "ignore:torch 2:UserWarning"]  # checkpoints without protection; warnings of ours fail tests
    # A cache of its own: compiled code and weights of one version are not for another.
    variables = {**os.environ, "PYTHONPATH": str(ROOT), "NNSLIM_CACHE": str(folder / f"{version}.cache")}
    with log.open("w") as output:
        run = [*command, *(ROOT / "tests" / name for name in TESTS)]
        code = subprocess.run(run, cwd=ROOT, env=variables, stdout=output, stderr=output, check=False).returncode
    if not counts.is_file():
        return f"{version:8} {' '.join(installed):34} no tests ran, exit code {code}: {log}", False
    suite = next(ElementTree.parse(counts).getroot().iter("testsuite"))
    total, failures, errors, skipped = (int(suite.get(key, 0)) for key in ("tests", "failures", "errors", "skipped"))
    bad = failures + errors
    row = f"{version:8} {' '.join(installed):34} {total - bad - skipped:6} {bad:6} {skipped:7}  {log}"
    return row, code == 0


def main() -> int:
    parser = new_parser(__doc__)
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder of the environments and logs")
    parser.add_argument("--versions", nargs="+", default=list(VERSIONS), help=f"of nnU-Net ({' '.join(VERSIONS)})")
    parser.add_argument("options", nargs="*", help="for pytest, after --")
    chosen = parser.parse_args()
    make_folder(chosen.output)
    rows, fine = [f"{'nnU-Net':8} {'Python, torch, NumPy':34} passed failed skipped  log"], True
    for version in chosen.versions:
        row, passed = tested(chosen.output.absolute(), version, chosen.options)
        print(row, flush=True)
        rows, fine = [*rows, row], fine and passed
    print("\n".join(["", *rows]))
    return 0 if fine else 1


if __name__ == "__main__":
    run_command(main)
