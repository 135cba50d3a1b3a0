"""Files and folders that everything uses."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from helpers import ROOT

from nnslim.errors import OutputError
from nnslim.files import remove_dead_folders, temporary_folder, whole_folder

NOBODY = """
import os, pwd
def nobody(uid): raise KeyError(uid)
pwd.getpwuid = nobody
os.environ.pop("HOME", None)
"""


def test_import_needs_no_home():
    """A container may run as a user without HOME and without an entry in the list of users."""
    code = NOBODY + "import nnslim, nnslim.cli, nnslim.running.engine, nnslim.compression.cache"
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr


@pytest.fixture
def place(tmp_path, monkeypatch):
    """The folder for temporary files."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    return tmp_path / "tmp"


def holder(place, block):
    """A process that is inside a temporary folder and has said which."""
    code = f"from pathlib import Path\nfrom nnslim.files import *\nwith {block} as folder: print(folder); input()"
    env = {**os.environ, "TMPDIR": str(place)}
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env=env, stdin=-1, stdout=-1, text=True)
    return process, Path(process.stdout.readline().strip())


def test_temporary_folder_of_a_killed_process_is_removed_and_that_of_a_live_one_is_not(place):
    (killed, dead), (running, live) = (holder(place, "temporary_folder()") for _ in range(2))
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    other = place / "nnslim-01234567-x"  # of another host: its locks may not be seen here
    other.mkdir()
    link = place / f"{live.name[:16]}-link"
    link.symlink_to(other)
    try:
        with temporary_folder() as folder:
            assert set(place.iterdir()) == {folder, live, other, link} and not dead.exists()
            assert folder.stat().st_mode & 0o777 == 0o700
        assert not folder.exists()
    finally:
        running.communicate("")
    assert not live.exists()


def test_temporary_folder_goes_when_the_block_fails(place):
    with pytest.raises(ZeroDivisionError), temporary_folder() as folder:
        (folder / "file").write_text("x")
        raise ZeroDivisionError
    assert list(place.iterdir()) == []


def test_side_folder_of_a_killed_process_is_removed_when_the_same_target_is_written(place, tmp_path):
    target = tmp_path / "model"
    killed, side = holder(place, f"whole_folder(Path({str(target)!r}))")
    running, live = holder(place, f"whole_folder(Path({str(target)!r}))")
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    (tmp_path / ".model-notes").mkdir()  # of the user
    with whole_folder(target) as ours:
        assert {path.name for path in tmp_path.glob(".model*")} == {ours.name, live.name, ".model-notes"}
        (ours / "plans.json").write_text("{}")
    assert not side.exists() and (target / "plans.json").is_file() and target.stat().st_mode & 0o777 == 0o755
    running.communicate("")  # the target is there by now: it is kept, and nothing else is left
    assert {path.name for path in tmp_path.iterdir()} == {"tmp", "model", ".model-notes"}
    with pytest.raises(OutputError, match="exists and is not overwritten"), whole_folder(target):
        pass


def test_dead_folder_that_cannot_be_locked_is_left(place, monkeypatch):
    def flock(*_):
        raise OSError(38, "no locks here")

    killed, dead = holder(place, "temporary_folder()")
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    with monkeypatch.context() as patched:
        patched.setattr("fcntl.flock", flock)
        with temporary_folder() as folder:
            assert set(place.iterdir()) == {folder, dead}
    remove_dead_folders()
    assert list(place.iterdir()) == []


def test_check_name_says_what_to_do_about_the_name_or_the_locale():
    script = (
        "import os; from pathlib import Path; from nnslim.files import check_name; check_name(Path(os.fsdecode({})))"
    )
    for name, utf8, said in (
        (b"\xff", "1", r"'\udcff' is no text in utf-8; rename it"),
        ("é".encode(), "0", r"'\udcc3\udca9' is no text in ascii; set PYTHONUTF8=1"),
        ("é".encode(), "1", ""),
    ):
        surroundings = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": utf8, "PYTHONCOERCECLOCALE": "0"}
        made = subprocess.run(
            [sys.executable, "-c", script.format(name)], env=surroundings, capture_output=True, text=True
        )
        assert made.stderr.strip().endswith(said) and bool(made.returncode) is bool(said)
