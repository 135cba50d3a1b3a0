"""A folder of cases: runs that are killed and resumed, speed against stock nnUNetv2_predict, a Ray node that is lost.

Examples: ./run.sh benchmarks/folder.py kills speed -o folder.json
          ./run.sh benchmarks/folder.py kills -o small.json --cases 6 --kills 2
          ./run.sh benchmarks/folder.py ray -o ray.json --cases 12

Needs the hippocampus images and the trained model of NNSLIM_DATA. `kills` sends SIGKILL to all processes of a run at
a random moment (after a random number of cases, before the next one would be done), inspects the files, resumes, and
compares every file with that of an undisturbed run. `speed` alternates all rows in each round,
since other load on the machine changes its speed. `ray` (needs Ray) starts two nodes on this machine and kills one
midway. The JSON file is written again after each of them.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

from nnslim.files import write_json
from nnslim.prediction.case import Record
from nnslim.prediction.images import check_complete
from nnslim.prediction.manifest import NAME, Manifest
from nnslim.running.timing import alternated, timed
from nnslim.tables import markdown
from studies.command import new_parser, run_command

_DATASET = "Dataset004_Hippocampus"


@dataclass(frozen=True)
class Setting:
    """What all measurements share: arguments, images and their count, a work folder, the commands' environment."""

    args: argparse.Namespace
    images: Path
    count: int
    work: Path
    environment: dict[str, str]

    def ours(self, output: Path, *options: str) -> list[str]:
        """Return the command line of nnslim."""
        command = [sys.executable, "-W", "ignore", "-m", "nnslim.cli", "predict", "-q", *_io(self.images, output)]
        return [*command, "-m", str(self.args.model), "--workers", str(self.args.workers), *options]

    def stock(self, output: Path) -> list[str]:
        """Return the command line of nnU-Net."""
        code = "from nnunetv2.inference.predict_from_raw_data import predict_entry_point as run; run()"
        workers = str(self.args.workers)
        options = ["-d", "4", "-c", "3d_fullres", "-f", "0", "-device", "cpu", "-npp", workers, "-nps", workers]
        if not self.args.mirroring:
            options.append("--disable_tta")
        return [sys.executable, "-W", "ignore", "-c", code, *_io(self.images, output), *options]

    def run(self, command: Sequence[str], output: Path | None = None) -> None:
        """Run a command to its end; what lies in `output` is removed first."""
        if output is not None:
            shutil.rmtree(output, ignore_errors=True)
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(
                f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
            )
        print(f"done: {' '.join(command[4:])}"[:100], file=sys.stderr, flush=True)

    def reference(self) -> tuple[float, dict[str, str]]:
        """Predict everything in an undisturbed run; return its seconds and the digests of its files."""
        output = self.work / "whole"
        seconds, _ = timed(partial(self.run, self.ours(output, "--backend", self.args.backend[0]), output))
        found = digests(output)
        print(f"undisturbed: {seconds:.1f} s, {len(found)} files", flush=True)
        return seconds, found


def _io(images: Path, output: Path) -> list[str]:
    return ["-i", str(images), "-o", str(output)]


def choose_cases(data: Path, folder: Path, count: int) -> int:
    """Link the test images, then training images, `count` in all; return how many there are."""
    files = [file for kind in ("imagesTs", "imagesTr") for file in sorted((data / _DATASET / kind).glob("*.nii.gz"))]
    folder.mkdir()
    for file in files[:count]:
        (folder / file.name).symlink_to(file)
    return len(files[:count])


