"""Patches that let one process call `totalsegmentator()` for many images, beside others that do the same."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from nnslim.hosts.nnunet.cases.export_patches import ExportPatches
from nnslim.hosts.nnunet.model.compatibility import predictor_class
from nnslim.hosts.nnunet.predict.predictor_patches import OwnSession, predictor_patches
from nnslim.hosts.totalseg.task_weights import locked_home
from nnslim.patching import AttributePatch

# What reads or writes files in TotalSegmentator's home, each written in place.
_HOME = (
    "setup_totalseg",
    "get_config_key",
    "set_config_key",
    "increase_prediction_counter",
    "download_pretrained_weights",
)


@contextmanager
def many_images(session: OwnSession, threads: int | None) -> Iterator[Callable[..., Any]]:
    """Yield `totalsegmentator`, made to keep its models and to start no processes; nothing remains patched afterwards.

    Its results are the same: the same functions are called with the same arguments, in this process.

    Args:
        session: decides whether models are compressed and kept.
        threads: CPU threads of torch; None: all, as TotalSegmentator does.
    """
    from totalsegmentator import python_api

    with locked_home():
        python_api.setup_nnunet()  # nnU-Net's folders: some versions read them as they are imported
        python_api.setup_totalseg()
    import totalsegmentator.nnunet  # noqa: F401  patches nnU-Net's predictor; ours go on top of that

    exports = ExportPatches(lambda: session.config.run)
    patches = [
        *predictor_patches(lambda: session, exports.apply),
        AttributePatch(predictor_class(), "predict_from_files", functools.partial(_with_threads, threads)),
        *(AttributePatch(python_api, name, _locked) for name in _HOME if hasattr(python_api, name)),
    ]
    with ExitStack() as stack:
        stack.callback(exports.undo)
        exports.apply()  # before the others: the one that sets threads goes around it
        for patch in patches:
            patch.apply()
            stack.callback(patch.undo)
        yield python_api.totalsegmentator


def _with_threads(threads: int | None, original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def predict_from_files(*args: Any, **options: Any) -> Any:
        import torch

        if threads is not None:  # TotalSegmentator has just set all that the machine has
            torch.set_num_threads(threads)
        return original(*args, **options)

    return predict_from_files


def _locked(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def locked(*args: Any, **kwargs: Any) -> Any:
        with locked_home():
            return original(*args, **kwargs)

    return locked
