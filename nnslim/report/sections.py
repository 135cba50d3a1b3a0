"""Words of the report: what was done, what the tables show, and what was not measured."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any

from nnslim.benchmark.timings import Benchmark
from nnslim.compression.model_report import times_fewer
from nnslim.compression.record import SlimRecord
from nnslim.report.number_format import dice, seconds, short
from nnslim.report.page_data import ReportData
from nnslim.report.page_figures import View, stage_bars
from nnslim.report.page_tables import best_pair, is_network, number, pass_seconds, way_of


def summary(data: ReportData) -> str:
    """Return one sentence about the whole."""
    record = data.record
    changed = [one for one in record.decisions if one.action != "dense"]
    if not changed:
        return f"No layer was changed; the weights are stored in {record.stored.get('precision') or 'some'} precision."
    kinds = ", ".join(dict.fromkeys(one.action for one in changed)) or "no method"
    text = f"{len(changed)} of {len(record.decisions)} layers were replaced ({kinds}): "
    text += f"{times_fewer(record.dense.macs, record.slim.macs)} multiply-accumulates"
    if timed := pass_seconds(best_pair(data.benchmarks, record), record):
        text += f", {times_fewer(*timed, 'less')} time for a forward pass"
    if record.agreement:
        text += f", a mean Dice of {dice(record.agreement.mean_dice)} against the dense model"
    return f"{text}."


def how_data(record: SlimRecord) -> str:
    """Return how images decided the weights."""
    calibration = record.config.get("calibration") or {}
    if not calibration.get("images"):
        return "No images were used: the weights alone decided, so nothing is known of what the data need."
    text = f"Fitted to at most {calibration.get('count')} unlabelled images of the folder "
    text += f'"{PurePath(calibration["images"]).name}" (seed {calibration.get("seed")}).'
    for number_, fold in enumerate(record.recovery):
        where = f" Fold {_fold(record, number_)}:" if len(record.recovery) > 1 else " Recovery:"
        before, after = (dice(fold.get(f"estimated_drop_{when}")) for when in ("before", "after"))
        text += f"{where} {fold.get('steps', 0)} steps without labels, estimated drop in Dice {before} before and "
        text += f'{after} after; ended by "{fold.get("stopped", "")}".'
    return text


def speed_line(record: SlimRecord) -> str:
    """Return what was timed when the model was compressed."""
    speed = record.speed
    if speed is None:
        return "No forward pass was timed when the model was compressed."
    text = f"When the model was compressed, one forward pass took {seconds(speed.slim)}, of the dense network "
    text += f"{seconds(speed.dense)} (alternated rounds, {speed.where or speed.backend})."
    if speed.planned is not None:
        text += f" It took {seconds(speed.planned)} before {len(speed.put_back)} layer(s) that saved no time went back "
        text += "to dense."
    return text


def half_line(record: SlimRecord) -> str:
    """Return what storing in half precision changed, where that was measured."""
    half = record.stored.get("agreement")
    if not half:
        return ""
    classes = ", ".join(f"{name} {dice(one['dice'])}" for name, one in half["classes"].items())
    return f"Stored in half precision; Dice with the same weights in single on {half['tiles']} tile(s): {classes}."


def later(record: SlimRecord) -> list[str]:
    """Return what happened to the weights after compression."""
    lines = []
    if distill := record.facts.get("distill"):
        lines.append(f"Then distilled from {distill.get('teacher')} on {distill.get('images')} images without labels.")
    if finetune := record.facts.get("finetune"):
        lines.append(f"Then fine-tuned with the labels of {finetune.get('dataset')} ({finetune.get('trainer')}).")
        for fold, result in (finetune.get("folds") or {}).items():
            values = [result.get(key) or {} for key in ("pseudo_dice_before", "pseudo_dice")]
            pairs = (f"{key} {dice(values[0].get(key))} to {dice(value)}" for key, value in values[1].items())
            lines.append(f"Fold {fold}: {result.get('epochs')} epochs; pseudo-Dice {', '.join(pairs)}.")
    return lines


def error_note(record: SlimRecord) -> str:
    """Return what the column of errors holds."""
    if all(one.error is None for one in record.decisions):
        return "Error: not recorded for this model."
    if (record.config.get("calibration") or {}).get("images"):
        return "Error: of the layer's outputs on the calibration images, relative, first fold, before any recovery."
    return "Error: of the layer's weights, relative, first fold."


def class_notes(record: SlimRecord, classes: Mapping[str, Any]) -> list[str]:
    """Return what the table of classes shows, in sentences."""
    lines = []
    if record.agreement is not None:
        agreement = record.agreement
        text = f"Slim against dense on {len(agreement.cases)} case(s): mean Dice {dice(agreement.mean_dice)}."
        if classes["lowest"]:
            lowest = classes["lowest"]
            text += f" The class that agrees least is {lowest['name']} ({dice(lowest['dice'])})."
        if classes["worst"]:
            case, name, value = classes["worst"]
            text += f" The worst single result is {name} in {case} ({dice(value)})."
        lines.append(text)
        if not classes["labelled"]:
            lines.append("No labels were compared; the estimated drop is what the dense model's probabilities suggest.")
    for table in classes["tables"]:
        means = ", ".join(f"{name} {show(table.mean(key))}" for key, name, show in _SCORES)
        lines.append(f"{table.name}, against labels of {table.cases} case(s): mean {means}.")
    return lines


_SCORES = (("dice", "Dice", dice), ("nsd", "NSD", dice), ("hd95", "HD95 in mm", short))


def benchmark_view(benchmark: Benchmark, record: SlimRecord) -> View:
    """Return a benchmark's rows, what they ran on, and its stages."""
    rows = []
    for row in benchmark.rows:
        remark = "this model" if is_network(row, record.slim) else ""
        if is_network(row, record.dense):
            remark = "its dense network"
        if row.get("reason"):
            remark = f"failed: {row['reason']}"
        keys = {"median": "time_median_ms", "low": "time_q1_ms", "high": "time_q3_ms", "speedup": "speedup_stock"}
        rows.append(
            {key: number(row, column) for key, column in {**keys, "macs": "macs", "memory": "peak_memory_mb"}.items()}
            | {"name": row.get("name", ""), "way": way_of(row), "remark": remark}
        )
    told = {
        "device_name": "{}",
        "threads": "{} thread(s)",
        "eval_passes": "{} passes of each row, in turn",
        "torch": "torch {}",
    }
    known = {
        key: ", ".join(dict.fromkeys(str(row[key]) for row in benchmark.rows if row.get(key) not in (None, "")))
        for key in told
    }
    return {
        "name": benchmark.name,
        "rows": rows,
        "about": "; ".join(told[key].format(value) for key, value in known.items() if value),
        "stages": stage_bars(benchmark.profiles),
        "starts": ", ".join(f"{name} {seconds(value)}" for name, value in benchmark.starts.items()),
    }


