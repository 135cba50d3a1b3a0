"""Compression methods, one folder each. Importing this package registers all of them, also those of other packages.

A method that lives elsewhere is registered by an entry point of its package, in the group `nnslim.methods`, which names
the module that calls `register_method`.
"""

from __future__ import annotations

import importlib
import pkgutil
from importlib.metadata import entry_points

for _module in pkgutil.iter_modules(__path__):
    if _module.ispkg:
        importlib.import_module(f"{__name__}.{_module.name}")
for _method in entry_points(group=__name__):
    _method.load()
