"""Ranks read from a table that nnslim wrote (plan.csv) and a person may have edited."""

from __future__ import annotations

from pathlib import Path

from nnslim.errors import ConfigError, InputError
from nnslim.tables import read_table

_READ = ("layer", "action", "rank_out", "rank_in")


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
