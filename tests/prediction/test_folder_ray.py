"""The ray engine on two nodes of this machine: one is killed midway, and every case is finished once."""

from __future__ import annotations

import os
import signal
import sys

import pytest
from folder_jobs import CopyJob, times, write_cases
from helpers import ROOT

from nnslim.errors import HostError, ModelError
from nnslim.prediction.case import Crew
from nnslim.prediction.run_directory import FolderSettings, run_folder

TESTS = ROOT / "tests"


@pytest.fixture
def cluster(monkeypatch):
    """Two nodes with one CPU each; the second is the one to kill."""
    pytest.importorskip("ray", reason="Ray is not installed (pip install nnslim[ray])")
    path = os.pathsep.join([str(TESTS), str(TESTS.parent), os.environ.get("PYTHONPATH", "")])
    monkeypatch.setenv("PYTHONPATH", path)  # as on a cluster: nnslim, and here the job, are installed on every node
    import ray
    from ray.cluster_utils import Cluster

    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    made.second = made.add_node(num_cpus=1)
    made.wait_for_nodes()
    yield made
    ray.shutdown()
    made.shutdown()


def test_node_killed_midway_every_case_is_finished_once_and_bad_models_end_the_run(cluster, tmp_path):
    handler = signal.getsignal(signal.SIGTERM)
    notes, out = tmp_path / "notes", tmp_path / "out"
    notes.mkdir()
    cases = write_cases(tmp_path / "in", {f"c{n:02d}": "x" * n for n in range(1, 17)})
    killed = []

    def progress(done: int, total: int) -> None:
        if not killed and times(notes, "loaded") == 2 and done >= 3:
            killed.append(done)
            cluster.remove_node(cluster.second, allow_graceful=False)

    # The first case waits for both workers, so that the node to be killed is at work.
    job = CopyJob(notes, seconds=0.3, loaded=2)
    settings = FolderSettings("ray", Crew(2, threads=1, address=cluster.address))
    records = run_folder(job, cases, out, settings, progress)
    assert killed
    assert [(record.name, record.status) for record in records] == [(case.name, "done") for case in cases]
    assert [(out / case.target).read_text() for case in cases] == ["X" * n for n in range(1, 17)]
    assert sorted(path.name for path in out.iterdir()) == [*(case.target for case in cases), "manifest.jsonl"]
    assert len((out / "manifest.jsonl").read_text().splitlines()) == 16
    again = {record.name for record in records if record.attempts > 1}
    assert 1 <= len(again) <= 2  # what the node held: one case in its forward pass, perhaps one that was read
    ran = {case.name: times(notes, f"forward-{case.name}") for case in cases}
    assert {name for name, count in ran.items() if count > 1} <= again and max(ran.values()) <= 2

    with pytest.raises(ModelError, match="no such model"):
        run_folder(CopyJob(notes, refuse=True), cases, tmp_path / "other", settings)

    greedy = FolderSettings("ray", Crew(1, threads=999, address=cluster.address))
    with pytest.raises(HostError, match="999 threads were asked for, but the machines of the Ray cluster have at most"):
        run_folder(CopyJob(notes), cases, tmp_path / "other", greedy)
    assert signal.getsignal(signal.SIGTERM) is handler


def test_missing_ray_is_named_with_its_remedy(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    cases = write_cases(tmp_path / "in", {"a": "x"})
    with pytest.raises(HostError, match=r"pip install 'nnslim\[ray\]'"):
        run_folder(CopyJob(tmp_path), cases, tmp_path / "out", FolderSettings("ray"))
