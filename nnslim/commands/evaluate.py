"""`nnslim evaluate` and `nnslim agree`: predictions against references, and a slim model against the dense one."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nnslim.commands.common import PreviousStageOption, QuietOption, TrustOption, counting, start, tell
from nnslim.errors import InputError, shown

if TYPE_CHECKING:
    from nnslim.evaluation.classes import Classes
    from nnslim.evaluation.scores import Evaluation

_log = logging.getLogger("nnslim")
_LEVEL = 0.05  # of significance
_TOTALSEG = "totalseg"  # a word for --groups


def evaluate(
    predictions: Annotated[Path, typer.Option("-p", "--predictions", help="folder, or one file")],
    references: Annotated[Path, typer.Option("-g", "--references", help="folder, or one file")],
    output: Annotated[Path, typer.Option("-o", "--output", help="CSV; summary.json and pictures go beside it")],
    dataset: Annotated[
        str | None,
        typer.Option("-d", "--dataset", help="dataset.json, or a TotalSegmentator task; default: the predictions'"),
    ] = None,
    tolerance: Annotated[float, typer.Option(help="mm within which surfaces agree (NSD)")] = 1.0,
    label: Annotated[list[str] | None, typer.Option("-l", "--label", help="class, repeatable; default: all")] = None,
    baseline: Annotated[
        Path | None, typer.Option(help="other predictions, such as the dense model's, for paired differences")
    ] = None,
    images: Annotated[Path | None, typer.Option("-i", "--images", help="images to draw the worst cases on")] = None,
    groups: Annotated[
        str | None, typer.Option(help=f"YAML or JSON, group: [class, ...]; or {_TOTALSEG}: its organ groups")
    ] = None,
    worst: Annotated[int, typer.Option(min=0, help="number of worst cases to draw")] = 3,
    figures: Annotated[bool, typer.Option("--figures/--no-figures", help="draw pictures")] = True,
    dice_only: Annotated[bool, typer.Option("--dice-only", help="without NSD and HD95")] = False,
    shapes: Annotated[bool, typer.Option("--shapes", help="also HD (largest distance, mm) and compactness")] = False,
    workers: Annotated[int | None, typer.Option(min=1, help="processes; default: all CPUs where it pays")] = None,
    quiet: QuietOption = False,
) -> None:
    """Dice, NSD and HD95 of predictions against references, per case and class: CSV, summary.json, pictures.

    Example: nnslim evaluate -p PREDICTIONS -g LABELS -o metrics.csv
    """
    from nnslim.evaluation.directories import evaluate_directories
    from nnslim.evaluation.scores import score_lines, write_csv, write_summary
    from nnslim.files import make_folder

    start(quiet)
    if output.suffix.lower() != ".csv":
        raise InputError(f"{output}: the table is a CSV; give a name that ends with .csv")
    if shapes and dice_only:
        raise InputError("--shapes needs the surfaces that --dice-only leaves out; give one of them")
    classes, grouped = _classes(dataset, predictions)
    common: dict[str, Any] = {"tolerance": tolerance, "surfaces": not dice_only, "shapes": shapes, "workers": workers}
    common["wanted"] = tuple(label) if label else None
    with counting(quiet, "cases") as count:
        found = evaluate_directories(predictions, references, classes, **common, progress=count)
    chosen = _groups(groups or (_TOTALSEG if grouped else None), found)
    make_folder(output.parent)
    write_csv(output, found)
    write_summary(output.with_name("summary.json"), found)
    written = [output, output.with_name("summary.json")]
    if baseline is not None:
        with counting(quiet, "cases of the baseline") as count:
            other = evaluate_directories(baseline, references, classes, **common, progress=count)
        written += _compare(found, other, output)
        _tell_problems(other, "baseline: ")
    if figures:
        from nnslim.evaluation.pictures import class_figure, group_figure, worst_figures

        stem = output.with_suffix("")
        written.append(stem.with_name(f"{stem.name}_classes.png"))
        class_figure(found, written[-1], chosen)
        if chosen is not None:
            written.append(stem.with_name(f"{stem.name}_groups.png"))
            group_figure(found, written[-1], chosen)
        written += worst_figures(found, stem, worst, classes, images)
    tell(*score_lines(found), f"written: {', '.join(map(str, written))}")
    _tell_problems(found)
    if not found.complete:
        raise typer.Exit(1)


def agree(
    model: Annotated[Path, typer.Option("-m", "--model", help="slim model folder")],
    dense: Annotated[Path, typer.Option("--dense", help="model folder that the slim one was made from")],
    images: Annotated[Path, typer.Option("-i", "--input", help="folder of images, or one image")],
    labels: Annotated[Path | None, typer.Option("-l", "--labels", help="folder of label maps <case><ending>")] = None,
    fold: Annotated[list[str] | None, typer.Option("-f", "--fold", help="default: those of the slim model")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda or mps")] = "cpu",
    disable_tta: Annotated[
        bool, typer.Option("--disable_tta", help="compare plain answers of a model that may be mirrored")
    ] = False,
    previous_stage: PreviousStageOption = None,
    trust: TrustOption = False,
    quiet: QuietOption = False,
) -> None:
    """Compare a slim model with the dense one on your images, per class; kept in nnslim.json and agreement.png.

    Example: nnslim agree -m SLIM --dense MODEL -i IMAGES
    """
    from nnslim.compression.record import RECORD, read_record
    from nnslim.hosts.nnunet.judge.agree_models import agreement_of_models, takes_mirrored, write_agreement
    from nnslim.hosts.nnunet.predict.predict_settings import PredictSettings

    start(quiet)
    read_record(model)  # a wrong folder is named before the images are predicted
    mirroring = takes_mirrored(model) and not disable_tta
    settings = PredictSettings(device, mirroring=mirroring, folds=fold, trust=trust, previous_stage=previous_stage)
    with counting(quiet, "cases") as count:
        agreement = agreement_of_models(dense, model, images, labels, settings, count)
    write_agreement(model, agreement)
    written = f"written: {model / RECORD}, {model / 'agreement.png'}"
    tell(*agreement.lines(), written, failed=bool(agreement.failed))


def _classes(dataset: str | None, predictions: Path) -> tuple[Classes | None, bool]:
    """Return what the labels mean, and whether TotalSegmentator's organ groups fit."""
    from nnslim.evaluation.classes import named_classes, read_dataset_json

    if dataset is None:
        dataset = str(predictions / "dataset.json")  # nnU-Net puts it there
        if not Path(dataset).is_file():
            return None, False
        _log.info("classes as in %s", dataset)
    if Path(dataset).is_file() or dataset.endswith(".json"):
        return read_dataset_json(Path(dataset)), False
    from nnslim.hosts.totalseg.tasks import task_classes

    return named_classes(task_classes(dataset)), True


