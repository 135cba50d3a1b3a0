"""A folder of cases against stock nnUNetv2_predict, and ten runs that are killed and resumed.

Examples: ./run.sh benchmarks/folder.py speed -o folder_speed.json --rounds 3
          ./run.sh benchmarks/folder.py kills -o folder_kills.json --kills 10 --seed 1

Needs the hippocampus images and the trained model of NNSLIM_DATA. `speed` alternates all rows in each round, since
other programs on the machine change its speed. `kills` sends SIGKILL to the main process at a random moment of its run,
looks at what is there, resumes, and compares every file with that of a run that was left alone.
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
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

from nnslim.work.folder.manifest import Manifest
from nnslim.work.images import check_complete

_DATASET = "Dataset004_Hippocampus"


def choose_cases(data: Path, folder: Path, count: int) -> int:
    """Link the test images and so many of the training images that there are `count`; return how many there are."""
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
    for file in sorted(folder.glob("*.nii.gz")):
        check_complete(file)
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


def ours(images: Path, output: Path, model: Path, *options: str) -> list[str]:
    """Return the command line of nnslim."""
    return [
        sys.executable,
        "-W",
        "ignore",
        "-m",
        "nnslim.cli",
        "predict",
        "-q",
        *_io(images, output),
        "-m",
        str(model),
        *options,
    ]


def stock(images: Path, output: Path, workers: int, mirroring: bool) -> list[str]:
    """Return the command line of nnU-Net."""
    code = "from nnunetv2.inference.predict_from_raw_data import predict_entry_point as run; run()"
    options = ["-d", "4", "-c", "3d_fullres", "-f", "0", "-device", "cpu", "-npp", str(workers), "-nps", str(workers)]
    return [
        sys.executable,
        "-W",
        "ignore",
        "-c",
        code,
        *_io(images, output),
        *options,
        *([] if mirroring else ["--disable_tta"]),
    ]


def _io(images: Path, output: Path) -> list[str]:
    return ["-i", str(images), "-o", str(output)]


def run(command: Sequence[str], environment: dict[str, str]) -> float:
    """Run a command to its end and return the seconds that it took."""
    started = time.perf_counter()
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(
            f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
        )
    return time.perf_counter() - started


def measure_speed(args: argparse.Namespace, images: Path, count: int, work: Path, environment: dict[str, str]) -> dict:
    """Alternate stock and ours; return rows of seconds, cases per minute, and voxels that differ from stock."""
    common = ["--workers", str(args.workers), *(["--mirroring"] if args.mirroring else [])]
    rows = {"nnUNetv2_predict": stock(images, work / "stock", args.workers, args.mirroring)}
    for backend in args.backend:
        rows[f"nnslim predict --backend {backend}"] = ours(
            images, work / backend, args.model, "--backend", backend, *common
        )
    seconds: dict[str, list[float]] = {name: [] for name in rows}
    for _ in range(args.rounds):
        for name, command in rows.items():
            shutil.rmtree(command[command.index("-o") + 1], ignore_errors=True)
            seconds[name].append(round(run(command, environment), 2))
            print(f"{name}: {seconds[name][-1]:.1f} s", flush=True)
    result = []
    first = seconds["nnUNetv2_predict"]
    for name, command in rows.items():
        differ, total = voxels_that_differ(work / "stock", Path(command[command.index("-o") + 1]))
        ratios = [stock_seconds / mine for stock_seconds, mine in zip(first, seconds[name], strict=True)]
        per_minute = round(60 * count / statistics.median(seconds[name]), 1)
        result.append(
            {"row": name, "seconds": seconds[name], "cases_per_minute": per_minute, "times_stock": _round(ratios)}
            | {"voxels_that_differ": differ, "voxels": total}
        )
        print(
            f"| `{name}` | {statistics.median(seconds[name]):.1f} | {per_minute} | {statistics.median(ratios):.2f} | "
            f"{differ} of {total} |"
        )
    return {"rows": result}


def _round(values: Sequence[float]) -> list[float]:
    return [round(value, 3) for value in values]


def kill_and_resume(
    args: argparse.Namespace, images: Path, count: int, work: Path, environment: dict[str, str]
) -> dict:
    """Kill `args.kills` runs at random moments and resume each; return what was found."""
    options = ["--workers", str(args.workers), "--backend", args.backend[0]]
    whole = run(ours(images, work / "whole", args.model, *options), environment)
    reference = digests(work / "whole")
    print(f"left alone: {whole:.1f} s, {len(reference)} files", flush=True)
    chance = random.Random(args.seed)
    trials = []
    for number in range(args.kills):
        output = work / f"killed_{number}"
        command = ours(images, output, args.model, *options)
        moment = chance.uniform(0, whole)
        process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            process.wait(moment)
        except subprocess.TimeoutExpired:
            os.kill(process.pid, signal.SIGKILL)
        killed = process.wait() == -signal.SIGKILL
        time.sleep(0.5)  # workers end when their parent does; what they wrote until then is looked at, too
        there = digests(output) if output.is_dir() else {}
        finished = {name: r for name, r in Manifest(output).read().items() if r.status == "done"}
        seconds = run(command, environment)
        after = Manifest(output).read()
        trials.append(
            {
                "moment_s": round(moment, 2),
                "killed": killed,
                "files_then": len(there),
                "done_then": len(finished),
                "wrong_then": sum(reference.get(name) != digest for name, digest in there.items()),
                "repeated": sum(after[name].time != record.time for name, record in finished.items()),
                "resume_s": round(seconds, 2),
                "equal": digests(output) == reference,
                "lines": len((output / "manifest.jsonl").read_text().splitlines()),
                "leftovers": [
                    p.name for p in output.iterdir() if not p.name.endswith(".nii.gz") and p.name != "manifest.jsonl"
                ],
            }
        )
        print(trials[-1], flush=True)
    passed = all(t["equal"] and not t["wrong_then"] and not t["repeated"] and not t["leftovers"] for t in trials)
    passed = passed and all(t["lines"] == count for t in trials)
    verdict = "all whole and equal" if passed else "FAILED"
    print(f"{len(trials)} runs, {sum(t['killed'] for t in trials)} killed: {verdict}")
    return {"left_alone_s": round(whole, 2), "trials": trials, "passed": passed}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one of the two."""
    data = Path(os.environ.get("NNSLIM_DATA") or Path(__file__).resolve().parents[2] / "shared")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["speed", "kills"])
    parser.add_argument("-o", "--output", type=Path, required=True, help="JSON file for the figures")
    parser.add_argument("-m", "--model", type=Path, help="model folder (default: the hippocampus model of NNSLIM_DATA)")
    parser.add_argument("--cases", type=int, default=40, help="test cases first, then training cases (default: 40)")
    parser.add_argument("--workers", type=int, default=2, help="of ours, and of nnU-Net's -npp and -nps (default: 2)")
    parser.add_argument("--rounds", type=int, default=3, help="speed: passes of each row, in turn (default: 3)")
    parser.add_argument("--backend", nargs="+", default=["stock", "auto"], help="rows of ours; kills takes the first")
    parser.add_argument("--mirroring", action="store_true", help="speed: with test-time mirroring, all rows")
    parser.add_argument("--kills", type=int, default=10, help="runs to kill (default: 10)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    args = parser.parse_args(arguments)
    models = data / "models"
    args.model = args.model or models / _DATASET / "nnUNetTrainer__nnUNetPlans__3d_fullres"
    with tempfile.TemporaryDirectory(prefix="nnslim-folder-") as folder:
        work = Path(folder)
        count = choose_cases(data / "data", work / "images", args.cases)
        environment = {**os.environ, "nnUNet_results": str(models), "nnUNet_raw": folder, "nnUNet_preprocessed": folder}
        measured: dict[str, Any] = (measure_speed if args.what == "speed" else kill_and_resume)(
            args, work / "images", count, work, environment
        )
    facts = {
        "cases": count,
        "workers": args.workers,
        "cpus": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
    }
    args.output.write_text(
        json.dumps({**facts, "mirroring": args.mirroring, "seed": args.seed, **measured}, indent=1) + "\n"
    )
    return 0 if measured.get("passed", True) else 1


if __name__ == "__main__":
    sys.exit(main())
