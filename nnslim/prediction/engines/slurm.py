"""Slurm: each task of an array takes its share of the folder, with workers of its own; there is no master.

The shares are of equal voxels and follow from the listing alone. A task that is run again goes on where it stopped.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from nnslim.errors import InputError

_SCRIPT = """\
#!/bin/bash
#SBATCH --job-name=nnslim-predict
#SBATCH --array=0-{last}
#SBATCH --cpus-per-task={cpus}
#SBATCH --mem=32G
#SBATCH --time=24:00:00
#SBATCH --output=%x-%A_%a.log
#SBATCH --requeue
{gpu}# Adapt the lines above to your cluster. Images, model and output must be on a file system that all nodes see.
# Each task predicts one of {parts} shares; submit the script again, and what is missing is predicted.
cd {folder}
exec {command}
"""


def part_of(environment: Mapping[str, str], parts: int | None = None) -> tuple[int, int]:
    """Return the (number, count) of this task among those that share the folder.

    Args:
        environment: SLURM_ARRAY_TASK_ID, _COUNT, _MIN, _STEP; tasks of one job step (srun --ntasks) count, too.
        parts: shares in all, for an array of which only some tasks are run again; None: the tasks of the array.
    Raises:
        InputError: no Slurm variables, or an array whose numbers are no range.
    """
    if "SLURM_ARRAY_TASK_ID" not in environment and ("SLURM_JOB_ID" not in environment or parts is not None):
        raise InputError(
            "the slurm engine runs inside a Slurm job; make the script with --print-sbatch and submit it with sbatch"
        )
    defaults = {"ARRAY_TASK_ID": 0, "ARRAY_TASK_MIN": 0, "ARRAY_TASK_STEP": 1, "ARRAY_TASK_COUNT": 1}
    defaults |= {"PROCID": 0, "STEP_NUM_TASKS": 1}
    try:
        given = [int(environment.get(f"SLURM_{name}", default)) for name, default in defaults.items()]
    except ValueError as error:
        raise InputError(f"the Slurm variables cannot be understood: {error}") from error
    task, first, stride, count, step, steps = given
    number, count = ((task - first) // max(stride, 1), count) if parts is None else (task, parts)
    if not 0 <= number < count:
        raise InputError(
            f"array task {task} is not one of {count} shares; submit a range such as --array=0-{count - 1}, or say "
            "with --parts how many shares there are"
        )
    return number * steps + step, count * steps


def sbatch_script(arguments: Sequence[str], parts: int, *, gpu: bool = False, cpus: int = 8) -> str:
    """Return a batch script for the same command, one array task per share.

    Args:
        arguments: of `nnslim`, as they were given, --print-sbatch included.
        parts: array tasks. gpu: ask for one per task. cpus: per task.
    """
    kept = [argument for argument in arguments if argument != "--print-sbatch"]
    if "slurm" not in kept and "--engine=slurm" not in kept:
        kept += ["--engine", "slurm"]
    if not any(argument == "--parts" or argument.startswith("--parts=") for argument in kept):
        kept += ["--parts", str(parts)]
    return _SCRIPT.format(
        last=parts - 1,
        parts=parts,
        cpus=cpus,
        gpu="#SBATCH --gres=gpu:1\n" if gpu else "",
        folder=shlex.quote(str(Path.cwd())),
        command=shlex.join([sys.executable, "-m", "nnslim.cli", *kept]),
    )
