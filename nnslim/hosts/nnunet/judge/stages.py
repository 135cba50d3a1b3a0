"""Where the time of a prediction goes: stages of the whole pipeline, case by case, and what starting costs."""

from __future__ import annotations

import itertools
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial, wraps
from pathlib import Path
from typing import Any

import torch

from nnslim.benchmark.alternated import Candidate, Progress, TimedJob, Timing, measure_rounds
from nnslim.benchmark.passes import Way
from nnslim.compression.config import SlimConfig
from nnslim.errors import NNSlimError
from nnslim.files import temporary_folder
from nnslim.hosts.nnunet.cases.preprocess import list_cases
from nnslim.hosts.nnunet.predict.load import NNUNetModel, load_predictor
from nnslim.hosts.nnunet.predict.predict_settings import PredictSettings
from nnslim.patching import AttributePatch
from nnslim.prediction.case import Case
from nnslim.running.timing import alternated, timed

STAGES = ("read", "preprocess", "forward", "merge", "export", "write")
STARTS = {
    "python": "pass",
    "torch": "import torch",
    "nnU-Net": "from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor",
    "nnslim predict": "from nnslim.hosts.nnunet.predict.load import predictor_class; predictor_class()",
}


@dataclass(frozen=True)
class TimedPipeline:
    """A way to predict cases.

    Attributes:
        name: title of the row. model: directory of the model. config: to compress by, None for the model as it is.
        settings: as for `nnslim predict`; backend "stock" is nnU-Net's own pipeline, its export included.
    """

    name: str
    model: Path
    config: SlimConfig | None = None
    settings: PredictSettings = field(default_factory=PredictSettings)


def predict_settings(
    way: Way, folds: Sequence[str] | None = None, checkpoint: str | None = None, trust: bool = False
) -> PredictSettings:
    """Return the settings of a prediction that runs the network in that way."""
    run: dict[str, Any] = {"backend": way.backend, "precision": way.precision}
    run["threads"] = way.threads or torch.get_num_threads()
    return PredictSettings(way.device, folds=folds and list(folds), checkpoint=checkpoint, trust=trust, **run)


def time_pipelines(
    pipelines: Sequence[TimedPipeline], images: Path, cases: int, on_cpu: bool, progress: Progress | None = None
) -> list[Timing]:
    """Predict cases of a directory by each pipeline in turn, each in a process of its own; results are stages."""
    jobs = [TimedJob(one.name, partial(prepare_pipeline, one, images)) for one in pipelines]
    return measure_rounds(jobs, cases, warmups=0, limit_memory=on_cpu, progress=progress)


def prepare_pipeline(pipeline: TimedPipeline, images: Path) -> Candidate:
    """Load the predictor and make its engine, so that no case pays for that.

    Raises:
        InputError: no images. ModelError, ConfigError, HostError: what cannot be used.
    """
    config = pipeline.config
    if config is not None:  # what is asked for is timed, also where it does not pay
        config = config.model_copy(update={"run": config.run.model_copy(update={"guard": False})})
    settings = pipeline.settings
    if settings.backend == "stock" and settings.export is None:
        settings = replace(settings, export="stock")
    load_seconds, predictor = timed(lambda: load_predictor(pipeline.model, config, settings))
    cases = list_cases(images, predictor.dataset_json["file_ending"]).cases
    engine_seconds, _ = timed(lambda: _first_pass(predictor))
    facts = {
        "cases": len(cases),
        "load_s": round(load_seconds, 3),
        "engine_s": round(engine_seconds, 3),
        "backend": str(getattr(predictor.network, "backend", "") or "stock"),
    }
    names = itertools.cycle(cases)

    def next_case() -> dict[str, Any]:
        name = next(names)
        case = Case(name, tuple(cases[name]), f"{name}{predictor.dataset_json['file_ending']}")
        with temporary_folder() as directory:
            return {"case": name, **profile_case(predictor, case, directory, pipeline.settings)}

    return Candidate(next_case, facts, pipeline.settings.backend != "stock")


