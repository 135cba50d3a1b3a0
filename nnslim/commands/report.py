"""`nnslim report`: what was done to a model, and what it cost, as one HTML page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nnslim.commands.common import PreviousStageOption, QuietOption, TrustOption, start, stepping


def report(
    model: Annotated[Path, typer.Option("-m", "--model", help="slim model folder")],
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="page to write; default: report.html in the model folder")
    ] = None,
    dense: Annotated[Path | None, typer.Option("--dense", help="model folder that the slim one was made from")] = None,
    images: Annotated[
        Path | None, typer.Option("-i", "--input", help="images: both models predict the worst and the median case")
    ] = None,
    labels: Annotated[Path | None, typer.Option("-l", "--labels", help="folder of label maps <case><ending>")] = None,
    benchmark: Annotated[
        list[Path] | None, typer.Option(help="folder of nnslim benchmark, or a CSV of timings; repeatable")
    ] = None,
    metrics: Annotated[
        list[str] | None, typer.Option(help="[NAME=]CSV of nnslim evaluate; repeatable: slim=a.csv, dense=b.csv")
    ] = None,
    compare: Annotated[
        list[str] | None, typer.Option(help="[NAME=]FOLDER of another slim model to draw beside; repeatable")
    ] = None,
    viewer: Annotated[bool, typer.Option("--viewer", help="embed NiiVue to scroll through the shown cases")] = False,
    viewer_mb: Annotated[float, typer.Option(min=0.1, help="MB that the volumes of a case may take in the page")] = 24,
    niivue: Annotated[Path | None, typer.Option(help="niivue.umd.js; default: nilearn's")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda or mps")] = "cpu",
    previous_stage: PreviousStageOption = None,
    trust: TrustOption = False,
    quiet: QuietOption = False,
) -> None:
    """Write one HTML page about a slim model: layers, time, classes, pictures; it loads nothing from elsewhere.

    Example: nnslim report -m SLIM --dense MODEL -i IMAGES -l LABELS
    """
    from nnslim.hosts.nnunet.judge.agree_models import takes_mirrored
    from nnslim.hosts.nnunet.judge.report_data import ReportSettings, write_page
    from nnslim.hosts.nnunet.predict.predict_settings import PredictSettings
    from nnslim.report.page_data import gaps

    start(quiet)
    settings = ReportSettings(
        dense,
        images,
        labels,
        PredictSettings(device, mirroring=takes_mirrored(model), trust=trust, previous_stage=previous_stage),
        benchmark or (),
        metrics or (),
        compare or (),
        viewer,
        niivue,
        int(viewer_mb * 1e6),
    )
    with stepping(quiet) as step:
        page, data = write_page(model, output, settings, step)
    for what, how in gaps(data).items():
        typer.echo(f"not measured: {what} ({how})")
    typer.echo(f"written: {page} ({page.stat().st_size / 1e6:.1f} MB)")
