"""Time dense and Tucker networks on a GPU, stock and by nnslim, in one run and in alternated rounds: gpu.md, gpu.csv.

All rows under autocast to float16, as nnU-Net runs. "stock" rows are torch's eager mode: the dense network as nnU-Net
runs it, and the plain Tucker layers. "nnslim-eager": rewritten, recorded as a CUDA graph, in the form that is the
fastest here; "nnslim-compile": torch.compile of the rewritten network, recorded, too. A row that fails says why.

Example: ./run.sh benchmarks/gpu.py --rank-factors 0.5 0.3 0.2 --rounds 30 -o gpu
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.shared import add_network_options, point_of
from nnslim.benchmark.alternated import reason
from nnslim.benchmark.passes import device_name, network_facts
from nnslim.benchmark.timings import quartiles
from nnslim.errors import BackendError
from nnslim.files import write_bytes
from nnslim.hosts.totalseg.grid_points import grid_network
from nnslim.running.engine import Backend, Settings, make_engine
from nnslim.running.timing import alternated, run_pass
from nnslim.tables import markdown, write_table
from studies.command import new_parser, run_command

WAYS: dict[str, Backend] = {"stock": "stock", "nnslim-eager": "eager", "nnslim-compile": "compile"}
_COLUMNS = (
    "name", "way", "gmac", "ms", "ms_q1", "ms_q3", "x_stock_dense", "x_same_dense", "error", "reason",
)  # fmt: skip


@dataclass
class Entry:
    """A row: a network and a way of running it.

    Attributes:
        name: of the network. way: key of `WAYS`. macs: of a pass.
        engine: None where it could not be made, see `problem`.
        error: norm of the difference to the same network in float32, relative. seconds: of each counted pass.
    """

    name: str
    way: str
    macs: int
    engine: nn.Module | None = None
    problem: str = ""
    error: float | None = None
    seconds: list[float] = field(default_factory=list)


def networks(args: argparse.Namespace) -> tuple[dict[str, nn.Module], tuple[int, ...]]:
    """Return the dense network and one for each rank factor, on the CPU, and (B, C, *patch)."""
    dense, shape = grid_network(point_of(args, batch_size=args.batch_size, apply_tucker=False))
    found = {"dense": dense}
    for factor in args.rank_factors:
        found[f"tucker {factor:g}"], _ = grid_network(point_of(args, batch_size=args.batch_size, rank_factor=factor))
    return found, shape


def entries(found: dict[str, nn.Module], shape: Sequence[int], ways: Sequence[str], device: str) -> list[Entry]:
    """Prepare every way of running every network on the device, and compare its output with float32."""
    x, made = sample(shape, device), []
    for name, network in found.items():
        macs = network_facts(network, shape)["macs"]
        network = copy.deepcopy(network).to(device).eval()
        with torch.inference_mode():
            wanted = network(x)
        for way in ways:
            entry = Entry(name, way, macs)
            try:
                entry.engine = make_engine(network, shape, Settings(WAYS[way]))
                entry.error = float((run_pass(entry.engine, x).float() - wanted).norm() / wanted.norm())
            except Exception as error:  # whatever a compiler raises: the other rows go on
                entry.engine, entry.problem = None, reason(error)
            made.append(entry)
            print(f"{name}, {way}: {entry.problem or 'ready'}", file=sys.stderr, flush=True)
    return made


def time_entries(made: Sequence[Entry], shape: Sequence[int], device: str, rounds: int) -> None:
    """Add the seconds of that many passes to each entry."""
    x = sample(shape, device)
    running = [entry for entry in made if entry.engine is not None]
    works = [partial(run_pass, entry.engine, x) for entry in running]  # waits for the GPU
    for entry, seconds in zip(running, alternated(works, rounds), strict=True):
        entry.seconds += seconds


def sample(shape: Sequence[int], device: str) -> Tensor:
    """Return seeded noise."""
    return torch.randn(tuple(shape), generator=torch.Generator().manual_seed(0)).to(device)


def rows_of(made: Sequence[Entry]) -> list[dict[str, Any]]:
    """Return the table: milliseconds, and speed-up over stock dense and over dense run in the same way."""
    medians = {(one.name, one.way): statistics.median(one.seconds) for one in made if one.seconds}
    rows = []
    for one in made:
        row: dict[str, Any] = dict.fromkeys(_COLUMNS, "")
        row |= {"name": one.name, "way": one.way, "gmac": f"{one.macs / 1e9:.1f}", "reason": one.problem}
        if one.error is not None:
            row["error"] = f"{one.error:.1e}"
        if (mine := medians.get((one.name, one.way))) is not None:
            low, _, high = quartiles(one.seconds)
            row |= {"ms": f"{mine * 1e3:.3f}", "ms_q1": f"{low * 1e3:.3f}", "ms_q3": f"{high * 1e3:.3f}"}
            for column, way in (("x_stock_dense", "stock"), ("x_same_dense", one.way)):
                if ("dense", way) in medians:
                    row[column] = f"{medians['dense', way] / mine:.2f}"
        rows.append(row)
    return rows


def slower_than_dense(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Return the rows of nnslim whose slim network is slower than the dense one run in the same way."""
    mine = [row for row in rows if row["name"] != "dense" and row["way"].startswith("nnslim") and row["x_same_dense"]]
    return [f"{row['name']}, {row['way']}" for row in mine if float(row["x_same_dense"]) < 1]


def make_parser() -> argparse.ArgumentParser:
    ends = "exit code: 0 done, 1 a row failed (the reason is in the table), 2 no CUDA device, or bad arguments"
    parser = new_parser(__doc__, ends)
    add_network_options(parser, rank_min=16)
    parser.add_argument("--rank-factors", type=float, nargs="+", default=[0.5, 0.3, 0.2])
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS))
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("-o", "--output", type=Path, default=Path("gpu"), help="files, without their ending")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    args = make_parser().parse_args(arguments)
    if not torch.cuda.is_available():
        raise BackendError("benchmarks/gpu.py needs a GPU, and torch finds no CUDA device here")
    found, shape = networks(args)
    made = entries(found, shape, args.ways, "cuda")
    time_entries(made, shape, "cuda", args.rounds)
    rows = rows_of(made)
    write_table(rows, args.output.with_suffix(".csv"))
    size = "x".join(map(str, shape))
    text = f"{args.network}, {size}, autocast, {device_name('cuda')}, torch {torch.__version__}, {args.rounds} rounds"
    text += f"\n\n{markdown(rows)}"
    if lost := slower_than_dense(rows):
        text += f"\nslower than dense: {'; '.join(lost)}"
    write_bytes(args.output.with_suffix(".md"), text.encode())
    print(text)
    return int(any(row["reason"] for row in rows))


if __name__ == "__main__":
    run_command(main)
