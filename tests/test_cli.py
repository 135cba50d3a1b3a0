"""The `nnslim` command as a user meets it: exit codes, one clear line per fault, nothing half-written."""

from __future__ import annotations

import json
import os
import re
import resource
import shlex
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import nibabel as nib
import numpy as np
import pytest
import torch
import typer
from helpers import NOBODY, ROOT, in_process, make_predictor

from nnslim.cli import app
from nnslim.errors import ModelError
from nnslim.hosts.nnunet.model.trained_model import load_checkpoint

# No guard: networks this narrow have nothing to gain, and are compressed to see that it is done.
HALF = "version: 1\nrun:\n  guard: false\nmethods:\n  - method: tucker\n    rank_factor: 0.5\n    rank_min: 2\n"


class Done(NamedTuple):
    """Exit code and what was printed."""

    returncode: int
    stdout: str
    stderr: str


@pytest.fixture
def nnslim(command):
    return lambda *arguments, expect: Done(*command(*arguments, expect=expect))


@pytest.fixture
def fault(nnslim):
    """Run a command that must fail with 2 and return its one line."""

    def run(*arguments) -> str:
        lines = nnslim(*arguments, expect=2).stderr.strip().splitlines()
        ours = [line for line in lines if line.startswith("nnslim: ")]
        assert len(ours) == 1 and lines[-1] == ours[0], lines
        return ours[0]

    return run


def fresh(*arguments, expect: int, limit: int | None = None) -> Done:
    """Run the command in a process of its own, on request with a limit on the size of files (bytes)."""

    def small_files() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "nnslim.cli", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        preexec_fn=small_files if limit else None,
    )
    assert done.returncode == expect, f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
    assert "Traceback" not in done.stderr
    return Done(done.returncode, done.stdout, done.stderr)


@pytest.fixture
def half(tmp_path: Path) -> Path:
    path = tmp_path / "half.yml"
    path.write_text(HALF)
    return path


def test_compress_then_predict_then_again(make_model, half, case_folder, tmp_path, nnslim, caplog):
    source = make_model(folds=(0, 1))
    done = nnslim("compress", "-m", source, "-o", tmp_path / "slim", "-c", half, expect=0)
    assert "2 fold(s), compressed" in done.stdout and "fewer" in done.stdout
    out = tmp_path / "out"
    done = nnslim("predict", "-i", case_folder, "-o", out, "-m", tmp_path / "slim", expect=0)
    assert "3 predicted, 0 there already, 0 failed" in done.stdout
    (said,) = (text for text in caplog.messages if text.startswith("device "))
    assert said == "device cpu, mirrored in 8 ways, backend auto, precision f32"
    for name in "abc":
        image, labels = nib.load(case_folder / f"{name}_0000.nii.gz"), nib.load(out / f"{name}.nii.gz")
        assert labels.shape == image.shape and np.allclose(labels.affine, image.affine, atol=1e-5)
    assert sorted(p.name for p in out.iterdir()) == ["a.nii.gz", "b.nii.gz", "c.nii.gz", "manifest.jsonl"]
    done = nnslim("predict", "-i", case_folder, "-o", out, "-m", tmp_path / "slim", "-q", expect=0)
    assert "0 predicted, 3 there already" in done.stdout and done.stderr == ""
    states = [json.loads(line)["status"] for line in (out / "manifest.jsonl").read_text().splitlines()]
    assert states == ["done"] * 3
    done = nnslim("predict", "-i", case_folder, "-o", out, "-m", source, "-c", half, "-q", expect=2)
    assert "holds results of another model or of other settings (3 in manifest.jsonl, a among them)" in done.stderr


def test_predict_equals_stock_nnunet(make_model, case_folder, tmp_path, nnslim):
    source = make_model()
    common = ("-i", case_folder, "-m", source, "-q", "--backend", "stock")
    nnslim("predict", *common, "-o", tmp_path / "ours", expect=0)
    nnslim("predict", *common, "-o", tmp_path / "plain", "--disable_tta", expect=0)
    old = nnslim("predict", *common, "-o", tmp_path / "old", "--no-mirroring", expect=0)
    assert "--disable_tta switches it off" in old.stderr
    predictor = make_predictor(use_mirroring=True)
    predictor.initialize_from_trained_model_folder(str(source), (0,))
    predictor.predict_from_files(
        str(case_folder),
        str(tmp_path / "stock"),
        num_processes_preprocessing=1,
        num_processes_segmentation_export=1,
    )
    for name in "abc":
        files = (nib.load(tmp_path / k / f"{name}.nii.gz") for k in ("ours", "stock", "plain", "old"))
        ours, stock, plain, old = (np.asarray(file.dataobj) for file in files)
        assert np.array_equal(ours, stock) and len(np.unique(ours)) > 1
        assert np.array_equal(plain, old) and not np.array_equal(ours, plain)


