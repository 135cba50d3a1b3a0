"""Former names of modules: scripts and trained models that name them still find what they held.

Python asks the finder only for modules that do not exist. Plans of models that earlier versions wrote name the
architectures below, so these rows must stay; the others help scripts, with a warning.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_loader
from types import ModuleType
from typing import Any

_ARCHITECTURES = ("nnslim.architectures",)
# Former module -> the modules that hold its names now.
MODULES: dict[str, tuple[str, ...]] = {
    "nnslim.hosts.nnunet.network": _ARCHITECTURES,
    "nnslim.hosts.nnunet.planned": _ARCHITECTURES,
    "nnslim.hosts.nnunet.inflation": (),
    "nnslim.hosts.nnunet.inflation.window": _ARCHITECTURES,
    "nnslim.hosts.nnunet.folder": ("nnslim.hosts.nnunet.model.trained_model",),
    "nnslim.hosts.nnunet.folder_job": ("nnslim.hosts.nnunet.predict",),
    "nnslim.hosts.nnunet.shipped": ("nnslim.hosts.nnunet.model.shipped",),
    "nnslim.hosts.nnunet.write": ("nnslim.hosts.nnunet.compress.compress_model",),
    "nnslim.hosts.nnunet.agree": ("nnslim.hosts.nnunet.judge.agree_models",),
    "nnslim.methods.embedded.daeformer": ("nnslim.network.daeformer",),
    "nnslim.surgery.reached": ("nnslim.network.reached",),
    "nnslim.cost": ("nnslim.network.cost",),
    "nnslim.operations": ("nnslim.network.operations",),
    "nnslim.spec": ("nnslim.network.spec",),
    "nnslim.work": (),
    "nnslim.work.config": ("nnslim.compression.config",),
    "nnslim.work.folder": (),
    "nnslim.work.folder.run": ("nnslim.prediction.run_directory",),
    "nnslim.work.folder.engines": ("nnslim.prediction.case",),
}
NAMES = {
    "ModelFolder": "TrainedModel",
    "read_model_folder": "read_trained_model",
    "compress_folder": "compress_model",
    "agreement_of_folders": "agreement_of_models",
}


class FormerModules(MetaPathFinder, Loader):
    """Finds the modules of `MODULES`."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return a spec for a former module; it is a package, as some of them were."""
        return spec_from_loader(fullname, self, is_package=True) if fullname in MODULES else None

    def exec_module(self, module: ModuleType) -> None:
        """Give the module a `__getattr__` that looks where its names are now."""
        former, homes = module.__name__, MODULES[module.__name__]
        if homes and homes != _ARCHITECTURES:
            message = f"{former} is a former name; import from {' or '.join(homes)}"
            warnings.warn(message, DeprecationWarning, stacklevel=2)

        def found(name: str) -> Any:
            for home in homes if not name.startswith("__") else ():
                if (value := getattr(import_module(home), NAMES.get(name, name), None)) is not None:
                    return value
            raise AttributeError(f"module '{former}' has no attribute '{name}'")

        module.__getattr__ = found  # type: ignore[method-assign]


def install() -> None:
    """Let Python ask for former modules after all others."""
    if not any(isinstance(finder, FormerModules) for finder in sys.meta_path):
        sys.meta_path.append(FormerModules())
