"""What a model costs on a board: one core, perhaps little memory; for docs/embedded.md.

./run.sh -m studies.board_profile -m MODEL -i IMAGES -o profile.json --memory-mb 1500
Prints milliseconds per pass, seconds per volume and peak memory of a process of its own. The limit is on private memory
of that process; where it does not suffice, the answer is "fits": false and the exit code 1.
"""

from __future__ import annotations

import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from nnslim.errors import ConfigError, InputError, NNSlimError
from nnslim.files import make_folder, write_json
from nnslim.running.machine import peak_bytes
from studies.command import new_parser, run_command

_MARK = "nnslim-profile: "
_MB = 1 << 20


@dataclass(frozen=True)
class ProfileJob:
    """What to measure.

    Attributes:
        model, images: folders, as for prediction. output: folder for the segmentations; None keeps none.
        backends: for the forward pass, in order; the volumes are predicted with the first.
        precision: f32, or int8 (openvino).
        cases: images, at most. repeats: timed forward passes per backend.
        memory_mb: resident memory that the process may have, in MiB; None: no limit.
    """

    model: str
    images: str
    output: str | None = None
    backends: Sequence[str] = ("stock",)
    precision: str = "f32"
    cases: int = 5
    repeats: int = 9
    memory_mb: int | None = None


def profile(job: ProfileJob) -> dict[str, Any]:
    """Measure in a new process with one thread, in CPU time, so that other programs do not count.

    Returns:
        threads, patch (voxels), forward_ms by backend (median of one patch, batch 1), volume_s (median: preprocess,
        predict without mirroring, export), slice_ms (median: predict only, per slice along the first axis), cases,
        peak_mb and start_mb (resident memory at most, and before the model was read), memory_mb, fits. Where the
        memory did not suffice, `fits` is False and `error` says where it ran out.
    Raises:
        ConfigError: impossible settings. InputError: the process could not use its input; with its message.
    """
    if job.repeats < 1 or job.cases < 1 or not job.backends:
        raise ConfigError(f"repeats {job.repeats}, cases {job.cases}, backends {job.backends}: expected 1 or more")
    if job.memory_mb is not None and sys.platform != "linux":
        raise ConfigError("a memory limit needs Linux")
    one = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "nnUNet_def_n_proc"), "1")
    code = "from studies.board_profile import measure_here; measure_here()"
    command = [sys.executable, "-W", "ignore", "-c", code, json.dumps(asdict(job))]
    ran = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **one}, check=False)
    lines = [line for line in ran.stdout.splitlines() if line.startswith(_MARK)]
    if lines:
        found = json.loads(lines[-1].removeprefix(_MARK))
        if "refused" in found:
            raise InputError(found["refused"])
        return found
    tail = " ".join(ran.stderr.split())[-300:]
    if job.memory_mb is None:
        raise InputError(f"{job.model} could not be profiled: the process ended with {ran.returncode}: {tail}")
    return {"fits": False, "memory_mb": job.memory_mb, "error": tail or f"the process ended with {ran.returncode}"}