def test_predict_cascade_equals_stock_nnunet_and_asks_for_the_stage_before(
    make_model, case_folder, tmp_path, nnslim, fault
):
    source, stage = make_model("cascade"), tmp_path / "stage"
    stage.mkdir()
    for name in "abc":
        image = nib.load(case_folder / f"{name}_0000.nii.gz")
        labels = (image.get_fdata() > 1).astype(np.uint8) + (image.get_fdata() > 2)
        nib.save(nib.Nifti1Image(labels.astype(np.uint8), image.affine), stage / f"{name}.nii.gz")
    common = ("predict", "-q", "--backend", "stock", "-i", case_folder, "-o", tmp_path / "ours", "-m", source)
    common += ("--disable_tta",)
    assert "needs the segmentations of '3d_lowres'" in fault(*common)
    nnslim(*common, "--previous-stage", stage, expect=0)
    predictor = make_predictor()
    predictor.initialize_from_trained_model_folder(str(source), (0,))
    predictor.predict_from_files(
        str(case_folder),
        str(tmp_path / "stock"),
        num_processes_preprocessing=1,
        num_processes_segmentation_export=1,
        folder_with_segs_from_prev_stage=str(stage),
    )
    for name in "abc":
        ours, stock = (np.asarray(nib.load(tmp_path / k / f"{name}.nii.gz").dataobj) for k in ("ours", "stock"))
        assert np.array_equal(ours, stock) and len(np.unique(ours)) > 1


def test_run_stock_command_inside_the_context_equals_compressed_folder(make_model, half, case_folder, tmp_path, nnslim):
    source = make_model()
    stock = ("-i", case_folder, "-f", "0", "-device", "cpu", "--disable_tta", "-npp", "1", "-nps", "1")
    command = ("nnUNetv2_predict_from_modelfolder", *stock, "-m", source, "-o", tmp_path / "run")
    done = fresh("run", "-c", half, "--", *command, expect=0)
    assert "parameters" in done.stderr and "fewer" in done.stderr
    nnslim("compress", "-q", "-m", source, "-o", tmp_path / "slim", "-c", half, expect=0)
    folder = ("-o", tmp_path / "folder", "-m", tmp_path / "slim", "--disable_tta")
    nnslim("predict", "-q", "-i", case_folder, *folder, expect=0)
    for name in "abc":
        one, two = (np.asarray(nib.load(tmp_path / k / f"{name}.nii.gz").dataobj) for k in ("run", "folder"))
        assert np.array_equal(one, two)


def test_run_script_gets_its_own_arguments_and_exit_code(half, tmp_path, nnslim):
    script = tmp_path / "mine.py"
    script.write_text(
        "import sys\nfrom nnunetv2.inference.predict_from_raw_data import nnUNetPredictor as P\n"
        "assert hasattr(P.manual_initialization, '__nnslim_original__')\n"
        "assert __name__ == '__main__' and sys.argv[1:] == ['-c', 'x', '--', 'y'], sys.argv\nsys.exit(7)\n"
    )
    fresh("run", "-c", half, "--", script, "-c", "x", "--", "y", expect=7)


def test_doctor_names_versions_and_finds_nothing_wrong(nnslim):
    done = nnslim("doctor", expect=0)
    assert (
        "all good" in done.stdout
        and "nnunetv2 2." in done.stdout
        and "tucker-balanced" in done.stdout.split("presets:")[1]
    )


def test_version_is_that_of_the_package(nnslim):
    from importlib.metadata import version

    assert nnslim("--version", expect=0).stdout.strip() == version("nnslim")


# --- bad input: one clear line, exit code 2 -------------------------------------------------------------------------


