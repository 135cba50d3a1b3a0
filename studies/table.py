"""A table that grows row by row in a CSV file, so that an interrupted study goes on where it stopped."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

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


def over_seeds(
    rows: Sequence[Mapping[str, Any]], name: str, columns: Sequence[str] = ("dice",), *, part: str | None = None
) -> list[dict[str, Any]]:
    """Return one row for all seeds of a setting: means, the spread of Dice, and how far it is behind the first setting.

    Args:
        rows: have `name`, "seed", "dice" and `columns`, as numbers or text.
        name: column that names a setting. columns: whose means are wanted.
        part: column that divides the table; each part has a first setting of its own.
    Returns:
        `spread` is the standard deviation over the seeds. `behind` is the mean over the seeds that both settings have,
        with its standard error.
    """
    table, found = pd.DataFrame(rows), []
    table["dice"] = table["dice"].astype(float)
    for _, one in table.groupby([part or name, name], sort=False):
        first = table[table[part] == one[part].iloc[0]] if part else table
        dense = first[first[name] == first[name].iloc[0]].set_index("seed")["dice"]
        behind = (dense - one.set_index("seed")["dice"]).dropna()
        made = {name: one[name].iloc[0], "seeds": len(one)}
        made |= {column: f"{one[column].astype(float).mean():.4f}" for column in columns}
        made["spread"] = f"{one['dice'].std():.4f}" if len(one) > 1 else ""
        made["behind"] = f"{behind.mean():+.4f} +- {behind.sem():.4f}" if len(behind) > 1 else f"{behind.mean():+.4f}"
        found.append(made)
    return found
