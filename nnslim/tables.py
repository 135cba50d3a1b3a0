"""Tables as CSV files: one way to write them, and one to read them."""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nnslim.errors import InputError
from nnslim.files import write_bytes

if TYPE_CHECKING:  # pandas takes half a second, which --help need not wait for
    from pandas import DataFrame


def write_table(
    rows: DataFrame | Iterable[Mapping[str, Any] | Sequence[Any]],
    path: Path,
    columns: Sequence[str] | None = None,
    *,
    separator: str = ",",
) -> None:
    """Write a CSV file, whole or not at all; None is an empty cell, and numbers are written as they are.

    Args:
        rows: a table, or one mapping or sequence per row.
        path: the file. columns: names, in order; None: those of the rows. separator: between two cells.
    Raises:
        OutputError: it cannot be written.
    """
    import pandas

    # As objects: a column of whole numbers with an empty cell would become one of floats.
    frame = rows if isinstance(rows, pandas.DataFrame) else pandas.DataFrame(list(rows), columns=columns, dtype=object)
    write_bytes(Path(path), frame.to_csv(index=False, sep=separator, lineterminator="\n").encode("utf-8"))


def read_table(path: Path, columns: Sequence[str] = ()) -> DataFrame:
    """Read a CSV file in UTF-8; every cell is text, and an empty cell is "".

    Raises:
        InputError: it cannot be read, is no table, or lacks one of the columns; names the file.
    """
    import pandas

    try:
        text = Path(path).read_text(encoding="utf-8-sig")
        frame = pandas.read_csv(io.StringIO(text), dtype=str, keep_default_na=False, index_col=False)
    except (OSError, ValueError) as error:  # pandas' parser errors are ValueErrors
        raise InputError(f"table {path} cannot be read: {error}") from error
    if lacking := [name for name in columns if name not in frame.columns]:
        found = ", ".join(map(str, frame.columns[:8]))
        raise InputError(f"{path} is not the expected table: no column {', '.join(lacking)}; found {found}")
    return frame


def markdown(rows: Iterable[Mapping[str, Any]], columns: Sequence[str] | None = None) -> str:
    """Return a table in Markdown, one line per row and a newline at the end of each; None is an empty cell.

    Args:
        columns: names, in order; a row may lack some. None: those of the first row.
    """
    rows = list(rows)
    names = list(columns or (rows[0] if rows else ()))
    cells = [["" if row.get(name) is None else str(row[name]).replace("|", "/") for name in names] for row in rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in (names, ["---"] * len(names), *cells))
