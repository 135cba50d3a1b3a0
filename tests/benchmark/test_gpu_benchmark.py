"""benchmarks/gpu.py: its table, made on a CPU, and what it says without a GPU."""

from __future__ import annotations

import importlib.util
import subprocess
import sys

import pytest
import torch
from helpers import ROOT

from nnslim.compression.compress_network import compress
from nnslim.compression.config import tucker

SCRIPT = ROOT / "benchmarks" / "gpu.py"
SHAPE = (1, 1, 16, 16, 16)
pytestmark = pytest.mark.skipif(not SCRIPT.exists(), reason="the source distribution has no benchmarks")


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("gpu_benchmark", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_ends_with_a_message(tmp_path):
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "-o", str(tmp_path / "gpu")], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 2 and not list(tmp_path.iterdir())
    assert done.stderr.splitlines()[-1] == (
        "nnslim: benchmarks/gpu.py needs a GPU, and torch finds no CUDA device here"
    )


def test_rows_say_how_far_off_and_how_much_faster(script, tiny_net, monkeypatch):
    dense = tiny_net("plain3d", features=(8, 16, 24))
    slim = compress(dense, [dense.state_dict()], tucker(rank_factor=0.5, rank_min=4), SHAPE).network
    monkeypatch.setitem(script.WAYS, "broken", "no such backend")
    monkeypatch.setattr(
        script, "make_engine", lambda net, shape, way: 1 / 0 if way.backend == "no such backend" else net
    )
    made = script.entries({"dense": dense, "tucker 0.5": slim}, SHAPE, ["stock", "nnslim-eager", "broken"], "cpu")
    script.time_entries(made, SHAPE, "cpu", 2)
    assert [len(one.seconds) for one in made] == [2, 2, 0] * 2
    assert [one.error for one in made] == [0, 0, None] * 2
    for one, seconds in zip(made, (0.4, 0.2, 0, 0.3, 0.25, 0), strict=True):
        one.seconds = [seconds] * 3 if seconds else []
    rows = script.rows_of(made)
    assert [row["x_stock_dense"] for row in rows] == ["1.00", "2.00", "", "1.33", "1.60", ""]
    assert [row["x_same_dense"] for row in rows] == ["1.00", "1.00", "", "1.33", "0.80", ""]
    assert rows[2]["reason"] == "ZeroDivisionError: division by zero" and rows[3]["ms"] == "300.000"
    assert float(rows[3]["gmac"]) < float(rows[0]["gmac"]) or rows[3]["gmac"] == rows[0]["gmac"] == "0.0"
    assert script.slower_than_dense(rows) == ["tucker 0.5, nnslim-eager"]
    assert script.markdown(rows).count("\n") == 8