def test_compress_faults_of_the_model_folder_exit_2(make_model, half, tmp_path, fault):
    source, target = make_model(), tmp_path / "slim"
    assert "is not a folder" in fault("compress", "-m", tmp_path / "no", "-o", target, "-c", half)
    assert "has no plans.json" in fault("compress", "-m", tmp_path, "-o", target, "-c", half)
    assert "fold_3" in fault("compress", "-m", source, "-o", target, "-c", half, "-f", "3")
    path = source / "fold_0" / "checkpoint_final.pth"
    path.write_bytes(path.read_bytes()[:5000])
    assert "checkpoint_final.pth is truncated or damaged (5,000 bytes)" in fault(
        "compress", "-m", source, "-o", target, "-c", half
    )
    assert not target.exists()


_LITTLE_MEMORY = """
import logging, resource, sys
from pathlib import Path
import torch
from nnslim.errors import NNSlimError
from nnslim.hosts.nnunet.model.trained_model import load_checkpoint
from nnslim.compression.recover import _read_state
from nnslim.inflation.published_weights import read_weights
torch.load(sys.argv[1])  # what torch needs itself
size = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmSize")) * 1024
resource.setrlimit(resource.RLIMIT_AS, (size + 2**24, resource.RLIM_INFINITY))
for call in (load_checkpoint, _read_state, read_weights):
    try: call(Path(sys.argv[2]))
    except NNSlimError as error: print(type(error).__name__, error)
"""


def test_checkpoint_that_memory_is_too_small_for_is_not_called_damaged(tmp_path):
    small, large = tmp_path / "small.pth", tmp_path / "large.pth"
    torch.save({"a": torch.zeros(9)}, small)
    torch.save({"network_weights": {"a": torch.zeros(2**26)}, "trainer_name": "", "init_args": {}}, large)
    command = [sys.executable, "-c", _LITTLE_MEMORY, str(small), str(large)]
    lines = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    kinds = ("ModelError", "InputError", "InputError")
    assert lines == [f"{kind} {large} cannot be read: there is not enough memory for it" for kind in kinds]
    with pytest.raises(ModelError, match=r"/proc/self/mem cannot be read: Input/output error"):
        load_checkpoint(Path("/proc/self/mem"))  # as a failing disk does


def test_commands_work_without_home_and_without_an_entry_in_the_list_of_users(make_model, case_folder, half, tmp_path):
    (tmp_path / "temporary").mkdir()
    commands = [
        ["doctor"],
        ["compress", "-q", "-m", make_model(), "-o", tmp_path / "slim", "-c", half],
        ["predict", "-q", "-m", tmp_path / "slim", "-i", case_folder, "-o", tmp_path / "out"],
    ]
    if find_spec("openvino") is not None:
        commands.append([*commands[-1][:-1], tmp_path / "again", "--backend", "openvino"])
    for command in commands:
        words = ["nnslim", *map(str, command)]
        code = NOBODY + f"import sys; sys.argv = {words}; from nnslim.cli import main; main()"
        ran = in_process(code, TMPDIR=str(tmp_path / "temporary"))
        assert ran.returncode == 0 and "Traceback" not in ran.stderr, ran.stdout + ran.stderr
        assert "cannot be used" not in ran.stderr, ran.stderr
    assert len(list((tmp_path / "out").glob("*.nii.gz"))) == len(list(case_folder.glob("*.nii.gz")))


def test_config_faults_exit_2_and_name_the_nearest(make_model, tmp_path, fault):
    source, target, config = make_model(), tmp_path / "slim", tmp_path / "bad.yml"
    assert "nearest: tucker-small" in fault("compress", "-m", source, "-o", target, "-c", "tucker-smal")
    for text, message in (
        (HALF.replace("rank_factor", "rank_facter"), "unknown key 'rank_facter'; nearest: rank_factor"),
        (HALF.replace("tucker", "tuker"), "unknown method 'tuker'; nearest: tucker"),
        (HALF.replace("0.5", "1.5"), "rank_factor: Input should be less than or equal to 1, found 1.5"),
        ("a: [", "is neither YAML nor JSON"),
        ("!!python/object/apply:os.system [exit 9]", "is neither YAML nor JSON"),
        (HALF + "    include: ['encodr.*']\n", "no convolution matches include pattern 'encodr.*'; nearest: encoder"),
    ):
        config.write_text(text)
        assert message in fault("compress", "-m", source, "-o", target, "-c", config)
    assert not target.exists()


