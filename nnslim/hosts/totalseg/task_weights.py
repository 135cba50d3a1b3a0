"""TotalSegmentator's weights: where they live, where they come from, and how to fetch them so that nothing is torn."""

from __future__ import annotations

import fcntl
import logging
import os
import re
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import Any

from nnslim.errors import ConfigError, DownloadError, HostError, OutputError
from nnslim.files import make_folder, read_json, sha256_of, write_json
from nnslim.hosts.totalseg.fetch import Progress, discard, fetch, import_requests, unpack_dataset
from nnslim.hosts.totalseg.tasks import totalseg_table, totalseg_version

log = logging.getLogger("nnslim")

RELEASES = "https://github.com/wasserth/TotalSegmentator/releases/download"  # as in its libs.py, 2.0 to 2.18
GITHUB_API = "https://api.github.com"
STAND_IN_NOTE = "STAND_IN.txt"


def totalseg_home() -> Path:
    """Return TotalSegmentator's own folder: TOTALSEG_HOME_DIR, else ~/.totalsegmentator; HostError without a home."""
    if "TOTALSEG_HOME_DIR" in os.environ:
        return Path(os.environ["TOTALSEG_HOME_DIR"])
    # Same exception as in its config.py: in some containers the home folder is the root.
    try:
        home = Path("/tmp") if str(Path.home()) == "/" else Path.home()
    except RuntimeError as error:
        raise HostError("TotalSegmentator keeps files in the home folder, and there is none; set HOME") from error
    return home / ".totalsegmentator"


@contextmanager
def locked_home() -> Iterator[None]:
    """Hold TotalSegmentator's home against other workers: it writes its files in place."""
    home = totalseg_home()
    make_folder(home)
    with (home / ".nnslim.lock").open("w") as stream:
        with suppress(OSError):  # a file system without locks; then as TotalSegmentator alone
            fcntl.flock(stream, fcntl.LOCK_EX)
        yield


def weights_folder() -> Path:
    """Return the folder that TotalSegmentator reads weights from: TOTALSEG_WEIGHTS_PATH, else below its home."""
    if "TOTALSEG_WEIGHTS_PATH" in os.environ:
        return Path(os.environ["TOTALSEG_WEIGHTS_PATH"])
    return totalseg_home() / "nnunet/results"


def task_source(task_id: int, *, base_url: str | None = None) -> tuple[str, str]:
    """Return the folder of a set of weights, below the weights folder, and the address of its zip.

    Args:
        task_id: nnU-Net dataset number, for example 297.
        base_url: address to use in place of the project's releases; default: env NNSLIM_TS_URL, else the releases.
    Raises:
        HostError: TotalSegmentator is missing, has no such table, or does not know the task.
        DownloadError: the task needs a licence, or its weights are not published.
    """
    table = totalseg_table("map_tasks_config", "TASK_ID_WEIGHTS_CONFIGS")
    commercial = totalseg_table("map_to_binary", "commercial_models").values()
    if task_id not in table:
        known = ", ".join(str(key) for key in sorted(key for key in table if isinstance(key, int)))
        raise HostError(f"TotalSegmentator {totalseg_version()} has no weights for task {task_id}; known: {known}")
    info = table[task_id]
    name, release = info["foldername"], info.get("version")
    if info.get("commercial") or task_id in commercial:
        raise DownloadError(
            f"the weights of task {task_id} ({name}) need a licence and are not downloaded here; "
            "set it with totalseg_set_license, then TotalSegmentator fetches them itself"
        )
    if release is None or release == "TODO":
        raise DownloadError(f"the weights of task {task_id} ({name}) are not published; take another task")
    base = base_url or os.environ.get("NNSLIM_TS_URL") or RELEASES
    return str(PurePosixPath(info.get("rel_path") or "", name)), f"{base.rstrip('/')}/{release}/{name}.zip"


