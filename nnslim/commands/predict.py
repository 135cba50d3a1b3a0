"""`nnslim predict`: segment a folder of images, case by case."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nnslim.commands.common import (
    BackendOption,
    CheckpointOption,
    FoldOption,
    PrecisionOption,
    PreviousStageOption,
    QuietOption,
    TrustOption,
    counting,
    start,
    stderr,
)


def predict(
    images: Annotated[Path, typer.Option("-i", "--input", help="folder of images, or one image")],
    output: Annotated[Path, typer.Option("-o", "--output", help="folder for the segmentations")],
    model: Annotated[Path, typer.Option("-m", "--model", help="model folder, dense or slim")],
    config: Annotated[str | None, typer.Option("-c", "--config", help="compress on the fly with this config")] = None,
    calibration: Annotated[
        Path | None, typer.Option(help="folder of unlabelled images, for -c and for --precision int8")
    ] = None,
    fold: FoldOption = None,
    checkpoint: CheckpointOption = None,
    device: Annotated[str, typer.Option(help="cpu, cuda or mps")] = "cpu",
    step_size: Annotated[float, typer.Option(help="tile step as a share of the patch, 0..1")] = 0.5,
    mirroring: Annotated[bool, typer.Option(help="test-time mirroring, up to 8x the time")] = False,
    overwrite: Annotated[bool, typer.Option(help="predict again what is there already")] = False,
    previous_stage: PreviousStageOption = None,
    backend: BackendOption = None,
    precision: PrecisionOption = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads; default: all")] = None,
    trust: TrustOption = False,
    quiet: QuietOption = False,
) -> None:
    """Predict a folder case by case: a bad case is reported and the others go on, results are never half-written."""
    from nnslim.hosts.nnunet.predict import PredictSettings, predict_folder
    from nnslim.work.config import load_config

    start(quiet)
    settings = PredictSettings(
        device=device,
        step_size=step_size,
        mirroring=mirroring,
        overwrite=overwrite,
        folds=fold,
        checkpoint=checkpoint,
        trust=trust,
        previous_stage=previous_stage,
        backend=backend.value if backend else None,
        precision=precision.value if precision else None,
        threads=threads,
    )
    chosen = load_config(config or {}).with_images(calibration)
    with counting(quiet, "cases") as count:
        results = predict_folder(images, output, model, chosen, settings, count)
    failed = [case for case in results if case.status == "failed"]
    for case in failed:
        stderr.print(f"nnslim: {case.name}: {case.error}", markup=False)
    done = sum(case.status == "done" for case in results)
    there = sum(case.status == "there" for case in results)
    typer.echo(f"{done} predicted, {there} there already, {len(failed)} failed: {output}")
    if failed:
        raise typer.Exit(1)
