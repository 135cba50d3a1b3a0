"""The `nnslim` command. Exit codes: 0 done, 1 a case or check failed and the rest is done, 2 bad arguments or input."""

from __future__ import annotations

import logging
import runpy
import shutil
import sys
from collections.abc import Callable
from enum import Enum
from importlib.metadata import entry_points
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from nnslim._version import __version__
from nnslim.errors import HostError, InputError, NNSlimError

app = typer.Typer(
    help="Make trained nnU-Net v2 and TotalSegmentator models smaller and faster, and see what it costs.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
_errors = Console(stderr=True, highlight=False, soft_wrap=True)

ConfigOption = Annotated[str, typer.Option("-c", "--config", help="preset name or YAML file")]
ImagesOption = Annotated[Path | None, typer.Option("-i", "--images", help="folder of unlabelled calibration images")]
TrustOption = Annotated[bool, typer.Option("--trust-checkpoint", help="load as nnU-Net does, code included")]
QuietOption = Annotated[bool, typer.Option("-q", "--quiet", help="no progress bar, warnings and errors only")]
# As words, not from the engine: importing that takes torch's seconds, also for --help.
_Backend = Enum("_Backend", {name: name for name in ("auto", "stock", "eager", "compile", "openvino")}, type=str)
_Precision = Enum("_Precision", {name: name for name in ("f32", "bf16", "f16", "int8")}, type=str)
_Format = Enum("_Format", {name: name for name in ("onnx", "openvino")}, type=str)
_ExportPrecision = Enum("_ExportPrecision", {name: name for name in ("f32", "f16", "int8")}, type=str)
BackendOption = Annotated[_Backend | None, typer.Option(help="how the network runs; default: the config's, else auto")]
PrecisionOption = Annotated[_Precision | None, typer.Option(help="of the arithmetic; all but f32 need openvino")]


def _start(quiet: bool) -> None:
    handler = RichHandler(console=_errors, show_time=False, show_path=False, markup=False)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[handler])
    logging.getLogger("nnslim").setLevel(logging.WARNING if quiet else logging.INFO)


def _progress(quiet: bool) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"))
    return Progress(*columns, TimeElapsedColumn(), console=_errors, disable=quiet, transient=True)


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="print the version")] = False) -> None:
    if version:
        typer.echo(__version__)
        raise typer.Exit


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def run(context: typer.Context, config: ConfigOption, images: ImagesOption = None, quiet: QuietOption = False) -> None:
    """Run nnUNetv2_predict, TotalSegmentator or any Python script unchanged, inside the context.

    Example: nnslim run -c tucker-balanced -- TotalSegmentator -i ct.nii.gz -o seg
    """
    from nnslim.context import NNSlimContext

    _start(quiet)
    if not context.args:
        raise NNSlimError("nothing to run: give a command after --, for example: -- nnUNetv2_predict -h")
    target, *arguments = context.args
    saved = sys.argv
    with NNSlimContext(config, images=images) as slim:
        try:
            sys.argv = [target, *arguments]
            _run_command(target)
        finally:
            sys.argv = saved
            if slim.report.models and not quiet:
                _errors.print(str(slim.report), markup=False)


def _run_command(target: str) -> None:
    """Run a console script of an installed package, or a .py file, in this process, with sys.argv as it is."""
    found = [entry for entry in entry_points(group="console_scripts") if entry.name == target]
    if found:
        found[0].load()()
    elif target.endswith(".py") and Path(target).is_file():
        sys.path.insert(0, str(Path(target).resolve().parent))
        runpy.run_path(target, run_name="__main__")
    else:
        where = shutil.which(target)
        hint = f"{where} is not a Python program" if where else "no such Python command or .py file is installed"
        raise HostError(f"cannot run '{target}' inside the context: {hint}")


