"""Time nnslim and its peers side by side, in one run and in alternated rounds: peers.md and peers.csv.

A peer that is not installed or fails gets a row that gives the reason.

Example: ./run.sh benchmarks/peers.py --network ts15 --rounds 5 -o peers
"""

from __future__ import annotations

import argparse
import copy
import logging
import os
import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.shared import add_network_options, point_of
from nnslim.benchmark.alternated import Candidate, TimedJob, measure_rounds, reason
from nnslim.benchmark.passes import (
    PlainOpenVINO,
    Way,
    convert_plain,
    device_name,
    keep_network,
    network_facts,
    prepare,
)
from nnslim.benchmark.timings import COLUMNS, compare, markdown_table, timed_row
from nnslim.errors import BackendError, ConfigError, nearest
from nnslim.files import write_bytes
from nnslim.hosts.totalseg.grid_points import grid_network
from nnslim.network.cost import measure_cost
from nnslim.optional import needed
from nnslim.tables import write_table
from studies.command import new_parser, run_command

Convert = Callable[[nn.Module, Sequence[int], int], Callable[[Tensor], Any]]


@dataclass(frozen=True)
class Peer:
    """A row: which of the prepared networks, and how it is run.

    Attributes:
        name: for --rows. network: dense, tucker or pruned. way: a backend of nnslim's benchmark; or else
        convert: makes the engine from (network, shape, threads), and `tool` is its name in the table.
    """

    name: str
    network: str
    way: Way | None = None
    convert: Convert | None = None
    tool: str = ""
    precision: str = "f32"


def nncf_int8(network: nn.Module, shape: Sequence[int], threads: int) -> Callable[[Tensor], Any]:
    """Quantise after training with NNCF's defaults, on a few patches of noise: good for time, not for accuracy."""
    nncf = needed("nncf", "nnslim[openvino]")
    nncf.set_log_level(logging.ERROR)
    generator = torch.Generator().manual_seed(1)
    patches = [torch.randn(tuple(shape), generator=generator).numpy() for _ in range(2)]
    model = nncf.quantize(convert_plain(network, shape), nncf.Dataset(patches), subset_size=len(patches))
    return PlainOpenVINO(model, threads)


def onnx_runtime(network: nn.Module, shape: Sequence[int], threads: int) -> Callable[[Tensor], Any]:
    """Export to ONNX and run by ONNX Runtime's CPU kernels."""
    onnxruntime = needed("onnxruntime", "nnslim[onnx]")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        file = str(Path(folder) / "network.onnx")
        torch.onnx.export(network, (torch.zeros(tuple(shape)),), file, dynamo=False, input_names=["x"])
        session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    return lambda x: session.run(None, {"x": x.numpy()})


