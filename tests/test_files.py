"""Files and folders that everything uses."""

from __future__ import annotations

import errno
import logging
import os
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import pytest
from helpers import NOBODY, ROOT, damages, in_process

from nnslim import caches
from nnslim.caches import private_folder, read_kept, user_cache, write_kept
from nnslim.errors import OutputError
from nnslim.files import (
    make_folder,
    output_error,
    remove_dead_folders,
    temporary_folder,
    unreadable,
    whole_folder,
    write_bytes,
)

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away, or become another user")


@pytest.fixture(autouse=True)
def own_temporary_folder(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path_factory.mktemp("temporary")))
    for each in range(2):
        for function in (private_folder, caches._usable):
            function.cache_clear()
        if each == 0:
            yield


def test_import_needs_no_home():
    """A container may run as a user without HOME and without an entry in the list of users."""
    ran = in_process(NOBODY + "import nnslim, nnslim.cli, nnslim.running.engine, nnslim.compression.cache")
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


def test_kept_file_that_is_damaged_in_any_way_is_reported_once_and_made_anew(tmp_path, caplog):
    path, content = tmp_path / "kept", bytes(range(256)) * 20
    assert read_kept(path) is None and not caplog.records
    write_kept(path, content)
    assert read_kept(path) == content and not caplog.records
    seen = []
    for damage in damages(path):
        caplog.clear()
        assert read_kept(path) is None, damage
        (record,) = caplog.records
        assert record.levelno == logging.WARNING and f"{path} cannot be used and is made anew: " in record.message
        write_kept(path, content)
        assert read_kept(path) == content, damage
        seen.append(damage)
    assert len(seen) > 50
    caplog.clear()
    path.rename(tmp_path / "other")
    assert read_kept(tmp_path / "other") is None, "what was kept under another name is something else"
    assert len(caplog.records) == 1


def test_kept_file_of_an_earlier_version_is_made_anew(tmp_path, caplog):
    (tmp_path / "kept").write_bytes(b"content without a checksum" * 9)
    assert read_kept(tmp_path / "kept") is None and len(caplog.records) == 1


def test_kept_files_are_written_by_many_at_once(tmp_path, caplog):
    path, failed = tmp_path / "kept", []

    def work(number: int) -> None:
        for _ in range(20):
            write_kept(path, bytes([number]) * 100_000)
            if read_kept(path) is None:
                failed.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed and not caplog.records and [file.name for file in tmp_path.iterdir()] == ["kept"]


def test_kept_file_is_not_open_to_others_whatever_the_umask_is(tmp_path):
    path, before = tmp_path / "kept", os.umask(0)
    try:
        write_kept(path, b"content")
    finally:
        os.umask(before)
    assert not path.stat().st_mode & (stat.S_IWGRP | stat.S_IWOTH) and read_kept(path) == b"content"


def test_cache_is_elsewhere_where_the_named_folder_cannot_be_used(tmp_path, monkeypatch, caplog):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("NNSLIM_CACHE", str(tmp_path / "new" / "folder"))
    assert user_cache() == tmp_path / "new" / "folder"
    monkeypatch.setenv("NNSLIM_CACHE", str(tmp_path / "file"))
    for _ in range(2):
        assert user_cache() not in (tmp_path / "file", tmp_path) and user_cache().is_dir()
    (record,) = caplog.records
    assert f"{tmp_path / 'file'} cannot be used as a cache" in record.message
    monkeypatch.setenv("NNSLIM_CACHE", "/proc/nnslim")
    assert user_cache().parts[1] != "proc"
    monkeypatch.delenv("NNSLIM_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert user_cache().is_absolute()


@pytest.mark.parametrize("home", [None, "/proc/none", "~", "relative"])
def test_cache_without_a_home_is_a_folder_of_this_user_alone(tmp_path, home):
    code = (
        NOBODY
        + f"""
if {home!r} is not None: os.environ["HOME"] = {home!r}
from nnslim.caches import user_cache, write_kept, read_kept
folder = user_cache()
write_kept(folder / "kept", b"1")
print(folder, oct(folder.stat().st_mode & 0o777), read_kept(folder / "kept"))
"""
    )
    for taken in (False, True):
        ran = in_process(code, TMPDIR=str(tmp_path))
        folder, mode, content = ran.stdout.split()
        assert (mode, content) == ("0o700", "b'1'"), ran.stderr
        if not taken:
            assert folder == str(tmp_path / f"nnslim_cache_{os.geteuid()}")
            (tmp_path / folder).chmod(0o777)  # as somebody may have made it before
    assert folder != str(tmp_path / f"nnslim_cache_{os.geteuid()}") and not Path(folder).exists()


@needs_root
def test_without_any_folder_for_temporary_files_one_line_says_so(tmp_path):
    code = f"""
import os, tempfile
tempfile._candidate_tempdir_list = lambda: [{str(tmp_path)!r}]
os.chmod({str(tmp_path)!r}, 0o555)
from nnslim.caches import private_folder
from nnslim.files import temporary_folder
os.setuid(12345)
for call in (private_folder, lambda: temporary_folder().__enter__()):
    try: call()
    except Exception as error: print(type(error).__name__, error)
"""
    lines = in_process(code).stdout.splitlines()
    assert len(lines) == 2
    assert all(line.startswith("OutputError no temporary folder can be made: No usable temporary") for line in lines)


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (errno.ENOSPC, "the disk is full; free some space there or choose another folder"),
        (errno.EDQUOT, "your disk quota is used up; free some space there or choose another folder"),
        (errno.EACCES, "Permission denied; check the folder and its permissions"),
        (errno.EROFS, "Read-only file system"),
        (errno.ENAMETOOLONG, "File name too long"),
        (errno.EIO, "Input/output error"),
        (errno.EMFILE, "Too many open files"),
        (errno.EFBIG, "File too large"),
    ],
)
def test_output_error_says_what_the_system_says(tmp_path, number, text):
    assert str(output_error(tmp_path, OSError(number, os.strerror(number)))) == f"cannot write {tmp_path}: {text}"


