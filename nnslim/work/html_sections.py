"""Words of the report: headline figures, what was done, and what was not measured."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

from nnslim.work.benchmark import Benchmark
from nnslim.work.html_figures import View, stage_bars
from nnslim.work.html_format import dice, seconds, short
from nnslim.work.html_tables import Pair, best_pair, is_network, number, way_of
from nnslim.work.report import times_fewer
from nnslim.work.slim_record import SlimRecord

if TYPE_CHECKING:
    from nnslim.work.html_report import ReportData


def tiles(data: ReportData) -> list[View]:
    """Return the headline figures; what was not measured says so in its place."""
    record = data.record
    size = sum(file.bytes for file in data.files)
    made = [
        _tile(
            "Parameters",
            f"{record.slim.parameters:,}",
            f"dense {record.dense.parameters:,}",
            "that a forward pass reaches",
            (record.dense.parameters, record.slim.parameters),
        ),
        _tile(
            f"Multiply-accumulates per {record.patch} patch",
            f"{record.slim.macs / 1e9:.2f} G",
            f"dense {record.dense.macs / 1e9:.2f} G",
            f'convention "macs": products with weights alone; as fvcore counts, norms included, '
            f"{record.dense.macs_fvcore / 1e9:.2f} G and {record.slim.macs_fvcore / 1e9:.2f} G",
            (record.dense.macs, record.slim.macs),
        ),
        _tile(
            "Checkpoint files" if len(data.files) > 1 else "Checkpoint file",
            f"{size / 1e6:.2f} MB",
            "" if data.dense_bytes is None else f"dense {data.dense_bytes / 1e6:.2f} MB",
            data.dense_note or "the dense model was not given",
            (data.dense_bytes, size) if data.dense_bytes else None,
            "less",
        ),
        _time_tile(best_pair(data.benchmarks, record), record),
        _agreement_tile(record),
        _accuracy_tile(data),
    ]
    return made


def _tile(
    title: str, value: str, before: str, note: str, pair: tuple[float, float] | None = None, fewer: str = "fewer"
) -> View:
    return {
        "title": title,
        "value": value,
        "before": before,
        "change": times_fewer(*pair, fewer) if pair else "",
        "worse": pair is not None and pair[1] > pair[0],
        "note": note,
        "gap": False,
    }


def _gap(title: str, note: str) -> View:
    return {"title": title, "value": "not measured", "before": "", "change": "", "note": note, "gap": True}


def _time_tile(pair: Pair | None, record: SlimRecord) -> View:
    title = "One forward pass"
    if pair is None and record.speed is None:
        return _gap(title, "neither when it was compressed nor by a benchmark")
    if pair is None:
        dense, slim, how = record.speed.dense, record.speed.slim, f"{record.speed.backend}, when it was compressed"
    else:
        dense, slim = (number(row, "time_median_ms") / 1e3 for row in (pair.dense, pair.slim))
        threads = pair.slim.get("threads")
        counted = f", {threads} thread(s)" if threads not in (None, "") else ""
        how = f"{way_of(pair.slim)}{counted}, median of {pair.slim.get('eval_passes', '?')} passes in turn"
        if pair.stock is not None:
            stock = number(pair.stock, "time_median_ms") / 1e3
            how += f"; dense by stock nnU-Net {seconds(stock)}, {stock / slim:.2f}x the time"
    return _tile(title, seconds(slim), f"dense {seconds(dense)}", how, (dense, slim), "less")


def _agreement_tile(record: SlimRecord) -> View:
    title = "Dice, slim against dense"
    if record.agreement is None:
        return _gap(title, "nnslim agree compares the two on images; no labels are needed")
    worst = record.agreement.worst()
    where = f"; lowest: {worst.class_name} in {worst.case}, {dice(worst.dice)}" if worst else ""
    note = f"mean over classes, {len(record.agreement.cases)} case(s){where}"
    return _tile(title, dice(record.agreement.mean_dice), "", note)


def _accuracy_tile(data: ReportData) -> View:
    title, agreement = "Dice against labels", data.record.agreement
    if agreement is not None and not math.isnan(agreement.drop):
        labelled = sum(case.labelled for case in agreement.cases)
        note = f"drop {agreement.drop:.4f} over {labelled} labelled case(s); estimated without labels: "
        note += f"{dice(agreement.expected_drop)}"
        dense, slim = (dice(agreement.mean(f"dice_{which}")) for which in ("dense", "slim"))
        return _tile(title, slim, f"dense {dense}", note)
    if data.scores:
        first, *rest = data.scores
        others = ", ".join(f"{table.name} {dice(table.mean('dice'))}" for table in rest)
        note = f"{first.name}, {first.cases} case(s); NSD {dice(first.mean('nsd'))}"
        return _tile(title, dice(first.mean("dice")), others, note)
    if agreement is not None and not math.isnan(agreement.expected_drop):
        note = "without labels: what the dense model's probabilities let one expect; an estimate, not a measurement"
        return _tile("Estimated drop in Dice against labels", dice(agreement.expected_drop), "", note)
    return _gap(title, "nnslim agree -l LABELS, or nnslim evaluate and --metrics")


def summary(record: SlimRecord) -> str:
    """Return one sentence about the whole."""
    changed = [one for one in record.decisions if one.action != "dense"]
    kinds = ", ".join(dict.fromkeys(one.action for one in changed)) or "no method"
    text = f"{len(changed)} of {len(record.decisions)} layers were replaced ({kinds}): "
    text += f"{times_fewer(record.dense.macs, record.slim.macs)} multiply-accumulates"
    if record.speed:
        text += f", {times_fewer(record.speed.dense, record.speed.slim, 'less')} time for a forward pass"
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


def class_lines(record: SlimRecord, classes: Mapping[str, Any]) -> list[str]:
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
        "device_name": "",
        "threads": " thread(s)",
        "eval_passes": " passes of each row, in turn",
        "torch": " (torch)",
    }
    facts = [
        ", ".join(dict.fromkeys(str(row[key]) for row in benchmark.rows if row.get(key) not in (None, ""))) + unit
        for key, unit in told.items()
    ]
    return {
        "name": benchmark.name,
        "rows": rows,
        "about": "; ".join(fact for fact in facts if fact),
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
    add(data.dense_bytes is None, "Size of the dense checkpoint", "nnslim report --dense DENSE")
    add(not data.scenes, "Pictures of the worst and the median case", "nnslim report --dense DENSE -i IMAGES")
    return found


def _fold(record: SlimRecord, place: int) -> str:
    folds: Sequence[Any] = record.facts.get("folds") or ()
    return str(folds[place]) if place < len(folds) else f"number {place + 1}"