@app.command()
def compress(
    model: Annotated[Path, typer.Option("-m", "--model", help="trained model folder: trainer__plans__configuration")],
    output: Annotated[Path, typer.Option("-o", "--output", help="folder to write; must not exist")],
    config: ConfigOption,
    images: ImagesOption = None,
    fold: Annotated[list[str] | None, typer.Option("-f", "--fold", help="fold, repeatable; default: all")] = None,
    checkpoint: Annotated[str | None, typer.Option("-chk", help="default: checkpoint_final.pth, else _best")] = None,
    allow_slower: Annotated[
        bool, typer.Option("--allow-slower", help="write also a model that is slower than the dense one here")
    ] = False,
    trust: TrustOption = False,
    quiet: QuietOption = False,
) -> None:
    """Compress a trained model into a folder that stock nnU-Net loads."""
    from nnslim.hosts.nnunet.folder import read_model_folder
    from nnslim.hosts.nnunet.write import compress_folder
    from nnslim.work.config import load_config
    from nnslim.work.report import ModelReport

    _start(quiet)
    settings = load_config(config)
    source = read_model_folder(model, fold, checkpoint, trust=trust)
    with _progress(quiet) as bar:
        task = bar.add_task("reading", total=None)
        slimmed = compress_folder(
            source,
            output,
            settings,
            images=images,
            progress=lambda what, done, total: bar.update(task, description=what, completed=done, total=total),
            allow_slower=allow_slower,
        )
    for line in ModelReport(str(model), len(source.checkpoints), slimmed, slimmed.seconds).lines():
        typer.echo(line)
    typer.echo(f"written: {output}")


@app.command()
def plan(
    model: Annotated[Path, typer.Option("-m", "--model", help="trained model folder: trainer__plans__configuration")],
    output: Annotated[Path, typer.Option("-o", "--output", help="CSV file to write; must not exist")],
    config: ConfigOption,
    images: Annotated[
        Path | None, typer.Option("-i", "--images", help="folder of unlabelled calibration images")
    ] = None,
    fold: Annotated[str | None, typer.Option("-f", "--fold", help="whose weights decide; default: the first")] = None,
    checkpoint: Annotated[str | None, typer.Option("-chk", help="default: checkpoint_final.pth, else _best")] = None,
    trust: TrustOption = False,
    quiet: QuietOption = False,
) -> None:
    """Choose the ranks only and write them as a table, to be edited and passed back: {method: tucker, plan: FILE}."""
    from nnslim.hosts.nnunet.error_grid import plan_folder
    from nnslim.hosts.nnunet.folder import read_model_folder
    from nnslim.work.config import load_config

    _start(quiet)
    settings = load_config(config).with_images(images)
    source = read_model_folder(model, fold and [fold], checkpoint, trust=trust)
    with _progress(quiet) as bar:
        task = bar.add_task("reading", total=None)
        planned = plan_folder(
            source,
            output,
            settings,
            progress=lambda what, done, total: bar.update(task, description=what, completed=done, total=total),
        )
    for line in planned.lines():
        typer.echo(line)
    typer.echo(f"written: {output}")


