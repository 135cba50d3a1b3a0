"""The patches by which nnU-Net's and TotalSegmentator's own prediction reads, preprocesses and exports in our way."""

from __future__ import annotations

import functools
import pkgutil
import queue
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from nnslim.compression.config import RunConfig
from nnslim.errors import InputError
from nnslim.hosts.nnunet.cases import write_labels as streamed
from nnslim.hosts.nnunet.cases.preprocess import list_cases
from nnslim.hosts.nnunet.model.compatibility import check_version, nnunet_version
from nnslim.patching import AttributePatch

_CONVERT = "convert_predicted_logits_to_segmentation_with_correct_shape"
# Modules that hold the functions by name, and call them by it or send that name to a process of theirs.
_PLACES = {
    "nnunetv2.inference.export_prediction": ("export_prediction_from_logits", _CONVERT, "resample_and_save"),
    "nnunetv2.inference.predict_from_raw_data": ("export_prediction_from_logits", _CONVERT),
    "nnunetv2.inference.data_iterators": ("preprocess_fromfiles_save_to_queue", "preprocess_fromnpy_save_to_queue"),
    "nnunetv2.training.nnUNetTrainer.nnUNetTrainer": ("export_prediction_from_logits", "resample_and_save"),
    "totalsegmentator.nnunet_runtime_patches": ("export_prediction_from_logits", _CONVERT),
}
_PREPROCESSOR = "nnunetv2.preprocessing.preprocessors.default_preprocessor"
_PREDICTOR = "nnunetv2.inference.predict_from_raw_data"
# nnU-Net's names of arguments.
_SOURCE = "list_of_lists_or_source_folder"
_ARGUMENTS = ("self", _SOURCE, "output_folder_or_list_of_truncated_output_files", "save_probabilities", "overwrite")
_ARGUMENTS += ("num_processes_preprocessing", "num_processes_segmentation_export")
_ARGUMENTS += ("folder_with_segs_from_prev_stage", "num_parts", "part_id")
# The methods of the predictor that `predict_from_files` is made of. A subclass with its own is left alone.
_STEPS = ("_manage_input_and_output_lists", "_internal_get_data_iterator_from_lists_of_filenames")
_STEPS += ("predict_from_data_iterator",)