def digests(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of the voxels and the affine of each segmentation.

    Raises:
        InputError: a file is torn.
    """
    found = {}
    for file in (path for path in sorted(folder.glob("*.nii.gz")) if not path.name.startswith(".")):
        check_complete(file)  # what begins with a dot is what a killed run left unfinished
        image = nib.load(file)
        found[file.name] = hashlib.sha256(np.asarray(image.dataobj).tobytes() + image.affine.tobytes()).hexdigest()
    return found


def voxels_that_differ(one: Path, other: Path) -> tuple[int, int]:
    """Return how many voxels of all files differ, and how many there are."""
    differ = total = 0
    for file in sorted(one.glob("*.nii.gz")):
        a, b = (np.asarray(nib.load(folder / file.name).dataobj) for folder in (one, other))
        differ, total = differ + int((a != b).sum()), total + a.size
    return differ, total


def measure_speed(setting: Setting) -> dict[str, Any]:
    """Alternate stock and ours; return rows of seconds, cases per minute, and voxels that differ from stock."""
    args, work = setting.args, setting.work
    rows = {"nnUNetv2_predict": (work / "stock", setting.stock(work / "stock"))}
    for backend in args.backend:
        options = ["--backend", backend, *([] if args.mirroring else ["--disable_tta"])]
        rows[f"nnslim predict --backend {backend}"] = (work / backend, setting.ours(work / backend, *options))
    works = [partial(setting.run, command, output) for output, command in rows.values()]
    seconds = alternated(works, args.rounds, warmups=0)
    result, table = [], []
    for (name, (output, _)), mine in zip(rows.items(), seconds, strict=True):
        differ, total = voxels_that_differ(work / "stock", output)
        ratios = [round(theirs / one, 3) for theirs, one in zip(seconds[0], mine, strict=True)]
        middle = statistics.median(mine)
        row = {"row": name, "seconds": [round(one, 2) for one in mine]}
        row |= {"cases_per_minute": round(60 * setting.count / middle, 1), "times_stock": ratios}
        row |= {"voxels_that_differ": differ, "voxels": total, "stages": stages(output)}
        result.append(row)
        shown = (f"`{name}`", f"{middle:.1f}", row["cases_per_minute"], f"{statistics.median(ratios):.2f}")
        heads = ("row", "seconds", "cases per minute", "times stock", "voxels that differ")
        table.append(dict(zip(heads, (*shown, f"{differ} of {total}"), strict=True)))
    print(markdown(table), flush=True)
    return {"mirroring": args.mirroring, "rows": result}


def stages(output: Path) -> dict[str, float]:
    """Return the mean seconds of each stage of a case; nothing for a folder without a manifest."""
    found = [record.stages for record in Manifest(output).read().values()]
    return {name: round(statistics.mean(case[name] for case in found), 3) for name in (found[0] if found else ())}


def kill_and_resume(setting: Setting) -> dict[str, Any]:
    """Kill `--kills` runs at random moments and resume each; a run that ends before its moment does not count."""
    args = setting.args
    begun = datetime.now(timezone.utc)
    whole, reference = setting.reference()
    ends = sorted(datetime.fromisoformat(r.time) for r in Manifest(setting.work / "whole").read().values())
    gaps = [(end - before).total_seconds() for before, end in zip([begun, *ends], ends, strict=False)]
    chance = random.Random(args.seed)
    trials: list[dict[str, Any]] = []
    while sum(trial["killed"] for trial in trials) < args.kills and len(trials) < 3 * args.kills:
        output = setting.work / f"killed_{len(trials)}"
        # By progress, not by the clock: on a busy machine no two runs take the same time.
        after = chance.randrange(setting.count)
        trials.append(_one_kill(setting, output, (after, chance.uniform(0, gaps[after])), reference))
        print(trials[-1], flush=True)
    passed = all(trial["passed"] for trial in trials) and sum(trial["killed"] for trial in trials) == args.kills
    print(
        f"{len(trials)} runs, {sum(t['killed'] for t in trials)} killed: {'passed' if passed else 'FAILED'}", flush=True
    )
    return {"left_alone_s": round(whole, 2), "seed": args.seed, "trials": trials, "passed": passed}


def _one_kill(setting: Setting, output: Path, moment: tuple[int, float], reference: dict[str, str]) -> dict[str, Any]:
    """Kill a run at a moment, (cases done, seconds after that), and resume it."""
    command = setting.ours(output, "--backend", setting.args.backend[0])
    process = subprocess.Popen(
        command,
        env=setting.environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,  # a process group of its own, workers included
    )
    while process.poll() is None and len(Manifest(output).read()) < moment[0]:
        time.sleep(0.02)
    try:
        process.wait(moment[1])
    except subprocess.TimeoutExpired:
        (os.killpg if setting.args.kill == "group" else os.kill)(process.pid, signal.SIGKILL)
    killed = process.wait() == -signal.SIGKILL
    _wait_for_group(process.pid)  # with --kill main: the workers end when their parent does
    there = digests(output) if output.is_dir() else {}
    unfinished = len(list(output.glob(".nnslim-*.nii.gz")))
    finished = {name: r for name, r in Manifest(output).read().items() if r.status == "done"}
    seconds, _ = timed(partial(setting.run, command))
    found = _compared(output, reference, setting.count)
    after = Manifest(output).read()
    wrong = sum(reference.get(name) != digest for name, digest in there.items())
    repeated = sum(after[name].time != record.time for name, record in finished.items())
    return {
        "cases_before": moment[0],
        "seconds_after": round(moment[1], 2),
        "killed": killed,
        "files_then": len(there),
        "unfinished_then": unfinished,
        "done_then": len(finished),
        "wrong_then": wrong,
        "repeated": repeated,
        "resume_s": round(seconds, 2),
        **found,
        "passed": found["passed"] and not wrong and not repeated,
    }


def _compared(output: Path, reference: dict[str, str], count: int) -> dict[str, Any]:
    """Say whether a folder holds the files of the reference, one manifest line for each case, and nothing else."""
    lines = [Record.from_json(json.loads(line)) for line in (output / NAME).read_text(encoding="utf-8").splitlines()]
    once = {record.name for record in lines if record is not None and record.status == "done"}
    others = sorted(path.name for path in output.iterdir() if path.name not in reference and path.name != NAME)
    equal = digests(output) == reference
    passed = equal and len(lines) == len(once) == count and not others
    return {"equal": equal, "lines": len(lines), "done": len(once), "leftovers": others, "passed": passed}


def _wait_for_group(group: int, patience: float = 10.0) -> None:
    """Wait until no process of a group is left."""
    end = time.monotonic() + patience
    with suppress(ProcessLookupError):
        while time.monotonic() < end:
            os.killpg(group, 0)
            time.sleep(0.05)


def lose_a_node(setting: Setting) -> dict[str, Any]:
    """Predict on two Ray nodes with a CPU each, and kill one when a quarter of the cases is done."""
    from ray.cluster_utils import Cluster

    _, reference = setting.reference()
    output = setting.work / "ray"
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        second = cluster.add_node(num_cpus=1)
        cluster.wait_for_nodes()
        options = ["--engine", "ray", "--ray-address", cluster.address, "--threads", "1"]
        command = setting.ours(output, *options, "--backend", setting.args.backend[0])
        started, killed_at = time.perf_counter(), None
        with (setting.work / "ray.log").open("w+") as log:
            process = subprocess.Popen(command, env=setting.environment, stdout=log, stderr=log)
            while process.poll() is None:
                done = Manifest(output).read().values()
                if killed_at is None and len(done) >= setting.count / 4 and len({r.worker for r in done}) > 1:
                    cluster.remove_node(second, allow_graceful=False)
                    killed_at = len(done)
                time.sleep(0.05)
            log.seek(0)
            print(log.read(), end="", flush=True)
    finally:
        cluster.shutdown()
    found = _compared(output, reference, setting.count)
    tries = {record.name: record.attempts for record in Manifest(output).read().values() if record.attempts > 1}
    result = {"seconds": round(time.perf_counter() - started, 2), "done_when_killed": killed_at, "tried_again": tries}
    result |= {"exit_code": process.returncode, **found}
    result["passed"] = found["passed"] and killed_at is not None and process.returncode == 0
    print(result, flush=True)
    return result


_PARTS = {"kills": kill_and_resume, "speed": measure_speed, "ray": lose_a_node}


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = new_parser(__doc__)
    parser.add_argument("what", nargs="+", choices=list(_PARTS))
    parser.add_argument("-o", "--output", type=Path, required=True, help="JSON file for the figures")
    parser.add_argument("-m", "--model", type=Path, help="model folder (default: the hippocampus model of NNSLIM_DATA)")
    parser.add_argument("--cases", type=int, default=40, help="test cases first, then training cases (default: 40)")
    parser.add_argument("--workers", type=int, default=2, help="for ours, and for nnU-Net's -npp and -nps (default: 2)")
    parser.add_argument(
        "--backend", nargs="+", default=["stock", "auto"], help="speed: rows of ours; kills and ray take the first"
    )
    parser.add_argument("--kills", type=int, default=10, help="kills: runs to kill (default: 10)")
    parser.add_argument("--kill", choices=["group", "main"], default="group", help="kills: all processes, or the first")
    parser.add_argument("--seed", type=int, default=0, help="kills: chooses the moments (default: 0)")
    parser.add_argument("--rounds", type=int, default=3, help="speed: passes of each row, in turn (default: 3)")
    parser.add_argument("--mirroring", action="store_true", help="speed: with test-time mirroring, all rows")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, and return 1 where something was lost, torn or repeated."""
    args = make_parser().parse_args(arguments)
    data = Path(os.environ.get("NNSLIM_DATA") or Path(__file__).resolve().parents[2] / "shared")
    models = data / "models"
    args.model = args.model or models / _DATASET / "nnUNetTrainer__nnUNetPlans__3d_fullres"
    with tempfile.TemporaryDirectory(prefix="nnslim-folder-") as folder:
        work = Path(folder)
        count = choose_cases(data / "data", work / "images", args.cases)
        environment = {**os.environ, "nnUNet_results": str(models), "nnUNet_raw": folder, "nnUNet_preprocessed": folder}
        environment.setdefault("NNSLIM_CACHE", str(work / "cache"))
        environment.pop("OMP_NUM_THREADS", None)  # it would hold back stock, which has no option for threads
        setting = Setting(args, work / "images", count, work, environment)
        measured: dict[str, Any] = {
            "cases": count,
            "workers": args.workers,
            "cpus": len(os.sched_getaffinity(0)),
            "python": platform.python_version(),
        }
        for what in args.what:
            measured[what] = _PARTS[what](setting)
            write_json(args.output, measured)
    return 0 if all(measured[what].get("passed", True) for what in args.what) else 1


if __name__ == "__main__":
    run_command(main)
