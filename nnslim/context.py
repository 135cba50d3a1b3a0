"""NNSlimContext: everything that loads a model inside the `with` block gets the slim one."""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping
from contextlib import ExitStack
from contextvars import ContextVar
from pathlib import Path
from types import TracebackType
from typing import Any

from nnslim.compression.config import RunConfig, SlimConfig, default_config, load_config
from nnslim.errors import HostError
from nnslim.hosts.nnunet.cases.export_patches import ExportPatches
from nnslim.hosts.nnunet.predict.predictor_patches import Session, predictor_patches
from nnslim.hosts.nnunet.train.sauron_trainer import training_patches
from nnslim.methods.base import MethodConfig

_log = logging.getLogger("nnslim")
_lock = threading.RLock()
_active: list[tuple[int, NNSlimContext]] = []  # the thread that entered it, and the context
_own: ContextVar[tuple[NNSlimContext, ...]] = ContextVar("nnslim_contexts", default=())
_installed: ExitStack | None = None


class _EntersItself(type):
    """Lets `with NNSlimContext:` mean `with NNSlimContext():`, as users of tucker-cnn write it."""

    def __enter__(cls) -> Any:
        return cls().__enter__()

    def __exit__(cls, *raised: Any) -> None:
        _own.get()[-1].__exit__(*raised)  # blocks of one thread or task end in turn, so it is the last one entered


class NNSlimContext(Session, metaclass=_EntersItself):
    """Compress every nnU-Net model that is loaded while the context is active.

        with NNSlimContext("tucker-balanced") as slim:
            totalsegmentator(input="ct.nii.gz", output="seg")
        print(slim.report)

    `with NNSlimContext:` and `NNSlimContext()` use the preset of `default_config`.

    Works for TotalSegmentator and for any code that uses nnUNetPredictor in this process. With a method that works in
    training (sauron), nnU-Net's `run_training` trains with it. Contexts nest: the inner one is in force. The patches
    are on nnU-Net's class and so affect the whole process: a thread or an asyncio task uses the context that it has
    entered itself or was started in, and other threads use the one entered last. Tasks of one thread never see each
    other's. Models loaded before the block stay dense; models loaded inside it stay slim after it.

    Attributes:
        config: the SlimConfig in force.
        report: what was done, model by model.
        kept: loaded models, with `run.keep_models`.
    """

    def __init__(
        self,
        config: SlimConfig | MethodConfig | Mapping[str, Any] | str | Path | None = None,
        *,
        images: str | Path | None = None,
    ) -> None:
        """Read the configuration; nothing is imported or patched before `with`.

        Args:
            config: SlimConfig, a method's configuration, a dictionary (tucker-cnn's is accepted), the path of a
                YAML file, or a preset name; None: `default_config`, tucker-auto with images and tucker-balanced else.
            images: folder of unlabelled calibration images for the models that are loaded inside the block, in place
                of `calibration.images`. They are used once per model; then the cache has the result.
        Raises:
            ConfigError: the configuration cannot be used.
        """
        config = default_config(images) if config is None else config
        super().__init__(load_config(config).with_images(None if images is None else Path(images)))
        self._entered = False

    def __enter__(self) -> NNSlimContext:
        """Patch nnU-Net.

        Raises:
            HostError: nnU-Net is missing or not supported, or this context is active already. Nothing is changed.
        """
        global _installed
        with _lock:
            if self._entered:
                raise HostError("this NNSlimContext is active already; make a new one for another block")
            if _installed is None:
                with ExitStack() as stack:  # leaves nothing behind if a later patch fails
                    exports = ExportPatches(_run_settings)
                    for patch in (*predictor_patches(_current, exports.apply), *training_patches(_training_now)):
                        patch.apply()
                        stack.callback(patch.undo)
                    stack.callback(exports.undo)
                    exports.apply()
                    _installed = stack.pop_all()
            _active.append((threading.get_ident(), self))
            _own.set((*_own.get(), self))
            self._entered = True
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Take the patches back with the last context; an exception of the block goes on."""
        global _installed
        with _lock:
            _active[:] = [(thread, context) for thread, context in _active if context is not self]
            _own.set(tuple(context for context in _own.get() if context is not self))
            self._entered = False
            self.kept.clear()
            if not _active and _installed is not None:
                stack, _installed = _installed, None
                stack.close()
        if error is None and not self.report.models and self.config.training is None:
            _log.warning("NNSlimContext: no nnU-Net model was loaded inside the block, so nothing was compressed")


def _run_settings() -> RunConfig | None:
    context = _current()
    return context.config.run if context is not None and context.config.apply else None


def _training_now() -> MethodConfig | None:
    context = _current()
    entry = context.config.training if context is not None and context.config.apply else None
    return None if entry is None else entry.settings


def _current() -> NNSlimContext | None:
    with _lock:
        own = [context for context in _own.get() if context._entered]  # a task may outlive the block it was started in
        others = [context for thread, context in _active if thread != threading.get_ident()]
        return (own or others or [None])[-1]
