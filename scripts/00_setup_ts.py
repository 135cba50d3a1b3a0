"""Put TotalSegmentator's weights in place: download them, or write untrained stand-ins for timing and tests."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from nnslim.errors import NNSlimError
from nnslim.hosts.totalseg.stand_in import is_stand_in, write_stand_in
from nnslim.hosts.totalseg.task_weights import disable_usage_statistics, download, task_source, weights_folder

ALL_TASKS = [291, 292, 293, 294, 295, 297]


def parse_tasks(words: list[str]) -> list[int]:
    tasks = [task for word in words for task in (ALL_TASKS if word == "all" else [int(word)])]
    return list(dict.fromkeys(tasks))


def parse_checksum(text: str) -> tuple[int, str]:
    task, _, digits = text.partition("=")
    if not task.isdigit() or not digits:
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form TASK=HEX, for example 297=0a1b...")
    return int(task), digits


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog="exit code: 0 all done, 1 some tasks failed, 2 wrong arguments or all tasks failed"
    )
    parser.add_argument(
        "--tasks", nargs="+", default=["297", "291"], metavar="N",
        help="nnU-Net dataset numbers, or 'all' for 291-295 and 297 (default: 297 291)",
    )  # fmt: skip
    parser.add_argument("--folder", type=Path, help="weights folder (default: the one TotalSegmentator reads)")
    parser.add_argument("--stand-in", action="store_true", help="write untrained weights instead of downloading")
    parser.add_argument(
        "--base-features", type=int, default=32, help="channels of a stand-in's first stage (default: 32)"
    )
    parser.add_argument(
        "--sha256", type=parse_checksum, action="append", default=[], metavar="TASK=HEX",
        help="expected checksum of a task's zip; may be given several times",
    )  # fmt: skip
    parser.add_argument("--retries", type=int, default=5, help="further attempts after a cut connection (default: 5)")
    parser.add_argument(
        "--offline-config", action="store_true",
        help="also switch TotalSegmentator's usage statistics off in its config.json",
    )  # fmt: skip
    parser.add_argument("-q", "--quiet", action="store_true", help="no progress; warnings and errors only")
    return parser


@contextmanager
def progress_bar(task: int, quiet: bool) -> Iterator[Callable[[int, int | None], None] | None]:
    if quiet:
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    columns = (TextColumn("task {task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        line = bar.add_task(str(task), total=None)
        yield lambda done, total: bar.update(line, completed=done, total=total)


def set_up(task: int, folder: Path, args: argparse.Namespace) -> str:
    if args.stand_in:
        target = folder / task_source(task)[0]
        if is_stand_in(target):
            return f"{target} (untrained stand-in, was there)"
        return f"{write_stand_in(task, folder, base_features=args.base_features)} (untrained stand-in)"
    with progress_bar(task, args.quiet) as progress:
        checksum = dict(args.sha256).get(task)
        return str(download(task, folder, sha256=checksum, progress=progress, retries=args.retries))


def main() -> int:
    parser = make_parser()
    args = parser.parse_args()
    try:
        tasks = parse_tasks(args.tasks)
    except ValueError as error:
        parser.error(f"--tasks: {error}")
    if unused := {task for task, _ in args.sha256} - set(tasks):
        parser.error(f"--sha256: task {min(unused)} is not among --tasks {tasks}")
    if args.retries < 0:
        parser.error(f"--retries: {args.retries} is below 0")
    logging.basicConfig(format="%(message)s")  # on stderr; other libraries stay at their warning level
    logging.getLogger("nnslim").setLevel(logging.WARNING if args.quiet else logging.INFO)
    folder = args.folder or weights_folder()
    failed = 0
    try:
        if args.offline_config:
            print(f"usage statistics off: {disable_usage_statistics()}")
    except NNSlimError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for task in tasks:
        try:
            print(f"task {task}: {set_up(task, folder, args)}", flush=True)
        except NNSlimError as error:
            failed += 1
            print(f"error: task {task}: {error}", file=sys.stderr)
    return 0 if not failed else 2 if failed == len(tasks) else 1


if __name__ == "__main__":
    sys.exit(main())
