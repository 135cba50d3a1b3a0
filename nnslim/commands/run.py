"""`nnslim run`: another program, unchanged, inside the context."""

from __future__ import annotations

import runpy
import shutil
import sys
from importlib.metadata import entry_points
from pathlib import Path

import typer

from nnslim.commands.common import ConfigOption, ImagesOption, QuietOption, start, stderr
from nnslim.errors import HostError, NNSlimError


def run(
    context: typer.Context, config: ConfigOption = None, images: ImagesOption = None, quiet: QuietOption = False
) -> None:
    """Run nnUNetv2_predict, TotalSegmentator or any Python script unchanged, inside the context.

    Example: nnslim run -c tucker-balanced -- TotalSegmentator -i ct.nii.gz -o seg
    """
    from nnslim.context import NNSlimContext

    start(quiet)
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
                stderr.print(str(slim.report), markup=False)


def _run_command(target: str) -> None:
    """Run a console script of an installed package, or a .py file, in this process, with sys.argv as it is."""
    if found := entry_points(group="console_scripts", name=target):
        next(iter(found)).load()()
    elif target.endswith(".py") and Path(target).is_file():
        sys.path.insert(0, str(Path(target).resolve().parent))
        runpy.run_path(target, run_name="__main__")
    else:
        where = shutil.which(target)
        hint = f"{where} is not a Python program" if where else "no such Python command or .py file is installed"
        raise HostError(f"cannot run '{target}' inside the context: {hint}")
