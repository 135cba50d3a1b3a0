"""Build nnslim's kernels when a wheel is built or the project is installed: `python hatch_build.py` does it in place.

A library for each set of processor features, with and without OpenMP; nnslim chooses at run time. Where there is no C
compiler that can build them nnslim is a package of Python alone, which does the same, several times slower in places.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

SOURCES = ("nnslim/running/kernels.c", "nnslim/resampling/labels.c")
FOLDER = "nnslim/running/compiled"
# Named as the compiler's -m options and as Linux's processor flags, the most capable set last.
FEATURES = {
    "x86_64": (
        ("avx2", "fma", "f16c"),
        ("avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512dq", "avx512vl"),
    )
}
_KINDS = {".threads.so": ("-fopenmp",), ".so": ()}
_FLAGS = ("-pipe", "-O3", "-ffp-contract=fast", "-fno-math-errno", "-fPIC")


def compiler() -> str | None:
    """Return the C compiler to build with: CC, else cc, gcc or clang; None where there is none."""
    named = os.environ.get("CC", "").split()
    return next((found for name in (*named[:1], "cc", "gcc", "clang") if (found := shutil.which(name))), None)


def build(root: Path) -> list[Path]:
    """Build what the compiler can, in the tree under `root`, and return the libraries.

    Libraries with OpenMP call its functions without naming a library for them: they are found in the one that torch has
    loaded. So torch's threads do the work, and do not wait actively beside others.
    """
    folder, chosen, made = root / FOLDER, compiler(), []
    if chosen is not None:
        folder.mkdir(exist_ok=True)
        wanted = {}
        for features in FEATURES.get(platform.machine(), ((),)):
            options = [f"-m{feature}" for feature in features]
            wanted |= {("+".join(features) or "any") + kind: [*options, *more] for kind, more in _KINDS.items()}
        with ThreadPoolExecutor() as pool:
            done = pool.map(lambda item: _build_one(chosen, root, item[1], folder / item[0]), wanted.items())
            made = [folder / name for name, worked in zip(wanted, list(done), strict=True) if worked]
    for path in set(folder.glob("*.so")) - set(made):  # of another version
        path.unlink()
    return made


def _build_one(chosen: str, root: Path, options: list[str], target: Path) -> bool:
    """Return whether the library was built; one that a process has loaded is replaced as a whole."""
    later = ["-Wl,-undefined,dynamic_lookup"] if sys.platform == "darwin" else []  # else undefined functions are errors
    with tempfile.TemporaryDirectory(dir=target.parent) as side:
        objects = [f"{side}/{Path(source).stem}.o" for source in SOURCES]
        commands = [
            [chosen, *_FLAGS, *options, "-c", "-o", file, str(root / source)]
            for source, file in zip(SOURCES, objects, strict=True)
        ]
        commands.append([chosen, "-shared", "-o", f"{side}/library", *objects, *later])
        worked = all(subprocess.run(command, capture_output=True, check=False).returncode == 0 for command in commands)
        if worked:
            Path(side, "library").replace(target)
        return worked


try:
    from hatchling.builders.hooks.plugin.interface import BuildHookInterface
except ImportError:
    pass
else:

    class KernelsHook(BuildHookInterface):
        """Puts the kernels into the wheel, which is then for this system, but for any Python."""

        def initialize(self, version: str, build_data: dict) -> None:
            """See `BuildHookInterface`."""
            try:
                made = build(Path(self.root))
            except OSError:  # a tree that cannot be written, a compiler that cannot be started
                made = []
            if not made:
                self.app.display_warning(
                    "nnslim is built without its kernels, which need a C compiler (CC, gcc, clang)"
                )
                return
            system = sysconfig.get_platform().replace("-", "_").replace(".", "_")
            build_data |= {"pure_python": False, "tag": f"py3-none-{system}"}
            build_data["artifacts"].append(f"/{FOLDER}/*.so")


if __name__ == "__main__":
    print("\n".join(map(str, build(Path(__file__).parent))) or "no C compiler")
