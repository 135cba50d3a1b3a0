"""manifest.jsonl: whole lines whatever happens, one per case, several writers, torn ends."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from nnslim.errors import OutputError
from nnslim.prediction.case import Record
from nnslim.prediction.manifest import Manifest, alone, checksum


def record(name: str, status: str = "done", time: str = "2026-01-01T00:00:00.000+00:00", **more) -> Record:
    return Record(name, status, time=time, **more)


def names_in(path: Path) -> list[str]:
    return [json.loads(line)["name"] for line in path.read_text(encoding="utf-8").splitlines()]


def test_append_then_read_gives_the_records_back_with_any_name(tmp_path):
    manifest = Manifest(tmp_path)
    records = [record(name, stages={"read": 1.5}) for name in ("a", "Fälle ü/ß", "line\nbreak", "b\udcff")]
    for item in records:
        manifest.append(item)
    assert list(manifest.read().values()) == records
    assert "Fälle ü/ß" in manifest.path.read_bytes().decode()


@pytest.mark.parametrize("cut", [1, 5, 60, 200])
def test_torn_last_line_is_passed_over_and_the_next_append_starts_a_line(tmp_path, cut):
    manifest = Manifest(tmp_path)
    for name in "ab":
        manifest.append(record(name))
    manifest.path.write_bytes(manifest.path.read_bytes()[:-cut])
    kept = ["a"] if cut > 1 else ["a", "b"]  # without its end of line only, the last record is whole
    assert list(manifest.read()) == kept
    manifest.append(record("c"))
    assert list(manifest.read()) == [*kept, "c"]
    manifest.tidy()
    assert names_in(manifest.path) == [*kept, "c"]


def test_torn_within_a_letter_of_several_bytes_is_readable(tmp_path):
    manifest = Manifest(tmp_path)
    manifest.append(record("a"))
    manifest.append(record("ü"))
    raw = manifest.path.read_bytes()
    manifest.path.write_bytes(raw[: raw.index("ü".encode()) + 1])
    assert list(manifest.read()) == ["a"]


def test_tidy_keeps_the_latest_record_of_a_case(tmp_path):
    manifest = Manifest(tmp_path)
    for item in (record("a", "failed", error="once"), record("b"), record("a", "done")):
        manifest.append(item)
    manifest.tidy()
    assert [(r.name, r.status) for r in manifest.read().values()] == [("a", "done"), ("b", "done")]
    before = manifest.path.stat().st_ino
    manifest.tidy()  # nothing to do: the file is not written again
    assert manifest.path.stat().st_ino == before and len(names_in(manifest.path)) == 2


def test_lines_of_other_programs_and_later_versions_do_no_harm(tmp_path):
    (tmp_path / "manifest.jsonl").write_text(
        '[1]\n{"other": 1}\n{"name": "a", "status": "done", "later": 5}\nnonsense\n'
    )
    assert Manifest(tmp_path).read() == {"a": Record("a", "done")}


def test_append_on_a_full_disk_names_the_file_and_leaves_it_whole(tmp_path):
    manifest = Manifest(tmp_path)
    manifest.append(record("a"))
    size = manifest.path.stat().st_size
    code = (
        "import resource, sys; from pathlib import Path\n"
        "from nnslim.prediction.case import Record; from nnslim.prediction.manifest import Manifest\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({size + 40}, {size + 40}))\n"  # half of a line fits
        "Manifest(Path(sys.argv[1])).append(Record('b', 'done'))\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=False)
    assert f"OutputError: cannot write {manifest.path}: File too large" in done.stderr
    assert manifest.path.stat().st_size == size and list(manifest.read()) == ["a"]
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY


def test_parts_are_read_together_and_the_last_to_finish_leaves_one_manifest(tmp_path):
    first, second = Manifest(tmp_path, (0, 2)), Manifest(tmp_path, (1, 2))
    first.append(record("a"))
    first.begin("a")
    second.append(record("b"))
    assert sorted(first.read()) == ["a", "b"]
    first.finish([record("a")])
    assert not (tmp_path / "manifest.jsonl").exists() and sorted(second.read()) == ["a", "b"]
    second.append(record("c", "failed"))
    second.finish([record("b"), record("c")])
    assert sorted(names_in(tmp_path / "manifest.jsonl")) == ["a", "b", "c"]
    assert [path.name for path in tmp_path.iterdir()] == ["manifest.jsonl"]


def test_part_that_is_run_again_replaces_its_records_by_time(tmp_path):
    whole = Manifest(tmp_path)
    whole.append(record("a", "failed", error="no memory"))
    whole.append(record("b"))
    for number, name in enumerate("ab"):
        part = Manifest(tmp_path, (number, 2))
        if name == "a":
            part.append(record("a", "done", time="2026-01-02T00:00:00.000+00:00"))
        part.finish([record(name)])
    assert {r.name: r.status for r in whole.read().values()} == {"a": "done", "b": "done"}
    assert sorted(names_in(whole.path)) == ["a", "b"]


def test_parts_of_an_array_that_never_ended_are_taken_in_by_the_next_run(tmp_path):
    Manifest(tmp_path, (2, 8)).append(record("a"))
    whole = Manifest(tmp_path)
    whole.append(record("b"))
    whole.tidy()
    assert sorted(names_in(whole.path)) == ["a", "b"] and len(list(tmp_path.iterdir())) == 1


def test_begun_counts_until_a_run_ends(tmp_path):
    manifest = Manifest(tmp_path)
    for name in ("a", "b", "a"):
        manifest.begin(name)
    assert manifest.begun() == {"a": 2, "b": 1} and not manifest.path.exists()
    manifest.finish([])
    assert manifest.begun() == {}


def test_alone_refuses_a_second_run_and_lets_shares_run_together(tmp_path):
    with alone(tmp_path), pytest.raises(OutputError, match="another nnslim predict is writing to"), alone(tmp_path):
        pass
    with alone(tmp_path, shared=True), alone(tmp_path, shared=True), pytest.raises(OutputError), alone(tmp_path):
        pass
    with alone(tmp_path):
        pass


def test_checksum_of_a_folder_follows_names_and_content(tmp_path):
    assert checksum(tmp_path / "none") == ""
    folder = tmp_path / "case"
    folder.mkdir()
    (folder / "liver.nii.gz").write_bytes(b"1")
    one = checksum(folder)
    (folder / ".hidden").write_bytes(b"x")
    assert checksum(folder) == one
    (folder / "liver.nii.gz").write_bytes(b"2")
    two = checksum(folder)
    (folder / "liver.nii.gz").rename(folder / "spleen.nii.gz")
    assert len({one, two, checksum(folder)}) == 3
