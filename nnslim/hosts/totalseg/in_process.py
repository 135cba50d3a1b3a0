"""Patches that let one process call `totalsegmentator()` for many images, beside others that do the same."""

from __future__ import annotations

import fcntl
import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from nnslim.files import make_folder
from nnslim.hosts.nnunet.cases import find_cases
from nnslim.hosts.nnunet.compat import predictor_class
from nnslim.hosts.nnunet.export_patches import ExportPatches
from nnslim.hosts.nnunet.predictor import OwnSession, predictor_patches
from nnslim.hosts.totalseg.weights import totalseg_home
from nnslim.surgery.patching import AttributePatch

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

    exports = ExportPatches(lambda: session.config.run.export == "streamed")
    patches = [
        *predictor_patches(lambda: session, exports.apply),
        AttributePatch(predictor_class(), "predict_from_files", functools.partial(_in_process, threads)),
        *(AttributePatch(python_api, name, _locked) for name in _HOME if hasattr(python_api, name)),
    ]
    with ExitStack() as stack:
        for patch in patches:
            patch.apply()
            stack.callback(patch.undo)
        stack.callback(exports.undo)
        yield python_api.totalsegmentator


def _in_process(threads: int | None, original: Callable[..., Any]) -> Callable[..., Any]:
    """nnU-Net starts a process that preprocesses and another one that exports, for one image: seconds each."""

    @functools.wraps(original)
    def predict_from_files(
        self: Any,
        list_of_lists_or_source_folder: Any,
        output_folder_or_list_of_truncated_output_files: Any,
        save_probabilities: bool = False,
        overwrite: bool = True,
        num_processes_preprocessing: int = 1,
        num_processes_segmentation_export: int = 1,
        folder_with_segs_from_prev_stage: str | None = None,
        num_parts: int = 1,
        part_id: int = 0,
        **options: Any,
    ) -> Any:
        import torch

        source, output = list_of_lists_or_source_folder, output_folder_or_list_of_truncated_output_files
        if threads is not None:  # TotalSegmentator has just set all that the machine has
            torch.set_num_threads(threads)
        if not (isinstance(source, str) and isinstance(output, str) and num_parts == 1):
            options |= {"num_parts": num_parts, "part_id": part_id}
            options["num_processes_preprocessing"] = num_processes_preprocessing
            options["num_processes_segmentation_export"] = num_processes_segmentation_export
            options["folder_with_segs_from_prev_stage"] = folder_with_segs_from_prev_stage
            return original(self, source, output, save_probabilities, overwrite, **options)
        cases = find_cases(Path(source), self.dataset_json["file_ending"])  # nnU-Net starts 12 processes to list them
        return self.predict_from_files_sequential(
            [[str(file) for file in files] for files in cases.values()],
            [str(Path(output) / name) for name in cases],
            save_probabilities,
            overwrite,
            folder_with_segs_from_prev_stage,
            **options,
        )

    return predict_from_files


def _locked(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def locked(*args: Any, **kwargs: Any) -> Any:
        with locked_home():
            return original(*args, **kwargs)

    return locked


@contextmanager
def locked_home() -> Iterator[None]:
    """Hold TotalSegmentator's home against other workers: it writes its files in place."""
    home = totalseg_home()
    make_folder(home)
    with (home / ".nnslim.lock").open("w") as stream:
        with suppress(OSError):  # a file system without locks; then as TotalSegmentator alone
            fcntl.flock(stream, fcntl.LOCK_EX)
        yield
