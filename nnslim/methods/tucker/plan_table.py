"""The plan as a table: written for people, edited by them, read back."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from nnslim.errors import ConfigError, InputError
from nnslim.methods.base import Decision
from nnslim.tables import read_table, write_table

_READ = ("layer", "action", "rank_out", "rank_in")


def write_plan(decisions: Sequence[Decision], path: Path) -> None:
    """Write one line per layer. Only `layer`, `action`, `rank_out` and `rank_in` are read back.

    Raises:
        OutputError: the file cannot be written.
    """
    counts = ("macs_before", "macs_after", "parameters_before", "parameters_after")
    rows = []
    for decision in decisions:
        outputs, inputs, *kernel = decision.shape
        row = dict(zip(_READ, (decision.layer, decision.action, *(decision.ranks or (None, None))), strict=True))
        row |= {"outputs": outputs, "inputs": inputs, "kernel": "x".join(map(str, kernel))}
        row |= {name: getattr(decision, name) for name in counts}
        error = None if decision.error is None else f"{decision.error:.4f}"
        rows.append(row | {"error": error, "reason": decision.reason})
    write_table(rows, path)


def read_ranks(path: Path | None) -> dict[str, tuple[int, int] | None]:
    """Return the ranks (R_out, R_in) of each layer in a table, None for a layer that stays dense.

    Raises:
        ConfigError: missing, not a table of ours, or a rank that is no positive number; names the line.
    """
    try:
        table = read_table(Path(path or ""), _READ)
    except InputError as error:
        raise ConfigError(f"plan: {error}") from error
    if table.empty:
        raise ConfigError(f"plan {path} lists no layer")
    found: dict[str, tuple[int, int] | None] = {}
    for number, (layer, action, *ranks) in enumerate(table[list(_READ)].to_numpy().tolist(), start=2):
        where = f"plan {path}, line {number} ({layer})"
        if layer in found:
            raise ConfigError(f"{where}: the layer is there twice")
        if action not in ("tucker", "dense"):
            raise ConfigError(f"{where}: action is 'tucker' or 'dense', found {action!r}")
        if action == "tucker" and not all(rank.isdecimal() and int(rank) > 0 for rank in ranks):
            raise ConfigError(f"{where}: ranks are positive numbers, found {ranks[0]!r} and {ranks[1]!r}")
        found[layer] = (int(ranks[0]), int(ranks[1])) if action == "tucker" else None
    return found
