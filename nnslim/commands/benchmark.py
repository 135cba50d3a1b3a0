"""`nnslim benchmark`: dense and slim side by side."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from nnslim.commands.common import CheckpointOption, FoldOption, QuietOption, TrustOption, start, stderr, stepping
from nnslim.errors import shown


def benchmark(
    model: Annotated[Path, typer.Option("-m", "--model", help="model folder")],
    output: Annotated[Path, typer.Option("-o", "--output", help="folder for tables and pictures")],
    config: Annotated[
        list[str] | None, typer.Option("-c", "--config", help="preset, YAML file or slim model folder; repeatable")
    ] = None,
    backend: Annotated[
        list[str] | None,
        typer.Option(
            help="stock, eager, compile, openvino, auto, stock-compile, openvino-plain; repeatable; "
            "default: stock, eager and, where installed, openvino"
        ),
    ] = None,
    precision: Annotated[
        list[str] | None, typer.Option(help="f32, bf16, f16, int8; repeatable; other than f32 on openvino alone")
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="counted passes of each row, in turn")] = 5,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; default: torch's choice")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="patches per pass")] = 1,
    images: Annotated[
        Path | None, typer.Option("-i", "--images", help="also time the whole pipeline on these cases, by stages")
    ] = None,
    cases: Annotated[int, typer.Option(min=1, help="cases of the whole pipeline")] = 3,
    dice: Annotated[Path | None, typer.Option(help="CSV file with columns name and dice, drawn against time")] = None,
    fold: FoldOption = None,
    checkpoint: CheckpointOption = None,
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
    trust: TrustOption = False,
    quiet: QuietOption = False,
) -> None:
    """Measure a model and its slim forms side by side: time, memory, MACs; benchmark.csv, benchmark.json, pictures.

    Example: nnslim benchmark -m MODEL -c tucker-balanced -o results
    """
    from nnslim.benchmark.timings import screen_table, stage_table
    from nnslim.hosts.nnunet.judge.benchmark_models import BenchmarkSettings, benchmark_models, ways_of

    start(quiet)
    ways = ways_of(backend or (), precision or (), threads, device)
    settings = BenchmarkSettings(ways, rounds, batch_size, cases, fold, checkpoint, trust, dice)
    with stepping(quiet) as step:
        measured = benchmark_models(model, config or (), output, settings, images=images, progress=step)
    screen = Console(highlight=False, width=None if sys.stdout.isatty() else 180)
    screen.print(screen_table(measured.rows))
    if measured.profiles:
        screen.print(stage_table(measured.profiles))
        typer.echo("start: " + ", ".join(f"{name} {seconds:.2f} s" for name, seconds in measured.starts.items()))
    typer.echo(f"written: {output}")
    for line in measured.failed:
        stderr.print(shown(f"nnslim: {line}"), markup=False)
    if measured.failed:
        raise typer.Exit(1)