def origin(data: ReportData) -> list[tuple[str, str]]:
    """Return what the model's own record says about where it comes from."""
    facts, unknown = data.record.facts, "not recorded"
    folds = [str(fold) for fold in facts.get("folds") or ()]
    return [
        ("model folder", data.folder or data.model),
        ("made from", str(facts.get("source") or unknown)),
        ("dataset", str(facts.get("dataset") or unknown)),
        ("configuration", str(facts.get("configuration") or unknown)),
        ("checkpoint", str(facts.get("checkpoint") or unknown)),
        ("folds", ", ".join(folds) or unknown),
        ("input", f"{data.record.input_shape[1]} channel(s), patch {data.record.patch} voxels"),
        ("compressed by", f"nnslim {facts.get('nnslim') or unknown}"),
        ("checkpoint file of", data.written or unknown),
    ]


def gaps(data: ReportData) -> list[View]:
    """Return what the page could not show, and the command that would measure it."""
    record, found = data.record, []

    def add(missing: bool, what: str, how: str) -> None:
        if missing:
            found.append({"what": what, "how": how})

    agreement = record.agreement
    add(agreement is None, "Agreement with the dense model, per class", "nnslim agree -m MODEL --dense DENSE -i IMAGES")
    unlabelled = agreement is None or math.isnan(agreement.drop)
    add(
        unlabelled and not data.scores,
        "Dice against labels",
        "nnslim agree -m MODEL --dense DENSE -i IMAGES -l LABELS",
    )
    add(
        not any(not math.isnan(table.mean("nsd")) for table in data.scores),
        "Surface Dice (NSD) and HD95 against labels",
        "nnslim evaluate -p PREDICTIONS -g LABELS -o metrics.csv, then nnslim report --metrics slim=metrics.csv",
    )
    add(
        record.speed is None and best_pair(data.benchmarks, record) is None,
        "Time of a forward pass, dense and slim",
        "nnslim benchmark -m DENSE -c MODEL -o DIR, then nnslim report --benchmark DIR",
    )
    add(
        not any(one.profiles for one in data.benchmarks),
        "Stages of the whole pipeline, dense and slim",
        "nnslim benchmark -m DENSE -c MODEL -i IMAGES -o DIR, then nnslim report --benchmark DIR",
    )
    add(not data.scenes, "Pictures of the worst and the median case", "nnslim report --dense DENSE -i IMAGES")
    return found


def _fold(record: SlimRecord, place: int) -> str:
    folds: Sequence[Any] = record.facts.get("folds") or ()
    return str(folds[place]) if place < len(folds) else f"number {place + 1}"
