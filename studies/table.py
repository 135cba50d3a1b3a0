"""A table that grows row by row in a CSV file, so that an interrupted study goes on where it stopped."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from nnslim.errors import ConfigError
from nnslim.files import make_folder
from nnslim.tables import read_table, write_table

_log = logging.getLogger("nnslim")


class GrowingTable:
    """The rows of a CSV file; each new one is written as soon as it is made.

    Attributes:
        path: the file. rows: those of the file, as text, then those that were added.
    """

    def __init__(self, path: Path, *key: str) -> None:
        """Read the file if it is there.

        Args:
            key: columns that tell rows apart.
        Raises:
            InputError: the file is not a table with these columns.
        """
        self.path, self._key = path, key
        self.rows: list[dict[str, Any]] = read_table(path, key).to_dict("records") if path.is_file() else []

    def __contains__(self, values: tuple[str, ...]) -> bool:
        return any(tuple(row[name] for name in self._key) == values for row in self.rows)

    def add(self, *rows: Mapping[str, Any]) -> None:
        """Append rows and write the file.

        Raises:
            ConfigError: the file has other columns. OutputError: it cannot be written.
        """
        for row in rows:
            if self.rows and list(self.rows[0]) != list(row):
                found, expected = list(self.rows[0]), list(row)
                raise ConfigError(f"{self.path} has the columns {found}, expected {expected}; choose another file")
            self.rows.append(dict(row))
        make_folder(self.path.parent)
        write_table(self.rows, self.path)

    def fill(self, makers: Mapping[str, Callable[[], Mapping[str, Any]]]) -> None:
        """Make the rows that are missing, in order, and report each.

        Args:
            makers: by the value of the key column, the function that makes the row.
        Raises:
            NNSlimError: what a row ran into; the rows before it are in the file.
        """
        missing = [name for name in makers if (name,) not in self]
        for number, name in enumerate(missing, 1):
            self.add(makers[name]())
            _log.info("%d of %d: %s", number, len(missing), shown(self.rows[-1]))


def shown(row: Mapping[str, Any]) -> str:
    """Return a row as one line of text."""
    return "  ".join(f"{key} {value}" for key, value in row.items())
