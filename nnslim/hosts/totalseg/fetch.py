"""Fetch a zip over HTTP, resuming cut downloads of the same file, and unpack it as carefully as a stranger's."""

from __future__ import annotations

import fcntl
import logging
import re
import shutil
import stat
import time
import zipfile
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any

from nnslim.errors import DownloadError, HostError, OutputError
from nnslim.files import output_error, read_json, temporary_folder, write_json
from nnslim.optional import needed

log = logging.getLogger("nnslim")

Progress = Callable[[int, "int | None"], None]
"""Called with (bytes here so far, bytes in all or None where the server does not tell)."""

_TIMEOUT_S = (10, 60)  # connect, and silence between two reads
_CHUNK = 1 << 14  # bytes; what a cut connection delivered of an unfinished chunk is lost
_WORTH_RETRYING = {408, 425, 429}
_MAX_BYTES = 16 << 30  # the largest published archives unpack to about 2 GiB
_MAX_ENTRIES = 10_000
_NOISE = "__MACOSX"  # side files of the macOS archiver: skipped, not refused


class _Again(Exception):  # noqa: N818
    """This attempt failed in a way that another attempt may mend."""


def fetch(url: str, part: Path, *, retries: int = 5, wait_s: float = 0.5, progress: Progress | None = None) -> int:
    """Fetch `url` into the file `part`; bytes already there are kept where the server still has the same file.

    Beside `part` lies `<part>.json` with the ETag, date and size of the remote file, which make resuming safe.

    Args:
        url: http or https address.
        part: file to write; left in place after a failure, so that the next call goes on from it.
        retries: further attempts after the first.
        wait_s: pause before the second attempt, in seconds; doubles with each further one.
        progress: called after each block.
    Returns:
        Size of the finished file in bytes.
    Raises:
        DownloadError: unreachable, refused by the server, or cut in every attempt.
        OutputError: the disk is full or the folder cannot be written.
    """
    reason = "no attempt was made"
    for attempt in range(retries + 1):
        if attempt:
            time.sleep(wait_s * 2 ** (attempt - 1))
        try:
            return _attempt(url, part, progress)
        except _Again as signal:
            reason = str(signal)
            log.info("attempt %d of %d for %s: %s", attempt + 1, retries + 1, url, reason)
    raise DownloadError(f"could not fetch {url} in {retries + 1} attempt(s): {reason}")


def discard(part: Path) -> None:
    """Remove a partial download and the note beside it."""
    part.unlink(missing_ok=True)
    _note(part).unlink(missing_ok=True)


def import_requests() -> Any:
    """Import the HTTP client, which only downloads need, or raise a HostError."""
    return needed("requests", "requests", purpose="a download", error=HostError)


def _note(part: Path) -> Path:
    return part.with_name(part.name + ".json")


def _attempt(url: str, part: Path, progress: Progress | None) -> int:
    requests = import_requests()
    kept = _kept(url, part)
    # Compressed transfer would make Content-Length and Range count other bytes than those we write.
    headers = {"Accept-Encoding": "identity"}
    if kept:
        headers |= {"Range": f"bytes={kept['have']}-", "If-Range": kept["validator"]}
    try:
        with requests.get(url, headers=headers, stream=True, timeout=_TIMEOUT_S) as answer:
            if _is_complete(answer, kept):
                return kept["have"]
            begin, total = _begin(answer, url, part, kept)
            return _write_body(answer, url, part, begin, total, progress)
    except requests.exceptions.RequestException as error:
        if isinstance(error, ValueError):  # malformed address or unknown scheme: the same next time
            raise DownloadError(f"could not fetch {url}: {error}") from error
        raise _Again(_short(error)) from error


def _short(error: Exception) -> str:
    """Cut the nested representations that requests puts around the one reason a person can act on."""
    inner = getattr(error.args[0], "reason", None) if error.args else None
    text = re.sub(r"^.*(object at 0x[0-9a-f]+>|HTTPS?Connection\([^)]*\)): ", "", str(inner or error))
    return f"{type(error).__name__}, {text}"


def _kept(url: str, part: Path) -> dict[str, Any]:
    """Return what is known of a usable partial file: have, validator, etag, last_modified, size; else {}."""
    note = read_json(_note(part))
    etag = note.get("etag") or ""
    # RFC 9110, 13.1.5: a weak ETag cannot vouch for single bytes.
    validator = etag if etag and not etag.startswith("W/") else note.get("last_modified")
    if not part.is_file() or not part.stat().st_size or note.get("url") != url or not validator:
        return {}
    return {**note, "have": part.stat().st_size, "validator": validator}


