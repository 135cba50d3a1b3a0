"""What was decided for each layer as a table (plan.csv), for people to read; a method may read its own columns back."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from nnslim.methods.base import Decision
from nnslim.tables import write_table

COLUMNS = (
    *("layer", "action", "rank_out", "rank_in", "outputs", "inputs", "kernel"),
    *("macs_before", "macs_after", "parameters_before", "parameters_after", "error", "reason"),
)


def write_decisions(decisions: Sequence[Decision], path: Path) -> None:
    """Write one line per layer, with `COLUMNS`.

    Raises:
        OutputError: the file cannot be written.
    """
    rows = [
        (
            *(one.layer, one.action, *(one.ranks or (None, None)), *one.shape[:2], "x".join(map(str, one.shape[2:]))),
            *(one.macs_before, one.macs_after, one.parameters_before, one.parameters_after),
            None if one.error is None else f"{one.error:.4f}",
            one.reason,
        )
        for one in decisions
    ]
    write_table(rows, path, COLUMNS)
