"""Unpack a zip of weights as if it came from a stranger: checked first, into a side folder, then moved into place."""

from __future__ import annotations

import shutil
import stat
import tempfile
import zipfile
from pathlib import Path, PurePosixPath

from nnslim.errors import DownloadError, OutputError
from nnslim.files import output_error

_MAX_BYTES = 16 << 30  # the largest published archives unpack to about 2 GiB
_MAX_ENTRIES = 10_000
_NOISE = "__MACOSX"  # side files of the macOS archiver: skipped, not refused


def unpack_dataset(archive: Path, target: Path, *, max_bytes: int = _MAX_BYTES) -> None:
    """Unpack `archive`, all of whose entries lie below the folder `target.name`, so that `target` exists.

    Args:
        archive: zip file; not modified.
        target: dataset folder to create; its parent exists. An existing one is left as it is.
        max_bytes: largest unpacked size that is accepted, in bytes.
    Raises:
        DownloadError: not a zip, damaged, too large, or an entry that would land elsewhere. Nothing is left behind.
        OutputError: no room or no permission. Nothing is left behind.
    """
    try:
        with zipfile.ZipFile(archive) as opened:
            entries = _checked_entries(opened, archive, target, max_bytes)
            _check_room(entries, target)
            _extract(opened, entries, target)
    # zipfile tells of damage in several ways, depending on which byte is wrong.
    except (zipfile.BadZipFile, zipfile.LargeZipFile, EOFError, NotImplementedError, ValueError) as error:
        raise DownloadError(f"{archive.name} is damaged: {error}; download it again") from error
    except (FileExistsError, NotADirectoryError) as error:
        raise DownloadError(f"{archive.name} is damaged: {error.filename} is a file and a folder") from error
    except OSError as error:
        raise output_error(target, error) from error
    except Exception as error:
        # zlib.error and lzma.LZMAError have no common base; anything that is ours passes on.
        if type(error).__module__ in ("zlib", "_lzma", "lzma"):
            raise DownloadError(f"{archive.name} is damaged: {error}; download it again") from error
        raise


def _checked_entries(opened: zipfile.ZipFile, archive: Path, target: Path, max_bytes: int) -> list[zipfile.ZipInfo]:
    """Return the entries to unpack, after all names, kinds, sizes and checksums were found good."""
    entries = [entry for entry in opened.infolist() if PurePosixPath(entry.filename).parts[:1] != (_NOISE,)]
    for entry in entries:
        if reason := _refusal(entry, target.name):
            raise DownloadError(f"{archive.name}: entry {entry.filename!r} refused, it {reason}; nothing was unpacked")
    if len({PurePosixPath(entry.filename) for entry in entries}) != len(entries):
        raise DownloadError(f"{archive.name}: the same name occurs twice; nothing was unpacked")
    size = sum(entry.file_size for entry in entries)
    if size > max_bytes or len(entries) > _MAX_ENTRIES:
        raise DownloadError(
            f"{archive.name} would unpack to {len(entries)} entries and {size} bytes, more than the "
            f"{_MAX_ENTRIES} entries or {max_bytes} bytes that are accepted; nothing was unpacked"
        )
    if not any(not entry.is_dir() for entry in entries):
        raise DownloadError(f"{archive.name} holds no file below {target.name}; nothing was unpacked")
    if (damaged := opened.testzip()) is not None:
        raise DownloadError(f"{archive.name} is damaged: wrong checksum of {damaged}; download it again")
    return entries


def _refusal(entry: zipfile.ZipInfo, top: str) -> str:
    """Return why an entry is not unpacked, or an empty string if it may be."""
    name = entry.orig_filename  # before zipfile cuts it at a NUL byte
    parts = PurePosixPath(name).parts
    if "\\" in name or "\0" in name or ":" in name:
        return "has a character that some systems take for a path"
    if name.startswith("/") or ".." in parts:
        return "leads out of the folder"
    if not parts or parts[0] != top or (len(parts) == 1 and not entry.is_dir()):
        return f"does not lie below {top}"
    kind = stat.S_IFMT(entry.external_attr >> 16)
    if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
        return "is a link or a special file"
    return "is encrypted" if entry.flag_bits & 1 else ""


def _check_room(entries: list[zipfile.ZipInfo], target: Path) -> None:
    """Refuse before writing if the disk cannot hold the files."""
    needed = sum(entry.file_size for entry in entries)
    free = shutil.disk_usage(target.parent).free
    if needed > free:
        raise OutputError(f"cannot write {target}: it needs {needed} bytes the disk has {free} free; make room there")


def _extract(opened: zipfile.ZipFile, entries: list[zipfile.ZipInfo], target: Path) -> None:
    """Write the entries into a side folder and move the whole into place."""
    # The leading dot keeps the side folder out of nnU-Net's search for names that start with "Dataset".
    prefix = f".unpack-{target.name}-"
    with tempfile.TemporaryDirectory(prefix=prefix, dir=target.parent, ignore_cleanup_errors=True) as side:
        for entry in entries:
            path = Path(side).joinpath(*PurePosixPath(entry.filename).parts)
            if entry.is_dir():
                path.mkdir(parents=True, exist_ok=True)
                continue
            path.parent.mkdir(parents=True, exist_ok=True)
            # zipfile reads no more than the declared size, so the sum checked above is a true bound.
            with opened.open(entry) as source, path.open("xb") as sink:
                shutil.copyfileobj(source, sink, 1 << 20)
        try:
            Path(side, target.name).replace(target)
        except OSError:
            if not target.is_dir():  # else another process was quicker, and its folder stays
                raise
