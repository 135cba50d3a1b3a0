"""Where the time of a prediction goes: stages of the whole pipeline, case by case, and what starting costs."""

from __future__ import annotations

import itertools
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial, wraps
from pathlib import Path
from typing import Any

import torch

from nnslim.benchmark.alternated import Candidate, TimedJob, Timing
from nnslim.compression.config import SlimConfig
from nnslim.errors import NNSlimError
from nnslim.hosts.nnunet.cases.preprocess import find_cases
from nnslim.hosts.nnunet.predict.load import NNUNetModel, load_predictor
from nnslim.hosts.nnunet.predict.predict_settings import PredictSettings
from nnslim.patching import AttributePatch
from nnslim.prediction.case import Case

STAGES = ("read", "preprocess", "forward", "merge", "export", "write")
_STARTS = {
    "python": "pass",
    "torch": "import torch",
    "nnU-Net": "from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor",
    "nnslim predict": "from nnslim.hosts.nnunet import predict; predict.predictor_class()",
}


@dataclass(frozen=True)
class TimedPipeline:
    """A way to predict cases.

    Attributes:
        name: of the row. model: model folder. config: to compress by, None for the model as it is.
        settings: as for `nnslim predict`; backend "stock" is nnU-Net's own pipeline, its export included.
    """

    name: str
    model: Path
    config: SlimConfig | None = None
    settings: PredictSettings = field(default_factory=PredictSettings)

    def job(self, images: Path) -> TimedJob:
        """Return the job whose passes predict the cases of a folder in turn; a pass returns its stages."""
        return TimedJob(self.name, partial(prepare_pipeline, self, images))


def prepare_pipeline(pipeline: TimedPipeline, images: Path) -> Candidate:
    """Load the predictor and make its engine, so that no case pays for that.

    Raises:
        InputError: no images. ModelError, ConfigError, HostError: what cannot be used.
    """
    started = time.perf_counter()
    config = pipeline.config
    if config is not None:  # what is asked for is timed, also where it does not pay
        config = config.model_copy(update={"run": config.run.model_copy(update={"guard": False})})
    settings = pipeline.settings
    if settings.backend == "stock" and settings.export is None:
        settings = replace(settings, export="stock")
    predictor = load_predictor(pipeline.model, config, settings)
    cases = find_cases(images, predictor.dataset_json["file_ending"])
    loaded = time.perf_counter()
    _first_pass(predictor)
    facts = {
        "cases": len(cases),
        "load_s": round(loaded - started, 3),
        "engine_s": round(time.perf_counter() - loaded, 3),
        "backend": str(getattr(predictor.network, "backend", "") or "stock"),
    }
    names = itertools.cycle(cases)
    return Candidate(
        partial(_next_case, predictor, cases, names, pipeline.settings), facts, pipeline.settings.backend != "stock"
    )


def _first_pass(predictor: Any) -> None:
    from torch._dynamo import OptimizedModule

    from nnslim.hosts.nnunet.predict.predictor_patches import input_channels

    shape = (1, input_channels(predictor), *predictor.configuration_manager.patch_size)
    network = predictor.network
    for state in predictor.list_of_parameters:
        (network._orig_mod if isinstance(network, OptimizedModule) else network).load_state_dict(state)
        with torch.inference_mode():
            network(torch.zeros(shape, device=predictor.device))


def _next_case(
    predictor: Any, cases: dict[str, list[Path]], names: Iterator[str], settings: PredictSettings
) -> dict[str, Any]:
    name = next(names)
    case = Case(name, tuple(cases[name]), f"{name}{predictor.dataset_json['file_ending']}")
    with tempfile.TemporaryDirectory(prefix="nnslim-") as folder:
        return {"case": name, **profile_case(predictor, case, Path(folder), settings)}


def profile_case(predictor: Any, case: Case, folder: Path, settings: PredictSettings) -> dict[str, float]:
    """Predict one case as `nnslim predict` does and return the seconds of each of `STAGES`.

    merge is what the sliding window does beside the network; export is resampling to the image's grid and choosing
    labels. The stages add up to the whole.

    Args:
        predictor: from `load_predictor`. case: its files, and the name of the result. folder: to write into.
        settings: those that the predictor was loaded with.
    """
    spent = dict.fromkeys(("read", "case", "predict", "network", "write"), 0.0)
    reader = predictor.plans_manager.image_reader_writer_class
    cuda = predictor.device.type == "cuda"
    model = NNUNetModel(predictor, settings)
    patches = [
        AttributePatch(reader, "read_images", partial(_timed, spent, "read")),
        AttributePatch(reader, "write_seg", partial(_timed, spent, "write")),
        AttributePatch(model, "read", partial(_timed, spent, "case")),
        AttributePatch(model, "forward", partial(_timed, spent, "predict")),
    ]
    with ExitStack() as stack:
        for patch in patches:
            patch.apply()
            stack.callback(patch.undo)
        stack.enter_context(_timed_network(predictor.network, spent, cuda))
        started = time.perf_counter()
        model.write(case, model.forward(case, model.read(case)), folder / case.target)
        total = time.perf_counter() - started
    return {
        "read": spent["read"],
        "preprocess": spent["case"] - spent["read"],
        "forward": spent["network"],
        "merge": spent["predict"] - spent["network"],
        "export": total - spent["case"] - spent["predict"] - spent["write"],
        "write": spent["write"],
    }


def _timed(spent: dict[str, float], stage: str, original: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(original)
    def timed(*args: Any, **kwargs: Any) -> Any:
        started = time.perf_counter()
        try:
            return original(*args, **kwargs)
        finally:
            spent[stage] += time.perf_counter() - started

    return timed


@contextmanager
def _timed_network(network: torch.nn.Module, spent: dict[str, float], cuda: bool) -> Iterator[None]:
    """Add up the seconds of the network's calls."""
    started = [0.0]

    def begin(*_: Any) -> None:
        if cuda:
            torch.cuda.synchronize()
        started[0] = time.perf_counter()

    def end(*_: Any) -> None:
        if cuda:
            torch.cuda.synchronize()
        spent["network"] += time.perf_counter() - started[0]

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


def start_times(rounds: int = 2) -> dict[str, float]:
    """Return the least seconds to start Python, and to import torch, nnU-Net and what `nnslim predict` needs."""
    seconds: dict[str, list[float]] = {name: [] for name in _STARTS}
    for _ in range(rounds):
        for name, code in _STARTS.items():
            started = time.perf_counter()
            command = [sys.executable, "-W", "ignore", "-c", code]
            done = subprocess.run(command, capture_output=True, text=True, env=os.environ.copy(), check=False)
            if done.returncode:
                raise NNSlimError(f"'{code}' does not run: {(done.stderr.strip().splitlines() or ['no message'])[-1]}")
            seconds[name].append(time.perf_counter() - started)
    return {name: round(min(values), 3) for name, values in seconds.items()}
