"""`nnslim compress`, `plan` and `distill`: a trained model made slim, its ranks alone, what it learns later."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from nnslim.commands import common
from nnslim.commands.common import start, stepping, tell

Store = Enum("Store", {name: name for name in ("half", "as-is")}, type=str)
Target = Enum("Target", {name: name for name in ("same", "mirrored", "ensemble")}, type=str)


def compress(
    model: common.ModelOption,
    output: Annotated[Path, typer.Option("-o", "--output", help="folder to write; must not exist")],
    config: common.ConfigOption = None,
    images: common.ImagesOption = None,
    fold: common.FoldOption = None,
    checkpoint: common.CheckpointOption = None,
    allow_slower: Annotated[
        bool, typer.Option("--allow-slower", help="write also a model that is slower than the dense one here")
    ] = False,
    disable_tta: Annotated[
        bool, typer.Option("--disable_tta", help="judge plain answers, which nnUNetv2_predict --disable_tta gives")
    ] = False,
    store: Annotated[Store | None, typer.Option(help="weights on disk; default: the config's, else as-is")] = None,
    trust: common.TrustOption = False,
    quiet: common.QuietOption = False,
) -> None:
    """Compress a trained model into a folder that stock nnU-Net loads.

    Example: nnslim compress -m MODEL -o SLIM -i IMAGES
    """
    from nnslim.compression.config import changed_settings, default_config, load_config
    from nnslim.compression.model_report import ModelReport
    from nnslim.hosts.nnunet.compress.compress_model import compress_model
    from nnslim.hosts.nnunet.model.trained_model import read_trained_model

    start(quiet)
    settings = load_config(config or default_config(images))
    if store is not None:
        settings = settings.model_copy(update={"store": store.value})
    if disable_tta:
        settings = changed_settings(settings, {"calibration": {"mirrored": False}}, "--disable_tta")
    source = read_trained_model(model, fold, checkpoint, trust=trust)
    with stepping(quiet) as step:
        slimmed = compress_model(source, output, settings, images=images, progress=step, allow_slower=allow_slower)
    report = ModelReport(str(model), len(source.checkpoints), slimmed, slimmed.seconds)
    tell(*report.lines(), f"written: {output}")


def plan(
    model: common.ModelOption,
    output: Annotated[Path, typer.Option("-o", "--output", help="CSV file to write; must not exist")],
    config: Annotated[str, typer.Option("-c", "--config", help="preset name or YAML file")],
    images: common.ImagesOption = None,
    fold: Annotated[str | None, typer.Option("-f", "--fold", help="whose weights decide; default: the first")] = None,
    checkpoint: common.CheckpointOption = None,
    trust: common.TrustOption = False,
    quiet: common.QuietOption = False,
) -> None:
    """Choose the ranks only and write them as a table, to be edited and passed back: {method: tucker, plan: FILE}.

    Example: nnslim plan -m MODEL -c budget.yml -i IMAGES -o plan.csv
    """
    from nnslim.compression.config import load_config
    from nnslim.hosts.nnunet.compress.plan_model import plan_model
    from nnslim.hosts.nnunet.model.trained_model import read_trained_model

    start(quiet)
    settings = load_config(config).with_images(images)
    source = read_trained_model(model, fold and [fold], checkpoint, trust=trust)
    with stepping(quiet) as step:
        planned = plan_model(source, output, settings, progress=step)
    tell(*planned.lines(), f"written: {output}")


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
    target: Annotated[
        Target, typer.Option(help="in one pass: mirrored, the mirrored answer; ensemble, that of all folds")
    ] = Target.same,
    mirrored_teacher: Annotated[
        bool, typer.Option(help="learn the mean of the dense answers to mirror images, where the model may be mirrored")
    ] = True,
    live_teacher: Annotated[
        bool, typer.Option(help="ask the dense network for each patch, where else it would predict each image once")
    ] = False,
    disable_tta: Annotated[bool, typer.Option("--disable_tta", help="judge plain answers")] = False,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda")] = "auto",
    trust: common.TrustOption = False,
    quiet: common.QuietOption = False,
) -> None:
    """Let a slim model learn the dense model's answers on images without labels; an interrupted run goes on.

    Example: nnslim distill -m SLIM --teacher MODEL -i IMAGES -o BETTER --steps 500
    """
    from nnslim.hosts.nnunet.compress.distill_model import distill_config, distill_model, read_pair
    from nnslim.hosts.nnunet.judge.agree_models import takes_mirrored

    start(quiet)
    given = {"steps": steps, "block_steps": block_steps, "mirrored_teacher": mirrored_teacher, "target": target.value}
    given |= {"seconds": seconds, "batch_size": batch_size, "learning_rate": learning_rate}
    given |= {"teacher": "live" if live_teacher else "auto"}
    plain = disable_tta or (target is Target.same and not takes_mirrored(model))
    settings = distill_config(images, device, mirrored=False if plain else None, **given)
    slim, dense = read_pair(model, teacher, ensemble=target is Target.ensemble, trust=trust)
    with stepping(quiet) as step:
        recoveries = distill_model(slim, dense, output, settings, progress=step)
    lines = [
        f"fold {fold}: {recovery.steps} steps, estimated drop in Dice {recovery.before:.4f} -> {recovery.after:.4f}"
        for fold, recovery in zip(slim.checkpoints, recoveries, strict=False)  # of an ensemble, the first alone
    ]
    tell(*lines, f"written: {output}")
