"""Commands that are ended by a signal leave nothing half-written, and go on when they are given again."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
from helpers import ROOT

_HALF = "run: {guard: false}\nmethods: [{method: tucker, rank_factor: 0.5, rank_min: 2}]\n"
_HALF += "recovery: {steps: 4000, every: 2}\n"


def heard() -> None:
    """Give a process the signals that nohup, and a shell that runs the tests in the background, have ignored."""
    for number in (signal.SIGHUP, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)


def stopped(tmp_path, arguments, started, number, group=False):
    """Start a command with an empty folder for temporary files, send it a signal once `started` says so.

    Returns:
        Its exit code, its last line, and what is left in that folder.
    """
    temporary = tmp_path / "temporary"
    temporary.mkdir(exist_ok=True)
    with subprocess.Popen(
        [sys.executable, "-W", "ignore", "-m", "nnslim.cli", *map(str, arguments)],
        env={**os.environ, "TMPDIR": str(temporary), "OMP_NUM_THREADS": "1", "NNSLIM_CACHE": str(tmp_path / "cache")},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=heard,
    ) as run:
        try:
            while run.poll() is None and not started(temporary):
                time.sleep(0.01)
            (os.killpg if group else os.kill)(run.pid, number)
            lines = run.communicate(timeout=120)[1].strip().splitlines()
        finally:
            run.kill()
    return run.returncode, lines[-1] if lines else "", sorted(path.name for path in temporary.glob("nnslim-*"))


def test_compress_ended_by_signals_leaves_nothing_and_goes_on(make_model, case_folder, tmp_path, command):
    half = tmp_path / "half.yml"
    half.write_text(_HALF)
    model, out = make_model(), tmp_path / "made" / "slim"
    arguments = ("compress", "-m", model, "-o", out, "-c", half, "-i", case_folder, "-q")

    def prepared(temporary):
        return len(list(temporary.glob("nnslim-*/*.npy"))) == 3

    def learning(_):
        return any(out.parent.glob(".slim.recovery.fold*"))

    def made():
        return sorted(path.name for path in out.parent.iterdir())

    code, line, left = stopped(tmp_path, arguments, prepared, signal.SIGTERM)
    assert (code, left, made()) == (143, [], [])
    assert line == (
        "nnslim: ended by SIGTERM; nothing half-written is left; give the same command again: learning (recovery) "
        "goes on where it stopped"
    )
    code, _, left = stopped(tmp_path, arguments, prepared, signal.SIGKILL)
    assert code == -signal.SIGKILL and len(left) == 1 and len(made()) == 1
    code, line, left = stopped(tmp_path, arguments, learning, signal.SIGINT)  # the leftovers of the killed one go, too
    assert (code, left, made()) == (130, [], [".slim.recovery.fold0"]) and line.startswith("nnslim: interrupted; ")
    half.write_text(half.read_text().replace("4000", "4"))
    command(*arguments, expect=0)
    assert made() == ["slim"]


@pytest.mark.parametrize(
    ("workers", "number", "code"),
    [(1, signal.SIGTERM, 143), pytest.param(2, signal.SIGHUP, 129, marks=pytest.mark.slow)],
)
def test_predict_ended_by_a_signal_keeps_finished_cases(
    make_model, case_folder, tmp_path, command, workers, number, code
):
    for copy in range(20):
        shutil.copy(case_folder / "a_0000.nii.gz", case_folder / f"a{copy}_0000.nii.gz")
    out = tmp_path / "out"
    arguments = ("predict", "-m", make_model(), "-i", case_folder, "-o", out, "-q", "--workers", workers)

    def finished(_=None):
        manifest = out / "manifest.jsonl"
        return manifest.read_text().count("\n") if manifest.is_file() else 0

    found, line, left = stopped(tmp_path, arguments, finished, number, group=workers > 1)
    assert (found, left) == (code, []) and line.endswith(
        "the same command goes on with the others (--resume, the default)"
    )
    assert not list(out.glob(".nnslim-*-*"))  # half-written results
    done = finished()
    assert 0 < done < 23
    again = command(*arguments, expect=0)[1]
    assert f"{23 - done} predicted, {done} there already, 0 failed" in again


_FORKS = """
import os, signal, time
from nnslim.commands.common import stoppable
with stoppable("nothing"):
    for _ in range(20):
        child = os.fork()
        if not child:
            try:
                time.sleep(20)
            finally:
                os._exit(0)
        os.kill(child, signal.SIGTERM)
        print(os.waitpid(child, 0)[1], end=" ")
print(signal.getsignal(signal.SIGTERM) is signal.SIG_DFL)
"""


def test_forked_children_of_a_command_end_by_the_first_signal():
    """A pool that nnU-Net forks and ends at once would otherwise wait for ever for a child that has lost its signal."""
    ran = subprocess.run([sys.executable, "-c", _FORKS], cwd=ROOT, capture_output=True, text=True)
    assert ran.stdout.split() == [str(int(signal.SIGTERM))] * 20 + ["True"], ran.stderr
