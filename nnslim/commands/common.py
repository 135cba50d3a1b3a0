"""What the commands share: options that several have, the log and the progress bar."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from nnslim.files import remove_dead_folders

Step = Callable[[str, int, int], None]
"""Called with what is being done, how much of it is done, and how much there is."""

stderr = Console(stderr=True, highlight=False, soft_wrap=True)

ConfigOption = Annotated[
    str | None,
    typer.Option(
        "-c", "--config", help="preset name or YAML file; default: tucker-auto with images, else tucker-balanced"
    ),
]
ModelOption = Annotated[Path, typer.Option("-m", "--model", help="trained model folder: trainer__plans__configuration")]
ImagesOption = Annotated[Path | None, typer.Option("-i", "--images", help="folder of unlabelled calibration images")]
FoldOption = Annotated[list[str] | None, typer.Option("-f", "--fold", help="fold, repeatable; default: all")]
CheckpointOption = Annotated[str | None, typer.Option("-chk", help="default: checkpoint_final.pth, else _best")]
PreviousStageOption = Annotated[
    Path | None, typer.Option(help="for a cascade: folder of the segmentations of the previous stage")
]
TrustOption = Annotated[
    bool, typer.Option("--trust-checkpoint", help="load checkpoints as nnU-Net does, including code in them")
]
AccumulateOption = Annotated[int, typer.Option(help="iterations whose gradients make one step of the optimiser")]
WarmupOption = Annotated[int, typer.Option(help="steps over which the learning rate rises from 0")]
ClipOption = Annotated[float | None, typer.Option(help="bound of a step's gradient norm; default: nnU-Net's 12")]
QuietOption = Annotated[bool, typer.Option("-q", "--quiet", help="no progress bar, warnings and errors only")]
# As words, not from the engine: importing that takes torch's seconds, also for --help.
Backend = Enum("Backend", {name: name for name in ("auto", "stock", "eager", "compile", "openvino")}, type=str)
Precision = Enum("Precision", {name: name for name in ("f32", "bf16", "f16", "int8")}, type=str)
BackendOption = Annotated[Backend | None, typer.Option(help="how the network runs; default: the config's, else auto")]
PrecisionOption = Annotated[
    Precision | None, typer.Option(help="precision of the arithmetic; all but f32 need openvino")
]
DeterministicOption = Annotated[
    bool, typer.Option("--deterministic", help="the same bytes, run after run on one machine: nothing is measured")
]
_caught: set[int] = set()  # signals that `stoppable` handles now
_REPEAT = 2.0  # seconds: `timeout` and others send a signal to a process and then again to its group


class _Stopped(KeyboardInterrupt):
    """By a signal. Python ends by SIGINT in the end if some C code has seen a plain KeyboardInterrupt pass."""


def _in_child() -> None:
    for number in _caught:
        signal.signal(number, signal.SIG_DFL if number != signal.SIGINT else signal.default_int_handler)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _caught)


# A forked child, as of nnU-Net's pools, ends by a signal as it would without us. A handler would lose one that comes
# before Python is ready in the child, and the pool would wait for that child for ever: it is held back until then.
os.register_at_fork(
    before=lambda: signal.pthread_sigmask(signal.SIG_BLOCK, _caught),
    after_in_parent=lambda: signal.pthread_sigmask(signal.SIG_UNBLOCK, _caught),
    after_in_child=_in_child,
)


@contextmanager
def stoppable(kept: str) -> Iterator[None]:
    """Let SIGINT, SIGTERM and SIGHUP end the block as an exception does, so that it cleans up after itself.

    Then one line says what is `kept` and how to go on, and the exit code is 128 + the signal's number, as in a shell.
    Temporary folders of processes that were killed are removed before and after. For programs of ours, not for a
    context inside somebody else's.
    """
    came, before = [(signal.SIGINT, -_REPEAT)], {}

    def stop(number: int, _: object) -> None:
        if (now := time.monotonic()) - came[-1][1] > _REPEAT:
            came.append((signal.Signals(number), now))
            raise _Stopped

    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) is not signal.SIG_IGN:  # as under nohup
                before[number] = signal.signal(number, stop)
        _caught.update(before)
    try:
        with suppress(OSError):  # a command that needs no temporary folder works without one
            remove_dead_folders()
        yield
    except KeyboardInterrupt:
        number = came[-1][0]
        how = "interrupted" if number == signal.SIGINT else f"ended by {number.name}"
        stderr.print(f"nnslim: {how}; {kept}", markup=False)
        sys.exit(128 + number)
    finally:
        with suppress(OSError):  # a command that needs no temporary folder works without one
            remove_dead_folders()
        _caught.difference_update(before)
        for number, handler in before.items():
            signal.signal(number, handler)


def start(quiet: bool) -> None:
    """Send nnslim's log to stderr: warnings only where `quiet`."""
    handler = RichHandler(console=stderr, show_time=False, show_path=False, markup=False)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[handler])
    logging.getLogger("nnslim").setLevel(logging.WARNING if quiet else logging.INFO)


def tell(*lines: str, failed: bool = False) -> None:
    """Print lines, and end the command with exit code 1 where something `failed`."""
    for line in lines:
        typer.echo(line)
    if failed:
        raise typer.Exit(1)


@contextmanager
def stepping(quiet: bool, first: str = "reading") -> Iterator[Step]:
    """Show a progress bar for work of several steps, the `first` of them known by name; yield what is told of each.

    Time that has passed, and time that is left, are those of the step.
    """
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"))
    times = (TimeElapsedColumn(), TextColumn("left:"), TimeRemainingColumn())
    with Progress(*columns, *times, console=stderr, disable=quiet, transient=True) as bar:
        task, shown = bar.add_task(first, total=None), first

        def tell_step(what: str, done: int, total: int) -> None:
            nonlocal shown
            if what != shown:
                bar.reset(task)
                shown = what
            bar.update(task, description=what, completed=done, total=total)

        yield tell_step


@contextmanager
def counting(quiet: bool, what: str) -> Iterator[Callable[[int, int], None]]:
    """Show a progress bar for work on many things of one kind, `what`; yield what is called with (done, total)."""
    with stepping(quiet, what) as step:
        yield lambda done, total: step(what, done, total)
