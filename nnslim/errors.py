"""What can go wrong for a user: each message says what was asked, where, what was found and what to do."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Iterable

_LONGEST = 1000  # letters of a message


def shown(text: str, longest: int = _LONGEST) -> str:
    """Return a text, parts of which may come from files, as one line: its middle left out, control characters named."""
    text = _cut(text, longest)
    return _cut("".join(c if c.isprintable() else " " if c.isspace() else ascii(c)[1:-1] for c in text), longest)


def _cut(text: str, longest: int) -> str:
    return text if len(text) <= longest else f"{text[: longest * 2 // 3]} … {text[3 - longest // 3 :]}"


def _show(record: logging.LogRecord) -> bool:
    record.msg, record.args = shown(record.getMessage()), None
    return True


logging.getLogger("nnslim").addFilter(_show)


class NNSlimError(Exception):
    """Base of all errors that a user can cause or fix. The command line prints the message and exits with 2."""

    def __str__(self) -> str:
        return shown(super().__str__())


class ConfigError(NNSlimError):
    """A configuration, preset or key that cannot be used."""


class SpecError(NNSlimError):
    """A SlimSpec that cannot be read, or that does not fit the network."""


class RankError(SpecError):
    """A rank outside 1..channels."""


class ModelError(NNSlimError):
    """A folder, plans file or checkpoint that is not a usable nnU-Net model."""


ModelFolderError = ModelError  # its former name


class HostError(NNSlimError):
    """nnU-Net, TotalSegmentator or torch is missing, or of a version whose methods we do not know."""


class InputError(NNSlimError):
    """An image that cannot be read, or does not fit the model."""


class OutputError(NNSlimError):
    """A file or folder that cannot be written."""


class RewriteError(NNSlimError):
    """A network that cannot be rewritten or prepared for a backend; the caller then runs it unchanged."""


class BackendError(NNSlimError):
    """A backend that is not installed here, or that cannot run the network; the caller falls back to another."""


class SlowerError(NNSlimError):
    """A slim model that would run slower than the dense one."""


class DownloadError(NNSlimError):
    """Something that could not be fetched, or that arrived damaged."""


def first_line(error: BaseException) -> str:
    """Return the first line of an error that is not ours, at most 300 letters; its kind where it says nothing."""
    return shown((str(error).strip().splitlines() or [type(error).__name__])[0], 300)


def one_line(error: BaseException) -> str:
    """Return the text of an error that is not ours on one line, at most 300 letters; its kind where it says nothing."""
    return shown(" ".join(str(error).split()) or type(error).__name__, 300)


def kind_and_line(error: BaseException) -> str:
    """Return the kind and the text of an error that is not ours, on one line."""
    return f"{type(error).__name__}: {shown(' '.join(str(error).split()), 300)}"


def nearest(word: str, known: Iterable[str]) -> str:
    """Return a hint that names the known words closest to `word`, for the end of an error message."""
    known = sorted(known)
    close = difflib.get_close_matches(word, known, n=3, cutoff=0.5)
    if close:
        return f"nearest: {', '.join(close)}"
    return f"known: {', '.join(known)}" if known else "none are known"