def download(
    task_id: int,
    folder: Path,
    *,
    base_url: str | None = None,
    sha256: str | None = None,
    progress: Progress | None = None,
    retries: int = 5,
) -> Path:
    """Fetch, check and unpack the weights of one task, unless their folder is already there.

    Args:
        task_id: nnU-Net dataset number.
        folder: weights folder; created if missing.
        base_url: see `task_source`.
        sha256: expected checksum of the zip, 64 hexadecimal digits; default: the one GitHub publishes, if any.
        progress: called with (bytes here, bytes in all or None).
        retries: further attempts after a cut or refused connection.
    Returns:
        The dataset folder.
    Raises:
        HostError, ConfigError: see `task_source`; a checksum that is none.
        DownloadError: unreachable, damaged or not the expected file. A cut zip stays as `.zip.part` and is resumed.
        OutputError: the disk is full or the folder cannot be written.
    """
    name, url = task_source(task_id, base_url=base_url)
    expected = _normal_sha256(sha256)
    target = Path(folder) / name
    if target.exists():
        _check_existing(target)
        return target
    make_folder(target.parent)
    part = target.with_name(f"{target.name}.zip.part")
    try:
        size = fetch(url, part, retries=retries, progress=progress)
    except DownloadError as error:
        raise DownloadError(
            f"{error}. The weights would be put at {target}. Without a network: fetch {url} on another machine and "
            f"unpack it in {target.parent}, or take untrained weights for timing and tests with "
            "scripts/00_setup_ts.py --stand-in"
        ) from error
    try:
        record = _verify(part, url, target, expected)
        unpack_dataset(part, target)
    except DownloadError:
        discard(part)  # resuming a wrong file would only give the wrong file again
        raise
    discard(part)
    record |= {"size": size, "fetched": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
    write_json(target.with_name(f"{target.name}.nnslim.json"), record)
    return target


def published_sha256(url: str, *, api: str = GITHUB_API) -> str | None:
    """Ask GitHub's release interface for the checksum of a release file.

    Returns:
        64 hexadecimal digits, or None: not a release address, not reachable, or uploaded before GitHub kept digests.
    """
    found = re.fullmatch(r"https://github\.com/([^/]+/[^/]+)/releases/download/([^/]+)/([^/]+)", url)
    if not found:
        return None
    requests = import_requests()
    try:
        answer = requests.get(f"{api}/repos/{found[1]}/releases/tags/{found[2]}", timeout=(5, 10))
        answer.raise_for_status()
        digests = [item.get("digest") for item in answer.json()["assets"] if item.get("name") == found[3]]
    except (requests.exceptions.RequestException, ValueError, KeyError, TypeError, AttributeError) as error:
        log.info("no published checksum for %s: %s", url, error)
        return None
    digest = re.fullmatch(r"sha256:([0-9a-f]{64})", str(digests[0]).lower()) if digests else None
    return digest[1] if digest else None


def disable_usage_statistics() -> Path:
    """Write `send_usage_stats: false` into TotalSegmentator's config.json; all other keys stay as they are.

    Call it only where the user asked for it: the file belongs to TotalSegmentator.

    Returns:
        Path of the config.json.
    Raises:
        ConfigError: the file is there but is not a JSON object.
        OutputError: it cannot be written.
    """
    path = totalseg_home() / "config.json"
    make_folder(path.parent)
    config = read_json(path)
    if path.exists() and not config:
        raise ConfigError(f"{path} is not a JSON object; repair or remove it, then run again")
    # TotalSegmentator does not fill gaps in an existing file, so a new one needs all keys that it reads.
    fresh = {"totalseg_id": f"totalseg_{secrets.token_hex(4).upper()}", "prediction_counter": 0}
    write_json(path.resolve(), {**fresh, **config, "send_usage_stats": False})
    return path


def _check_existing(target: Path) -> None:
    """Warn or refuse where the folder that is there cannot be the wanted weights; never change it."""
    if (target / STAND_IN_NOTE).exists():
        raise DownloadError(f"{target} holds untrained stand-in weights; remove that folder to download the real ones")
    if not target.is_dir():
        raise OutputError(f"{target} is a file where the weights folder belongs; remove it and run again")
    if next(target.glob("**/plans.json"), None) is None:
        log.warning("%s exists but holds no plans.json; it is left as it is, remove it to download again", target)


def _normal_sha256(sha256: str | None) -> str | None:
    if sha256 is None:
        return None
    digits = sha256.strip().lower().removeprefix("sha256:")
    if not re.fullmatch(r"[0-9a-f]{64}", digits):
        raise ConfigError(f"{sha256!r} is not a SHA-256 checksum; 64 hexadecimal digits are expected")
    return digits


def _verify(part: Path, url: str, target: Path, given: str | None) -> dict[str, Any]:
    """Compare the zip with the best checksum that is known; return what is worth recording."""
    found = sha256_of(part)
    known, source = given, "given by the user"
    if known is None:
        known, source = published_sha256(url), "published by GitHub"
    noted = target.with_name(f"{target.name}.nnslim.json")
    record = read_json(noted)
    if known is None and record.get("url") == url and record.get("sha256"):
        known, source = record["sha256"], f"recorded in {noted} at the last download"
    if known is None:
        log.warning("%s: no checksum is known, only length and zip CRCs are checked; sha256 %s", url, found)
        source = "length and CRC only"
    elif known != found:
        raise DownloadError(f"{url} has sha256 {found}, but {known} is expected ({source}); the file was removed")
    return {"url": url, "sha256": found, "checked": source}
