"""Optional packages: imported late, with what to install where they are missing."""

from __future__ import annotations

import getpass
import importlib
import importlib.metadata
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nnslim.caches import private_folder
from nnslim.errors import BackendError, NNSlimError


@contextmanager
def name_and_home() -> Iterator[None]:
    """Give a user who has no name or no home one while the block runs: monai, OpenVINO and NNCF ask when imported."""
    added = {}
    try:
        getpass.getuser()
    except (KeyError, OSError):
        added["LOGNAME"] = str(os.getuid())
    try:
        Path.home()
    except RuntimeError:
        added["HOME"] = str(private_folder())
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)


def needed(name: str, install: str, *, purpose: str = "", error: type[NNSlimError] = BackendError) -> Any:
    """Import the module `name`, or raise `error` with what `purpose` needs it for and what pip can `install`."""
    try:
        with name_and_home():
            return importlib.import_module(name)
    except ImportError as problem:
        missing = problem.name or name
        why = f"{purpose} needs it; " if purpose else ""
        raise error(f"{missing} is not installed; {why}pip install {install}") from problem


def installed_version(package: str, name: str, install: str, *, error: type[NNSlimError]) -> str:
    """Return the version of a package without importing it, or raise `error` with its `name` and what to `install`."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        raise error(f"{name} is not installed; run pip install {install}") from None