@app.command()
def predict(
    images: Annotated[Path, typer.Option("-i", "--input", help="folder of images, or one image")],
    output: Annotated[Path, typer.Option("-o", "--output", help="folder for the segmentations")],
    model: Annotated[Path, typer.Option("-m", "--model", help="model folder, dense or slim")],
    config: Annotated[str | None, typer.Option("-c", "--config", help="compress on the fly with this config")] = None,
    fold: Annotated[list[str] | None, typer.Option("-f", "--fold", help="fold, repeatable; default: all")] = None,
    checkpoint: Annotated[str | None, typer.Option("-chk", help="default: checkpoint_final.pth, else _best")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda or mps")] = "cpu",
    step_size: Annotated[float, typer.Option(help="tile step as a share of the patch, 0..1")] = 0.5,
    mirroring: Annotated[bool, typer.Option(help="test-time mirroring, up to 8x the time")] = False,
    overwrite: Annotated[bool, typer.Option(help="predict again what is there already")] = False,
    previous_stage: Annotated[
        Path | None, typer.Option(help="for a cascade: folder of the segmentations of the stage before")
    ] = None,
    backend: BackendOption = None,
    precision: PrecisionOption = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads; default: all")] = None,
    trust: TrustOption = False,
    quiet: QuietOption = False,
) -> None:
    """Predict a folder case by case: a bad case is reported and the others go on, results are never half-written."""
    from nnslim.hosts.nnunet.predict import PredictSettings, predict_folder

    _start(quiet)
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
    with _progress(quiet) as bar:
        task = bar.add_task("cases", total=None)
        results = predict_folder(
            images, output, model, config, settings, lambda done, total: bar.update(task, completed=done, total=total)
        )
    failed = [case for case in results if case.status == "failed"]
    for case in failed:
        _errors.print(f"nnslim: {case.name}: {case.error}", markup=False)
    done = sum(case.status == "done" for case in results)
    there = sum(case.status == "there" for case in results)
    typer.echo(f"{done} predicted, {there} there already, {len(failed)} failed: {output}")
    if failed:
        raise typer.Exit(1)


@app.command()
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
    fold: Annotated[list[str] | None, typer.Option("-f", "--fold", help="fold, repeatable; default: all")] = None,
    checkpoint: Annotated[str | None, typer.Option("-chk", help="default: checkpoint_final.pth, else _best")] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
    trust: TrustOption = False,
    quiet: QuietOption = False,
) -> None:
    """Measure a model and its slim forms side by side: time, memory, MACs; benchmark.csv, benchmark.json, pictures."""
    from nnslim.hosts.nnunet.benchmark import BenchmarkSettings, benchmark_folder, ways_of
    from nnslim.work.benchmark_screen import screen_table, stage_table

    _start(quiet)
    ways = ways_of(backend or (), precision or (), threads, device)
    settings = BenchmarkSettings(ways, rounds, batch_size, cases, fold, checkpoint, trust, dice)
    with _progress(quiet) as bar:
        task = bar.add_task("reading", total=None)
        measured = benchmark_folder(
            model,
            config or (),
            output,
            settings,
            images=images,
            progress=lambda what, done, total: bar.update(task, description=what, completed=done, total=total),
        )
    screen = Console(highlight=False, width=None if sys.stdout.isatty() else 180)
    screen.print(screen_table(measured.rows))
    if measured.profiles:
        screen.print(stage_table(measured.profiles))
        typer.echo("start: " + ", ".join(f"{name} {seconds:.2f} s" for name, seconds in measured.starts.items()))
    typer.echo(f"written: {output}")
    for line in measured.failed:
        _errors.print(f"nnslim: {line}", markup=False)
    if measured.failed:
        raise typer.Exit(1)


