"""`nnslim compress` and `nnslim plan`: a trained model made slim, or its ranks alone."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from nnslim.commands.common import (
    CheckpointOption,
    ConfigOption,
    FoldOption,
    ImagesOption,
    ModelOption,
    QuietOption,
    TrustOption,
    start,
    stepping,
)

Store = Enum("Store", {name: name for name in ("half", "as-is")}, type=str)


def compress(
    model: ModelOption,
    output: Annotated[Path, typer.Option("-o", "--output", help="folder to write; must not exist")],
    config: ConfigOption,
    images: ImagesOption = None,
    fold: FoldOption = None,
    checkpoint: CheckpointOption = None,
    allow_slower: Annotated[
        bool, typer.Option("--allow-slower", help="write also a model that is slower than the dense one here")
    ] = False,
    store: Annotated[Store | None, typer.Option(help="weights on disk; default: the config's, else as-is")] = None,
    trust: TrustOption = False,
    quiet: QuietOption = False,
) -> None:
    """Compress a trained model into a folder that stock nnU-Net loads."""
    from nnslim.compression.config import load_config
    from nnslim.compression.model_report import ModelReport
    from nnslim.hosts.nnunet.compress.compress_model import compress_model
    from nnslim.hosts.nnunet.model.trained_model import read_trained_model

    start(quiet)
    settings = load_config(config)
    if store is not None:
        settings = settings.model_copy(update={"store": store.value})
    source = read_trained_model(model, fold, checkpoint, trust=trust)
    with stepping(quiet) as step:
        slimmed = compress_model(
            source,
            output,
            settings,
            images=images,
            progress=step,
            allow_slower=allow_slower,
        )
    for line in ModelReport(str(model), len(source.checkpoints), slimmed, slimmed.seconds).lines():
        typer.echo(line)
    typer.echo(f"written: {output}")


def plan(
    model: ModelOption,
    output: Annotated[Path, typer.Option("-o", "--output", help="CSV file to write; must not exist")],
    config: ConfigOption,
    images: ImagesOption = None,
    fold: Annotated[str | None, typer.Option("-f", "--fold", help="whose weights decide; default: the first")] = None,
    checkpoint: CheckpointOption = None,
    trust: TrustOption = False,
    quiet: QuietOption = False,
) -> None:
    """Choose the ranks only and write them as a table, to be edited and passed back: {method: tucker, plan: FILE}."""
    from nnslim.compression.config import load_config
    from nnslim.hosts.nnunet.compress.plan_model import plan_model
    from nnslim.hosts.nnunet.model.trained_model import read_trained_model

    start(quiet)
    settings = load_config(config).with_images(images)
    source = read_trained_model(model, fold and [fold], checkpoint, trust=trust)
    with stepping(quiet) as step:
        planned = plan_model(
            source,
            output,
            settings,
            progress=step,
        )
    for line in planned.lines():
        typer.echo(line)
    typer.echo(f"written: {output}")