class ExportPatches:
    """Replaces functions by name in the modules that are loaded, between `apply` and `undo`.

    TotalSegmentator brings its own copies of nnU-Net's functions, and writes them over nnU-Net's when it is imported,
    which may be inside the block: `apply` is called again before each prediction and takes in what is new. What was
    written over ours is left in force by `undo`.
    """

    def __init__(self, run: Callable[[], RunConfig | None]) -> None:
        """Prepare, without touching anything.

        Args:
            run: asked at each call for the settings in force; None: what was there is called.
        """
        self._run = run
        self._patches: dict[tuple[int, str], AttributePatch] = {}
        self._lock = threading.Lock()

    def apply(self) -> None:
        """Replace what is not replaced yet in any module that is loaded, of an nnU-Net whose source was read."""
        if not check_version(nnunet_version()):
            return
        with self._lock:
            for place, functions in _PLACES.items():
                for function in functions if (module := sys.modules.get(place)) is not None else ():
                    self._replace(module, function, self._choice)
            if (module := sys.modules.get(_PREPROCESSOR)) is not None:
                self._replace(module.DefaultPreprocessor, "run_case_npy", self._lean)
            if (module := sys.modules.get(_PREDICTOR)) is not None:
                self._replace(module.nnUNetPredictor, "predict_from_files", self._here)

    def undo(self) -> None:
        """Put back what was there, but not over what others have put in place of ours."""
        with self._lock, ExitStack() as stack:
            for patch in self._patches.values():
                if patch.in_force:
                    stack.callback(patch.undo)
            self._patches.clear()
            streamed.originals.clear()

    def _replace(self, owner: Any, name: str, make: Callable[..., Any]) -> None:
        before = self._patches.get((id(owner), name))
        if vars(owner).get(name) is None or (before is not None and before.in_chain):
            return  # this nnU-Net does not have it, or it is done
        patch = AttributePatch(owner, name, functools.partial(make, owner, name))
        patch.apply()
        self._patches[id(owner), name] = patch

    def _wanted(self) -> bool:
        run = self._run()
        return run is not None and run.export == "streamed"

    def _here(self, owner: Any, name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        """Predict a single image in this process.

        nnU-Net starts 12 processes to list a folder, others to preprocess and to export, and each imports torch and
        nnU-Net anew: for several images that is spread over them, for one the caller waits for it and nothing
        overlaps. Here nnU-Net's own method runs with what its workers do called in place of the workers. Its
        `predict_from_files_sequential` is another path, which before 2.8 leaves out the stage before a cascade.
        """

        @functools.wraps(original)
        def predict_from_files(*args: Any, **named: Any) -> Any:
            run = self._run()
            given = {**dict(zip(_ARGUMENTS, args, strict=False)), **named}
            alone = _only_case(given) if run is not None and run.processes == "auto" else None
            if alone is None or any(getattr(type(given["self"]), name) is not getattr(owner, name) for name in _STEPS):
                return original(*args, **named)
            with _in_process(given["self"], alone):
                return original(*args, **named)

        return predict_from_files

    def _choice(self, module: Any, name: str, original: Callable[..., Any]) -> Exporter:
        streamed.originals[f"{module.__name__}.{name}"] = original
        return Exporter(original, getattr(streamed, name), self._wanted)

    def _lean(self, owner: Any, name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def run_case_npy(*given: Any, **named: Any) -> Any:
            return streamed.call_lean(original, given, named) if self._wanted() else original(*given, **named)

        return run_case_npy


class Exporter:
    """Ours or the function that was there, chosen at each call, or when it is sent to another process.

    What is sent is a name: a process that starts afresh knows no patches and no contexts.
    """

    def __init__(self, original: Callable[..., Any], ours: Callable[..., Any], wanted: Callable[[], bool]) -> None:
        """Hold both functions."""
        functools.update_wrapper(self, original)
        self._original, self._ours, self._wanted = original, ours, wanted

    def __call__(self, *given: Any, **named: Any) -> Any:
        """Call the one that is wanted now."""
        return (self._ours if self._wanted() else self._original)(*given, **named)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        chosen = self._ours if self._wanted() else self._original
        return pkgutil.resolve_name, (f"{chosen.__module__}:{chosen.__qualname__}",)


@contextmanager
def _in_process(predictor: Any, files: list[list[str]]) -> Iterator[None]:
    """Let `predict_from_files` of nnU-Net or TotalSegmentator do here, for one case, what it starts processes for."""
    import nnunetv2.inference.data_iterators as iterators
    import nnunetv2.inference.predict_from_raw_data as host

    configuration, plans, dataset = predictor.configuration_manager, predictor.plans_manager, predictor.dataset_json
    listed = predictor._manage_input_and_output_lists

    def preprocessed(cases: Any, stages: Any, outputs: Any, processes: int) -> Iterator[dict[str, Any]]:
        items: queue.Queue[dict[str, Any]] = queue.Queue()
        given = (items, threading.Event(), threading.Event(), predictor.verbose_preprocessing)  # done, to be given up
        iterators.preprocess_fromfiles_save_to_queue(cases, stages, outputs, plans, dataset, configuration, *given)
        while not items.empty():
            yield items.get()

    def predicted(items: Iterator[dict[str, Any]], probabilities: bool = False, processes: int = 1, *more: Any) -> Any:
        rest = (probabilities, *((host.default_num_processes, *more) if more else ()))  # TotalSegmentator has one more
        results = []
        for item in items:
            logits = predictor.predict_logits_from_preprocessed_data(item["data"]).cpu().detach().numpy()
            properties, output = item["data_properties"], item["ofile"]
            if output is None:
                labels = plans, configuration, predictor.label_manager
                results.append(getattr(host, _CONVERT)(logits, *labels, properties, *rest))
            else:
                where = configuration, plans, dataset, output
                results.append(host.export_prediction_from_logits(logits, properties, *where, *rest))
        host.compute_gaussian.cache_clear()
        host.empty_cache(predictor.device)
        return results

    steps = (lambda source, *rest, **named: listed(files, *rest, **named)), preprocessed, predicted
    vars(predictor).update(zip(_STEPS, steps, strict=True))
    try:
        yield
    finally:
        for name in _STEPS:
            vars(predictor).pop(name, None)


def _only_case(given: dict[str, Any]) -> list[list[str]] | None:
    """Return the files of the only case, as nnU-Net takes them; None if there is not one."""
    predictor, source = given["self"], given.get(_SOURCE)
    if given.get("num_parts", 1) != 1 or source is None:
        return None
    if not isinstance(source, str):
        return source if isinstance(source, list) and len(source) == 1 else None
    ending = predictor.dataset_json["file_ending"]
    try:
        listing = list_cases(Path(source), ending)
    except InputError:  # nnU-Net says it in its own way
        return None
    strange = listing.problems or any(file.name.endswith(ending) for file in listing.left_out)
    if len(listing.cases) != 1 or strange or not Path(source).is_dir():
        return None
    return [list(map(str, files)) for files in listing.cases.values()]