@app.command()
def agree(
    model: Annotated[Path, typer.Option("-m", "--model", help="slim model folder")],
    dense: Annotated[Path, typer.Option("--dense", help="model folder that the slim one was made from")],
    images: Annotated[Path, typer.Option("-i", "--input", help="folder of images, or one image")],
    labels: Annotated[Path | None, typer.Option("-l", "--labels", help="folder of label maps <case><ending>")] = None,
    fold: Annotated[list[str] | None, typer.Option("-f", "--fold", help="default: those of the slim model")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda or mps")] = "cpu",
    previous_stage: Annotated[
        Path | None, typer.Option(help="for a cascade: folder of the segmentations of the stage before")
    ] = None,
    trust: TrustOption = False,
    quiet: QuietOption = False,
) -> None:
    """Compare a slim model with the dense one on your images, per class; kept in nnslim.json and agreement.png."""
    from nnslim.hosts.nnunet.agree import agreement_of_folders, slim_record, write_agreement
    from nnslim.hosts.nnunet.predict import PredictSettings

    _start(quiet)
    slim_record(model)  # a wrong folder is named before the images are predicted
    settings = PredictSettings(device=device, folds=fold, trust=trust, previous_stage=previous_stage)
    with _progress(quiet) as bar:
        task = bar.add_task("cases", total=None)
        agreement = agreement_of_folders(
            dense, model, images, labels, settings, lambda done, total: bar.update(task, completed=done, total=total)
        )
    write_agreement(model, agreement)
    for line in agreement.lines():
        typer.echo(line)
    typer.echo(f"written: {model / 'nnslim.json'}, {model / 'agreement.png'}")
    if agreement.failed:
        raise typer.Exit(1)


@app.command()
def finetune(
    model: Annotated[Path, typer.Option("-m", "--model", help="model folder to start from, slim or dense")],
    dataset: Annotated[str, typer.Option("-d", "--dataset", help="number or name, raw or preprocessed")],
    output: Annotated[Path, typer.Option("-o", "--output", help="model folder to write")],
    fold: Annotated[list[str] | None, typer.Option("-f", "--fold", help="fold, repeatable; default: all")] = None,
    epochs: Annotated[int, typer.Option(help="epochs in all")] = 50,
    iterations: Annotated[int | None, typer.Option(help="per epoch; default: the trainer's")] = None,
    validation_iterations: Annotated[int | None, typer.Option(help="per epoch; default: the trainer's")] = None,
    batch_size: Annotated[int | None, typer.Option(help="default: the plans'")] = None,
    optimizer: Annotated[str, typer.Option(help="adamw or sgd")] = "adamw",
    learning_rate: Annotated[float, typer.Option(help="of the first epoch")] = 1e-4,
    schedule: Annotated[str, typer.Option(help="of the learning rate: constant or poly")] = "constant",
    weight_decay: Annotated[float | None, typer.Option(help="default: the trainer's")] = None,
    teacher: Annotated[Path | None, typer.Option(help="dense model folder to distil from as well")] = None,
    distill: Annotated[float, typer.Option(help="weight of the distillation term, with --teacher")] = 1.0,
    trainer: Annotated[str | None, typer.Option(help="class name; default: the one of the checkpoint")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda or mps")] = "cpu",
    num_gpus: Annotated[int, typer.Option(help="CUDA devices to train on together")] = 1,
    resume: Annotated[bool, typer.Option("--continue", help="go on where the output folder stopped")] = False,
    validate: Annotated[bool, typer.Option(help="then predict the validation cases, as nnUNetv2_train does")] = False,
    seed: Annotated[int, typer.Option(help="of the augmentation")] = 0,
    checkpoint: Annotated[str | None, typer.Option("-chk", help="default: checkpoint_final.pth, else _best")] = None,
    processes: Annotated[int, typer.Option(help="that preprocess, where that has not been done")] = 2,
    previous_stage: Annotated[Path | None, typer.Option(help="for a cascade: the stage before's segmentations")] = None,
    trust: TrustOption = False,
    quiet: QuietOption = False,
) -> None:
    """Train a slim model further on a dataset with labels, inside nnU-Net's own trainer."""
    from nnslim.hosts.nnunet.finetune import FinetuneSettings, finetune_folder

    given = {key: value for key, value in locals().items() if key in FinetuneSettings.__dataclass_fields__}
    _start(quiet)
    settings = FinetuneSettings(folds=fold, **given)
    with _progress(quiet) as bar:
        task = bar.add_task("epochs", total=None)
        finetune_folder(
            model, output, dataset, settings, lambda done, total: bar.update(task, completed=done, total=total)
        )
    typer.echo(f"written: {output}")


@app.command()
def distill(
    model: Annotated[Path, typer.Option("-m", "--model", help="slim model folder")],
    teacher: Annotated[Path, typer.Option("--teacher", help="model folder that the slim one was made from")],
    images: Annotated[Path, typer.Option("-i", "--images", help="folder of unlabelled images")],
    output: Annotated[Path, typer.Option("-o", "--output", help="model folder to write; must not exist")],
    steps: Annotated[int, typer.Option(help="steps that learn the dense logits, per fold")] = 300,
    block_steps: Annotated[int, typer.Option(help="steps before them that learn each stage's outputs")] = 0,
    seconds: Annotated[float | None, typer.Option(help="time budget per fold")] = None,
    batch_size: Annotated[int | None, typer.Option(help="patches per step; default: 2")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="of AdamW; default: 0.0015")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda")] = "auto",
    trust: TrustOption = False,
    quiet: QuietOption = False,
) -> None:
    """Let a slim model learn the dense model's answers on images without labels; an interrupted run goes on."""
    from nnslim.hosts.nnunet.distill import distill_config, distill_folder, read_pair

    _start(quiet)
    given = {"seconds": seconds, "batch_size": batch_size, "learning_rate": learning_rate}
    settings = distill_config(images, device, steps=steps, block_steps=block_steps, **given)
    slim, dense = read_pair(model, teacher, trust=trust)
    with _progress(quiet) as bar:
        task = bar.add_task("reading", total=None)
        recoveries = distill_folder(
            slim,
            dense,
            output,
            settings,
            progress=lambda what, done, total: bar.update(task, description=what, completed=done, total=total),
        )
    for fold, recovery in zip(slim.checkpoints, recoveries, strict=True):
        typer.echo(
            f"fold {fold}: {recovery.steps} steps, estimated drop in Dice {recovery.before:.4f} -> {recovery.after:.4f}"
        )
    typer.echo(f"written: {output}")


@app.command()
def export(
    model: Annotated[Path, typer.Option("-m", "--model", help="model folder, dense or slim")],
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="file to write: .onnx or .xml; none: int8 beside checkpoints")
    ] = None,
    format_: Annotated[_Format | None, typer.Option("--format", help="default: by the ending of the output")] = None,
    precision: Annotated[
        _ExportPrecision, typer.Option(help="f16: of the weights; int8: calibrated on images")
    ] = _ExportPrecision.f32,  # type: ignore[attr-defined]
    images: Annotated[
        Path | None, typer.Option("-i", "--images", help="folder of images: to calibrate int8, and to compare on")
    ] = None,
    fold: Annotated[str | None, typer.Option("-f", "--fold", help="default: the first")] = None,
    patch: Annotated[str | None, typer.Option(help="sizes in voxels, such as 96,96,96; default: the model's")] = None,
    checkpoint: Annotated[str | None, typer.Option("-chk", help="default: checkpoint_final.pth, else _best")] = None,
    trust: TrustOption = False,
    quiet: QuietOption = False,
) -> None:
    """Write the network as an ONNX or OpenVINO file that runs without torch and nnU-Net, and compare it on a tile."""
    from nnslim.hosts.nnunet.export import ExportSettings, export_model, read_patch
    from nnslim.hosts.nnunet.folder import read_model_folder

    _start(quiet)
    asked = None if patch is None else read_patch(patch)
    source = read_model_folder(model, fold and [fold], checkpoint, trust=trust)
    with _progress(quiet) as bar:
        task = bar.add_task("reading", total=None)

        def step(what: str, done: int, total: int) -> None:
            bar.update(task, description=what, completed=done, total=total)

        if output is None:
            lines, passed = _int8_beside(source, precision.value, images, step)
        else:
            named = format_.value if format_ else {".onnx": "onnx"}.get(output.suffix, "openvino")
            exported = export_model(source, output, ExportSettings(named, precision.value, images, asked), step)
            lines, passed = exported.lines(), bool(exported.files)
    for line in lines:
        typer.echo(line)
    if not passed:
        raise typer.Exit(1)


