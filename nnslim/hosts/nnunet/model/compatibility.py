"""Which nnU-Net is installed, and whether its methods are those that nnslim replaces."""

from __future__ import annotations

import functools
import inspect
import logging
import re
from collections.abc import Callable
from typing import Any

from nnslim.errors import HostError
from nnslim.optional import installed_version

OLDEST, NEWEST = (2, 3, 1), (2, 8)
_log = logging.getLogger("nnslim")
_MANUAL = ("self", "network", "plans_manager", "configuration_manager", "parameters")
_MANUAL += ("dataset_json", "trainer_name", "inference_allowed_mirroring_axes")
_KNOWN = {
    "initialize_from_trained_model_folder": ("self", "model_training_output_dir", "use_folds", "checkpoint_name"),
    "manual_initialization": _MANUAL,
    "_internal_predict_sliding_window_return_logits": ("self", "data", "slicers", "do_on_device"),
}


def nnunet_version() -> str:
    """Return the version of the installed nnU-Net; HostError where there is none."""
    return installed_version("nnunetv2", "nnU-Net v2", "nnunetv2", error=HostError)


@functools.lru_cache  # a warning once
def check_version(version: str) -> bool:
    """Return whether the source of this nnU-Net was read (2.3.1 to 2.8.x); warn of a newer one.

    Raises:
        HostError: it is older.
    """
    numbers = tuple(int(part) for part in re.findall(r"\d+", version)[:3])
    if numbers < OLDEST:
        raise HostError(f"nnU-Net {version} is installed; nnslim needs 2.3.1 or newer. Run pip install -U nnunetv2")
    if numbers[:2] > NEWEST:
        _log.warning("nnU-Net %s is newer than 2.8.x, the newest that nnslim knows: used as far as it fits", version)
    return numbers[:2] <= NEWEST


def check_signature(function: Callable[..., Any], name: str) -> None:
    """Raise a HostError for a method whose arguments differ from those of our replacement.

    Wrappers that other tools put around a method are looked through (functools.wraps); extra arguments with defaults
    are allowed.
    """
    parameters = inspect.signature(function).parameters
    found, known = tuple(parameters), _KNOWN[name]
    extra = [p for p in list(parameters.values())[len(known) :] if p.default is p.empty]
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    if found[: len(known)] != known or any(p.kind in named for p in extra):
        raise HostError(
            f"nnUNetPredictor.{name} takes ({', '.join(found)}), but ({', '.join(known)}) is expected; "
            f"nnslim does not support this nnU-Net and has changed nothing ({nnunet_version()})"
        )


def predictor_class() -> type:
    """Import nnU-Net's predictor and check it.

    Raises:
        HostError: nnU-Net is missing, of another version, or its methods differ. Nothing was changed.
    """
    check_version(nnunet_version())
    try:
        from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
    except ImportError as error:
        raise HostError(f"nnU-Net {nnunet_version()} is installed but cannot be imported: {error}") from error
    for name in _KNOWN:
        method = getattr(nnUNetPredictor, name, None)
        if method is None:
            raise HostError(
                f"nnUNetPredictor has no method {name}; nnslim does not support this nnU-Net ({nnunet_version()})"
            )
        check_signature(method, name)
    return nnUNetPredictor
