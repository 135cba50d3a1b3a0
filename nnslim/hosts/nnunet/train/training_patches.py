"""The patch on nnU-Net's `run_training`: inside a context, trainers get the context's training method."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from nnslim.methods.base import MethodConfig
from nnslim.methods.sauron import SauronConfig
from nnslim.patching import AttributePatch

_FINDERS = ("recursive_find_trainer_class_by_name", "recursive_find_python_class")  # nnU-Net 2.8, and before


def training_patches(current: Callable[[], MethodConfig | None]) -> list[AttributePatch]:
    """Return the patches, not yet applied.

    The look-up of the trainer class is replaced where `run_training` has it: whoever imported that function before
    gets the trainer, too. Processes that nnU-Net spawns for several GPUs do not; they find nnUNetTrainerSauron by name
    (nnUNet_extTrainer).

    Args:
        current: returns the settings of the training method in force for the calling thread, or None.
    """
    from nnunetv2.run import run_training as module

    def finding(original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def find(*arguments: Any, **options: Any) -> Any:
            config = current()
            found = _plain(original, arguments, options) if config is not None else original(*arguments, **options)
            if not isinstance(config, SauronConfig) or found is None:
                return found
            from nnslim.hosts.nnunet.train.sauron_trainer import sauron_trainer_class

            return sauron_trainer_class(config, found)

        return find

    return [AttributePatch(module, name, finding) for name in _FINDERS if hasattr(module, name)]


def _plain(original: Callable[..., Any], arguments: tuple, options: dict) -> Any:
    """Look up a trainer; nnUNetTrainerSauron, which nnU-Net may not know, by the name that it is built on."""
    given = [one.removesuffix("Sauron") if isinstance(one, str) else one for one in arguments]
    return original(*given, **{k: v.removesuffix("Sauron") if k == "trainer_name" else v for k, v in options.items()})
