"""What the tests of the evaluation run in processes of their own; imports nothing heavy."""

from __future__ import annotations

import os
import signal


def square_or_die(number: int, fatal: int) -> int:
    """Return the square; kill this process at the number `fatal`, as the system does when memory is out."""
    if number == fatal:
        os.kill(os.getpid(), signal.SIGKILL)
    return number * number
