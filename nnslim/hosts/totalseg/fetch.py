"""Fetch one file over HTTP so that a cut download goes on where it stopped, and never joins two different files."""

from __future__ import annotations

import fcntl
import logging
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nnslim.errors import DownloadError, HostError
from nnslim.files import output_error, read_json, write_json
from nnslim.optional import needed

log = logging.getLogger("nnslim")

Progress = Callable[[int, "int | None"], None]
"""Called with (bytes here so far, bytes in all or None where the server does not tell)."""

_TIMEOUT_S = (10, 60)  # connect, and silence between two reads
_CHUNK = 1 << 14  # bytes; what a cut connection delivered of an unfinished chunk is lost
_WORTH_RETRYING = {408, 425, 429}


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
