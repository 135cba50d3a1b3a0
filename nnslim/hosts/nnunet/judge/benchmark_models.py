"""Benchmark of trained models: dense and slim, on several backends, one pass and the whole pipeline."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from torch import nn

from nnslim.benchmark.alternated import Progress, Timing
from nnslim.benchmark.grid import measure_points
from nnslim.benchmark.passes import Way, device_name, way_columns
from nnslim.benchmark.roofline import measure_roofline
from nnslim.benchmark.timing_figures import save_timing_figures
from nnslim.benchmark.timings import COLUMNS, DENSE, REPORT, Row, add_dice, compare, read_dice, write_timing_report
from nnslim.compression.compress_network import compress
from nnslim.compression.config import SlimConfig, load_config
from nnslim.errors import ConfigError, OutputError
from nnslim.files import make_folder
from nnslim.hosts.nnunet.cases.calibration_tiles import calibration_of
from nnslim.hosts.nnunet.judge.stages import (
    TimedPipeline,
    predict_settings,
    stage_medians,
    start_times,
    time_pipelines,
)
from nnslim.hosts.nnunet.model.trained_model import build_network, input_shape, read_trained_model
from nnslim.running.engine import BACKENDS
from nnslim.tables import write_table


@dataclass(frozen=True)
class BenchmarkSettings:
    """What is measured.

    Attributes:
        ways: how every network is run. rounds: counted passes of each row. batch_size: patches per pass.
        cases: number of cases for the whole pipeline, with images. folds, checkpoint, trust: see `read_trained_model`.
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
class ModelPoint:
    """A point of the benchmark: a network of the table and how it is run.

    Attributes:
        network: "dense", or the name of a slim form. model: directory of the dense model.
        variant: how the slim form is made, or the directory of a slim model; None: dense.
    """

    network: str
    way: Way
    model: Path
    variant: SlimConfig | Path | None = None
    batch_size: int = 1

    @property
    def name(self) -> str:
        """Name of its passes and of its pipeline."""
        return f"{self.network}, {self.way.backend} {self.way.precision}"

    def columns(self) -> Row:
        """Return what the table says about the point; ranks as tucker-cnn has them, where there is one Tucker step."""
        entries = self.variant.methods if isinstance(self.variant, SlimConfig) and self.variant.apply else ()
        chosen = [entry.settings for entry in entries if entry.method == "tucker"]
        columns: Row = {"nnunet_path": str(self.model), "load_params": True, "batch_size": self.batch_size}
        columns |= {**way_columns(self.way), "name": self.network, "apply_tucker": bool(chosen)}
        if len(chosen) == 1:
            columns |= {key: getattr(chosen[0], key) for key in ("rank_mode", "rank_min", "decompose", "verbose")}
            columns["rank_factor"] = chosen[0].rank_factor if chosen[0].rank_mode == "relative" else ""
        return columns


@dataclass(frozen=True)
class ModelBenchmark:
    """Rows of the table, and of each pipeline the seconds of its stages; `starts`: seconds to start and import."""

    rows: list[Row]
    profiles: dict[str, dict[str, float]]
    starts: dict[str, float]
    failed: list[str]


def ways_of(
    backends: Sequence[str], precisions: Sequence[str], threads: int | None = None, device: str = "cpu"
) -> tuple[Way, ...]:
    """Return all combinations that can run: precisions other than f32 on OpenVINO alone.

    Args:
        backends: if empty, all that are installed here except torch.compile. precisions: if empty, f32.
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
) -> ModelBenchmark:
    """Measure a model and its slim forms side by side; write benchmark.csv, benchmark.json and figures.

    Args:
        model: directory of the dense model (a slim one is measured as it is).
        configs: presets, YAML files, or directories of slim models.
        output: directory; must not hold a benchmark yet.
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
    ways = settings.ways or ways_of((), ())
    points = _points(Path(model), {DENSE: None, **_named(configs)}, ways, settings.batch_size)
    make_folder(output)
    on_cpu, roofline = ways[0].device == "cpu", measure_roofline(ways[0].threads)
    dense, shape = build_network(source), input_shape(source)
    starts = {} if images is None else start_times()  # first: what fails here loses no measurement

    def build(point: ModelPoint) -> tuple[nn.Module, tuple[int, ...]]:
        network = dense
        if isinstance(point.variant, Path):
            network = build_network(read_trained_model(point.variant, trust=settings.trust))
        elif point.variant is not None:
            with calibration_of(source, point.variant) as data:
                made = compress(dense, source.weights[:1], point.variant, shape, data=data, progress=progress)
                network = made.network
        return network, (settings.batch_size, *shape[1:])

    rows, timings = measure_points(points, build, settings.rounds, progress)
    piped: list[Timing] = []
    if images is not None:
        pipelines = [_pipeline(point, settings) for point in points if _has_pipeline(point)]
        piped = time_pipelines(pipelines, Path(images), settings.cases, on_cpu, progress)
    profiles = {timing.name: stage_medians(timing) for timing in piped if timing.results}
    for point, row in zip(points, rows, strict=True):
        if point.name in profiles:
            row["end_to_end_s"] = round(sum(profiles[point.name].values()), 3)
    add_dice(rows, dice)
    compare(rows)
    write_table(rows, output / "benchmark.csv", COLUMNS)
    more = {"stages": profiles, "starts": starts, "cases": [_case_record(timing) for timing in piped]}
    write_timing_report(output / REPORT, rows, timings, roofline, more)
    title = f"{source.plans.get('dataset_name', Path(model).name)}, {device_name(ways[0].device)}"
    save_timing_figures(rows, roofline if on_cpu else None, lambda kind: output / f"{kind}.png", profiles, title)
    failed = [f"{timing.name}: {timing.error}" for timing in (*timings, *piped) if timing.error]
    return ModelBenchmark(rows, profiles, starts, failed)


def _named(configs: Sequence[str]) -> dict[str, SlimConfig | Path]:
    """Return the configs and slim models by a short name each."""
    made: dict[str, SlimConfig | Path] = {}
    for config in configs:
        path = Path(config)
        is_model = (path / "plans.json").is_file()
        name = (path.resolve().parent.name if is_model else path.stem) or config
        if name in made or name == DENSE:
            raise ConfigError(f"two networks would be named '{name}' in the table; rename one of the files or folders")
        made[name] = path if is_model else load_config(config)
    return made


def _points(
    model: Path, networks: dict[str, SlimConfig | Path | None], ways: Sequence[Way], batch_size: int
) -> list[ModelPoint]:
    """Return the references on the dense network first, then every network in every way."""
    references = ["stock", *(["openvino-plain"] if ways[0].device == "cpu" else [])]
    plan = [(DENSE, replace(ways[0], backend=backend, precision="f32")) for backend in references]
    plan += [(name, way) for name in networks for way in ways]
    return [ModelPoint(name, way, model, networks[name], batch_size) for name, way in dict.fromkeys(plan)]


def _has_pipeline(point: ModelPoint) -> bool:
    """Whether `nnslim predict` has the backend; stock nnU-Net is timed on the dense model alone."""
    return point.way.backend in BACKENDS and (point.way.backend != "stock" or point.network == DENSE)


def _pipeline(point: ModelPoint, settings: BenchmarkSettings) -> TimedPipeline:
    variant = point.variant
    model, config = (variant, None) if isinstance(variant, Path) else (point.model, variant)
    predicting = predict_settings(point.way, settings.folds, settings.checkpoint, settings.trust)
    return TimedPipeline(point.name, model, config, predicting)


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
