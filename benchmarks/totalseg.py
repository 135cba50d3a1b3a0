"""Where the time of `totalsegmentator()` goes, in and out of the context: one stage table per task.

Everything runs in one process, the rows alternated. The slim row gets one call before the counted ones (column
`first`), in which the model is compressed; later calls read it from the cache. Labels are compared with those outside.

Example: ./run.sh scripts/00_setup_ts.py --stand-in --tasks all --offline-config
         ./run.sh benchmarks/totalseg.py -i ct.nii.gz -o totalseg-times --modes fast full --rounds 3
"""

from __future__ import annotations

import argparse
import functools
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

from nnslim import NNSlimContext
from nnslim.benchmark.passes import device_name
from nnslim.compression.config import SlimConfig, from_dict
from nnslim.evaluation.overlap import dice_per_label
from nnslim.files import write_json
from nnslim.patching import AttributePatch
from nnslim.running.timing import alternated, timed
from nnslim.tables import markdown, write_table
from studies.command import new_parser, run_command

STAGES = ("load", "preprocess", "forward", "export", "rest")
COLUMNS = ("mode", "row", "first", "seconds", *STAGES, "speedup", "equal", "dice")


class Clock:
    """Seconds of each stage, from the moments at which nnU-Net's predictor enters and leaves its steps.

    Preprocessing and export run in processes of their own, so their stages are what the caller waits: from the
    beginning of `predict_from_files` to the first network, and from the last network to its end. `rest` is
    TotalSegmentator's own: reading, cropping, resampling, joining the parts, writing.
    """

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(STAGES, 0.0)
        self._since = 0.0

    def load(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap `initialize_from_trained_model_folder`; in the context compression is part of it."""

        @functools.wraps(original)
        def initialize_from_trained_model_folder(*args: Any, **options: Any) -> Any:
            started = time.perf_counter()
            made = original(*args, **options)
            self.seconds["load"] += time.perf_counter() - started
            return made

        return initialize_from_trained_model_folder

    def forward(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap `predict_logits_from_preprocessed_data`."""

        @functools.wraps(original)
        def predict_logits_from_preprocessed_data(*args: Any, **options: Any) -> Any:
            started = time.perf_counter()
            self.seconds["preprocess"] += started - self._since
            made = original(*args, **options)
            self._since = time.perf_counter()
            self.seconds["forward"] += self._since - started
            return made

        return predict_logits_from_preprocessed_data

    def files(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap `predict_from_files`."""

        @functools.wraps(original)  # whose signature nnU-Net asks for
        def predict_from_files(*args: Any, **options: Any) -> Any:
            self._since = time.perf_counter()
            made = original(*args, **options)
            self.seconds["export"] += time.perf_counter() - self._since
            return made

        return predict_from_files


@contextmanager
def clocked() -> Iterator[Clock]:
    """Yield a clock that is wrapped around the methods in force, TotalSegmentator's patches included."""
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    clock = Clock()
    wraps = {
        "initialize_from_trained_model_folder": clock.load,
        "predict_logits_from_preprocessed_data": clock.forward,
        "predict_from_files": clock.files,
    }
    with ExitStack() as stack:
        for name, wrap in wraps.items():
            patch = AttributePatch(nnUNetPredictor, name, wrap)
            patch.apply()
            stack.callback(patch.undo)
        yield clock


def segment(image: Path, config: SlimConfig | None, options: dict[str, Any]) -> tuple[dict[str, float], np.ndarray]:
    """Call `totalsegmentator`, outside for no config; return seconds, in all and of each stage, and the labels."""
    from totalsegmentator.python_api import totalsegmentator

    with tempfile.TemporaryDirectory(prefix="nnslim-") as folder:
        out = Path(folder) / "labels.nii.gz"
        call = functools.partial(totalsegmentator, image, out, ml=True, device="cpu", quiet=True, **options)
        with nullcontext() if config is None else NNSlimContext(config), clocked() as clock:
            seconds, _ = timed(call)
        stages = {**clock.seconds, "seconds": seconds}
        stages["rest"] = seconds - sum(clock.seconds.values())
        return stages, np.asarray(nib.load(out).dataobj)


def dice(one: np.ndarray, other: np.ndarray) -> float:
    """Return the mean Dice over the labels that are in either map."""
    found = [int(label) for label in np.union1d(one, other) if label]
    return float(np.mean(list(dice_per_label(one, other, found).values()))) if found else 1.0


def measure_mode(mode: str, image: Path, rows: dict[str, SlimConfig | None], rounds: int) -> list[dict[str, Any]]:
    """Return one table row per configuration; the first is outside."""
    options = {"fast": {"fast": True}, "full": {"fast": False}}[mode]
    times: dict[str, list[dict[str, float]]] = {name: [] for name in rows}
    labels: dict[str, np.ndarray] = {}

    def call(name: str) -> None:
        seconds, labels[name] = segment(image, rows[name], options)
        print(f"{mode}, {name}: {seconds['seconds']:.1f} s", file=sys.stderr, flush=True)
        times[name].append(seconds)

    slim = [name for name, config in rows.items() if config is not None and config.methods]
    for name in slim:  # the others have nothing to compress
        call(name)
    first = {name: round(times[name].pop()["seconds"], 2) for name in slim}
    alternated([functools.partial(call, name) for name in rows], rounds, warmups=0)
    outside = next(iter(rows))
    base = statistics.median(one["seconds"] for one in times[outside])
    table = []
    for name, taken in times.items():
        middle = {what: round(statistics.median(one[what] for one in taken), 2) for what in ("seconds", *STAGES)}
        row = {"mode": mode, "row": name, "first": first.get(name, ""), **middle}
        row |= {"speedup": round(base / middle["seconds"], 2)}
        row |= {"equal": f"{100 * float((labels[name] == labels[outside]).mean()):.4f} %"}
        row |= {"dice": round(dice(labels[name], labels[outside]), 4)}
        table.append(row)
    return table


def make_parser() -> argparse.ArgumentParser:
    """Return the command line."""
    parser = new_parser(__doc__)
    parser.add_argument("-i", "--image", type=Path, required=True, help="a CT")
    parser.add_argument("-o", "--output", type=Path, default=Path("totalseg-times"), help="files, without ending")
    parser.add_argument("--modes", nargs="+", choices=("fast", "full"), default=["fast"], help="full: five models")
    parser.add_argument("--rank-factor", type=float, default=0.25)
    parser.add_argument("--rank-min", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    return parser


def main() -> None:
    """Measure, print the tables and write CSV and JSON."""
    args = make_parser().parse_args()
    slim = {"method": "tucker", "rank_factor": args.rank_factor, "rank_min": args.rank_min, "rank_multiple": 8}
    rows = {
        "outside": None,
        "inside, dense": from_dict({"methods": [], "run": {"backend": "eager"}}),
        f"inside, Tucker {args.rank_factor:g}": from_dict({"methods": [slim], "run": {"backend": "eager"}}),
    }
    from totalsegmentator.python_api import setup_nnunet

    setup_nnunet()  # nnU-Net's folders: some versions read them as they are imported
    import totalsegmentator.nnunet  # noqa: F401  patches nnU-Net's predictor: the clock goes around that

    table: list[dict[str, Any]] = []
    for mode in args.modes:
        table += measure_mode(mode, args.image, rows, args.rounds)
    write_table(table, args.output.with_suffix(".csv"), COLUMNS)
    write_json(args.output.with_suffix(".json"), {"device": device_name("cpu"), "rounds": args.rounds, "rows": table})
    print(markdown(table, COLUMNS))


if __name__ == "__main__":
    run_command(main)
