"""Predict a folder with one loaded model, case by case."""

from __future__ import annotations

import functools
import json
import logging
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from nnslim.errors import ModelFolderError, NNSlimError, OutputError
from nnslim.files import make_folder, output_error
from nnslim.hosts.nnunet.cases import check_stage, find_cases, preprocess_case, silent
from nnslim.hosts.nnunet.compat import predictor_class
from nnslim.hosts.nnunet.folder import read_model_folder
from nnslim.hosts.nnunet.predictor import slim_predictor
from nnslim.hosts.nnunet.streamed import write_prediction
from nnslim.hosts.nnunet.window import window_logits
from nnslim.running.allocator import keep_heap
from nnslim.running.engine import Backend, Precision
from nnslim.work.config import SlimConfig, load_config
from nnslim.work.report import Report

_log = logging.getLogger("nnslim")


@dataclass(frozen=True)
class PredictSettings:
    """How to predict; the defaults are nnU-Net's, but on the CPU and without mirroring.

    Attributes:
        device: cpu, cuda or mps. step_size: tile step as a share of the patch. mirroring: at test time.
        overwrite: predict again what is there. folds: all that have the checkpoint if None.
        checkpoint: checkpoint_final.pth, else checkpoint_best.pth, if None. trust: see `load_checkpoint`.
        previous_stage: for a cascade, folder of the segmentations of the stage before.
        backend, precision, threads: see `nnslim.running.engine.Settings`; None: the config's.
        export: "streamed" or nnU-Net's own, "stock"; None: the config's.
    """

    device: str = "cpu"
    step_size: float = 0.5
    mirroring: bool = False
    overwrite: bool = False
    folds: list[str] | None = None
    checkpoint: str | None = None
    trust: bool = False
    previous_stage: Path | None = None
    backend: Backend | None = None
    precision: Precision | None = None
    threads: int | None = None
    export: Literal["streamed", "stock"] | None = None


@dataclass(frozen=True)
class CaseResult:
    """One line of manifest.jsonl.

    Attributes:
        name: case identifier (file name without channel and ending).
        status: "done", "there" (was predicted before) or "failed".
        seconds: from reading to writing.
        error: why it failed, one line.
    """

    name: str
    status: str
    seconds: float = 0.0
    error: str = ""


@dataclass
class _Session:
    config: SlimConfig
    report: Report


def load_predictor(model: Path, config: Any, settings: PredictSettings) -> Any:
    """Return an initialised nnUNetPredictor, compressed by `config` where one is given.

    Raises:
        ModelFolderError, ConfigError, HostError: what cannot be used.
    """
    cls = predictor_class()
    slim = SlimConfig() if config is None else load_config(config)
    chosen = {key: getattr(settings, key) for key in ("backend", "precision", "threads", "export")}
    slim = slim.model_copy(
        update={"run": slim.run.model_copy(update={key: value for key, value in chosen.items() if value is not None})}
    )
    # Reads and checks everything before nnU-Net does, which reports faults as bare KeyErrors and stack traces.
    source = read_model_folder(model, settings.folds, settings.checkpoint, trust=settings.trust)
    device = torch.device(settings.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ModelFolderError("device cuda was asked for, but torch finds no CUDA device; use --device cpu")
    with silent():
        predictor = cls(
            tile_step_size=settings.step_size,
            use_mirroring=settings.mirroring,
            device=device,
            allow_tqdm=False,
        )
        folds = tuple(int(fold) if fold.isdigit() else fold for fold in source.checkpoints)
        predictor.initialize_from_trained_model_folder(str(model), folds, source.checkpoint_name)
    slim_predictor(predictor, _Session(slim, Report()), str(model), Path(model))
    predictor.nnslim_export = slim.run.export
    if slim.run.backend != "stock":
        # On this object alone: nothing of nnU-Net's class is touched outside a context.
        predictor._internal_predict_sliding_window_return_logits = functools.partial(
            window_logits, predictor, batch=slim.run.tile_batch, contiguous=slim.run.export == "stock"
        )
    return predictor


def predict_folder(
    images: Path,
    output: Path,
    model: Path,
    config: Any = None,
    settings: PredictSettings | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[CaseResult]:
    """Predict every case of a folder; a case that fails is reported and the rest goes on.

    Args:
        images: folder of `<case>_0000<ending>` files, one per channel, or one such file.
        output: folder for `<case><ending>` and manifest.jsonl (one line per case and run).
        model: model folder, dense or slim.
        config: what NNSlimContext takes, to compress on the fly.
        settings: device, tiles, mirroring, folds.
        progress: called with (cases done, cases in all).
    Raises:
        InputError: no images. ModelFolderError, ConfigError: unusable model or config. OutputError: the output folder
        cannot be written. A single bad case raises nothing.
    """
    settings = settings or PredictSettings()
    images, output = Path(images), Path(output)
    predictor = load_predictor(Path(model), config, settings)
    ending = predictor.dataset_json["file_ending"]
    check_stage(predictor, settings.previous_stage)
    cases = find_cases(images, ending)
    make_folder(output)
    manifest = output / "manifest.jsonl"
    results = []
    with keep_heap():
        for number, (name, files) in enumerate(cases.items(), start=1):
            results.append(_one_case(predictor, name, files, output, settings))
            try:
                with manifest.open("a", encoding="utf-8") as stream:
                    stream.write(json.dumps(asdict(results[-1])) + "\n")
            except OSError as error:
                raise output_error(manifest, error) from error
            if progress is not None:
                progress(number, len(cases))
    return results


def _one_case(predictor: Any, name: str, files: list[Path], output: Path, settings: PredictSettings) -> CaseResult:
    ending = predictor.dataset_json["file_ending"]
    target = output / f"{name}{ending}"
    if target.exists() and not settings.overwrite:
        return CaseResult(name, "there")
    started = time.perf_counter()
    beside = output / f".{name}.{os.getpid()}"
    try:
        previous = settings.previous_stage and settings.previous_stage / f"{name}{ending}"
        _predict_case(predictor, files, previous, beside)
        Path(f"{beside}{ending}").replace(target)
    except NNSlimError as error:
        return CaseResult(name, "failed", error=str(error))
    except OSError as error:
        return CaseResult(name, "failed", error=str(output_error(target, error)))
    except (RuntimeError, MemoryError) as error:  # torch: out of memory, among others
        return CaseResult(name, "failed", error=one_line(error))
    finally:
        for leftover in output.glob(f"{beside.name}*"):
            leftover.unlink(missing_ok=True)
    return CaseResult(name, "done", round(time.perf_counter() - started, 3))


def one_line(error: Exception) -> str:
    """Return the kind and the text of an error that is not ours, for a list of failed cases."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def _predict_case(predictor: Any, files: list[Path], previous: Path | None, truncated: Path) -> None:
    """Read, preprocess, predict and write one case with nnU-Net's own parts, in this process."""
    streamed = getattr(predictor, "nnslim_export", "stock") == "streamed"
    data, properties = preprocess_case(predictor, files, previous, lean=streamed)
    with silent():
        logits = predictor.predict_logits_from_preprocessed_data(torch.from_numpy(data))
        del data
        try:
            write_prediction(predictor, logits, properties, truncated, streamed=streamed)
        except RuntimeError as error:  # SimpleITK's way to report a failed write
            raise OutputError(f"cannot write {truncated}: {' '.join(str(error).split())[-300:]}") from error