def _groups(groups: str | None, found: Evaluation) -> dict[str, list[str]] | None:
    from nnslim.evaluation.classes import group_classes, read_groups

    names = [one.name for one in found.present]
    if groups is None:
        return None
    if groups != _TOTALSEG:
        return read_groups(Path(groups), [one.name for one in found.classes], names)
    from nnslim.hosts.totalseg.tasks import organ_groups

    return group_classes(organ_groups(), names)


def _compare(found: Evaluation, other: Evaluation, output: Path) -> list[Path]:
    """Print and write the paired differences to the baseline."""
    from nnslim.evaluation.scores import paired_differences, write_csv, write_differences

    differences = {metric: paired_differences(found, other, metric) for metric in ("dice", "nsd")}
    files = [output.with_name(f"{output.stem}_{what}.csv") for what in ("baseline", "difference")]
    write_csv(files[0], other)
    write_differences(files[1], differences)
    for metric, listed in differences.items():
        for one in listed.itertuples():
            typer.echo(
                f"{metric} minus baseline, {one.name}: {one.mean:+.4f} (SD {one.sd:.4f}, {one.cases} case(s)), "
                f"lowest {one.lowest:+.4f} in {one.lowest_case}"
            )
        tested = listed["p_holm"].dropna()
        fell = listed["name"][(listed["p_holm"] < _LEVEL) & (listed["mean"] < 0)]
        if len(listed):
            lower = f"; lower: {', '.join(fell)}" if len(fell) else ""
            counted = f"{(tested < _LEVEL).sum()} of {len(tested)} class(es)"
            typer.echo(f"{metric}: {counted} differ from the baseline (Wilcoxon, Holm, {_LEVEL}){lower}")
    return files


def _tell_problems(found: Evaluation, prefix: str = "") -> None:
    for name, reason in found.failed.items():
        typer.echo(shown(f"{prefix}failed: {name}: {reason}"), err=True)
    for word, names in (("no prediction for", found.missing), ("no reference for", found.extra)):
        if names:
            typer.echo(shown(f"{prefix}{word} {len(names)} case(s): {', '.join(names)}"), err=True)
    for case in found.cases:
        for side in ("prediction", "reference"):
            if names := [one.name for one in found.classes if case.lacking.get(one.key) == side]:
                listed = f"{len(names)} class(es): {', '.join(names)}"
                typer.echo(shown(f"{prefix}{case.name}: no {side} file of {listed}"), err=True)
