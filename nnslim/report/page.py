"""The report of a slim model as one HTML page that loads nothing from elsewhere."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nnslim._version import __version__
from nnslim.errors import InputError
from nnslim.figures import overlay_planes
from nnslim.report.headline_tiles import tiles
from nnslim.report.number_format import FILTERS, dice
from nnslim.report.page_data import ReportData, Viewer
from nnslim.report.page_figures import View, layer_bars, recovery_lines, scatter
from nnslim.report.page_tables import classes_view, kept_dense, methods_view, model_points, time_points, without_folders
from nnslim.report.sections import (
    benchmark_view,
    class_notes,
    error_note,
    gaps,
    half_line,
    how_data,
    later,
    origin,
    speed_line,
    summary,
)
from nnslim.report.viewer import Scene, embed

_TEMPLATES = Path(__file__).parent / "html"
# What the browser itself then refuses: anything that is not in the page.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'; "
_PAGE = "script-src 'unsafe-inline'; img-src data:"
_VIEWER = "script-src 'unsafe-inline'; img-src data: blob:; connect-src data: blob:; worker-src blob:; font-src data:"
_FEW = 6  # classes whose Dice is told under a case


def render_report(data: ReportData) -> str:
    """Return the page. Everything that comes from outside is escaped; the browser is told to load nothing.

    Raises:
        InputError: no volume fits into the viewer, or two models have one name.
    """
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= FILTERS
    return environment.get_template("page.html.j2").render(_context(data))


def _context(data: ReportData) -> View:
    record, config = data.record, without_folders(data.record.config)
    viewer = None if data.viewer is None else viewer_view(data.scenes, data.viewer)
    classes = classes_view(record, data.scores)
    name = str(record.facts.get("dataset") or data.model)
    return {
        "title": f"{name}: report of the slim model",
        "version": __version__,
        "made": data.made,
        "policy": _POLICY + (_PAGE if viewer is None else _VIEWER),
        "record": record,
        "summary": summary(data),
        "tiles": tiles(data),
        "methods": methods_view(config),
        "how_data": how_data(record),
        "later": [line for line in (half_line(record), *later(record)) if line],
        "speed_line": speed_line(record),
        "kept": kept_dense(record),
        "recovery": recovery_lines(record.recovery, record.facts.get("folds") or ()),
        "config": config,
        "bars": layer_bars(record.decisions),
        "error_note": error_note(record),
        "actions": sorted({one.action for one in record.decisions}),
        "benchmarks": [benchmark_view(one, record) for one in data.benchmarks],
        "classes": classes,
        "class_lines": class_notes(record, classes) if classes else [],
        **_pareto(data),
        "scenes": [scene_view(scene) for scene in data.scenes],
        "viewer": viewer,
        "origin": origin(data),
        "files": data.files,
        "gaps": gaps(data),
    }


def _pareto(data: ReportData) -> View:
    if data.model in data.others:
        raise InputError(f"two models are named {data.model}; rename one of the folders")
    records = {data.model: data.record, **data.others}
    points, labelled = model_points(records)
    models = scatter(points, "GMAC per patch", "Dice", "kind") if data.others else None
    timed, timed_labelled = time_points(data.benchmarks, records)
    times = scatter(timed, "ms per patch", "Dice")
    return {
        "models": models and {"figure": models, "caption": _caption("Multiply-accumulates of a patch", labelled)},
        "timed": times and {"figure": times, "caption": _caption("Median time of a pass", timed_labelled)},
    }


def _caption(what: str, labelled: bool) -> str:
    against = "labels" if labelled else "the dense model, which has 1 by definition"
    return (
        f"{what} (logarithmic) and mean Dice against {against}; better is up and to the left. The dashed line joins "
        "what nothing else beats in both."
    )


def scene_view(scene: Scene) -> View:
    """Return the pictures of a case, and what is said about them."""
    planes = overlay_planes(scene.image, list(scene.maps.items()), spacing=scene.spacing, centre=scene.centre)
    listed = sorted((value, name) for name, value in scene.dice.items() if value == value)
    shown = ", ".join(f"{name} {dice(value)}" for value, name in listed[:_FEW])
    text = f"Dice, slim against dense: {shown}" + (" (the lowest)" if len(listed) > _FEW else "")
    different = int(scene.different.sum())
    text += f". {different:,} voxels differ; the planes cross the most of them." if different else ". No voxel differs."
    outlines = ", ".join(scene.maps)
    return {
        "name": scene.name,
        "role": scene.role,
        "maps": list(scene.maps),
        "text": f"{text} {scene.note}".strip(),
        "planes": [
            {
                "name": name,
                "source": "data:image/png;base64," + base64.b64encode(picture).decode("ascii"),
                "alt": f"{name} plane of {scene.name} with the outlines of {outlines}",
            }
            for name, picture in planes.items()
        ],
    }


def viewer_view(scenes: Sequence[Scene], viewer: Viewer) -> View | None:
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
    return {
        "cases": cases,
        "maps": list(dict.fromkeys(one["name"] for case in cases for one in case["maps"])),
        "notes": notes,
        "data": {"cases": cases},
        "script": viewer.script,
    }
