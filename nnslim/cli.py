"""The `nnslim` command. Exit codes: 0 done, 1 a case or check failed and the rest is done, 2 bad arguments or input,
130, 143 or 129: ended by SIGINT (Ctrl-C), SIGTERM or SIGHUP."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Annotated

import typer

from nnslim._version import __version__
from nnslim.commands.benchmark import benchmark
from nnslim.commands.common import stderr, stoppable
from nnslim.commands.compress import compress, distill, plan
from nnslim.commands.doctor import doctor
from nnslim.commands.evaluate import agree, evaluate
from nnslim.commands.export import export
from nnslim.commands.finetune import finetune
from nnslim.commands.inflate import inflate
from nnslim.commands.predict import predict
from nnslim.commands.report import report
from nnslim.commands.run import run
from nnslim.commands.train import train
from nnslim.errors import NNSlimError

app = typer.Typer(
    help="Make trained nnU-Net v2 and TotalSegmentator models smaller and faster, and see what it costs.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
_AGAIN = "nothing half-written is left; give the same command again"
_LEARNING = f"{_AGAIN}: learning (recovery) goes on where it stopped"
_KEPT = {
    "run": "what the program wrote is as it left it",
    "predict": "finished cases are kept; the same command goes on with the others (--resume, the default)",
    "finetune": "the last checkpoint is kept; the same command with --continue goes on from it",
    "train": "the last checkpoint is kept; the same command with --continue goes on from it",
    "compress": _LEARNING,
    "distill": _LEARNING,
}


def _stoppable(command: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(command)
    def stopped(*given: object, **named: object) -> None:
        with stoppable(_KEPT.get(command.__name__, _AGAIN)):
            command(*given, **named)

    return stopped


# In this order in --help.
_PANELS = {
    "Compress": (compress, plan, distill),
    "Predict": (predict, run, export),
    "Judge": (agree, evaluate, benchmark, report),
    "Train": (train, finetune, inflate),
    "Look": (doctor,),
}
for _panel, _commands in _PANELS.items():
    for _command in _commands:
        _passed_on = {"allow_extra_args": True, "ignore_unknown_options": True} if _command is run else None
        app.command(context_settings=_passed_on, rich_help_panel=_panel)(_stoppable(_command))


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="print the version")] = False) -> None:
    if version:
        typer.echo(__version__)
        raise typer.Exit


def main() -> None:
    """Entry point: errors that a user can fix become one line and exit code 2."""
    try:
        app()
    except NNSlimError as error:
        stderr.print(f"nnslim: {error}", markup=False)
        sys.exit(2)


if __name__ == "__main__":
    main()
