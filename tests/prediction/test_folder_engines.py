"""Folder runs with a model without a network: order, overlap, failures, deaths, resume, kill -9."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from folder_jobs import IDENTITY, CopyJob, times, write_cases
from helpers import ROOT

from nnslim.errors import ConfigError, HostError, InputError, ModelError, OutputError
from nnslim.prediction.case import Case, Crew
from nnslim.prediction.engines.slurm import part_of, sbatch_script
from nnslim.prediction.manifest import Manifest
from nnslim.prediction.run_directory import FolderSettings, run_folder
from nnslim.prediction.schedule import Schedule, in_order, share

TESTS = ROOT / "tests"
HERE = FolderSettings()
TWO = FolderSettings("local", Crew(2))


@pytest.fixture
def notes(tmp_path: Path) -> Path:
    folder = tmp_path / "notes"
    folder.mkdir()
    return folder


def statuses(records) -> dict[str, str]:
    return {record.name: record.status for record in records}


def wait_for(condition: Callable[[], bool], seconds: float = 120.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.02)


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


# --- order of work --------------------------------------------------------------------------------------------------


def test_in_order_large_first_and_what_was_begun_before_last():
    cases = [Case(name, (), name, voxels) for name, voxels in (("a", 5), ("b", 9), ("c", 9), ("d", 1))]
    assert [case.name for case in in_order(cases)] == ["b", "c", "a", "d"]
    assert [case.name for case in in_order(cases, {"b": 1, "a": 2})] == ["c", "d", "b", "a"]


def test_share_balances_voxels_and_loses_none():
    cases = [Case(str(number), (), "", voxels) for number, voxels in enumerate([10, 9, 8, 1, 1, 1, 7, 3])]
    shares = [share(cases, index, 3) for index in range(3)]
    assert sorted(case.name for part in shares for case in part) == sorted(case.name for case in cases)
    # nnU-Net's way, every third case, gives 18, 13 and 9.
    assert sorted(sum(case.voxels for case in part) for part in shares) == [12, 13, 15]
    assert share(cases[::-1], 1, 3) == shares[1]


def test_schedule_suspects_come_last_alone_and_are_given_up():
    a, b, c = (Case(name, (), name) for name in "abc")
    schedule = Schedule([a, b, c], attempts=2)
    assert schedule.take(()) == a and schedule.take([a]) == b
    assert schedule.died([a, b]) == []
    assert schedule.take(()) == c
    assert schedule.take([c]) is None  # a suspect goes to a worker that holds nothing else
    assert schedule.take(()) == a and schedule.attempts(a) == 2
    assert schedule.take([a]) is None and schedule.waiting == 1
    assert schedule.died([a]) == [a]
    assert schedule.take(()) == b and schedule.waiting == 0


# --- here and in two workers: the same behaviour --------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings", [HERE, FolderSettings(crew=Crew(overlap=False)), TWO], ids=["here", "plain", "two"]
)
def test_bad_cases_are_reported_the_rest_is_done_and_a_second_run_repeats_only_them(tmp_path, notes, settings):
    texts = {"a": "x", "b": "bad one", "c": "xx", "e": "exit", "ü ß": "xxx"}
    cases, out = write_cases(tmp_path / "in", texts), tmp_path / "out folder ä"
    seen = []
    records = run_folder(CopyJob(notes), cases, out, settings, lambda done, total: seen.append((done, total)))
    assert [record.name for record in records] == list(texts)
    assert statuses(records) == {"a": "done", "b": "failed", "c": "done", "e": "failed", "ü ß": "done"}
    assert seen == [(number, 5) for number in range(1, 6)]
    by_name = {record.name: record for record in records}
    assert by_name["b"].error == "b.txt holds 'bad one'; expected anything else"
    assert by_name["e"].error == "SystemExit: the host gave up"
    assert sorted(path.name for path in out.iterdir()) == ["a.out", "c.out", "manifest.jsonl", "ü ß.out"]
    assert (out / "ü ß.out").read_text() == "XXX"
    lines = {(line := json.loads(text))["name"]: line for text in (out / "manifest.jsonl").open(encoding="utf-8")}
    assert lines.keys() == texts.keys()
    line = lines["c"]
    assert (
        list(line["stages"]) == ["read", "forward", "write"] and line["seconds"] >= sum(line["stages"].values()) - 0.01
    )
    assert line["voxels"] == 2 and line["peak_mb"] > 5 and line["model"] == IDENTITY and line["attempts"] == 1
    assert line["sha256"] == hashlib.sha256(b"XX").hexdigest()
    assert line["input"]["bytes"] == 2 and line["versions"] == {"copy": "1"}

    again = run_folder(CopyJob(notes), cases, out, settings)
    assert statuses(again) == {"a": "there", "b": "failed", "c": "there", "e": "failed", "ü ß": "there"}
    assert [times(notes, f"forward-{name}") for name in ("a", "c", "e", "ü ß")] == [1, 1, 2, 1]
    assert len((out / "manifest.jsonl").read_text().splitlines()) == 5


def test_stages_of_neighbouring_cases_overlap(tmp_path, notes):
    """Each stage waits until another stage has begun with another case: one after the other they would wait forever."""
    import threading

    forward_b, read_b = threading.Event(), threading.Event()

    class Model:
        def read(self, case):
            if case.name == "b":
                read_b.set()
            return case.name

        def forward(self, case, data):
            if case.name == "a":
                assert read_b.wait(60)  # b is read while a is in its forward pass
            if case.name == "b":
                forward_b.set()
            return data

        def write(self, case, result, beside):
            if case.name == "a":
                assert forward_b.wait(60)  # a is written while b is in its forward pass
            beside.write_text(result)

        def run(self):
            return {}

    class Job(CopyJob):
        def open(self, place):
            from contextlib import nullcontext

            return nullcontext(Model())

    cases = write_cases(tmp_path / "in", {"a": "xx", "b": "x"})
    records = run_folder(Job(notes), cases, tmp_path / "out", HERE)
    assert statuses(records) == {"a": "done", "b": "done"}, [record.error for record in records]


def test_largest_case_is_begun_first(tmp_path, notes):
    cases = write_cases(tmp_path / "in", {"a": "x", "b": "xxx", "c": "xx"})
    run_folder(CopyJob(notes, seconds=0.05), cases, tmp_path / "out", HERE)  # file times have steps of milliseconds
    order = sorted(notes.glob("forward-*"), key=lambda path: path.stat().st_mtime_ns)
    assert [path.name[8] for path in order] == ["b", "c", "a"]


def test_problem_of_the_listing_needs_no_model(tmp_path, notes):
    cases = [Case("a", (), "a.out", problem="two files claim it")]
    records = run_folder(CopyJob(notes, refuse=True), cases, tmp_path / "out", HERE)
    assert [(r.status, r.error) for r in records] == [("failed", "two files claim it")]


# --- what is done, and what is not ----------------------------------------------------------------------------------


def test_resume_finds_torn_missing_and_changed_files_and_leaves_strangers_alone(tmp_path, notes, caplog):
    cases, out = write_cases(tmp_path / "in", {name: name for name in "abcde"}), tmp_path / "out"
    run_folder(CopyJob(notes), cases[:4], out, HERE)
    (out / "a.out").write_text("")  # torn
    (out / "b.out").unlink()
    os.utime(tmp_path / "in" / "c.txt", (1e9, 1e9))  # another image, copied with its old time
    (out / "e.out").write_text("by hand")
    (out / ".nnslim-0123abcd-a.out").write_text("half")  # of a run that was killed
    (out / ".nnslim-0123abcd-b-a.out").write_text("another case's")
    (out / ".nnslim-notes").write_text("the user's")
    with caplog.at_level(logging.WARNING, "nnslim"):
        records = run_folder(CopyJob(notes), cases, out, HERE)
    assert statuses(records) == {"a": "done", "b": "done", "c": "done", "d": "there", "e": "there"}
    assert [(out / f"{name}.out").read_text() for name in "abcde"] == ["A", "B", "C", "D", "by hand"]
    hidden = sorted(path.name for path in out.glob(".*"))
    assert hidden == [".nnslim-0123abcd-b-a.out", ".nnslim-notes"]
    told = "\n".join(caplog.messages)
    assert "a.out is not what was written (another checksum)" in told
    assert "c: its images have changed" in told
    assert "1 results are kept that manifest.jsonl does not name (e.out ...)" in told
    records = run_folder(CopyJob(notes), cases, out, FolderSettings(overwrite=True))
    assert set(statuses(records).values()) == {"done"} and (out / "e.out").read_text() == "E"


def test_results_of_another_model_are_not_mixed(tmp_path, notes, monkeypatch):
    cases, out = write_cases(tmp_path / "in", {"a": "x"}), tmp_path / "out"
    run_folder(CopyJob(notes), cases, out, HERE)
    monkeypatch.setattr(CopyJob, "stamp", lambda self: ("f" * 16, {}))
    with pytest.raises(OutputError, match=r"holds results of another model or of other settings \(1 in manifest"):
        run_folder(CopyJob(notes), cases, out, HERE)
    assert statuses(run_folder(CopyJob(notes), cases, out, FolderSettings(overwrite=True))) == {"a": "done"}


def test_unwritable_output_and_unknown_engine_are_named(tmp_path, notes):
    cases = write_cases(tmp_path / "in", {"a": "x"})
    with pytest.raises(OutputError, match="cannot write /sys/nnslim"):
        run_folder(CopyJob(notes), cases, Path("/sys/nnslim"), HERE)
    with pytest.raises(ConfigError, match="no engine 'lokal'; nearest: local"):
        run_folder(CopyJob(notes), cases, tmp_path / "out", FolderSettings("lokal"))


def test_image_that_vanishes_is_a_failed_case(tmp_path, notes):
    cases = write_cases(tmp_path / "in", {"a": "x", "b": "x"})
    cases[0].files[0].unlink()
    records = run_folder(CopyJob(notes), cases, tmp_path / "out", HERE)
    assert (
        statuses(records) == {"a": "failed", "b": "done"} and "a.txt cannot be read: No such file" in records[0].error
    )


def test_image_that_vanishes_between_listing_and_resume_is_a_failed_case(tmp_path, notes):
    cases = write_cases(tmp_path / "in", {"a": "x", "b": "x"})
    run_folder(CopyJob(notes), cases, tmp_path / "out", HERE)
    cases[0].files[0].unlink()
    records = run_folder(CopyJob(notes), cases, tmp_path / "out", HERE)
    assert statuses(records) == {"a": "failed", "b": "there"} and "a.txt cannot be read" in records[0].error


@pytest.mark.parametrize("place", ["a.out", "a.out/ct.txt"])
def test_result_in_the_place_of_an_image_is_refused(tmp_path, notes, place):
    image = tmp_path / place
    image.parent.mkdir(exist_ok=True)
    image.write_text("x")
    for settings in (HERE, FolderSettings(overwrite=True)):
        with pytest.raises(OutputError, match=r"a\.out would replace the image .*; choose another output folder"):
            run_folder(CopyJob(notes), [Case("a", (image,), "a.out")], tmp_path, settings)
    assert image.read_text() == "x"


# --- deaths ---------------------------------------------------------------------------------------------------------


def test_killed_worker_is_replaced_and_its_cases_are_predicted(tmp_path, notes):
    cases, out = write_cases(tmp_path / "in", {f"c{n}": "x" * n for n in range(1, 8)}), tmp_path / "out"
    records = run_folder(CopyJob(notes, kill=(("c3", 1), ("c6", 2))), cases, out, TWO)
    assert set(statuses(records).values()) == {"done"}
    attempts = {record.name: record.attempts for record in records}
    assert attempts["c6"] == 3 and attempts["c3"] == 2
    assert times(notes, "forward-c6") == 3 and times(notes, "forward-c3") == 2
    assert len(list(out.glob("*.out"))) == 7 and not list(out.glob(".*"))


def test_case_that_kills_every_worker_is_given_up_and_no_other_with_it(tmp_path, notes):
    cases = write_cases(tmp_path / "in", {f"c{n}": "x" * n for n in range(1, 6)})
    records = run_folder(CopyJob(notes, kill=(("c5", 99),)), cases, tmp_path / "out", TWO)
    assert statuses(records) == {"c1": "done", "c2": "done", "c3": "done", "c4": "done", "c5": "failed"}
    error = records[4].error
    assert error == "3 workers ended while they had it; the last one was killed by SIGKILL (often: out of memory)"
    assert times(notes, "forward-c5") == 3


def test_model_that_cannot_be_used_ends_the_run_at_once(tmp_path, notes):
    cases = write_cases(tmp_path / "in", {"a": "x"})
    for settings in (HERE, TWO):
        with pytest.raises(ModelError, match="no such model"):
            run_folder(CopyJob(notes, refuse=True), cases, tmp_path / "out", settings)


def test_workers_that_die_loading_are_tried_three_times(tmp_path, notes):
    cases = write_cases(tmp_path / "in", {"a": "x", "b": "x"})
    one = FolderSettings("local", Crew(1))
    with pytest.raises(HostError, match="no worker can be started: the last 3 were killed by SIGKILL"):
        run_folder(CopyJob(notes, die_opening=99), cases, tmp_path / "out", one)
    assert times(notes, "open") == 3
    records = run_folder(CopyJob(notes, die_opening=5), cases, tmp_path / "out", one)
    assert set(statuses(records).values()) == {"done"}


def test_first_worker_loads_alone(tmp_path, notes):
    cases = write_cases(tmp_path / "in", {f"c{n}": "x" for n in range(4)})
    records = run_folder(CopyJob(notes, first_alone=True, loaded=2), cases, tmp_path / "out", TWO)
    assert set(statuses(records).values()) == {"done"}
    assert (notes / "loaded.1").stat().st_mtime_ns <= (notes / "open.2").stat().st_mtime_ns


def start_run(tmp_path: Path, notes: Path, count: int, engine: str = "local") -> subprocess.Popen:
    """Start a folder run of `count` slow cases in a process of its own."""
    code = (
        "import sys; from pathlib import Path; from folder_jobs import CopyJob, write_cases\n"
        "from nnslim.prediction.case import Crew\n"
        "from nnslim.prediction.run_directory import FolderSettings, run_folder\n"
        "if __name__ == '__main__':\n"
        f"    texts = {{f'c{{n}}': 'x' * n for n in range(1, {count} + 1)}}\n"
        f"    cases = write_cases(Path({str(tmp_path / 'in')!r}), texts)\n"
        f"    job = CopyJob(Path({str(notes)!r}), seconds=0.3)\n"
        f"    run_folder(job, cases, Path({str(tmp_path / 'out')!r}), FolderSettings({engine!r}, Crew(2)))\n"
    )
    script = tmp_path / "run.py"
    script.write_text(code)
    path = os.pathsep.join([str(TESTS), str(TESTS.parent), os.environ.get("PYTHONPATH", "")])
    return subprocess.Popen([sys.executable, str(script)], env={**os.environ, "PYTHONPATH": path})


def children_of(pid: int) -> list[int]:
    found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True, check=False).stdout
    return [int(word) for word in found.split()]


@pytest.mark.parametrize("engine", ["local", "here"])
def test_kill_9_of_the_whole_run_then_resume(tmp_path, notes, engine):
    run = start_run(tmp_path, notes, 8, engine)
    manifest = Manifest(tmp_path / "out")
    wait_for(lambda: len(manifest.read()) >= 2)
    workers = children_of(run.pid)
    os.kill(run.pid, signal.SIGKILL)
    run.wait()
    wait_for(lambda: not any(is_running(pid) for pid in workers))  # nobody goes on without the parent
    done = {name: record.sha256 for name, record in manifest.read().items() if record.status == "done"}
    assert 2 <= len(done) < 8
    forwards = {name: times(notes, f"forward-{name}") for name in done}
    cases = write_cases(tmp_path / "in", {f"c{n}": "x" * n for n in range(1, 9)})
    records = run_folder(CopyJob(notes), cases, tmp_path / "out", TWO)
    assert {name: status for name, status in statuses(records).items() if status == "there"}.keys() == done.keys()
    assert {name: times(notes, f"forward-{name}") for name in done} == forwards  # nothing that is done is repeated
    assert [(tmp_path / "out" / f"c{n}.out").read_text() for n in range(1, 9)] == ["X" * n for n in range(1, 9)]
    assert sorted(path.name for path in (tmp_path / "out").glob(".*")) == []
    assert len((tmp_path / "out" / "manifest.jsonl").read_text().splitlines()) == 8


def test_killed_worker_processes_from_outside_lose_nothing(tmp_path, notes):
    run = start_run(tmp_path, notes, 6)
    manifest = Manifest(tmp_path / "out")
    for expected in (1, 3):
        wait_for(lambda n=expected: len(manifest.read()) >= n)
        workers = [pid for pid in children_of(run.pid) if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]
        os.kill(workers[0], signal.SIGKILL)
    assert run.wait(120) == 0
    assert {r.status for r in manifest.read().values()} == {"done"} and len(manifest.read()) == 6


# --- shares of a folder: slurm --------------------------------------------------------------------------------------


def slurm(task: int, count: int, first: int = 0, step: int = 1, **more: str) -> dict[str, str]:
    names = {"ID": task, "COUNT": count, "MIN": first, "STEP": step}
    return {**{f"SLURM_ARRAY_TASK_{name}": str(value) for name, value in names.items()}, **more}


def test_part_of_reads_ranges_steps_tasks_and_reruns():
    assert part_of(slurm(2, 4)) == (2, 4)
    assert part_of(slurm(5, 3, first=1, step=2)) == (2, 3)  # --array=1-5:2
    assert part_of(slurm(7, 2, first=3), parts=8) == (7, 8)  # --array=3,7: two of eight are run again
    assert part_of(slurm(1, 2, SLURM_PROCID="2", SLURM_STEP_NUM_TASKS="4")) == (6, 8)
    assert part_of({"SLURM_JOB_ID": "5"}) == (0, 1)
    with pytest.raises(InputError, match="array task 7 is not one of 2 shares; submit a range such as --array=0-1"):
        part_of(slurm(7, 2, first=3))
    with pytest.raises(InputError, match="inside a Slurm job; make the script with --print-sbatch"):
        part_of({})
    with pytest.raises(InputError, match="Slurm variables cannot be understood"):
        part_of({"SLURM_ARRAY_TASK_ID": "x"})


def test_shares_are_predicted_once_each_and_leave_one_manifest(tmp_path, notes):
    cases, out = write_cases(tmp_path / "in", {f"c{n}": "x" * n for n in range(1, 8)}), tmp_path / "out"
    sizes = []
    for number in (2, 0, 1):
        records = run_folder(CopyJob(notes), cases, out, FolderSettings(part=(number, 3)))
        sizes.append(sum(record.voxels for record in records))
    assert sorted(sizes) == [9, 9, 10]
    assert sorted(path.name for path in out.iterdir()) == [f"c{n}.out" for n in range(1, 8)] + ["manifest.jsonl"]
    assert [times(notes, f"forward-c{n}") for n in range(1, 8)] == [1] * 7
    assert statuses(run_folder(CopyJob(notes), cases, out, HERE)) == {f"c{n}": "there" for n in range(1, 8)}


def test_sbatch_script_is_bash_and_says_how_many_shares(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = ["predict", "-i", "my images", "-o", "out", "-m", "m", "--print-sbatch", "--engine", "slurm"]
    script = sbatch_script(arguments, 5, gpu=True)
    assert "#SBATCH --array=0-4\n" in script and "#SBATCH --gres=gpu:1\n" in script and "--print-sbatch" not in script
    assert "predict -i 'my images' -o out -m m --engine slurm --parts 5" in script
    checked = subprocess.run(["bash", "-n"], input=script, text=True, capture_output=True, check=False)
    assert checked.returncode == 0, checked.stderr