def _measured(job: ProfileJob) -> dict[str, Any]:
    import torch

    from nnslim.hosts.nnunet.cases.preprocess import list_cases, preprocess_case
    from nnslim.hosts.nnunet.cases.write_labels import write_segmentation
    from nnslim.hosts.nnunet.model.trained_model import input_shape, read_trained_model
    from nnslim.hosts.nnunet.predict.load import load_predictor
    from nnslim.hosts.nnunet.predict.predict_settings import PredictSettings

    torch.set_num_threads(1)
    start = _resident()
    if job.memory_mb is not None:
        _limit(job.memory_mb, start)
    model = read_trained_model(Path(job.model))
    shape, ending = input_shape(model), model.dataset["file_ending"]
    cases = dict(list(list_cases(Path(job.images), ending).cases.items())[: job.cases])

    def predictor_for(backend: str) -> Any:
        settings = PredictSettings(backend=backend, precision=job.precision, threads=1, export="streamed")
        return load_predictor(Path(job.model), None, settings)

    predictor, tile = predictor_for(job.backends[0]), torch.rand(shape)
    forward = {job.backends[0]: _median_ms(predictor.network, tile, job.repeats)}
    volumes, slices = [], []
    for name, files in cases.items():
        started = time.process_time()
        data, properties = preprocess_case(predictor, files, None, lean=True)
        before = time.process_time()
        logits = predictor.predict_logits_from_preprocessed_data(torch.from_numpy(data))
        slices.append((time.process_time() - before) / data.shape[1])
        with nullcontext(job.output) if job.output is not None else tempfile.TemporaryDirectory() as folder:
            make_folder(Path(folder))
            write_segmentation(predictor, logits, properties, Path(folder) / f"{name}{ending}", threads=1)
        volumes.append(time.process_time() - started)
    peak = peak_bytes()
    for backend in job.backends[1:]:
        other = predictor_for(backend).network
        forward[backend] = _median_ms(other, tile, job.repeats)
    return {
        "threads": torch.get_num_threads(),
        "patch": list(shape[2:]),
        "forward_ms": {name: round(value, 3) for name, value in forward.items()},
        "volume_s": round(statistics.median(volumes), 4),
        "slice_ms": round(statistics.median(slices) * 1e3, 3),
        "cases": len(cases),
        "peak_mb": round(peak / _MB, 1),
        "start_mb": round(start / _MB, 1),
        "memory_mb": job.memory_mb,
        "fits": True,
    }


def _median_ms(network: Callable[[Any], Any], tile: Any, repeats: int) -> float:
    import torch

    from nnslim.running.timing import alternated

    with torch.inference_mode():  # the first passes prepare
        (times,) = alternated([lambda: network(tile)], repeats, warmups=2, clock=time.process_time)
    return statistics.median(times) * 1e3


def _resident() -> int:
    """Return the resident memory of this process, bytes."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    except OSError:
        return peak_bytes()


def _limit(memory_mb: int, resident: int) -> None:
    """Let allocations fail beyond a board's memory: resident memory now, plus private data up to the limit."""
    used = next(
        int(line.split()[1]) * 1024
        for line in Path("/proc/self/status").read_text().splitlines()
        if line.startswith("VmData:")
    )
    free = memory_mb * _MB - resident
    if free <= 0:
        raise MemoryError(f"python with torch takes {resident / _MB:.0f} MiB before any model is read")
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    wanted = used + free
    resource.setrlimit(resource.RLIMIT_DATA, (wanted if hard == resource.RLIM_INFINITY else min(wanted, hard), hard))


def measure_here() -> None:
    """Measure the job in sys.argv, in this process, and print the result for `profile`."""
    job = ProfileJob(**json.loads(sys.argv[1]))
    try:
        found = _measured(job)
    except NNSlimError as error:
        found = {"refused": str(error)}
    except (MemoryError, RuntimeError) as error:  # torch reports failed allocations as a RuntimeError
        text = " ".join(str(error).split())
        if job.memory_mb is None or not (isinstance(error, MemoryError) or "alloc" in text or "memory" in text):
            raise
        found = {"fits": False, "memory_mb": job.memory_mb, "error": text[:200] or "out of memory"}
    print(_MARK + json.dumps(found), flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = new_parser(__doc__)
    parser.add_argument("-m", "--model", required=True, help="model folder, dense or slim")
    parser.add_argument("-i", "--images", required=True, help="folder of images, as for prediction")
    parser.add_argument("-o", "--output", dest="json", type=Path, help="JSON file; default: print only")
    parser.add_argument("-s", "--segmentations", dest="output", help="folder for them; default: none are kept")
    parser.add_argument(
        "--backend", dest="backends", nargs="+", default=["stock"], help="stock, eager, openvino; the first predicts"
    )
    parser.add_argument("--precision", default="f32", help="f32, or int8 with openvino (f32)")
    parser.add_argument("--cases", type=int, default=5, help="images, at most (5)")
    parser.add_argument("--repeats", type=int, default=9, help="timed forward passes; the median counts (9)")
    parser.add_argument("--memory-mb", type=int, help="memory of the board, MiB; default: no limit")
    chosen = vars(parser.parse_args(arguments))
    target = chosen.pop("json")
    found = profile(ProfileJob(**chosen))
    if target is not None:
        write_json(target, found)
    print(json.dumps(found, indent=2))
    return 0 if found["fits"] else 1


if __name__ == "__main__":
    run_command(main)