def test_long_names_are_written_or_named(tmp_path):
    write_bytes(tmp_path / ("a" * 255), b"1")
    assert (tmp_path / ("a" * 255)).read_bytes() == b"1"
    for call in (lambda path: write_bytes(path, b"1"), make_folder):
        with pytest.raises(OutputError, match=r"File name too long$"):
            call(tmp_path / ("a" * 256))
    assert len(list(tmp_path.iterdir())) == 1


def test_unreadable_names_the_cause(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"12")
    torchs = RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory: you tried")
    for error in (MemoryError(), torchs, OSError(errno.ENOMEM, "Cannot allocate memory")):
        assert unreadable(path, error) == f"{path} cannot be read: there is not enough memory for it"
    assert unreadable(path, OSError(errno.EIO, "Input/output error")) == f"{path} cannot be read: Input/output error"
    assert unreadable(path, EOFError("it ends")) == f"{path} is truncated or damaged (2 bytes): it ends"


def on_full_disk(folder, code: str, size: str) -> subprocess.CompletedProcess:
    """Run code as the root of its own name space, with a small disk in the place of the folder."""
    script = f'mount -t tmpfs -o size={size} tmpfs "{folder}" && exec "{sys.executable}" -c "$CODE"'
    given = {**os.environ, "PYTHONPATH": str(ROOT), "CODE": code}
    ran = subprocess.run(
        ["unshare", "-Urm", "sh", "-c", script], env=given, capture_output=True, text=True, check=False
    )
    if "unshare" in ran.stderr or "mount" in ran.stderr:
        pytest.skip("this system allows no mounts of one's own")
    return ran


@pytest.mark.skipif(shutil.which("unshare") is None, reason="needs util-linux")
def test_full_disk_is_named_whoever_writes(tmp_path):
    code = f"""
import tempfile, torch
from pathlib import Path
tempfile.tempdir = {str(tmp_path)!r}
from nnslim.errors import NNSlimError
from nnslim.caches import write_kept
from nnslim.files import save_checkpoint, temporary_folder, write_bytes
def by_torch():
    with temporary_folder() as folder:
        torch.save(torch.zeros(10**6), folder / "weights.pt")  # a RuntimeError without an errno
def by_numpy():
    import numpy
    with temporary_folder() as folder:
        numpy.save(folder / "image.npy", numpy.zeros(10**6))
def by_hand():
    import numpy
    from nnslim.files import output_error
    try: numpy.save(target.with_name("image.npy"), numpy.zeros(10**6))
    except OSError as error: raise output_error(target.with_name("image.npy"), error)
    finally: target.with_name("image.npy").unlink()
def by_openvino():
    import openvino
    from nnslim.running.kept_models import write_openvino_model
    model = openvino.convert_model(torch.nn.Linear(1000, 1000), example_input=torch.zeros(1, 1000))
    write_openvino_model(model, Path(tempfile.tempdir) / "models" / "model.xml")
target = Path(tempfile.tempdir) / "file"
for call in (by_torch, by_numpy, by_hand, lambda: write_kept(target, bytes(10**7)),
             lambda: write_bytes(target, bytes(10**7)),
             lambda: save_checkpoint({{"a": torch.zeros(10**7)}}, target), by_openvino):
    try: call()
    except NNSlimError as error: print(type(error).__name__, error)
"""
    ran = on_full_disk(tmp_path, code, "2m")
    lines = ran.stdout.splitlines()
    assert len(lines) == 7, ran.stderr
    wanted = "the disk is full; free some space there or choose another folder"
    assert all(line.startswith("OutputError cannot write ") and line.endswith(wanted) for line in lines), lines


def test_errors_of_other_kinds_pass_a_temporary_folder_as_they_are():
    for error in (RuntimeError("a fault"), OSError(errno.ENOENT, "no such file")):
        with pytest.raises(type(error)) as caught, temporary_folder() as folder:
            raise error
        assert caught.value is error and not folder.exists()
