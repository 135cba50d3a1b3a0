"""One worker: reading, forward pass and writing of three neighbouring cases at the same time."""

from __future__ import annotations

import logging
import os
import queue
import re
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nnslim.errors import InputError, NNSlimError, kind_and_line
from nnslim.files import output_error, remove
from nnslim.prediction.case import Case, Model, Record, Report, now
from nnslim.prediction.manifest import checksum
from nnslim.running.machine import PeakMeter

_LEFTOVER = re.compile(r"\.nnslim-[0-9a-f]{8}-(.*)", re.DOTALL)  # see `_hidden`
_log = logging.getLogger("nnslim")


class Pipeline:
    """Takes cases from `take` until that gives None, and hands a record of each to `report`.

    Reading runs ahead by one case, and writing lags behind by one, each in a thread of its own; the forward pass stays
    in the caller's thread, where torch keeps its pool, contexts apply and Ctrl-C arrives. So at most one case's logits
    wait to be written while the next one's are made.
    """

    def __init__(self, model: Model, output: Path, *, overlap: bool = True) -> None:
        """Take a loaded model and the folder of results; without `overlap` memory is lowest, one thing at a time."""
        self._model, self._output, self._overlap = model, output, overlap
        self._peaks = PeakMeter()
        self._worker = f"{socket.gethostname()}:{os.getpid()}"

    def run(self, take: Callable[[], Case | None], report: Report) -> None:
        """Work until there is nothing to take. `take` and `report` may be called in other threads, one at a time each.

        Raises:
            Exception: whatever `take` or `report` raise; a case that fails is a record.
        """
        if not self._overlap:
            while (case := take()) is not None:
                report(self._written(self._forward(self._read(case))))
            return
        ahead: queue.Queue[Any] = queue.Queue()
        behind: queue.Queue[Any] = queue.Queue(maxsize=1)
        room = threading.Semaphore(1)  # for one case that is read and waits
        faults: list[BaseException] = []
        stop = threading.Event()

        def read() -> None:
            try:
                while room.acquire() and not stop.is_set() and (case := take()) is not None:
                    ahead.put(self._read(case))
            except BaseException as error:
                faults.append(error)
            ahead.put(None)

        def write() -> None:
            while (work := behind.get()) is not None:
                try:
                    if not faults:
                        report(self._written(work))
                    del work
                except BaseException as error:
                    faults.append(error)

        threads = [threading.Thread(target=target, name=target.__name__, daemon=True) for target in (read, write)]
        for thread in threads:
            thread.start()
        try:
            while (work := ahead.get()) is not None and not faults:
                room.release()
                behind.put(self._forward(work))
                del work
        finally:
            stop.set()
            room.release()
            behind.put(None)
            threads[1].join()
        if faults:
            raise faults[0]

    def _read(self, case: Case) -> _Work:
        work = _Work(case, self._output, self._peaks.begin())
        with work.stage("read"):
            work.input = input_facts(case.files)
            work.content = self._model.read(case)
        return work

    def _forward(self, work: _Work) -> _Work:
        if not work.error:
            with work.stage("forward"):
                work.content = self._model.forward(work.case, work.content)
        return work

    def _written(self, work: _Work) -> Record:
        sums: dict[str, str] = {}
        if not work.error:
            with work.stage("write"):
                work.beside.parent.mkdir()
                self._model.write(work.case, work.content, work.beside)
                made = [*(path for path in work.beside.parent.iterdir() if path != work.beside), work.beside]
                sums = {path.name: _flushed(path) for path in made}
                for path in made:
                    _put(path, work.target.with_name(path.name))
        work.content = None
        if work.error:
            sums = {}
        remove(work.beside.parent)
        return Record(
            name=work.case.name,
            status="failed" if work.error else "done",
            error=work.error,
            seconds=round(time.perf_counter() - work.begun, 3),
            stages=work.seconds,
            voxels=work.case.voxels,
            peak_mb=round(self._peaks.end(work.peak) / 2**20, 1),
            target=work.case.target,
            sha256=sums.pop(work.case.target, ""),
            side_files=sums,
            input=work.input,
            run={} if work.error else self._model.run(),
            worker=self._worker,
            time=now(),
        )


class _Work:
    """A case on its way through the stages."""

    def __init__(self, case: Case, output: Path, peak: int) -> None:
        self.case, self.peak, self.begun = case, peak, time.perf_counter()
        # In a folder of its own, by its own name: a writer may write more files, and name one inside another.
        self.target, self.beside = output / case.target, output / _hidden(case.target) / case.target
        self.input: dict[str, float] = {}
        self.seconds: dict[str, float] = {}
        self.content: Any = None
        self.error = ""

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time a stage, and make what it raises the error of the case."""
        begun = time.perf_counter()
        try:
            yield
        except (Exception, SystemExit) as error:  # a host may exit where it should raise
            _log.debug("%s, %s", self.case.name, name, exc_info=error)
            self.content = None
            if isinstance(error, NNSlimError):
                self.error = str(error)
            elif isinstance(error, OSError) and name == "write":
                self.error = str(output_error(self.target, error))
            else:
                self.error = kind_and_line(error)
            self.error = self.error.replace(str(self.beside), str(self.target))
        finally:
            self.seconds[name] = round(time.perf_counter() - begun, 3)


def _hidden(target: str) -> str:
    return f".nnslim-{secrets.token_hex(4)}-{target}"


def input_facts(files: tuple[Path, ...]) -> dict[str, float]:
    """Return what tells whether images have changed: bytes, and the latest modification (Unix seconds)."""
    try:
        found = [file.stat() for file in files]
    except OSError as error:
        raise InputError(f"{error.filename} cannot be read: {error.strerror}") from error
    return {"bytes": sum(stat.st_size for stat in found), "time": round(max(stat.st_mtime for stat in found), 3)}


def remove_leftovers(output: Path, cases: Iterable[Case]) -> int:
    """Remove what runs that were killed left half-written of these cases; return how many there were."""
    ours = {case.target for case in cases} | {case.name for case in cases}
    found = [
        path
        for path in output.iterdir()
        if (match := _LEFTOVER.fullmatch(path.name)) and {match[1], match[1].rpartition(".")[0]} & ours
    ]
    for path in found:
        remove(path)
    return len(found)


def _flushed(path: Path) -> str:
    """Bring a file or folder to the disk and return its checksum."""
    for file in [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]:
        handle = os.open(file, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    return checksum(path)


def _put(beside: Path, target: Path) -> None:
    if target.exists() and (beside.is_dir() or target.is_dir()):  # folders are not replaced in one step
        old = target.with_name(_hidden(target.name))
        target.replace(old)
        remove(old)
    beside.replace(target)
