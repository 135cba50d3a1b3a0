"""Files that are whole or not there at all, and one wording for disk errors."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import io
import json
import logging
import os
import platform
import secrets
import shutil
import stat
import sys
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

from nnslim.errors import InputError, ModelError, NNSlimError, OutputError, one_line

_FULL = {errno.ENOSPC, errno.EDQUOT}  # the first one also where there is no room for more files
_PLACE = {None, errno.EACCES, errno.EPERM, errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENOTEMPTY}
_NO_MEMORY = ("out of memory", "allocate memory", "not enough memory", "bad_alloc")
_BLOCK = 1 << 20
PACKED = b"\x1f\x8b"  # how gzip begins
OTHERS = stat.S_IWGRP | stat.S_IWOTH  # the right to write of others than the owner
_log = logging.getLogger("nnslim")


def output_error(path: Path, error: OSError) -> OutputError:
    """Say in one line why `path` could not be written; a full disk gets its own remedy."""
    if error.errno is None:  # numpy says how many items it wrote
        error = unwritable(path if path.is_dir() else path.parent) or error
    if error.errno in _FULL:
        full = "the disk is full" if error.errno == errno.ENOSPC else "your disk quota is used up"
        return OutputError(f"cannot write {path}: {full}; free some space there or choose another folder")
    remedy = "; check the folder and its permissions" if error.errno in _PLACE else ""
    return OutputError(f"cannot write {path}: {error.strerror or error}{remedy}")


def unwritable(folder: Path, size: int = _BLOCK) -> OSError | None:
    """Try to make a file of `size` bytes; return what was in the way: some libraries do not say that a disk is full."""
    try:
        with tempfile.TemporaryFile(dir=folder) as stream:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(stream.fileno(), 0, max(size, 1))
    except OSError as error:
        return error
    return None


def no_memory(error: BaseException) -> bool:
    """Return whether an error says that memory ran out; torch says so in a RuntimeError."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, MemoryError) or any(words in str(error).lower() for words in _NO_MEMORY)


def unreadable(path: Path, error: BaseException, fault: str = "is truncated or damaged") -> str:
    """Say in one line why `path` could not be read: for want of memory, what the system says, or else the `fault`."""
    if no_memory(error):
        return f"{path} cannot be read: there is not enough memory for it"
    if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):  # torch seeks before a cut file
        return f"{path} cannot be read: {error.strerror}"
    return f"{path} {fault} ({path.stat().st_size:,} bytes): {one_line(error)}"


@contextmanager
def temporary_errors() -> Iterator[None]:
    """Say in an OutputError why no temporary file or folder can be made."""
    try:
        yield
    except OSError as error:
        raise OutputError(f"no temporary folder can be made: {error.strerror}; TMPDIR names another place") from error


def make_folder(folder: Path) -> None:
    """Create `folder` with its parents, or raise an OutputError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise output_error(folder, error) from error


def read_json(path: Path) -> dict:
    """Return the object in `path`; an absent, unreadable or non-object file gives {}."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def read_json_object(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file of a model folder.

    Raises:
        ModelError: missing, unreadable, or not an object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"{path.parent} is not an nnU-Net model folder: it has no {path.name}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise ModelError(f"{path} should hold a JSON object, found {type(content).__name__}")
    return content


def read_yaml(path: Path, error: type[NNSlimError] = InputError) -> Any:
    """Return the content of a YAML or JSON file; raise `error` if it cannot be read, or is neither."""
    import yaml

    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as problem:
        raise error(f"{path} cannot be read: {problem.strerror}; expected YAML or JSON") from problem
    except (yaml.YAMLError, UnicodeDecodeError) as problem:
        raise error(f"{path} is neither YAML nor JSON: {' '.join(str(problem).split())[:200]}") from problem


def write_json(path: Path, content: dict) -> None:
    """Write an object with `write_bytes`."""
    write_bytes(path, (json.dumps(content, indent=4) + "\n").encode())


