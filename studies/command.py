"""What the commands of studies and benchmarks share."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Callable

from nnslim.errors import NNSlimError


def new_parser(doc: str | None, epilog: str | None = None) -> argparse.ArgumentParser:
    """Return a parser whose help begins with a module's docstring, as it is written."""
    return argparse.ArgumentParser(description=doc, epilog=epilog, formatter_class=argparse.RawDescriptionHelpFormatter)


def run_command(main: Callable[[], int | None]) -> None:
    """Run the main function of a module and exit: with what it returns, or with 2 and one line for an NNSlimError."""
    logging.basicConfig(format="%(message)s")
    logging.getLogger("nnslim").setLevel(logging.INFO)
    try:
        sys.exit(main())
    except NNSlimError as error:
        print(f"nnslim: {error}", file=sys.stderr)
        sys.exit(2)
