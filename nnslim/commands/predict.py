"""`nnslim predict`: segment a folder of images, case by case, on one machine or many."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from nnslim.commands import common
from nnslim.commands.common import counting, start, stderr, tell
from nnslim.errors import ConfigError, shown

Engine = Enum("Engine", {name: name for name in ("local", "ray", "slurm")}, type=str)
_STEP = 0.5
_MODEL_ONLY = ("--fold", "-chk", "--previous-stage", "--disable_tta", "--step-size", "--trust-checkpoint")
_MODEL_ONLY += ("--out-filters", "--in-filters")


def predict(
    images: Annotated[Path, typer.Option("-i", "--input", help="folder of images, or one image")],
    output: Annotated[Path, typer.Option("-o", "--output", help="folder for the segmentations")],
    model: Annotated[Path | None, typer.Option("-m", "--model", help="model folder, dense or slim")] = None,
    task: Annotated[
        str | None, typer.Option(help="TotalSegmentator task, in place of -m: total, total_fast, total_mr ...")
    ] = None,
    config: Annotated[str | None, typer.Option("-c", "--config", help="compress on the fly with this config")] = None,
    calibration: Annotated[
        Path | None, typer.Option(help="folder of unlabelled images, for -c and for --precision int8")
    ] = None,
    engine: Annotated[Engine, typer.Option(help="local: this machine; ray; slurm")] = Engine.local,  # type: ignore[attr-defined]
    workers: Annotated[
        int | None, typer.Option(min=1, help="worker processes; default: one per GPU, else this process")
    ] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads per worker; default: an equal share")] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite/--resume", help="predict finished cases again, or continue where a run stopped")
    ] = False,
    overlap: Annotated[bool, typer.Option(help="read, predict and write neighbouring cases at the same time")] = True,
    fold: common.FoldOption = None,
    checkpoint: common.CheckpointOption = None,
    device: Annotated[str, typer.Option(help="auto (a GPU where there is one), cpu, cuda or mps")] = "auto",
    step_size: Annotated[float, typer.Option(help="tile step as a share of the patch, 0..1")] = _STEP,
    disable_tta: Annotated[
        bool, typer.Option("--disable_tta", help="no test-time mirroring: up to 8 times faster, a little less accurate")
    ] = False,
    mirroring: Annotated[bool | None, typer.Option(hidden=True)] = None,
    previous_stage: common.PreviousStageOption = None,
    out_filters: Annotated[
        Path | None, typer.Option(help="Sauron's table whose last row says the filters of each layer, for any plans")
    ] = None,
    in_filters: Annotated[Path | None, typer.Option(help="likewise, its input channels")] = None,
    backend: common.BackendOption = None,
    precision: common.PrecisionOption = None,
    deterministic: common.DeterministicOption = False,
    ml: Annotated[bool, typer.Option("--ml", help="with --task: one label map per case, not a file per class")] = False,
    roi: Annotated[
        list[str] | None, typer.Option(help="with --task: class to segment, repeatable; default: all")
    ] = None,
    parts: Annotated[
        int | None, typer.Option(min=1, help="with slurm: total number of shares; default: the tasks of the array")
    ] = None,
    print_sbatch: Annotated[
        bool, typer.Option("--print-sbatch", help="with slurm: print the script to submit")
    ] = False,
    ray_address: Annotated[
        str | None, typer.Option(help="with ray: address of the cluster; default: the running one, else a local one")
    ] = None,
    trust: common.TrustOption = False,
    quiet: common.QuietOption = False,
) -> None:
    """Predict a folder: a bad case is reported and the others continue; finished cases are whole and not repeated.

    Example: nnslim predict -i IMAGES -o OUT -m MODEL
    """
    if (model is None) == (task is None):
        raise ConfigError("give one of -m MODEL and --task TASK")
    goes_with_models = (
        fold,
        checkpoint,
        previous_stage,
        disable_tta,
        step_size != _STEP,
        trust,
        out_filters,
        in_filters,
    )
    _refuse(task is not None, _MODEL_ONLY, goes_with_models, "-m; TotalSegmentator decides it for its tasks")
    _refuse(model is not None, ("--ml", "--roi"), (ml, roi), "--task")
    _refuse(engine.value != "ray", ("--ray-address",), (ray_address,), "--engine ray")
    _refuse(engine.value != "slurm" and not print_sbatch, ("--parts",), (parts,), "--engine slurm")
    if print_sbatch:
        from nnslim.prediction.engines.slurm import sbatch_script

        cpus = (threads or 8) * (workers if workers and threads else 1)
        typer.echo(sbatch_script(sys.argv[1:], parts or 8, gpu=device == "cuda", cpus=cpus), nl=False)
        return
    from nnslim.prediction.case import Crew, crew_here
    from nnslim.prediction.engines.slurm import part_of
    from nnslim.prediction.run_directory import FolderSettings
    from nnslim.running.machine import chosen_device

    start(quiet)
    if mirroring is not None:
        stderr.print("nnslim: mirroring is the default, as in nnU-Net; --disable_tta switches it off", markup=False)
        disable_tta = not mirroring
    device = chosen_device(device)
    if engine.value == "ray":
        runner, crew = "ray", Crew(workers or 0, threads, int(device == "cuda"), overlap, ray_address)
    else:
        runner, crew = crew_here(device, workers, threads, overlap=overlap)
    folder = FolderSettings(
        runner, crew, overwrite, part=part_of(os.environ, parts) if engine.value == "slurm" else None
    )
    chosen: Any = {"backend": backend and backend.value, "precision": precision and precision.value, "threads": threads}
    chosen["deterministic"] = deterministic
    settled: Any = config
    if calibration is not None:  # only now: the import takes torch's seconds
        from nnslim.compression.config import load_config

        settled = load_config(config or {}).with_images(calibration.absolute())
    with counting(quiet, "cases") as count:
        if task is not None:
            from nnslim.hosts.totalseg.task_directory import TaskSettings, predict_task_folder

            wanted = TaskSettings(task, device, ml, tuple(roi or ()), **chosen)
            results = predict_task_folder(images, output, wanted, settled, count, folder)
        else:
            from nnslim.hosts.nnunet.predict.directory import PredictSettings, predict_folder

            widths = (table and table.absolute() for table in (out_filters, in_filters))
            given = (device, step_size, not disable_tta, fold, checkpoint, trust, previous_stage, *widths)
            settings = PredictSettings(*given, **chosen)
            results = predict_folder(images, output, model, settled, settings, count, folder)
    failed = [case for case in results if case.status == "failed"]
    for case in failed:
        stderr.print(shown(f"nnslim: {case.name}: {case.error}"), markup=False)
    done, there = (sum(case.status == word for case in results) for word in ("done", "there"))
    tell(f"{done} predicted, {there} there already, {len(failed)} failed: {output}", failed=bool(failed))


def _refuse(out_of_place: bool, names: Sequence[str], values: Sequence[Any], place: str) -> None:
    """Refuse options that would have no effect."""
    if out_of_place and (given := [name for name, value in zip(names, values, strict=True) if value]):
        raise ConfigError(f"{given[0]} goes with {place}")
