"""The report's sentences and headline figures."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

from nnslim.benchmark.timing_figures import way_of
from nnslim.benchmark.timings import Benchmark, number_in
from nnslim.compression.model_report import times_fewer
from nnslim.compression.record import SlimRecord
from nnslim.report.number_format import dice, giga, megabytes, seconds, short
from nnslim.report.page_data import ReportData
from nnslim.report.page_figures import fold_name
from nnslim.report.page_tables import View, best_pair, dense_and_slim_seconds, is_network

_FEW = 6  # classes whose Dice is listed under a case


def summary(data: ReportData) -> str:
    """Return one sentence about the whole."""
    record = data.record
    changed = [one for one in record.decisions if one.action != "dense"]
    if not changed:
        precision = record.stored.get("precision") or "unrecorded"
        return f"No layer was changed; the weights are stored in {precision} precision."
    kinds = ", ".join(dict.fromkeys(one.action for one in changed))
    text = f"{len(changed)} of {len(record.decisions)} layers were replaced ({kinds}): "
    text += f"{times_fewer(record.dense.macs, record.slim.macs)} multiply-accumulates"
    if timed := dense_and_slim_seconds(best_pair(data.benchmarks, record), record):
        text += f", {times_fewer(*timed, 'less')} time for a forward pass"
    if record.agreement:
        text += f", a mean Dice of {dice(record.agreement.mean_dice)} against the dense model"
    return f"{text}."


# --- headline figures -------------------------------------------------------------------------------------------------


def tiles(data: ReportData) -> list[View]:
    """Return the headline figures; a figure that was not measured says so in its place."""
    dense, slim = data.record.dense, data.record.slim
    return [
        _tile(
            "parameters",
            "Parameters",
            f"{slim.parameters:,}",
            f"dense {dense.parameters:,}",
            "used in a forward pass",
            (dense.parameters, slim.parameters),
        ),
        _tile(
            "macs",
            f"Multiply-accumulates per {data.record.patch} patch",
            f"{slim.macs / 1e9:.2f} G",
            f"dense {dense.macs / 1e9:.2f} G",
            "products with weights alone; by fvcore's convention, which counts norms, "
            f"{dense.macs_fvcore / 1e9:.2f} G and {slim.macs_fvcore / 1e9:.2f} G",
            (dense.macs, slim.macs),
        ),
        _size_tile(data),
        _time_tile(data),
        _agreement_tile(data.record),
        _accuracy_tile(data),
    ]


def _tile(
    key: str,
    title: str,
    value: str,
    before: str = "",
    note: str = "",
    pair: tuple[float, float] | None = None,
    fewer: str = "fewer",
) -> View:
    """Return a tile; without a value it is a gap, and the note names the command that measures it."""
    tile = {"key": key, "title": title, "value": value or "not measured", "before": before, "note": note}
    change = times_fewer(*pair, fewer) if pair else ""
    return {**tile, "change": change, "worse": pair is not None and pair[1] > pair[0], "gap": not value}


def _size_tile(data: ReportData) -> View:
    stored, size = data.record.stored, sum(file.bytes for file in data.files)
    dense = stored.get("source_checkpoint_bytes")
    note = "the size of the dense model was not recorded"
    weights, source_weights = (stored.get(key) for key in ("weight_bytes", "source_weight_bytes"))
    if weights and source_weights:
        note = f"weights alone {megabytes(weights)} MB ({stored['precision']} precision), "
        note += f"dense {megabytes(source_weights)} MB"
        if dense and dense > 1.5 * source_weights:
            note += "; the rest of the dense file is the optimiser's state"
    title = "Checkpoint files" if len(data.files) > 1 else "Checkpoint file"
    before, pair = f"dense {megabytes(dense)} MB" if dense else "", (dense, size) if dense and size else None
    return _tile("size", title, f"{megabytes(size)} MB", before, note, pair, "less")


def _time_tile(data: ReportData) -> View:
    pair = best_pair(data.benchmarks, data.record)
    timed = dense_and_slim_seconds(pair, data.record)
    if timed is None:
        return _tile("time", "One forward pass", "", note="nnslim benchmark measures it")
    dense, slim = timed
    if pair is None:
        note = f"{data.record.speed.backend}, when the model was compressed"
    else:
        threads = pair.slim.get("threads")
        counted = f", {threads} thread(s)" if threads not in (None, "") else ""
        note = f"{way_of(pair.slim)}{counted}, median of {pair.slim.get('eval_passes', '?')} alternated passes"
        if pair.stock is not None:
            stock = number_in(pair.stock, "time_median_ms") / 1e3
            note += f"; dense by stock nnU-Net {seconds(stock)}, {stock / slim:.2f}x the time"
    return _tile("time", "One forward pass", seconds(slim), f"dense {seconds(dense)}", note, timed, "less")


def _agreement_tile(record: SlimRecord) -> View:
    title, agreement = "Dice, slim against dense", record.agreement
    if agreement is None:
        return _tile("agreement", title, "", note="nnslim agree compares the two on images; no labels are needed")
    worst = agreement.worst()
    where = f"; lowest: {worst.class_name} in {worst.case}, {dice(worst.dice)}" if worst else ""
    note = f"mean over classes, {len(agreement.cases)} case(s){where}"
    return _tile("agreement", title, dice(agreement.mean_dice), note=note)


def _accuracy_tile(data: ReportData) -> View:
    title, agreement = "Dice against labels", data.record.agreement
    if agreement is not None and not math.isnan(agreement.drop):
        labelled = sum(case.labelled for case in agreement.cases)
        note = f"drop {agreement.drop:.4f} over {labelled} labelled case(s); estimated without labels: "
        note += dice(agreement.expected_drop)
        dense, slim = (dice(agreement.mean(f"dice_{which}")) for which in ("dense", "slim"))
        return _tile("accuracy", title, slim, f"dense {dense}", note)
    if data.scores:
        first, *rest = data.scores
        others = ", ".join(f"{table.name} {dice(table.mean('dice'))}" for table in rest)
        note = f"{first.name}, {first.cases} case(s); NSD {dice(first.mean('nsd'))}"
        return _tile("accuracy", title, dice(first.mean("dice")), others, note)
    if agreement is not None and not math.isnan(agreement.expected_drop):
        note = "computed from the dense model's probabilities, without labels; an estimate, not a measurement"
        return _tile("estimate", "Estimated drop in Dice", dice(agreement.expected_drop), note=note)
    return _tile("accuracy", title, "", note="nnslim agree -l LABELS, or nnslim evaluate and nnslim report --metrics")


# --- sections ---------------------------------------------------------------------------------------------------------


def how_data(record: SlimRecord) -> str:
    """Return how images decided the weights."""
    calibration = record.config.get("calibration") or {}
    if not calibration.get("images"):
        return "No images were used; the slim weights follow from the dense weights alone."
    text = f"Fitted to at most {calibration.get('count')} unlabelled images of the folder "
    text += f'"{PurePath(calibration["images"]).name}" (seed {calibration.get("seed")}).'
    for place, fold in enumerate(record.recovery):
        name = fold_name(record.facts.get("folds") or (), place)
        before, after = (dice(fold.get(f"estimated_drop_{when}")) for when in ("before", "after"))
        text += f" Recovery of {name}: {fold.get('steps', 0)} steps without labels, estimated drop in Dice {before} "
        text += f'before and {after} after; ended by "{fold.get("stopped", "")}".'
    return text


def later(record: SlimRecord) -> list[str]:
    """Return what was done to the weights after compression: precision, distillation, fine-tuning."""
    lines = []
    if half := record.stored.get("agreement"):
        classes = ", ".join(f"{name} {dice(one['dice'])}" for name, one in half["classes"].items())
        lines.append(f"Stored in half precision; Dice against single precision on {half['tiles']} tile(s): {classes}.")
    if distill := record.facts.get("distill"):
        lines.append(f"Then distilled from {distill.get('teacher')} on {distill.get('images')} images without labels.")
    if finetune := record.facts.get("finetune"):
        lines.append(f"Then fine-tuned with the labels of {finetune.get('dataset')} ({finetune.get('trainer')}).")
        for fold, result in (finetune.get("folds") or {}).items():
            before, after = (result.get(key) or {} for key in ("pseudo_dice_before", "pseudo_dice"))
            pairs = ", ".join(f"{key} {dice(before.get(key))} to {dice(value)}" for key, value in after.items())
            lines.append(f"Fold {fold}: {result.get('epochs')} epochs; pseudo-Dice {pairs}.")
    return lines


def speed_line(record: SlimRecord) -> str:
    """Return what was timed when the model was compressed."""
    speed = record.speed
    if speed is None:
        return "No forward pass was timed when the model was compressed."
    text = f"When the model was compressed, one forward pass took {seconds(speed.slim)}, and {seconds(speed.dense)} "
    text += f"with the dense network (alternated rounds, {speed.where or speed.backend})."
    if speed.planned is not None:
        text += f" It took {seconds(speed.planned)} before {len(speed.put_back)} layer(s) that saved no time were made "
        text += "dense again."
    return text


def error_note(record: SlimRecord) -> str:
    """Return what the column of errors holds."""
    if all(one.error is None for one in record.decisions):
        return "The errors were not recorded for this model."
    if (record.config.get("calibration") or {}).get("images"):
        return "Error: relative, in the layer's outputs on the calibration images, first fold, before any recovery."
    return "Error: relative, in the layer's weights, first fold."


def class_notes(record: SlimRecord, classes: Mapping[str, Any]) -> list[str]:
    """Return what the table of classes shows, in sentences."""
    lines = []
    if agreement := record.agreement:
        text = f"Slim against dense on {len(agreement.cases)} case(s): mean Dice {dice(agreement.mean_dice)}."
        if lowest := classes["lowest"]:
            text += f" The class with the lowest agreement is {lowest['name']} ({dice(lowest['dice'])})."
        if worst := agreement.worst():
            text += f" The worst single result is {worst.class_name} in {worst.case} ({dice(worst.dice)})."
        lines.append(text)
        if not classes["labelled"]:
            lines.append("No labels were compared; the drop is estimated from the dense model's probabilities.")
    for table in classes["tables"]:
        means = f"Dice {dice(table.mean('dice'))}, NSD {dice(table.mean('nsd'))}, HD95 {short(table.mean('hd95'))} mm"
        lines.append(f"{table.name}, against labels of {table.cases} case(s): mean {means}.")
    return lines


def scene_note(scene: Any) -> str:
    """Return what is said under the pictures of a case."""
    listed = sorted((value, name) for name, value in scene.dice.items() if not math.isnan(value))
    shown = ", ".join(f"{name} {dice(value)}" for value, name in listed[:_FEW])
    text = f"Dice, slim against dense: {shown}" + (" (the lowest)" if len(listed) > _FEW else "")
    different = int(scene.different.sum())
    text += f". {different:,} voxels differ; the planes cross most of them." if different else ". No voxel differs."
    return f"{text} {scene.note}".strip()


def quality_caption(what: str, labelled: bool) -> str:
    """Return the caption of a figure of quality against cost."""
    against = "labels" if labelled else "the dense model, which has 1 by definition"
    return (
        f"{what} (logarithmic) and mean Dice against {against}; better is up and to the left. Hollow: the dense "
        "network. The dashed line joins the points that no other beats in both."
    )


def layer_caption(record: SlimRecord) -> str:
    """Return the caption of the figure of layers, with the total."""
    return (
        f"Multiply-accumulates of each layer that the forward pass reaches, before and after, for one patch of "
        f"{record.patch} voxels; {giga(record.dense.macs)} and {giga(record.slim.macs)} G in all."
    )


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


def origin(data: ReportData) -> dict[str, str]:
    """Return what the model's own record says about where it comes from."""
    facts, record = data.record.facts, data.record
    said = {
        "model folder": data.folder or data.model,
        "made from": facts.get("source"),
        "dataset": facts.get("dataset"),
        "configuration": facts.get("configuration"),
        "checkpoint": facts.get("checkpoint"),
        "folds": ", ".join(map(str, facts.get("folds") or ())),
        "input": f"{record.input_shape[1]} channel(s), patch {record.patch} voxels",
        "compressed by": facts.get("nnslim") and f"nnslim {facts['nnslim']}",
        "checkpoint written": data.written,
    }
    return {key: str(value or "not recorded") for key, value in said.items()}


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
