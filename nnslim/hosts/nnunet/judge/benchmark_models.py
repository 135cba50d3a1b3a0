"""Benchmark of model folders: dense and slim, on several backends, one pass and the whole pipeline."""

from __future__ import annotations

import dataclasses
import importlib.util
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nnslim.benchmark.alternated import Progress, TimedJob, Timing, measure_rounds
from nnslim.benchmark.passes import Way, device_name, job_of, keep_network, way_columns
from nnslim.benchmark.roofline import measure_roofline
from nnslim.benchmark.timing_figures import dice_figure, stage_figure, time_figure
from nnslim.benchmark.timings import (
    DENSE,
    REPORT,
    Row,
    compare,
    read_dice,
    timed_row,
    write_timing_report,
    write_timings,
)
from nnslim.compression.compress_network import compress
from nnslim.compression.config import SlimConfig, load_config
from nnslim.errors import ConfigError, OutputError
from nnslim.files import make_folder
from nnslim.hosts.nnunet.cases.calibration_tiles import calibration_of
from nnslim.hosts.nnunet.judge.stages import TimedPipeline, stage_medians, start_times
from nnslim.hosts.nnunet.model.trained_model import TrainedModel, build_network, input_shape, read_trained_model
from nnslim.hosts.nnunet.predict.predict_settings import PredictSettings
from nnslim.running.engine import BACKENDS


@dataclass(frozen=True)
class BenchmarkSettings:
    """What is measured.

    Attributes:
        ways: on which every network is run. rounds: counted passes of each row. batch_size: patches per pass.
        cases: of the whole pipeline, with images. folds, checkpoint, trust: see `read_model_folder`.
        dice: CSV file with the columns name and dice, to be drawn against time.
    """

    ways: tuple[Way, ...] = ()
    rounds: int = 5
    batch_size: int = 1
    cases: int = 3
    folds: Sequence[str] | None = None
    checkpoint: str | None = None
    trust: bool = False
    dice: Path | None = None


@dataclass(frozen=True)
class Measured:
    """Rows of the table, and of each pipeline the seconds of its stages; `starts`: seconds to start and import."""

    rows: list[Row]
    profiles: dict[str, dict[str, float]]
    starts: dict[str, float]
    failed: list[str]


def ways_of(
    backends: Sequence[str], precisions: Sequence[str], threads: int | None = None, device: str = "cpu"
) -> tuple[Way, ...]:
    """Return all that can be combined: other precisions than f32 on OpenVINO alone.

    Args:
        backends: all that are installed here, but torch.compile, if empty. precisions: f32 alone if empty.
    """
    found = importlib.util.find_spec("openvino") is not None and device == "cpu"
    names = list(backends) or ["stock", "eager", *(["openvino"] if found else [])]
    return tuple(
        Way(name, precision, threads, device, autocast=device == "cuda")
        for name in names
        for precision in precisions or ("f32",)
        if precision == "f32" or name == "openvino"
    )


def benchmark_models(
    model: Path,
    configs: Sequence[str],
    output: Path,
    settings: BenchmarkSettings,
    *,
    images: Path | None = None,
    progress: Progress | None = None,
) -> Measured:
    """Measure a model and its slim forms side by side; write benchmark.csv, benchmark.json and pictures.

    Args:
        model: dense model folder (a slim one is measured as it is).
        configs: presets, YAML files, or folders of models that were compressed before.
        output: folder; must not hold a benchmark yet. settings: ways, rounds, batch size, folds.
        images: cases for the stages of the whole pipeline; None: forward passes alone.
        progress: called with (what is measured, turns done, turns in all).
    Raises:
        ModelError, ConfigError: unusable model or config. InputError: the Dice table cannot be read.
        OutputError: a benchmark is there already, or it cannot be written. A row that fails raises nothing.
    """
    output = Path(output)
    if (output / "benchmark.csv").exists():
        raise OutputError(f"{output / 'benchmark.csv'} exists and is not overwritten; choose another folder")
    dice = {} if settings.dice is None else read_dice(settings.dice)
    source = read_trained_model(model, settings.folds, settings.checkpoint, trust=settings.trust)
    variants = _named(configs)
    make_folder(output)
    ways = settings.ways or ways_of((), ())
    shape = (settings.batch_size, *input_shape(source)[1:])
    threads = ways[0].threads
    roofline = measure_roofline(threads)
    with tempfile.TemporaryDirectory(prefix="nnslim-") as folder:
        networks = _networks(source, variants, Path(folder), settings.trust, progress)
        plan = _rows_to_measure(networks, ways)
        jobs = [job_of(f"{name}, {way.backend} {way.precision}", networks[name], shape, way) for name, way in plan]
        on_cpu = all(way.device == "cpu" for way in ways)
        timings = measure_rounds(jobs, settings.rounds, limit_memory=on_cpu, progress=progress)
    common = {"nnunet_path": str(model), "load_params": True, "batch_size": shape[0], "patch_size": shape[1:]}
    rows = []
    for (name, way), timing in zip(plan, timings, strict=True):
        about = {**common, **way_columns(way), **_tucker_columns(variants.get(name)), "name": name}
        rows.append(timed_row(timing, {**about, "dice": dice.get(name, "")}))
    compare(rows)
    profiles, starts, piped = {}, {}, []
    if images is not None:
        piped = _pipelines(model, variants, ways, images, settings, progress)
        profiles = {timing.name: stage_medians(timing) for timing in piped if timing.results}
        starts = start_times()
    _add_end_to_end(rows, profiles)
    write_timings(output / "benchmark.csv", rows)
    more = {"stages": profiles, "starts": starts, "cases": [_case_record(timing) for timing in piped]}
    write_timing_report(output / REPORT, rows, timings, roofline, more)
    title = f"{source.plans.get('dataset_name', Path(model).name)}, {device_name(ways[0].device)}"
    time_figure(rows, roofline if on_cpu else None, output / "time.png", title=title)
    dice_figure(rows, output / "dice.png", title=title)
    stage_figure(profiles, output / "stages.png", title=title)
    failed = [f"{timing.name}: {timing.error}" for timing in (*timings, *piped) if timing.error]
    return Measured(rows, profiles, starts, failed)


