"""Predict one image without nnU-Net's worker processes."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nnslim.errors import InputError
from nnslim.hosts.nnunet.cases.preprocess import list_cases


def one_image_here(wanted: Callable[[], bool], original: Callable[..., Any]) -> Callable[..., Any]:
    """Return `nnUNetPredictor.predict_from_files` that predicts a single image in this process.

    nnU-Net starts 12 processes to list a folder, others to preprocess and to export, and each imports torch and nnU-Net
    anew: for several images that is spread over them, for one the caller waits for it and nothing overlaps. nnU-Net's
    own `predict_from_files_sequential` calls the same functions with the same arguments: the files are the same.

    Args:
        wanted: asked at each call. original: what several images, and part of a folder, are left to.
    """

    @functools.wraps(original)
    def predict_from_files(
        self: Any,
        list_of_lists_or_source_folder: Any,
        output_folder_or_list_of_truncated_output_files: Any,
        save_probabilities: bool = False,
        overwrite: bool = True,
        num_processes_preprocessing: int = 3,
        num_processes_segmentation_export: int = 3,
        folder_with_segs_from_prev_stage: str | None = None,
        num_parts: int = 1,
        part_id: int = 0,
        **options: Any,
    ) -> Any:
        source, output = list_of_lists_or_source_folder, output_folder_or_list_of_truncated_output_files
        here = wanted() and num_parts == 1 and hasattr(self, "predict_from_files_sequential")
        alone = _only_case(source, output, self.dataset_json["file_ending"]) if here else None
        if alone is None:
            return original(
                self,
                source,
                output,
                save_probabilities,
                overwrite,
                num_processes_preprocessing,
                num_processes_segmentation_export,
                folder_with_segs_from_prev_stage,
                num_parts,
                part_id,
                **options,
            )
        return self.predict_from_files_sequential(
            *alone, save_probabilities, overwrite, folder_with_segs_from_prev_stage, **options
        )

    return predict_from_files


def _only_case(source: Any, output: Any, ending: str) -> tuple[list[list[str]], Any] | None:
    """Return the files of the only case, and where its result goes, as nnU-Net takes them; None if there is not one."""
    if not isinstance(source, str):
        if len(source) != 1:
            return None
        files = list(source)
    else:
        found = _listed(Path(source), ending)
        if found is None:
            return None
        name, files = found
        if isinstance(output, str):
            output = [str(Path(output) / name)]
    if output is not None:  # nnU-Net makes the folder only where it starts processes
        folder = Path(output) if isinstance(output, str) else Path(output[0]).parent
        folder.mkdir(parents=True, exist_ok=True)
    return files, output


def _listed(folder: Path, ending: str) -> tuple[str, list[list[str]]] | None:
    """Return the name and the files of the only case of a folder; None if nnU-Net may see it otherwise."""
    try:
        listing = list_cases(folder, ending)
    except InputError:  # nnU-Net says it in its own way
        return None
    strange = listing.problems or any(file.name.endswith(ending) for file in listing.left_out)
    if len(listing.cases) != 1 or strange or not folder.is_dir():
        return None
    ((name, files),) = listing.cases.items()
    return name, [[str(file) for file in files]]
