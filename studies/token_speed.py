"""Speed of the published token-sparse UNETR, dense against sparse, per stage, with MACs; for docs/token_sparse.md.

./run.sh -m studies.token_speed -o speed.csv --ratios 0 0.75 0.9 --backends unfused stock openvino
"""

from __future__ import annotations

import argparse
import re
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from nnslim.files import make_folder
from nnslim.methods.token_sparse.unetr import PUBLISHED, published_unetr
from nnslim.network.operations import count_operations
from nnslim.running.engine import Settings, make_engine
from nnslim.running.timing import alternated
from nnslim.tables import write_table
from studies.command import new_parser, run_command
from studies.table import shown

# What each module name belongs to; the first pattern that matches a module counts, and what is inside it does not.
STAGES = (
    ("scorer", re.compile(r"\.reduction\.scorers\.\d+$")),
    ("top-k", re.compile(r"\.reduction\.topk$")),
    ("embed", re.compile(r"(^|\.)(patch_embed|patch_embedding|down_projection)$")),
    ("completion", re.compile(r"(^|\.)completion$")),
    ("blocks", re.compile(r"(encoder|eva|vit)\.blocks\.\d+$")),
    ("decoder", re.compile(r"^(decoder|up_projection|encoder[1-4]|decoder[2-5]|out)$")),
)


@dataclass(frozen=True)
class Measured:
    """One network on one backend.

    Attributes:
        name: of the network. macs: of one sample, conventions "torch" and "torchprofile".
        wall, cpu: median seconds of a pass over the batch; cpu, over all threads, is also of use on a busy machine.
        samples_per_second: batch size / wall.
        stages: CPU seconds of each stage, median; empty where the backend has none.
    """

    name: str
    macs: int
    macs_torchprofile: int
    wall: float
    cpu: float
    samples_per_second: float
    stages: dict[str, float]


def stage_of(name: str) -> str | None:
    """Return the stage that a module belongs to as a whole, or None."""
    return next((stage for stage, pattern in STAGES if pattern.search(name)), None)


@contextmanager
def staged(network: nn.Module, clock: Callable[[], float] = time.process_time) -> Iterator[dict[str, float]]:
    """Add up the seconds of each stage of the passes inside; "rest" is not among them."""
    seconds: dict[str, float] = defaultdict(float)
    handles, started = [], {}

    def begin(module: nn.Module, _: Any) -> None:
        started[id(module)] = clock()

    for name, module in network.named_modules():
        if (stage := stage_of(name)) is None:
            continue

        def end(module: nn.Module, _: Any, __: Any, stage: str = stage) -> None:
            seconds[stage] += clock() - started.pop(id(module))

        handles += [module.register_forward_pre_hook(begin), module.register_forward_hook(end)]
    try:
        yield seconds
    finally:
        for handle in handles:
            handle.remove()


def alternate(
    networks: dict[str, nn.Module],
    image: Tensor,
    rounds: int,
    *,
    engines: dict[str, nn.Module] | None = None,
    around: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> list[Measured]:
    """Run the networks in turn, `rounds` times after one warm-up, and return medians.

    Args:
        networks: by name, in eval mode. image: (B, C, *size), on their device.
        engines: what runs in their place, by the same names; stages are then not told apart.
        around: makes a context for all passes, such as one that chooses the kernel of attention.
    """
    passes: dict[str, list[tuple[float, dict[str, float]]]] = {name: [] for name in networks}

    def one_pass(name: str, network: nn.Module) -> None:
        with staged(network) as seconds:
            begun = time.process_time()
            network(image)
            if image.is_cuda:
                torch.cuda.synchronize(image.device)
            passes[name].append((time.process_time() - begun, dict(seconds)))

    with torch.inference_mode(), around():
        works = [partial(one_pass, *item) for item in (engines or networks).items()]
        walls = alternated(works, rounds, device=image.device)
    made = []
    for (name, network), wall in zip(networks.items(), walls, strict=True):
        cost, counted = count_operations(network, (1, *image.shape[1:])), passes[name][1:]  # the first warmed up
        kinds = counted[0][1] if engines is None else {}
        made.append(
            Measured(
                name,
                cost.macs(),
                cost.macs("torchprofile"),
                statistics.median(wall),
                statistics.median(cpu for cpu, _ in counted),
                image.shape[0] / statistics.median(wall),
                {kind: statistics.median(each.get(kind, 0.0) for _, each in counted) for kind in kinds},
            )
        )
    return made


def rows(measured: Sequence[Measured], backend: str) -> list[dict[str, Any]]:
    """Return CSV rows; the gain is over the first."""
    return [
        {
            "network": each.name,
            "backend": backend,
            "gmacs": round(each.macs / 1e9, 3),
            "gmacs_torchprofile": round(each.macs_torchprofile / 1e9, 3),
            "wall_seconds": round(each.wall, 3),
            "cpu_seconds": round(each.cpu, 3),
            "samples_per_second": round(each.samples_per_second, 4),
            "gain_wall": round(measured[0].wall / each.wall, 2),
            "gain_cpu": round(measured[0].cpu / each.cpu, 2),
            **{f"cpu_{kind}": round(each.stages.get(kind, 0.0), 3) for kind, _ in STAGES},
        }
        for each in measured
    ]


def make_parser() -> argparse.ArgumentParser:
    parser = new_parser(__doc__)
    parser.add_argument("-o", "--output", type=Path, required=True, help="CSV file")
    parser.add_argument("--network", choices=list(PUBLISHED), default="btcv", help="published configuration (btcv)")
    parser.add_argument("--ratios", type=float, nargs="+", default=[0, 0.75, 0.9], help="0 is the dense network")
    parser.add_argument("--decoder", choices=["x8", "x8v2"], default="x8v2")
    parser.add_argument(
        "--backends",
        nargs="+",
        default=["stock"],
        choices=["unfused", "stock", "eager", "openvino", "compile"],
        help="stock (torch as it is), unfused (the same, attention as products and a softmax, as the paper's code and "
        "MONAI's UNETR have it), eager (nnslim's), openvino, compile",
    )
    parser.add_argument("--rounds", type=int, default=3, help="passes of each network after the warm-up (3)")
    parser.add_argument("--batch", type=int, default=1, help="samples per pass (1)")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (2)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    chosen = make_parser().parse_args(arguments)
    torch.set_num_threads(chosen.threads)
    torch.manual_seed(0)
    networks = {
        f"ratio {ratio:g}": published_unetr(chosen.network, ratios=ratio, decoder=chosen.decoder).eval()
        for ratio in chosen.ratios
    }
    for network in networks.values():
        network.to(chosen.device)
    settings = PUBLISHED[chosen.network]
    shape = (chosen.batch, settings["channels"], *settings["image_size"])
    make_folder(chosen.output.parent)
    table = []
    for backend in chosen.backends:
        engines, around = None, nullcontext
        if backend == "unfused":
            around = partial(sdpa_kernel, SDPBackend.MATH)
        elif backend != "stock":
            how = Settings(backend, threads=chosen.threads)
            engines = {name: make_engine(network, shape, how) for name, network in networks.items()}
        image = torch.randn(shape, device=chosen.device)
        made = rows(alternate(networks, image, chosen.rounds, engines=engines, around=around), backend)
        table += made
        write_table(table, chosen.output)
        for row in made:
            print(shown(row), flush=True)


if __name__ == "__main__":
    run_command(main)
