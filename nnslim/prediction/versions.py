"""Versions for the record of a run, without importing what they belong to."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

from nnslim._version import __version__


def versions(*hosts: str) -> dict[str, str]:
    """Return the versions of nnslim, Python, torch and of the packages named, those that are installed."""
    found = {"nnslim": __version__, "python": platform.python_version()}
    for name in ("torch", *hosts):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