def test_compress_output_that_cannot_be_written_exits_2(make_model, half, tmp_path, fault):
    source = make_model()
    # sysfs refuses new folders to every user, root included.
    assert "cannot write /sys/" in fault("compress", "-m", source, "-o", "/sys/nnslim/out", "-c", half)
    (tmp_path / "file").write_text("x")
    assert "cannot write" in fault("compress", "-m", source, "-o", tmp_path / "file" / "out", "-c", half)


def test_compress_full_disk_exits_2_and_leaves_nothing(make_model, half, tmp_path, fault):
    source = make_model()
    # A limit on the size of files stands in for a disk that is full: the same write fails, halfway through.
    command = ("compress", "-q", "-m", source, "-o", tmp_path / "out" / "slim", "-c", half)
    line = fresh(*command, expect=2, limit=20_000).stderr.strip().splitlines()[-1]
    assert "cannot write" in line and "checkpoint_final.pth" in line
    assert list((tmp_path / "out").iterdir()) == []


def test_predict_bad_cases_are_reported_and_the_rest_goes_on(make_model, case_folder, tmp_path, nnslim):
    out = tmp_path / "out"
    (case_folder / "broken_0000.nii.gz").write_bytes(b"this is no image")
    cut = case_folder / "cut_0000.nii.gz"
    cut.write_bytes((case_folder / "a_0000.nii.gz").read_bytes()[:3000])
    shutil.copy(case_folder / "a_0000.nii.gz", case_folder / "two_0000.nii.gz")
    shutil.copy(case_folder / "a_0000.nii.gz", case_folder / "two_0001.nii.gz")
    done = nnslim("predict", "-i", case_folder, "-o", out, "-m", make_model(), expect=1)
    assert "3 predicted, 0 there already, 3 failed" in done.stdout
    assert "broken: broken_0000.nii.gz cannot be read" in done.stderr
    assert "cut: cut_0000.nii.gz cannot be read" in done.stderr
    assert "two: the model needs 1 channel(s) (MRI), found 2 file(s)" in done.stderr
    assert sorted(p.name for p in out.iterdir()) == ["a.nii.gz", "b.nii.gz", "c.nii.gz", "manifest.jsonl"]
    status = {(line := json.loads(text))["name"]: line["status"] for text in (out / "manifest.jsonl").open()}
    assert status == {"a": "done", "b": "done", "broken": "failed", "c": "done", "cut": "failed", "two": "failed"}


def test_predict_input_faults_exit_2(make_model, case_folder, tmp_path, fault):
    source = make_model()
    common = ("-o", tmp_path / "out", "-m", source)
    assert "does not exist" in fault("predict", "-i", tmp_path / "none", *common)
    (tmp_path / "empty").mkdir()
    assert "no image named <case>_0000.nii.gz" in fault("predict", "-i", tmp_path / "empty", *common)
    if not torch.cuda.is_available():
        assert "finds no CUDA device" in fault("predict", "-i", case_folder, *common, "--device", "cuda")
    assert "cannot write /sys/" in fault("predict", "-i", case_folder, "-o", "/sys/nnslim", "-m", source)


def test_run_faults_exit_2(half, fault):
    assert "no such Python command" in fault("run", "-c", half, "--", "nnUNetv2_predikt")
    assert "is not a Python program" in fault("run", "-c", half, "--", "ls")
    assert "nothing to run" in fault("run", "-c", half)


def test_bad_arguments_exit_2(nnslim):
    done = nnslim("compress", "--modle", "x", expect=2)
    assert "No such option" in done.stderr


def test_help_of_every_command_has_an_example_whose_options_exist():
    program = typer.main.get_command(app)
    assert len(program.commands) == 14
    for name, command in program.commands.items():
        (example,) = re.findall(rf"Example: nnslim {name}(.*)", command.help)
        given = shlex.split(example)
        known = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
        own = given[: given.index("--")] if "--" in given else given
        assert {word for word in own if word.startswith("-")} <= known, example
        required = [parameter for parameter in command.params if parameter.required]
        assert all(set(parameter.opts) & set(own) for parameter in required), example