def _named(configs: Sequence[str]) -> dict[str, SlimConfig | Path]:
    """Return the configs and slim folders by a short name each."""
    made: dict[str, SlimConfig | Path] = {}
    for config in configs:
        path = Path(config)
        is_folder = (path / "plans.json").is_file()
        name = (path.resolve().parent.name if is_folder else path.stem) or config
        if name in made or name == DENSE:
            raise ConfigError(f"two networks would be named '{name}' in the table; rename one of the files or folders")
        made[name] = path if is_folder else load_config(config)
    return made


def _networks(
    source: TrainedModel,
    variants: dict[str, SlimConfig | Path],
    folder: Path,
    trust: bool,
    progress: Progress | None,
) -> dict[str, Path]:
    """Write each network for the processes that measure it; returns the files by name."""
    dense = build_network(source)
    files = {DENSE: folder / "0.pt"}
    keep_network(dense, files[DENSE])
    for number, (name, variant) in enumerate(variants.items(), start=1):
        if progress is not None:
            progress(f"compressing: {name}", number - 1, len(variants))
        files[name] = folder / f"{number}.pt"
        keep_network(_slim(source, dense, variant, trust, progress), files[name])
    return files


def _slim(
    source: TrainedModel, dense: nn.Module, variant: SlimConfig | Path, trust: bool, progress: Progress | None
) -> nn.Module:
    if isinstance(variant, Path):
        return build_network(read_trained_model(variant, trust=trust))
    with calibration_of(source, variant) as data:
        return compress(dense, source.weights[:1], variant, input_shape(source), data=data, progress=progress).network


def _rows_to_measure(networks: dict[str, Path], ways: Sequence[Way]) -> list[tuple[str, Way]]:
    """Return (network, way): the references on the dense network first, then all with all."""
    first = ways[0]
    references = [dataclasses.replace(first, backend="stock", precision="f32")]
    if first.device == "cpu":
        references.append(dataclasses.replace(first, backend="openvino-plain", precision="f32"))
    rows = [(DENSE, way) for way in references] + [(name, way) for name in networks for way in ways]
    return list(dict.fromkeys(rows))


def _tucker_columns(variant: SlimConfig | Path | None) -> Row:
    """Return the predecessor's columns about ranks, where one Tucker step is all there is."""
    entries = variant.methods if isinstance(variant, SlimConfig) and variant.apply else ()
    chosen = [entry.settings for entry in entries if entry.method == "tucker"]
    columns: Row = {"apply_tucker": bool(chosen)}
    if len(chosen) == 1:
        columns |= {key: getattr(chosen[0], key) for key in ("rank_mode", "rank_min", "decompose", "verbose")}
        columns["rank_factor"] = chosen[0].rank_factor if chosen[0].rank_mode == "relative" else ""
    return columns


def _pipelines(
    model: Path,
    variants: dict[str, SlimConfig | Path],
    ways: Sequence[Way],
    images: Path,
    settings: BenchmarkSettings,
    progress: Progress | None,
) -> list[Timing]:
    """Predict cases with stock nnU-Net and with every network on every backend that `nnslim predict` knows."""
    chosen = list(dict.fromkeys([dataclasses.replace(ways[0], backend="stock", precision="f32"), *ways]))
    jobs: list[TimedJob] = []
    for name, variant in {DENSE: None, **variants}.items():
        for way in chosen:
            if way.backend in BACKENDS and (way.backend != "stock" or name == DENSE):
                folder, config = (variant, None) if isinstance(variant, Path) else (model, variant)
                predicting = predict_settings(way, settings.folds, settings.checkpoint, settings.trust)
                title = f"{name}, {way.backend} {way.precision}"
                jobs.append(TimedPipeline(title, Path(folder), config, predicting).job(Path(images)))
    on_cpu = ways[0].device == "cpu"
    return measure_rounds(jobs, settings.cases, warmups=0, limit_memory=on_cpu, progress=progress)


def predict_settings(
    way: Way, folds: Sequence[str] | None = None, checkpoint: str | None = None, trust: bool = False
) -> PredictSettings:
    """Return the settings of a prediction that runs the network in that way."""
    threads = way.threads or torch.get_num_threads()
    chosen: dict[str, Any] = {"backend": way.backend, "precision": way.precision, "threads": threads}
    wanted = None if folds is None else list(folds)
    return PredictSettings(way.device, folds=wanted, checkpoint=checkpoint, trust=trust, **chosen)


def _add_end_to_end(rows: Sequence[Row], profiles: dict[str, dict[str, float]]) -> None:
    for row in rows:
        stages = profiles.get(f"{row['name']}, {str(row['backend']).partition(':')[0]} {row['precision']}")
        if stages:
            row["end_to_end_s"] = round(sum(stages.values()), 3)


def _case_record(timing: Timing) -> Row:
    return {
        "name": timing.name,
        "process_start_s": round(timing.start_seconds, 3),
        "prepare_s": round(timing.prepare_seconds, 3),
        "peak_memory_mb": round(timing.peak_memory / 1e6, 1),
        "facts": timing.facts,
        "cases": timing.results,
        "error": timing.error,
    }
