"""`nnslim agree`: a slim model against the dense one, on images."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nnslim.commands.common import PreviousStageOption, QuietOption, TrustOption, counting, start


def agree(
    model: Annotated[Path, typer.Option("-m", "--model", help="slim model folder")],
    dense: Annotated[Path, typer.Option("--dense", help="model folder that the slim one was made from")],
    images: Annotated[Path, typer.Option("-i", "--input", help="folder of images, or one image")],
    labels: Annotated[Path | None, typer.Option("-l", "--labels", help="folder of label maps <case><ending>")] = None,
    fold: Annotated[list[str] | None, typer.Option("-f", "--fold", help="default: those of the slim model")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda or mps")] = "cpu",
    previous_stage: PreviousStageOption = None,
    trust: TrustOption = False,
    quiet: QuietOption = False,
) -> None:
    """Compare a slim model with the dense one on your images, per class; kept in nnslim.json and agreement.png."""
    from nnslim.compression.record import RECORD, read_record
    from nnslim.hosts.nnunet.judge.agree_models import agreement_of_models, write_agreement
    from nnslim.hosts.nnunet.predict.predict_settings import PredictSettings

    start(quiet)
    read_record(model)  # a wrong folder is named before the images are predicted
    settings = PredictSettings(device=device, folds=fold, trust=trust, previous_stage=previous_stage)
    with counting(quiet, "cases") as count:
        agreement = agreement_of_models(dense, model, images, labels, settings, count)
    write_agreement(model, agreement)
    for line in agreement.lines():
        typer.echo(line)
    typer.echo(f"written: {model / RECORD}, {model / 'agreement.png'}")
    if agreement.failed:
        raise typer.Exit(1)
