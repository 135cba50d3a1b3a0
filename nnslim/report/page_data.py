"""All that the report's page shows, and its tables as plain values for the template."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Any

import numpy as np

from nnslim.benchmark.timing_figures import QualityPoint
from nnslim.benchmark.timings import DENSE, Benchmark, Row, number_in, way_of
from nnslim.compression.record import SlimRecord
from nnslim.errors import ConfigError
from nnslim.evaluation.agreement import Agreement
from nnslim.evaluation.scores import ScoreTable
from nnslim.methods.base import method_named
from nnslim.network.cost import Counts
from nnslim.report.number_format import dice
from nnslim.report.viewer import Scene

View = dict[str, Any]
_FEW = 6  # classes whose Dice is listed under a case


@dataclass(frozen=True)
class FileFact:
    """A file of the model.

    Attributes:
        name, bytes, sha256: of the file. weights: bytes of the weights alone. precision: of these, half or single.
        optimiser: the file holds an optimiser's state as well.
    """

    name: str
    bytes: int
    sha256: str
    weights: int = 0
    precision: str = "single"
    optimiser: bool = False


@dataclass(frozen=True)
class Viewer:
    """NiiVue's script, label -> name, and the bytes that the volumes of a case may take in the page."""

    script: str
    labels: Mapping[int, str]
    limit: int = 24_000_000


@dataclass(frozen=True)
class ReportData:
    """All that the page shows.

    Attributes:
        model: a short name. record: its nnslim.json. made: date of the page. folder: name of the model folder.
        written: date of the checkpoint file.
        files: the checkpoints.
        benchmarks: timings. scores: against labels, of any predictions. others: more models to compare with, by name.
        scenes: cases to show. viewer: None without one.
    """

    model: str
    record: SlimRecord
    made: str
    folder: str = ""
    written: str = ""
    files: Sequence[FileFact] = ()
    benchmarks: Sequence[Benchmark] = ()
    scores: Sequence[ScoreTable] = ()
    others: Mapping[str, SlimRecord] = field(default_factory=dict)
    scenes: Sequence[Scene] = ()
    viewer: Viewer | None = None


@dataclass(frozen=True)
class Pair:
    """The same pass by the slim and the dense network, in one run. stock: by stock nnU-Net; None where not measured."""

    slim: Row
    dense: Row
    stock: Row | None


def is_network(row: Row, counts: Counts) -> bool:
    """Whether a row is of a network with these counts: names in a benchmark are the user's."""
    batch = number_in(row, "batch_size")
    return number_in(row, "macs") == counts.macs * batch and number_in(row, "parameters") == counts.parameters


def best_pair(benchmarks: Iterable[Benchmark], record: SlimRecord) -> Pair | None:
    """Return the fastest row of the slim network that has a dense one beside it, run in the same way."""

    def way(row: Row) -> list[str]:
        return [way_of(row), *(str(row.get(key)) for key in ("precision", "threads", "batch_size", "device"))]

    pairs = []
    for benchmark in benchmarks:
        timed = [row for row in benchmark.rows if number_in(row, "time_median_ms") > 0]
        named = (row for row in timed if (row.get("name"), row.get("backend")) == (DENSE, "stock"))
        stock = next(named, None)
        dense_rows = [row for row in timed if row.get("name") == DENSE or is_network(row, record.dense)]
        for slim in (row for row in timed if is_network(row, record.slim)):
            alike = [dense for dense in dense_rows if way(dense) == way(slim)]
            pairs += [Pair(slim, dense, stock) for dense in alike[:1]]
    return min(pairs, key=lambda pair: number_in(pair.slim, "time_median_ms"), default=None)


def dense_and_slim_seconds(pair: Pair | None, record: SlimRecord) -> tuple[float, float] | None:
    """Return seconds of a pass (dense, slim): from a benchmark, else from when the model was compressed."""
    if pair is not None:
        return number_in(pair.dense, "time_median_ms") / 1e3, number_in(pair.slim, "time_median_ms") / 1e3
    return (record.speed.dense, record.speed.slim) if record.speed else None