def _is_complete(answer: Any, kept: dict[str, Any]) -> bool:
    """True where the server says that nothing is left to send (a run ended after the last byte, before unpacking)."""
    end = re.fullmatch(r"bytes \*/(\d+)", answer.headers.get("Content-Range", ""))
    return bool(answer.status_code == 416 and kept and end and int(end[1]) == kept["have"] == kept.get("size"))


def _begin(answer: Any, url: str, part: Path, kept: dict[str, Any]) -> tuple[int, int | None]:
    """Return the offset that the body starts at and the size of the whole file, both in bytes."""
    status = answer.status_code
    if status == 200:
        length = answer.headers.get("Content-Length", "")
        return 0, int(length) if length.isdigit() else None
    if status == 206 and kept and (total := _continued(answer, kept)) is not None:
        return kept["have"], total
    if status in (206, 416):
        discard(part)
        raise _Again("the file on the server is not the one that was begun; starting over")
    if status in _WORTH_RETRYING or status >= 500:
        raise _Again(f"the server answered {status} {answer.reason}")
    raise DownloadError(f"could not fetch {url}: the server answered {status} {answer.reason}")


def _continued(answer: Any, kept: dict[str, Any]) -> int | None:
    """Return the size of the whole file if the 206 answer goes on exactly where our bytes of the same file end."""
    # Some servers honour Range but not If-Range, so compare what they say about the file as well.
    for key, header in (("etag", "ETag"), ("last_modified", "Last-Modified")):
        if header in answer.headers and kept.get(key) and answer.headers[header] != kept[key]:
            return None
    found = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", answer.headers.get("Content-Range", ""))
    if not found or int(found[1]) != kept["have"] or kept.get("size") not in (None, int(found[2])):
        return None
    return int(found[2])


def _write_body(answer: Any, url: str, part: Path, begin: int, total: int | None, progress: Progress | None) -> int:
    """Write the body from byte `begin` on and check the final size."""
    requests = import_requests()
    try:
        with part.open("ab") as stream:
            claim(stream, part, begin)
            if not begin:
                seen = {"etag": answer.headers.get("ETag"), "last_modified": answer.headers.get("Last-Modified")}
                write_json(_note(part), {"url": url, "size": total, **seen})
            done = begin
            for chunk in answer.iter_content(_CHUNK):
                stream.write(chunk)
                done += len(chunk)
                if progress:
                    progress(done, total)
    except requests.exceptions.RequestException:  # also an OSError, but it says something about the line, not the disk
        raise
    except OSError as error:
        raise output_error(part, error) from error
    if total is not None and done != total:
        if done > total:
            discard(part)
        raise _Again(f"{done} of {total} bytes arrived")
    return done


def claim(stream: Any, part: Path, begin: int) -> None:
    """Lock the open file against a second process that downloads the same, and cut it to `begin` bytes."""
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise DownloadError(f"another process is already downloading {part}; wait for it to end") from error
    if begin and stream.tell() != begin:
        raise _Again("another process changed the partial file")
    stream.truncate(begin)


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
            size, free = sum(entry.file_size for entry in entries), shutil.disk_usage(target.parent).free
            if size > free:
                need = f"it needs {size} bytes, the disk has {free} free; make room there"
                raise OutputError(f"cannot write {target}: {need}")
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
    if all(entry.is_dir() for entry in entries):
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


def _extract(opened: zipfile.ZipFile, entries: list[zipfile.ZipInfo], target: Path) -> None:
    """Write the entries into a side folder and move the whole into place."""
    with temporary_folder(target) as side:
        for entry in entries:
            path = side.joinpath(*PurePosixPath(entry.filename).parts)
            if entry.is_dir():
                path.mkdir(parents=True, exist_ok=True)
                continue
            path.parent.mkdir(parents=True, exist_ok=True)
            # zipfile reads no more than the declared size, so the sum checked above is a true bound.
            with opened.open(entry) as source, path.open("xb") as sink:
                shutil.copyfileobj(source, sink, 1 << 20)
        try:
            (side / target.name).replace(target)
        except OSError:
            if not target.is_dir():  # else another process was quicker, and its folder stays
                raise