def _int8_beside(
    source: Any, precision: str, images: Path | None, step: Callable[[str, int, int], None]
) -> tuple[list[str], bool]:
    """Write an int8 model beside each checkpoint; return lines for the user, and whether all passed the check."""
    from nnslim.hosts.nnunet.int8 import keep_int8

    if precision != "int8" or images is None:
        raise InputError("name a file to write with -o; only --precision int8 with -i can go beside the checkpoints")
    checked = keep_int8(source, images, progress=step)
    lines = [f"fold {fold}: {found.line()}" for fold, found in checked.items()]
    return lines, all(found.passed for found in checked.values())


@app.command()
def doctor() -> None:
    """Explain this machine: versions, what is compatible, which CPU and GPU features there are, where files go."""
    from nnslim.doctor import examine

    findings = examine()
    for line in findings.lines():
        typer.echo(line)
    if not findings.usable:
        raise typer.Exit(1)


def main() -> None:
    """Entry point: errors that a user can mend become one line and exit code 2."""
    try:
        app()
    except NNSlimError as error:
        _errors.print(f"nnslim: {error}", markup=False)
        sys.exit(2)
    except KeyboardInterrupt:
        _errors.print("nnslim: interrupted")
        sys.exit(130)


if __name__ == "__main__":
    main()