def prune(network: nn.Module, shape: Sequence[int], macs: int, multiple: int = 4) -> nn.Module:
    """Return the network with channels removed by Torch-Pruning, at about that many MACs.

    Whole channels by the size of their kernels, the same share everywhere, widths in multiples; inputs and heads stay.

    Raises:
        BackendError: Torch-Pruning is not installed.
    """
    torch_pruning = needed("torch_pruning", "torch-pruning")
    heads = measure_cost(network, shape).heads
    low, high, best = 0.0, 0.95, network
    # A halved patch has the same channel groups; tracing the whole one would take minutes.
    small = (1, shape[1], *(max(size // 2, 1) if size % 64 == 0 and size > 64 else size for size in shape[2:]))
    for _ in range(7):  # bisection: MACs within about 1 %
        ratio = (low + high) / 2
        made = swap_norms(copy.deepcopy(network), nn.InstanceNorm3d, nn.BatchNorm3d)
        pruner = torch_pruning.pruner.MagnitudePruner(
            made,
            torch.zeros(small),
            importance=torch_pruning.importance.MagnitudeImportance(p=2),
            pruning_ratio=ratio,
            ignored_layers=[made.get_submodule(name) for name in heads],
            round_to=multiple,
        )
        pruner.step()
        made = swap_norms(made, nn.BatchNorm3d, nn.InstanceNorm3d)
        found = network_facts(made, shape)["macs"]
        low, high = (ratio, high) if found > macs else (low, ratio)
        if abs(found - macs) < abs(network_facts(best, shape)["macs"] - macs):
            best = made
    return best.eval()


def swap_norms(network: nn.Module, old: type[nn.Module], new: type[nn.Module]) -> nn.Module:
    """Replace each norm by another kind with the same weights, in place: instance norms lead Torch-Pruning astray."""
    made: dict[int, nn.Module] = {}
    for module in list(network.modules()):
        for name, child in module._modules.items():
            if type(child) is old:
                if id(child) not in made:
                    made[id(child)] = new(child.num_features, child.eps, affine=True)
                    made[id(child)].weight, made[id(child)].bias = child.weight, child.bias
                module._modules[name] = made[id(child)]
    return network.eval()


_EAGER, _OPENVINO = Way("eager"), Way("openvino")
PEERS = (
    Peer("stock", "dense", Way("stock")),
    Peer("openvino", "dense", Way("openvino-plain")),
    Peer("nncf-int8", "dense", convert=nncf_int8, tool="NNCF, OpenVINO", precision="int8"),
    Peer("onnxruntime", "dense", convert=onnx_runtime, tool="ONNX Runtime"),
    Peer("pruned-stock", "pruned", Way("stock")),
    Peer("pruned-openvino", "pruned", Way("openvino-plain")),
    Peer("tucker-stock", "tucker", Way("stock")),
    Peer("tucker-openvino", "tucker", Way("openvino-plain")),
    Peer("nnslim-dense-eager", "dense", _EAGER),
    Peer("nnslim-dense-openvino", "dense", _OPENVINO),
    Peer("nnslim-dense-int8", "dense", replace(_OPENVINO, precision="int8")),
    Peer("nnslim-tucker-eager", "tucker", _EAGER),
    Peer("nnslim-tucker-openvino", "tucker", _OPENVINO),
    Peer("nnslim-tucker-int8", "tucker", replace(_OPENVINO, precision="int8")),
)


def prepare_peer(path: Path, shape: tuple[int, ...], peer: Peer, threads: int) -> Candidate:
    """Load the network that was kept for this run and make the peer's engine.

    Raises:
        BackendError: its network could not be made, or its tool is missing.
    """
    problem = path.with_suffix(".txt")
    if problem.exists():
        raise BackendError(problem.read_text())
    if peer.way is not None:
        return prepare(path, shape, replace(peer.way, threads=threads))
    torch.set_num_threads(threads)
    network = torch.load(path, map_location="cpu", weights_only=False).eval()
    facts: dict[str, Any] = {**network_facts(network, shape), "threads": threads, "backend": peer.tool}
    engine = peer.convert(network, shape, threads)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))

    def one_pass() -> None:
        with torch.inference_mode():
            engine(x)

    return Candidate(one_pass, facts)


def keep_networks(args: argparse.Namespace, peers: Sequence[Peer], folder: Path) -> tuple[int, ...]:
    """Write the networks that the peers need, or why one cannot be made; returns (1, C, *patch)."""
    dense, shape = grid_network(point_of(args, apply_tucker=False))
    tucker, _ = grid_network(point_of(args, rank_factor=args.rank_factor))
    makers: dict[str, Callable[[], nn.Module]] = {
        "dense": lambda: dense,
        "tucker": lambda: tucker,
        "pruned": lambda: prune(dense, shape, network_facts(tucker, shape)["macs"]),
    }
    for name in dict.fromkeys(peer.network for peer in peers):
        try:
            keep_network(makers[name](), folder / f"{name}.pt")
        except Exception as error:  # a peer's tool must not end the others
            (folder / f"{name}.txt").write_text(reason(error))
    return shape


def run_peers(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure the chosen peers and return their rows."""
    peers = [peer for peer in PEERS if not args.rows or peer.name in args.rows]
    threads = args.threads or torch.get_num_threads()
    with tempfile.TemporaryDirectory(prefix="nnslim-") as name:
        folder = Path(name)
        shape = keep_networks(args, peers, folder)
        jobs = [
            TimedJob(peer.name, partial(prepare_peer, folder / f"{peer.network}.pt", shape, peer, threads))
            for peer in peers
        ]
        timings = measure_rounds(jobs, args.rounds, progress=_report)
    rows = []
    for peer, timing in zip(peers, timings, strict=True):
        way = peer.way or Way()
        columns = {"name": peer.name, "backend": peer.tool or way.backend, "threads": threads, "batch_size": shape[0]}
        columns |= {"patch_size": shape[1:], "device": "cpu", "autocast": False}
        columns["apply_tucker"] = peer.network == "tucker"
        columns["precision"] = peer.precision if peer.way is None else way.precision
        rows.append(timed_row(timing, columns))
    compare(rows, ("stock", "openvino"))
    return rows


def _report(name: str, done: int, total: int) -> None:
    print(f"{done}/{total} {name}", file=sys.stderr, flush=True)


def make_parser() -> argparse.ArgumentParser:
    names = ", ".join(peer.name for peer in PEERS)
    parser = new_parser(__doc__, f"rows: {names}")
    add_network_options(parser, rank_min=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rows", nargs="+", help="names; default: all")
    parser.add_argument("--rank-factor", type=float, default=0.3)
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's choice)")
    parser.add_argument("-o", "--output", type=Path, default=Path("peers"), help="files, without their ending")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    args = make_parser().parse_args(arguments)
    for row in args.rows or ():
        if row not in {peer.name for peer in PEERS}:
            raise ConfigError(f"no row '{row}'; {nearest(row, [peer.name for peer in PEERS])}")
    rows = run_peers(args)
    write_table(rows, args.output.with_suffix(".csv"), COLUMNS)
    where = f"{args.network}, {device_name()}, {len(os.sched_getaffinity(0))} processor(s), {args.rounds} rounds"
    text = f"{where}, torch {torch.__version__}\n\n{markdown_table(rows)}"
    write_bytes(args.output.with_suffix(".md"), text.encode())
    print(text)
    return int(any(row["status"] == "failed" for row in rows))


if __name__ == "__main__":
    run_command(main)
