"""`nnslim distill`: a slim model learns from the dense one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nnslim.commands.common import QuietOption, TrustOption, start, stepping


def distill(
    model: Annotated[Path, typer.Option("-m", "--model", help="slim model")],
    teacher: Annotated[Path, typer.Option("--teacher", help="model that the slim one was made from")],
    images: Annotated[Path, typer.Option("-i", "--images", help="directory of unlabelled images")],
    output: Annotated[Path, typer.Option("-o", "--output", help="model directory to write; must not exist")],
    steps: Annotated[int, typer.Option(help="steps that learn the dense logits, per fold")] = 300,
    block_steps: Annotated[int, typer.Option(help="steps before them that learn each stage's outputs")] = 0,
    seconds: Annotated[float | None, typer.Option(help="time budget per fold")] = None,
    batch_size: Annotated[int | None, typer.Option(help="patches per step; default: 2")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="learning rate of AdamW; default: 0.0005")] = None,
    mirrored_teacher: Annotated[
        bool, typer.Option(help="learn the mean of the dense answers to mirror images, where the model may be mirrored")
    ] = True,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda")] = "auto",
    trust: TrustOption = False,
    quiet: QuietOption = False,
) -> None:
    """Let a slim model learn the dense model's answers on images without labels; an interrupted run goes on."""
    from nnslim.hosts.nnunet.compress.distill_model import distill_config, distill_model, read_pair

    start(quiet)
    given = {"steps": steps, "block_steps": block_steps, "mirrored_teacher": mirrored_teacher}
    given |= {"seconds": seconds, "batch_size": batch_size, "learning_rate": learning_rate}
    settings = distill_config(images, device, **given)
    slim, dense = read_pair(model, teacher, trust=trust)
    with stepping(quiet) as step:
        recoveries = distill_model(slim, dense, output, settings, progress=step)
    for fold, recovery in zip(slim.checkpoints, recoveries, strict=True):
        typer.echo(
            f"fold {fold}: {recovery.steps} steps, estimated drop in Dice {recovery.before:.4f} -> {recovery.after:.4f}"
        )
    typer.echo(f"written: {output}")
