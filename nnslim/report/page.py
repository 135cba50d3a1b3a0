"""The report of a slim model as one HTML page that loads nothing from elsewhere."""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from nnslim._version import __version__
from nnslim.benchmark.timing_figures import QualityPoint, pareto, quality_figure, stage_figure
from nnslim.benchmark.timings import number_in, stage_names, way_of
from nnslim.compression.model_report import ANSWERS, times_fewer
from nnslim.errors import InputError
from nnslim.figures import overlay_planes
from nnslim.report import number_format, page_data
from nnslim.report.page_data import ReportData, View, Viewer
from nnslim.report.page_figures import fold_name, inline_svg, layer_figure, recovery_figure, strips_figure
from nnslim.report.viewer import Scene, embed

_TEMPLATES = Path(__file__).parent / "html"
# What the browser itself then refuses: anything that is not in the page.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'; "
_PAGE = "script-src 'unsafe-inline'; img-src data:"
_VIEWER = "script-src 'unsafe-inline'; img-src data: blob:; connect-src data: blob:; worker-src blob:; font-src data:"

# What the template calls.
_CALLED = (
    times_fewer,
    fold_name,
    way_of,
    number_in,
    stage_figure,
    stage_names,
    page_data.remark,
    page_data.benchmark_note,
    page_data.scene_note,
)


def render_report(data: ReportData) -> str:
    """Return the page. Everything that comes from outside is escaped; the browser is told to load nothing.

    Raises:
        InputError: no volume fits into the viewer, or two models have one name.
    """
    import jinja2

    if data.model in data.others:
        raise InputError(f"two models are named {data.model}; rename one of the folders")
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {name: getattr(number_format, name) for name in number_format.FILTERS}
    environment.filters |= {"svg": inline_svg, "json": partial(json.dumps, ensure_ascii=False)}
    environment.globals |= {one.__name__: one for one in _CALLED}
    return environment.get_template("page.html.j2").render(_context(data))


def _context(data: ReportData) -> View:
    record, agreement = data.record, data.record.agreement
    records, config = {data.model: record, **data.others}, page_data.without_paths(record.config)
    viewer = None if data.viewer is None else viewer_view(data.scenes, data.viewer)
    pair = page_data.best_pair(data.benchmarks, record)
    return {
        "title": f"{record.facts.get('dataset') or data.model}: report of the slim model",
        "version": __version__,
        "policy": _POLICY + (_PAGE if viewer is None else _VIEWER),
        "data": data,
        "record": record,
        "agreement": agreement,
        "worst": agreement and agreement.worst(),
        "pair": pair,
        "timed": page_data.dense_and_slim_seconds(pair, record),
        "methods": page_data.methods_view(config),
        "kept": page_data.kept_dense(record),
        "recovery": recovery_figure(record.recovery, record.facts.get("folds") or ()),
        "config": config,
        "answers": ANSWERS,
        "layers": layer_figure(record.decisions),
        "classes": page_data.classes_view(record, data.scores),
        "strips": agreement
        and strips_figure(agreement.values("dice"), agreement.class_names, [case.name for case in agreement.cases]),
        "labelled": page_data.has_labels(records.values()),
        "models": quality_view(page_data.model_points(records), "GMAC per patch") if data.others else None,
        "times": quality_view(page_data.time_points(data.benchmarks, records), "ms per patch"),
        "planes": [_planes(scene) for scene in data.scenes],
        "viewer": viewer,
        "gaps": page_data.gaps(data),
    }


def quality_view(points: Sequence[QualityPoint], cost: str) -> View | None:
    """Return numbered points and their figure; None with fewer than two whose cost and quality are known.

    Args:
        cost: title of the axis.
    """
    known = [point for point in points if point.cost > 0 and math.isfinite(point.cost + point.quality)]
    if len(known) < 2:
        return None
    marked = [replace(point, mark=str(number)) for number, point in enumerate(known, start=1)]
    best = pareto([(point.cost, point.quality) for point in marked])
    return {
        "points": marked,
        "best": [marked[n].mark for n in best],
        "cost": cost,
        "figure": quality_figure(marked, cost),
    }


def _planes(scene: Scene) -> list[View]:
    """Return the pictures of a case."""
    planes = overlay_planes(scene.image, list(scene.maps.items()), spacing=scene.spacing, centre=scene.centre)
    return [
        {"name": name, "source": "data:image/png;base64," + base64.b64encode(picture).decode("ascii")}
        for name, picture in planes.items()
    ]


def viewer_view(scenes: Sequence[Scene], viewer: Viewer) -> View:
    """Return the volumes of the cases that fit, and a note for each that does not.

    Raises:
        InputError: none fits.
    """
    cases: list[Any] = []
    notes: list[str] = []
    for scene in scenes:
        try:
            cases.append(embed(scene, viewer.labels, viewer.limit))
        except InputError as error:
            notes.append(f"Left out: {error}.")
    if not cases:
        raise InputError(notes[0] if notes else "the viewer needs cases: name their folder with -i, and --dense")
    maps = list(dict.fromkeys(one["name"] for case in cases for one in case["maps"]))
    return {"cases": cases, "maps": maps, "notes": notes}
