"""The version, read from the package's metadata; pyproject.toml is the only place that states it."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("nnslim")
except PackageNotFoundError:  # run from a source tree that is not installed
    __version__ = "0+unknown"
