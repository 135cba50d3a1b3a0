"""Replace an attribute of a class at run time and put the very same object back; undo what a library replaces."""

from __future__ import annotations

import inspect
import logging
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

_ABSENT = object()
_log = logging.getLogger("nnslim")


@contextmanager
def kept_sigterm() -> Iterator[None]:
    """Put the handler of SIGTERM back: Ray leaves its own, which forked children then have, too."""
    handler = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread() and handler is not None:
            signal.signal(signal.SIGTERM, handler)


class AttributePatch:
    """One attribute of one class or module, replaced between `apply` and `undo`.

    The raw object is saved from the owner's own `__dict__` (a staticmethod stays a staticmethod; an inherited
    attribute is deleted again at undo). If somebody else has replaced our object by the time of `undo`, theirs is left
    in place and a warning says so: taking it away would break them.
    """

    def __init__(self, owner: Any, name: str, make: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
        """Touch nothing yet; `make` is called with the plain function in force and returns the replacement."""
        self.owner, self.name, self._make = owner, name, make
        self._saved: Any = _ABSENT
        self._ours: Any = None

    def apply(self) -> None:
        """Install the replacement; it carries the original as `__nnslim_original__`."""
        self._saved = vars(self.owner).get(self.name, _ABSENT)
        raw = inspect.getattr_static(self.owner, self.name)  # finds inherited descriptors, too
        wrapper = type(raw) if isinstance(raw, (staticmethod, classmethod)) else None
        original = raw.__func__ if wrapper else getattr(self.owner, self.name)
        made = self._make(original)
        made.__nnslim_original__ = original
        self._ours = wrapper(made) if wrapper else made
        setattr(self.owner, self.name, self._ours)

    @property
    def in_force(self) -> bool:
        """Whether our object is there, and not another that was put over it."""
        return self._ours is not None and vars(self.owner).get(self.name) is self._ours

    @property
    def in_chain(self) -> bool:
        """Whether our object is there, or under wrappers that others have put around it (functools.wraps)."""
        found = vars(self.owner).get(self.name)
        while found is not None and found is not self._ours:
            found = getattr(found, "__wrapped__", None)
        return found is not None

    def undo(self) -> None:
        """Put the saved object back, if ours is still the one in force."""
        if not self.in_force:
            _log.warning(
                "%s.%s was replaced by somebody else while nnslim was active; left as it is",
                getattr(self.owner, "__name__", self.owner),
                self.name,
            )
            return
        if self._saved is _ABSENT:
            delattr(self.owner, self.name)
        else:
            setattr(self.owner, self.name, self._saved)