def write_bytes(path: Path, content: bytes, *, own: bool = False) -> None:
    """Write `content` beside `path`, then move it into place, so that a reader sees the old or the new file only.

    Args:
        own: others cannot write the file, whatever the umask and the rights of an older file are.
    Raises:
        OutputError: it cannot be written; `path` is as it was.
    """
    beside = path.with_name(f".{path.name[:40]}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        with beside.open("xb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        if own:
            beside.chmod(stat.S_IMODE(beside.stat().st_mode) & ~OTHERS)
        elif path.exists():
            shutil.copymode(path, beside)
        beside.replace(path)
    except OSError as error:
        raise output_error(path, error) from error
    finally:
        with suppress(OSError):
            beside.unlink(missing_ok=True)


def remove(path: Path) -> None:
    """Remove a file, a link or a folder with what is in it, where that is possible."""
    with suppress(OSError):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink()


def save_checkpoint(content: dict[str, Any], path: Path) -> None:
    """Write a checkpoint with `write_bytes`; torch itself reports a full disk without an errno."""
    write_bytes(path, checkpoint_bytes(content))


def checkpoint_bytes(content: dict[str, Any]) -> bytes:
    """Return what `torch.save` writes."""
    import torch  # here, so that small tools that only write JSON start fast

    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


@contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """Give a temporary folder beside `target` and move it to `target` when the block ends without an exception.

    Raises:
        OutputError: `target` exists and is not an empty folder, or something cannot be written. Nothing is left then.
    """
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise OutputError(f"{target} exists and is not overwritten; remove it first, or choose another folder")
    make_folder(target.parent)
    try:
        with temporary_folder(target) as side:
            yield side
            side.chmod(0o755)  # it was private
            if target.exists():
                target.rmdir()
            side.replace(target)
    except OSError as error:
        raise output_error(target, error) from error


@contextmanager
def temporary_folder(target: Path | None = None) -> Iterator[Path]:
    """Give a private folder that is removed when the block ends; if the process is killed, by the next call like it.

    Args:
        target: the folder is made beside it; default: in the folder for temporary files.
    Raises:
        OutputError: without a target, where no folder can be made, or it is full.
    """
    with temporary_errors() if target is None else nullcontext():
        parent, prefix = remove_dead_folders(target)
        while (handle := _lock(folder := Path(tempfile.mkdtemp(prefix=prefix, dir=parent)), new=True)) is None:
            pass  # another process took it for a dead one
    try:
        yield folder
    except (OSError, RuntimeError) as error:  # some libraries do not say that the disk is full
        problem = error if isinstance(error, OSError) and error.errno in _FULL else unwritable(folder)
        if problem is None or target is not None:
            raise
        raise output_error(folder, problem) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(handle)


def remove_dead_folders(target: Path | None = None) -> tuple[Path, str]:
    """Remove temporary folders, see `temporary_folder`, that killed processes of this user and this host left.

    Returns:
        Where such folders are made, and how their names begin: with a dot, so that nnU-Net does not see them, and with
        the host, as locks of another one may not be seen here.
    """
    parent = Path(tempfile.gettempdir()) if target is None else target.parent
    host = hashlib.sha256(platform.node().encode()).hexdigest()[:8]
    prefix = f"{'nnslim' if target is None else '.' + target.name}-{host}-"
    with suppress(OSError):
        for folder in [Path(entry.path) for entry in os.scandir(parent) if entry.name.startswith(prefix)]:
            if (handle := _lock(folder, new=False)) is not None:
                shutil.rmtree(folder, ignore_errors=True)
                os.close(handle)
    return parent, prefix


def _lock(folder: Path, *, new: bool) -> int | None:
    """Return a descriptor that locks a folder until it is closed; None if it is in use, gone or another user's.

    A new folder does without a lock where the file system has none; an old one there is taken to be in use.
    """
    try:
        handle = os.open(folder, os.O_RDONLY | os.O_NOFOLLOW)
    except OSError as error:  # gone, a link, not readable
        if new and not isinstance(error, FileNotFoundError):
            raise
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        free = True
    except OSError as error:
        free = new and not isinstance(error, BlockingIOError)
    found = os.fstat(handle)
    if free and folder.exists() and folder.lstat().st_ino == found.st_ino and (new or found.st_uid == os.getuid()):
        return handle
    os.close(handle)
    return None


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file, 64 lower-case hexadecimal digits. Cost: one read of the file."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def check_name(path: Path) -> None:
    """Refuse a path that is no text to Python: SimpleITK ends the process that gives it one.

    Raises:
        InputError: the message shows what is wrong by \\udc and the byte.
    """
    try:
        str(path).encode()
    except UnicodeEncodeError as error:
        encoding = sys.getfilesystemencoding()
        remedy = "rename it" if encoding == "utf-8" else "set PYTHONUTF8=1"
        raise InputError(f"{str(path)!a} is no text in {encoding}; {remedy}") from error


def unpacked(path: Path) -> Iterator[bytes]:
    """Yield a file's content in blocks, decompressed where it begins as gzip does, whatever its name says.

    What follows the last member of a gzip file comes as it is: image readers pass over it.

    Raises:
        EOFError: a gzip file that is cut short. zlib.error: one that is damaged.
    """
    with path.open("rb") as stream:
        block, member = stream.read(1 << 16), zlib.decompressobj(31)  # small: zeros become a thousand times as many
        packed = block.startswith(PACKED)
        while block:
            if packed and member.eof:
                packed, member = block.startswith(PACKED[: len(block)]), zlib.decompressobj(31)
            if found := member.decompress(block) if packed else block:
                yield found
            block = (packed and member.unused_data) or stream.read(1 << 16)
        if packed and not member.eof:
            raise EOFError("the compressed file is cut short")
