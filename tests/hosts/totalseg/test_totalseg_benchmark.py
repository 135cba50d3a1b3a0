"""benchmarks/totalseg.py: its stages and labels, on a small CT with small stand-in weights."""

from __future__ import annotations

import csv
import importlib.util
import sys

import numpy as np
import pytest
from helpers import ROOT

pytest.importorskip("totalsegmentator", reason="TotalSegmentator is not installed (pip install nnslim[ts])")

from nnslim.hosts.totalseg.stand_in import write_stand_in
from nnslim.hosts.totalseg.task_weights import weights_folder

SCRIPT = ROOT / "benchmarks" / "totalseg.py"
pytestmark = pytest.mark.skipif(not SCRIPT.exists(), reason="the source distribution has no benchmarks")


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("totalseg_benchmark", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_dice_counts_the_labels_of_both_maps(script):
    one, other = np.array([0, 1, 1, 2]), np.array([0, 1, 0, 3])
    assert script.dice(one, other) == pytest.approx((2 / 3 + 0 + 0) / 3)
    assert script.dice(one, one) == script.dice(one * 0, one * 0) == 1.0


@pytest.mark.slow
def test_stages_add_up_and_dense_labels_are_equal(script, ct, home, tmp_path, monkeypatch):
    write_stand_in(297, weights_folder(), base_features=4, patch_size=(64, 64, 64))
    arguments = ["totalseg.py", "-i", str(ct), "-o", str(tmp_path / "times"), "--rounds", "1", "--rank-min", "2"]
    monkeypatch.setattr(sys, "argv", arguments)
    script.main()
    with (tmp_path / "times.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert [row["row"] for row in rows] == ["outside", "inside, dense", "inside, Tucker 0.25"]
    for row in rows:
        stages = [float(row[name]) for name in script.STAGES]
        assert min(stages) > 0 and sum(stages) == pytest.approx(float(row["seconds"]), abs=0.05)
    assert [row["equal"] for row in rows[:2]] == ["100.0000 %"] * 2 and float(rows[1]["dice"]) == 1.0