def without_paths(value: Any) -> Any:
    """Return JSON values with absolute paths cut to their last part: a page is passed on, a home folder need not be."""
    if isinstance(value, Mapping):
        return {key: without_paths(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_paths(one) for one in value]
    return f".../{PurePath(value).name}" if isinstance(value, str) and PurePath(value).is_absolute() else value


def methods_view(config: Mapping[str, Any]) -> list[View]:
    """Return each method with the settings that are not its defaults; with all where the method is not known here."""
    made = []
    for entry in config.get("methods", ()):
        try:
            usual = method_named(entry["method"]).config_class().model_dump(mode="json")
        except (ConfigError, ValueError):
            usual = {}
        changed = {key: value for key, value in entry.get("settings", {}).items() if value != usual.get(key)}
        made.append({"name": entry["method"], "changed": changed})
    return made


def kept_dense(record: SlimRecord) -> list[View]:
    """Return why layers stay dense: reason, layers, and their share of the dense MACs; the largest share first."""
    reasons: dict[str, list[int]] = {}
    for one in record.decisions:
        if one.action == "dense":
            reasons.setdefault(one.why, []).append(one.macs_before)
    rows = [
        {"reason": reason, "layers": len(macs), "share": sum(macs) / max(record.dense.macs, 1)}
        for reason, macs in reasons.items()
    ]
    return sorted(rows, key=lambda row: -row["share"])


def classes_view(record: SlimRecord, scores: Sequence[ScoreTable]) -> View | None:
    """Return a row per class with agreement and scores, and the class that agrees least; None where neither is known.

    A score of a class that nobody has is NaN.
    """
    agreement = record.agreement
    names = list(agreement.class_names) if agreement else []
    names = list(dict.fromkeys([*names, *(name for table in scores for name in table.classes)]))
    if not names:
        return None
    rows: list[View] = [{"name": name, "scores": [table.classes.get(name) for table in scores]} for name in names]
    view: View = {
        "rows": rows,
        "labelled": False,
        "lowest": None,
        "titles": _titles(agreement, scores),
    }
    if agreement is None:
        return view
    columns = ("dice", "volume_difference", "expected_drop", "dice_dense", "dice_slim", "drop")
    means = {column: agreement.class_means(column) for column in columns}
    for place, row in enumerate(rows):
        compared = place < len(agreement.class_names)
        row |= {column: float(means[column][place]) if compared else math.nan for column in columns}
        row["worst"] = agreement.worst(row["name"]) if compared else None
    view["labelled"] = any(case.labelled for case in agreement.cases)
    if not np.isnan(means["dice"]).all():
        view["lowest"] = rows[int(np.nanargmin(means["dice"]))]
    return view


def _titles(agreement: Agreement | None, scores: Sequence[ScoreTable]) -> list[str]:
    """Return the heads of the table of classes; # marks numbers."""
    titles = ["class"]
    if agreement is not None:
        labelled = ["#Dice dense", "#Dice slim", "#drop"] if any(case.labelled for case in agreement.cases) else []
        titles += ["#Dice, slim against dense", "worst case", "#volume", *labelled, "#estimated drop"]
    for table in scores:
        tolerance = "" if table.tolerance is None else f" at {table.tolerance} mm"
        titles += [f"#{table.name}: {metric}" for metric in ("Dice", f"NSD{tolerance}", "HD95, mm")]
    return titles


def quality(record: SlimRecord, labelled: bool) -> tuple[float, float]:
    """Return (dense, slim) Dice: against labels, else against the dense model, which agrees with itself."""
    if record.agreement is None:
        return math.nan, math.nan
    if labelled:
        return record.agreement.mean("dice_dense"), record.agreement.mean("dice_slim")
    return 1.0, record.agreement.mean_dice


def has_labels(records: Iterable[SlimRecord]) -> bool:
    """Whether every record was compared with labels."""
    return all(one.agreement is not None and not math.isnan(one.agreement.drop) for one in records)


def model_points(records: Mapping[str, SlimRecord]) -> list[QualityPoint]:
    """Return (GMAC, Dice) of each model and of their dense ones."""
    labelled, points = has_labels(records.values()), []
    for dense in dict.fromkeys(record.dense for record in records.values()):
        made_from = next(record for record in records.values() if record.dense == dense)
        points.append(QualityPoint(DENSE, DENSE, dense.macs / 1e9, quality(made_from, labelled)[0], True))
    return points + [
        QualityPoint(name, "slim", record.slim.macs / 1e9, quality(record, labelled)[1])
        for name, record in records.items()
    ]


def time_points(benchmarks: Sequence[Benchmark], records: Mapping[str, SlimRecord]) -> list[QualityPoint]:
    """Return (ms per patch, Dice) of each row; Dice is the row's own, else that of the row's model, else NaN."""
    labelled, points = has_labels(records.values()), []
    for benchmark in benchmarks:
        prefix = f"{benchmark.name}: " if len(benchmarks) > 1 else ""
        for row in benchmark.rows:
            dense = any(is_network(row, record.dense) for record in records.values())
            dice = number_in(row, "dice")
            if math.isnan(dice) and (record := _record_of(row, records, dense)) is not None:
                dice = quality(record, labelled)[0 if dense else 1]
            milliseconds = number_in(row, "time_median_ms") / max(number_in(row, "batch_size"), 1)
            points.append(QualityPoint(f"{prefix}{row.get('name', '')}", way_of(row), milliseconds, dice, dense))
    return points


def _record_of(row: Row, records: Mapping[str, SlimRecord], dense: bool) -> SlimRecord | None:
    """Return the model that a row is of; None where several have its counts, and none its name."""
    if dense:
        return next(record for record in records.values() if is_network(row, record.dense))
    found = {name: record for name, record in records.items() if is_network(row, record.slim)}
    return next(iter(found.values())) if len(found) == 1 else found.get(str(row.get("name")))


def remark(row: Mapping[str, Any], record: SlimRecord) -> str:
    """Return what a row of a benchmark has to do with the model."""
    if row.get("reason"):
        return f"failed: {row['reason']}"
    if is_network(row, record.dense):
        return "its dense network"
    return "this model" if is_network(row, record.slim) else ""


def benchmark_note(benchmark: Benchmark) -> str:
    """Return what a benchmark was run on."""
    told = {"device_name": "{}", "threads": "{} thread(s)", "eval_passes": "{} alternated passes", "torch": "torch {}"}
    known = {
        key: ", ".join(dict.fromkeys(str(row[key]) for row in benchmark.rows if row.get(key) not in (None, "")))
        for key in told
    }
    return "; ".join(told[key].format(value) for key, value in known.items() if value)


def scene_note(scene: Any) -> str:
    """Return what is said under the pictures of a case."""
    listed = sorted((value, name) for name, value in scene.dice.items() if not math.isnan(value))
    shown = ", ".join(f"{name} {dice(value)}" for value, name in listed[:_FEW])
    text = f"Dice, slim against dense: {shown}" + (" (the lowest)" if len(listed) > _FEW else "")
    different = int(scene.different.sum())
    text += f". {different:,} voxels differ; the planes cross most of them." if different else ". No voxel differs."
    return f"{text} {scene.note}".strip()


def gaps(data: ReportData) -> dict[str, str]:
    """Return what the page could not show, and the command that measures it."""
    record, agreement = data.record, data.record.agreement
    agree = "nnslim agree -m MODEL --dense DENSE -i IMAGES"
    benchmark, report = "nnslim benchmark -m DENSE -c MODEL", "nnslim report --benchmark DIR"
    unlabelled = agreement is None or math.isnan(agreement.drop)
    wanted = {
        "Agreement with the dense model, per class": (agreement is None, agree),
        "Dice against labels": (unlabelled and not data.scores, f"{agree} -l LABELS"),
        "Surface Dice (NSD) and HD95 against labels": (
            all(math.isnan(table.mean("nsd")) for table in data.scores),
            "nnslim evaluate -p PREDICTIONS -g LABELS -o metrics.csv, then nnslim report --metrics slim=metrics.csv",
        ),
        "Time of a forward pass, dense and slim": (
            dense_and_slim_seconds(best_pair(data.benchmarks, record), record) is None,
            f"{benchmark} -o DIR, then {report}",
        ),
        "Stages of the whole pipeline, dense and slim": (
            not any(one.profiles for one in data.benchmarks),
            f"{benchmark} -i IMAGES -o DIR, then {report}",
        ),
        "Pictures of the worst and the median case": (not data.scenes, "nnslim report --dense DENSE -i IMAGES"),
    }
    return {what: how for what, (missing, how) in wanted.items() if missing}
