"""Headline figures of the report."""

from __future__ import annotations

import math

from nnslim.compression.model_report import times_fewer
from nnslim.compression.record import SlimRecord
from nnslim.report.number_format import dice, seconds
from nnslim.report.page_data import ReportData
from nnslim.report.page_figures import View
from nnslim.report.page_tables import Pair, best_pair, number, pass_seconds, way_of


def tiles(data: ReportData) -> list[View]:
    """Return the headline figures; what was not measured says so in its place."""
    record = data.record
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
        _size_tile(data),
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


def _size_tile(data: ReportData) -> View:
    stored, size = data.record.stored, sum(file.bytes for file in data.files)
    dense = stored.get("source_checkpoint_bytes")
    note = "the size of the dense one was not recorded"
    weights = [stored.get(key) for key in ("weight_bytes", "source_weight_bytes")]
    if all(weights):
        note = f"weights alone {weights[0] / 1e6:.2f} MB ({stored['precision']} precision), dense "
        note += f"{weights[1] / 1e6:.2f} MB"
        if dense and dense > 1.5 * weights[1]:
            note += "; the rest of its file is the optimiser's state"
    title = "Checkpoint files" if len(data.files) > 1 else "Checkpoint file"
    before = f"dense {dense / 1e6:.2f} MB" if dense else ""
    return _tile(title, f"{size / 1e6:.2f} MB", before, note, (dense, size) if dense and size else None, "less")


def _time_tile(pair: Pair | None, record: SlimRecord) -> View:
    title = "One forward pass"
    timed = pass_seconds(pair, record)
    if timed is None:
        return _gap(title, "neither when it was compressed nor by a benchmark")
    dense, slim = timed
    if pair is None:
        how = f"{record.speed.backend}, when it was compressed"
    else:
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
