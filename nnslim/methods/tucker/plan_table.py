"""The plan as a table: written for people, edited by them, read back."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path

from nnslim.errors import ConfigError
from nnslim.files import write_bytes
from nnslim.methods.base import Decision

COLUMNS = (
    "layer",
    "action",
    "rank_out",
    "rank_in",
    "outputs",
    "inputs",
    "kernel",
    "macs_before",
    "macs_after",
    "parameters_before",
    "parameters_after",
    "error",
    "reason",
)


def write_plan(decisions: Sequence[Decision], path: Path) -> None:
    """Write one line per layer. Only `layer`, `action`, `rank_out` and `rank_in` are read back.

    Raises:
        OutputError: the file cannot be written.
    """
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    for decision in decisions:
        ranks = decision.ranks or ("", "")
        writer.writerow(
            {
                "layer": decision.layer,
                "action": decision.action,
                "rank_out": ranks[0],
                "rank_in": ranks[1],
                "outputs": decision.shape[0],
                "inputs": decision.shape[1],
                "kernel": "x".join(str(size) for size in decision.shape[2:]),
                "macs_before": decision.macs_before,
                "macs_after": decision.macs_after,
                "parameters_before": decision.parameters_before,
                "parameters_after": decision.parameters_after,
                "error": "" if decision.error is None else f"{decision.error:.4f}",
                "reason": decision.reason,
            }
        )
    write_bytes(path, text.getvalue().encode())


def read_ranks(path: Path | None) -> dict[str, tuple[int, int] | None]:
    """Return the ranks (R_out, R_in) of each layer in a table, None for a layer that stays dense.

    Raises:
        ConfigError: missing, not a table of ours, or a rank that is no positive number; names the line.
    """
    try:
        lines = list(csv.DictReader(io.StringIO(Path(path or "").read_text(encoding="utf-8-sig"))))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(f"plan {path} cannot be read: {error}") from error
    needed = set(COLUMNS[:4])
    if not lines or needed - set(lines[0]):
        raise ConfigError(f"plan {path} is not a table with the columns {', '.join(COLUMNS[:4])}")
    found: dict[str, tuple[int, int] | None] = {}
    for number, line in enumerate(lines, start=2):
        where = f"plan {path}, line {number} ({line['layer']})"
        if line["layer"] in found:
            raise ConfigError(f"{where}: the layer is there twice")
        if line["action"] not in ("tucker", "dense"):
            raise ConfigError(f"{where}: action is 'tucker' or 'dense', found {line['action']!r}")
        if line["action"] == "dense":
            found[line["layer"]] = None
            continue
        ranks = [line["rank_out"] or "", line["rank_in"] or ""]
        if not all(rank.isdecimal() and int(rank) > 0 for rank in ranks):
            raise ConfigError(f"{where}: ranks are positive numbers, found {ranks[0]!r} and {ranks[1]!r}")
        found[line["layer"]] = (int(ranks[0]), int(ranks[1]))
    return found
