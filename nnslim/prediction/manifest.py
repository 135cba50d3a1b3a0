"""manifest.jsonl: one line for each finished or failed case, complete or absent whenever a process is killed."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path

from nnslim.errors import OutputError
from nnslim.files import output_error, sha256_of, write_bytes
from nnslim.prediction.case import Record

NAME = "manifest.jsonl"
_PART, _ACTIVE, _COMPLETE = "manifest-", ".part.jsonl", ".complete.jsonl"
_STARTED = ".nnslim-started"


class Manifest:
    """The manifest of an output folder; if several runs share one, each writes its own part.

    File systems between machines do not append atomically, so no file has two writers. A part that is complete gets
    another name, and the run that finds all parts complete merges them.
    """

    def __init__(self, folder: Path, part: tuple[int, int] | None = None) -> None:
        """Name the files of one run: of (number, count) runs that share the folder, or the only one (None)."""
        self.folder, self._part = folder, part
        self._whole = folder / NAME
        suffix = "" if part is None else _part_name(*part)
        self.path = self._whole if part is None else folder / f"{suffix}{_ACTIVE}"
        self._started = folder / f"{_STARTED}{suffix}"

    def append(self, record: Record) -> None:
        """Add a line; on a full disk the file is as it was, and an OutputError is raised."""
        _append(self.path, asdict(record))

    def read(self) -> dict[str, Record]:
        """Return the latest record of each case, those of all parts included; lines that are torn are passed over."""
        # The parts first: they are removed only after the merged file is in place.
        return _latest([*self._parts(), self._whole])

    def tidy(self) -> None:
        """Leave one whole line per case in this run's file, and nothing in parts of runs that are over."""
        if self._part is None and self._parts():
            self._merge(self._parts())
            return
        raw = _lines(self.path)
        latest = _latest([self.path])
        if raw and (len(latest) != len(raw) or self.path.read_bytes()[-1:] != b"\n"):
            write_bytes(self.path, _text(latest.values()))

    def finish(self, records: Iterable[Record]) -> None:
        """Close this run's part, given its records, or the whole; the last of several runs merges all parts."""
        self._started.unlink(missing_ok=True)
        if self._part is None:
            self.tidy()
            return
        names = {record.name for record in records}
        mine = [record for name, record in self.read().items() if name in names]
        write_bytes(self.folder / f"{_part_name(*self._part)}{_COMPLETE}", _text(mine))
        self.path.unlink(missing_ok=True)
        count = self._part[1]
        complete = [self.folder / f"{_part_name(number, count)}{_COMPLETE}" for number in range(count)]
        if all(path.exists() for path in complete):
            others = [path for path in self._parts() if f"-of-{count:04d}" not in path.name]
            self._merge([*complete, *others])

    def begin(self, name: str) -> None:
        """Note that a case is begun, outside the manifest: what kills its process leaves this trace."""
        _append(self._started, {"name": name})

    def begun(self) -> Counter[str]:
        """Return how often each case was begun by runs that did not come to their end."""
        return Counter(content["name"] for content in _contents(self._started) if "name" in content)

    def _parts(self) -> list[Path]:
        return sorted(path for end in (_ACTIVE, _COMPLETE) for path in self.folder.glob(f"{_PART}*{end}"))

    def _merge(self, parts: Iterable[Path]) -> None:
        write_bytes(self._whole, _text(self.read().values()))
        for path in parts:
            path.unlink(missing_ok=True)


def checksum(path: Path) -> str:
    """Return the SHA-256 of a file; of a folder, that of the names and checksums of its files; "" if nothing is there.

    Hidden files do not count.
    """
    if not path.is_dir():
        try:
            return sha256_of(path)
        except OSError:
            return ""
    digest = hashlib.sha256()
    for file in sorted(path.rglob("*")):
        name = file.relative_to(path)
        if file.is_file() and not any(part.startswith(".") for part in name.parts):
            digest.update(f"{name.as_posix()} {sha256_of(file)}\n".encode())
    return digest.hexdigest()


@contextmanager
def alone(folder: Path, *, shared: bool = False) -> Iterator[None]:
    """Hold the folder, so that two runs do not write the same files; ends with the process, however that ends.

    Args:
        folder: exists. shared: several that divide the work may hold it at once, but no run of another kind.
    Raises:
        OutputError: another run holds it.
    """
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise output_error(folder, error) from error
    try:
        try:
            fcntl.flock(handle, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError:
            raise OutputError(
                f"another nnslim predict is writing to {folder}; wait for its end, or choose another folder"
            ) from None
        except OSError:
            pass  # a file system without locks is no reason to stop
        yield
    finally:
        os.close(handle)


def _append(path: Path, content: dict) -> None:
    line = _line(content)
    try:
        with path.open("ab+", buffering=0) as file:
            size = file.seek(0, os.SEEK_END)
            if size and os.pread(file.fileno(), 1, size - 1) != b"\n":  # a process was killed while writing
                line = b"\n" + line
            try:
                written = file.write(line)
                if written < len(line):  # a full disk takes what fits, and only the next write fails
                    file.write(line[written:])
            except OSError:
                file.truncate(size)
                raise
    except OSError as error:
        raise output_error(path, error) from error


def _lines(path: Path) -> list[str]:
    try:
        text = path.read_bytes().decode("utf-8", "replace")  # a torn line may end within a letter
    except FileNotFoundError:
        return []
    except OSError as error:
        raise OutputError(f"cannot read {path}: {error.strerror}; check its permissions") from error
    return [line for line in text.split("\n") if line.strip()]


def _contents(path: Path) -> Iterator[dict]:
    """Yield the objects of a file of JSON lines; lines that are torn are passed over."""
    for line in _lines(path):
        with suppress(ValueError):
            if isinstance(content := json.loads(line), dict):
                yield content


def _part_name(number: int, count: int) -> str:
    return f"{_PART}{number:04d}-of-{count:04d}"


def _latest(paths: Iterable[Path]) -> dict[str, Record]:
    found: dict[str, Record] = {}
    for content in (content for path in paths for content in _contents(path)):
        record = Record.from_json(content)
        if record is not None and (record.name not in found or found[record.name].time <= record.time):
            found[record.name] = record
    return found


def _line(content: dict) -> bytes:
    try:
        return (json.dumps(content, ensure_ascii=False) + "\n").encode()
    except UnicodeEncodeError:  # a file name that is no UTF-8
        return (json.dumps(content) + "\n").encode()


def _text(records: Iterable[Record]) -> bytes:
    return b"".join(_line(asdict(record)) for record in records)
