"""Caches: where they lie, and files in them that are checked before they are used."""

from __future__ import annotations

import atexit
import errno
import functools
import hashlib
import logging
import os
import shutil
import stat
import tempfile
from contextlib import suppress
from pathlib import Path

import platformdirs

from nnslim.files import OTHERS, remove, temporary_errors, write_bytes

_SUM = 64  # digits of a SHA-256
_log = logging.getLogger("nnslim")


def user_cache() -> Path:
    """Return nnslim's cache folder, made where it is missing: NNSLIM_CACHE, else nnslim in the user's cache folder.

    A cache is optional: where that cannot be used (no home, not allowed, no folder), it is the `private_folder`.
    """
    named, folder = os.environ.get("NNSLIM_CACHE"), None
    with suppress(RuntimeError):  # no home
        folder = Path(named).expanduser() if named else platformdirs.user_cache_path("nnslim")
    return _usable(folder if named or (folder and folder.is_absolute()) else None, named)


@functools.lru_cache(maxsize=64)  # said once
def _usable(folder: Path | None, named: str | None) -> Path:
    if folder is not None:
        with suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            if os.access(folder, os.R_OK | os.X_OK):
                return folder
    level, where = logging.WARNING if named else logging.INFO, named or folder or "without a home, ~/.cache"
    _log.log(level, "%s cannot be used as a cache; %s takes its place", where, private_folder())
    return private_folder()


@functools.lru_cache(maxsize=1)
def private_folder() -> Path:
    """Return a temporary folder that only this user can write: one for all processes unless somebody has its name."""
    with temporary_errors():
        folder = Path(tempfile.gettempdir()) / f"nnslim_cache_{os.geteuid()}"
        if not _is_own(folder):
            folder = Path(tempfile.mkdtemp(prefix="nnslim-"))
            atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def _is_own(folder: Path) -> bool:
    """Make a folder where it is missing; return whether only this user and root can write it."""
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        found = folder.lstat()
    except OSError:
        return False
    return not (stat.S_ISLNK(found.st_mode) or found.st_uid not in (0, os.geteuid()) or found.st_mode & OTHERS)


def write_kept(path: Path, content: bytes) -> None:
    """Write a file of a cache for `read_kept`: the content and its checksum, which also covers the file's name."""
    write_bytes(path, content + _checksum(path, content), own=True)


def read_kept(path: Path) -> bytes | None:
    """Return what `write_kept` wrote: None if nothing is there, and with a warning if it is anything else."""
    try:
        with open(path, "rb", opener=_as_it_is) as stream:
            content = stream.read() or b""
        if content[-_SUM:] == _checksum(path, content[:-_SUM]):
            return content[:-_SUM]
        problem = "it is not what was written"
        remove(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        problem = "it is a link" if error.errno == errno.ELOOP else error.strerror
        if error.errno in (errno.ELOOP, errno.EISDIR):  # else it may be readable later
            remove(path)
    _log.warning("%s cannot be used and is made anew: %s", path, problem)
    return None


def _as_it_is(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK)  # a link is not followed, a pipe not waited for


def _checksum(path: Path, content: bytes) -> bytes:
    return hashlib.sha256(path.name.encode() + b"\0" + content).hexdigest().encode()
