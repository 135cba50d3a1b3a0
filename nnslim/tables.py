"""Tables as CSV files: one way to write them, and one to read them."""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nnslim.errors import InputError
from nnslim.files import write_bytes

if TYPE_CHECKING:  # pandas takes half a second, which --help need not wait for
    from pandas import DataFrame

# A spreadsheet takes text that begins so for a formula, and runs it; ' before it, which is not shown, makes it text.
_FORMULA = re.compile(r"(?![+-](\d[\d.]*(e[+-]?\d+)?|inf|nan)$)'*[=+\-@\t\r\n＝＋－＠]", re.IGNORECASE)


def write_table(
    rows: DataFrame | Iterable[Mapping[str, Any] | Sequence[Any]],
    path: Path,
    columns: Sequence[str] | None = None,
    *,
    separator: str = ",",
) -> None:
    """Write a CSV file, whole or not at all; None is an empty cell, and numbers are written as they are.

    Text that a spreadsheet would take for a formula gets a ' in front, which `read_table` takes away.

    Args:
        rows: a table, or one mapping or sequence per row.
        path: the file. columns: names, in order; None: those of the rows. separator: between two cells.
    Raises:
        OutputError: it cannot be written.
    """
    import pandas

    # As objects: a column of whole numbers with an empty cell would become one of floats.
    frame = rows if isinstance(rows, pandas.DataFrame) else pandas.DataFrame(list(rows), columns=columns, dtype=object)
    frame = frame.set_axis(list(map(_as_text, frame.columns)), axis=1)
    for place, kind in enumerate(frame.dtypes):
        if not pandas.api.types.is_numeric_dtype(kind):
            cells = list(map(_as_text, frame.iloc[:, place]))
            frame.isetitem(place, pandas.Series(cells, frame.index, dtype=object))
    write_bytes(Path(path), frame.to_csv(index=False, sep=separator, lineterminator="\n").encode("utf-8"))


def read_table(path: Path, columns: Sequence[str] = (), *, separator: str = ",") -> DataFrame:
    """Read a CSV file in UTF-8; every cell is text as it was given to `write_table`, and an empty cell is "".

    Raises:
        InputError: it cannot be read, is no table, or lacks one of the columns; names the file.
    """
    import pandas

    try:
        text = Path(path).read_text(encoding="utf-8-sig")
        frame = pandas.read_csv(io.StringIO(text), sep=separator, dtype=str, keep_default_na=False, index_col=False)
    except (OSError, ValueError) as error:  # pandas' parser errors are ValueErrors
        raise InputError(f"table {path} cannot be read: {error}") from error
    frame = frame.rename(columns=_as_given).apply(lambda column: column.map(_as_given))
    if lacking := [name for name in columns if name not in frame.columns]:
        found = ", ".join(map(str, frame.columns[:8]))
        raise InputError(f"{path} is not the expected table: no column {', '.join(lacking)}; found {found}")
    return frame


def _as_text(cell: Any) -> Any:
    if not isinstance(cell, str):
        return cell
    cell = cell.replace("\r\n", "\n").replace("\r", "\n")  # a lone CR would end the row
    return f"'{cell}" if _FORMULA.match(cell) else cell


def _as_given(cell: str) -> str:
    return cell[1:] if cell.startswith("'") and _FORMULA.match(cell) else cell


def markdown(rows: Iterable[Mapping[str, Any]], columns: Sequence[str] | None = None) -> str:
    """Return a table in Markdown, one line per row and a newline at the end of each; None is an empty cell.

    Args:
        columns: names, in order; a row may lack some. None: those of the first row.
    """
    rows = list(rows)
    names = list(columns or (rows[0] if rows else ()))
    cells = [["" if row.get(name) is None else row[name] for name in names] for row in rows]
    lines = ([" ".join(str(cell).splitlines()) for cell in line] for line in (names, ["---"] * len(names), *cells))
    plain = ([cell.replace("|", "&#124;").replace("<", "&lt;") for cell in line] for line in lines)  # no HTML
    return "".join(f"| {' | '.join(line)} |\n" for line in plain)
