"""Speed of the published token-sparse UNETR: dense against sparse in one run, per stage, with MACs in both conventions.

./run.sh scripts/12_token_sparse_speed.py -o speed.csv --ratios 0 0.75 0.9 --backends unfused stock openvino
"""

from __future__ import annotations

import argparse
import csv
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from nnslim.methods.token_sparse.unetr import PUBLISHED, published_unetr
from nnslim.running.engine import Settings, make_engine
from studies.token_speed import alternate, rows


def main() -> None:
    """Read the arguments, measure, print and write a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
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
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    torch.manual_seed(0)
    made = {f"ratio {ratio:g}": ratio for ratio in chosen.ratios}
    networks = {
        name: published_unetr(chosen.network, ratios=ratio, decoder=chosen.decoder).eval().to(chosen.device)
        for name, ratio in made.items()
    }
    settings = PUBLISHED[chosen.network]
    shape = (chosen.batch, settings["channels"], *settings["image_size"])
    table = []
    for backend in chosen.backends:
        engines, around = None, nullcontext
        if backend == "unfused":
            around = partial(sdpa_kernel, SDPBackend.MATH)
        elif backend != "stock":
            how = Settings(backend, threads=chosen.threads)
            engines = {name: make_engine(network, shape, how) for name, network in networks.items()}
        image = torch.randn(shape, device=chosen.device)
        table += rows(alternate(networks, image, chosen.rounds, engines=engines, around=around), backend)
        chosen.output.parent.mkdir(parents=True, exist_ok=True)
        with chosen.output.open("w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(table[0]))
            writer.writeheader()
            writer.writerows(table)
        for row in table[-len(networks) :]:
            print("  ".join(f"{key} {value}" for key, value in row.items()), flush=True)


if __name__ == "__main__":
    main()