def _first_pass(predictor: Any) -> None:
    from nnunetv2.utilities.label_handling.label_handling import determine_num_input_channels
    from torch._dynamo import OptimizedModule

    plans, configuration, network = predictor.plans_manager, predictor.configuration_manager, predictor.network
    channels = determine_num_input_channels(plans, configuration, predictor.dataset_json)
    for state in predictor.list_of_parameters:
        (network._orig_mod if isinstance(network, OptimizedModule) else network).load_state_dict(state)
        with torch.inference_mode():
            network(torch.zeros((1, channels, *configuration.patch_size), device=predictor.device))


def profile_case(predictor: Any, case: Case, folder: Path, settings: PredictSettings) -> dict[str, float]:
    """Predict one case as `nnslim predict` does and return the seconds of each of `STAGES`.

    merge is the sliding window without the network; export is resampling to the image's grid and choosing labels. The
    stages add up to the whole.

    Args:
        predictor: from `load_predictor`. case: its files, and the name of the result. folder: directory to write into.
        settings: as given to `load_predictor`.
    """
    spent = dict.fromkeys(("read", "network", "write"), 0.0)
    reader = predictor.plans_manager.image_reader_writer_class
    cuda = predictor.device.type == "cuda"
    model = NNUNetModel(predictor, settings)
    patches = [
        AttributePatch(reader, "read_images", partial(_counted, spent, "read")),
        AttributePatch(reader, "write_seg", partial(_counted, spent, "write")),
    ]
    with ExitStack() as stack:
        for patch in patches:
            patch.apply()
            stack.callback(patch.undo)
        stack.enter_context(_timed_network(predictor.network, spent, cuda))
        reading, data = timed(lambda: model.read(case))
        predicting, logits = timed(lambda: model.forward(case, data))
        writing, _ = timed(lambda: model.write(case, logits, folder / case.target))
    return {
        "read": spent["read"],
        "preprocess": reading - spent["read"],
        "forward": spent["network"],
        "merge": predicting - spent["network"],
        "export": writing - spent["write"],
        "write": spent["write"],
    }


def _counted(spent: dict[str, float], stage: str, original: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(original)
    def counted(*args: Any, **kwargs: Any) -> Any:
        seconds, result = timed(lambda: original(*args, **kwargs))
        spent[stage] += seconds
        return result

    return counted


@contextmanager
def _timed_network(network: torch.nn.Module, spent: dict[str, float], cuda: bool) -> Iterator[None]:
    """Add up the seconds of the network's calls."""
    started = 0.0

    def begin(*_: Any) -> None:
        nonlocal started
        if cuda:
            torch.cuda.synchronize()
        started = time.perf_counter()

    def end(*_: Any) -> None:
        if cuda:
            torch.cuda.synchronize()
        spent["network"] += time.perf_counter() - started

    hooks = (network.register_forward_pre_hook(begin), network.register_forward_hook(end))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def stage_medians(timing: Timing) -> dict[str, float]:
    """Return the median seconds of each stage over the passes of a pipeline's job."""
    if not timing.results:
        return {}
    return {stage: statistics.median(result[stage] for result in timing.results) for stage in STAGES}


def start_times(rounds: int = 2, programs: Mapping[str, str] = STARTS) -> dict[str, float]:
    """Return the least seconds that each program takes in a new Python: nothing, and the imports of `STARTS`.

    Raises:
        NNSlimError: a program fails.
    """
    works = [partial(_run_python, code) for code in programs.values()]
    seconds = alternated(works, rounds, warmups=0)
    return {name: round(min(values), 3) for name, values in zip(programs, seconds, strict=True)}


def _run_python(code: str) -> None:
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=False)
    if done.returncode:
        raise NNSlimError(f"'{code}' fails: {(done.stderr.strip().splitlines() or ['no message'])[-1]}")
