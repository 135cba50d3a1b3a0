"""Gather what a report shows from a slim model and from its measurements."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from nnslim.benchmark.timings import read_benchmark
from nnslim.compression.record import RECORD, SlimRecord, read_record
from nnslim.compression.recover import Progress
from nnslim.compression.storage import bytes_of, in_half
from nnslim.errors import InputError, ModelError
from nnslim.evaluation.scores import read_scores
from nnslim.files import read_json_object, sha256_of, write_bytes
from nnslim.hosts.nnunet.model.model_files import find_folds
from nnslim.hosts.nnunet.model.trained_model import load_checkpoint
from nnslim.hosts.nnunet.predict.predict_settings import PredictSettings
from nnslim.report.page import render_report
from nnslim.report.page_data import FileFact, ReportData, Viewer
from nnslim.report.viewer import find_niivue


@dataclass(frozen=True)
class ReportSettings:
    """What goes into the page beside the model's own record.

    Attributes:
        images: cases to compare and to show. dense: model that the slim one was made from, to predict them with.
        labels: label maps of the images. predict: how images are predicted.
        benchmarks: folders or files of `nnslim benchmark`.
        scores: tables of `nnslim evaluate`, each FILE or NAME=FILE.
        others: more slim models to compare with, each FOLDER or NAME=FOLDER.
        viewer: embed NiiVue with the shown cases. niivue: its script; that of nilearn if None.
        viewer_limit: bytes that the volumes of a case may take in the page.
    """

    dense: Path | None = None
    images: Path | None = None
    labels: Path | None = None
    predict: PredictSettings = field(default_factory=PredictSettings)
    benchmarks: Sequence[Path] = ()
    scores: Sequence[str] = ()
    others: Sequence[str] = ()
    viewer: bool = False
    niivue: Path | None = None
    viewer_limit: int = 24_000_000


def write_page(
    model: Path, output: Path | None = None, settings: ReportSettings | None = None, progress: Progress | None = None
) -> tuple[Path, ReportData]:
    """Write the page about a slim model folder.

    Args:
        model: folder with nnslim.json. output: page to write, replaced if it is there; report.html in `model` if None.
        progress: called with (what is done, done, in all) where cases are predicted.
    Returns:
        The page, and what it shows.
    Raises:
        ModelError, InputError: something that was named cannot be used. OutputError: the page cannot be written.
    """
    output = Path(model) / "report.html" if output is None else Path(output)
    data = gather(Path(model), settings or ReportSettings(), progress)
    write_bytes(output, render_report(data).encode())
    return output, data


def gather(model: Path, settings: ReportSettings, progress: Progress | None = None) -> ReportData:
    """Return what the page shows. Arguments and errors as for `write_page`."""
    if settings.images is not None and settings.dense is None:
        raise InputError("to show cases (-i) both models predict them: name the dense one with --dense")
    if settings.viewer and settings.images is None:
        raise InputError("the viewer shows cases: name their folder with -i, and the dense model with --dense")
    script = find_niivue(settings.niivue) if settings.viewer else ""  # before anything is predicted
    record, labels = _record(model), _labels(read_json_object(model / "dataset.json"))
    files = _checkpoints(model, record)
    data = ReportData(
        model=_short_name(model),
        record=record,
        made=_date(datetime.datetime.now().timestamp()),
        folder=model.resolve().name,
        written=_date(max(path.stat().st_mtime for path in files)),
        files=[_file_fact(one, trust=settings.predict.trust) for one in files],
        benchmarks=tuple(read_benchmark(Path(path)) for path in settings.benchmarks),
        scores=tuple(read_scores(path, name or path.stem, labels) for name, path in map(_split, settings.scores)),
        others=_others(settings.others),
    )
    if settings.images is None or settings.dense is None:
        return data
    from nnslim.hosts.nnunet.judge.scenes import scenes_of_models

    scenes, agreement, names = scenes_of_models(
        settings.dense, model, settings.images, settings.labels, settings.predict, record.agreement, progress
    )
    viewer = Viewer(script, names, settings.viewer_limit) if settings.viewer else None
    return replace(data, record=replace(record, agreement=agreement), scenes=scenes, viewer=viewer)


def _record(model: Path) -> SlimRecord:
    try:
        return SlimRecord.from_dict(read_record(model), str(model / RECORD))
    except InputError as error:
        raise ModelError(f"{error}; a report needs the directory of a slim model") from error


def _checkpoints(model: Path, record: SlimRecord) -> list[Path]:
    name = str(record.facts.get("checkpoint"))
    files = [model / f"fold_{fold}" / name for fold in find_folds(model, name)]
    if not files:
        raise ModelError(f"{model} has no fold_X folder with {name}, which its nnslim.json names")
    return files


def _file_fact(path: Path, *, trust: bool) -> FileFact:
    content, name = load_checkpoint(path, trust=trust), f"{path.parent.name}/{path.name}"
    weights, optimiser = content["network_weights"], content.get("optimizer_state") is not None
    precision = "half" if in_half(weights) else "single"
    return FileFact(name, path.stat().st_size, sha256_of(path), bytes_of(weights), precision, optimiser)


def _date(seconds: float) -> str:
    return datetime.datetime.fromtimestamp(seconds).astimezone().strftime("%Y-%m-%d %H:%M %Z")


def _others(named: Sequence[str]) -> dict[str, SlimRecord]:
    found: dict[str, SlimRecord] = {}
    for text in named:
        name, path = _split(text)
        name = name or _short_name(path)
        if name in found:
            raise InputError(f"two models are named '{name}'; give one of them another name: NAME={path}")
        found[name] = _record(path)
    return found


def _short_name(model: Path) -> str:
    """Return the folder's name, or its parent's where it is called trainer__plans__configuration, as most are."""
    path = model.resolve()
    return path.parent.name if path.name.count("__") == 2 else path.name


def _split(text: str) -> tuple[str, Path]:
    """Return name and path of NAME=PATH; no name where there is only a path, which may hold an = itself."""
    name, found, rest = text.partition("=")
    return (name, Path(rest)) if found and "/" not in name and not Path(text).exists() else ("", Path(text))


def _labels(dataset: dict[str, Any]) -> dict[str, str]:
    """Return the name of each label by its number as text; regions have no number of their own."""
    labels = dataset.get("labels") or {}
    return {str(value): str(name) for name, value in labels.items() if isinstance(value, int)}
