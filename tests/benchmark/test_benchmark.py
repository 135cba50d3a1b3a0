"""Timings: alternated passes, whole tables, grids that go on, and pictures with something on them."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from benchmark_jobs import MEGABYTE, failing, holding, noting

from nnslim.benchmark.alternated import TimedJob, Timing, measure_rounds, reason
from nnslim.benchmark.grid import (
    GridPoint,
    finish_grid,
    here_pool,
    measure_point,
    measure_points,
    ray_pool,
    run_grid,
)
from nnslim.benchmark.passes import Way, job_of, keep_network
from nnslim.benchmark.roofline import Roofline, measure_roofline
from nnslim.benchmark.timing_figures import dice_figure, pareto, save_timing_figures, stage_figure, time_figure
from nnslim.benchmark.timings import (
    COLUMNS,
    PUBLISHED_COLUMNS,
    add_dice,
    compare,
    markdown_table,
    read_dice,
    read_timings,
    timed_row,
)
from nnslim.errors import ConfigError, InputError
from nnslim.network.cost import measure_cost
from nnslim.running.machine import available_bytes, peak_bytes, reset_peak
from nnslim.tables import write_table


def test_passes_alternate_and_the_first_is_not_counted(tmp_path):
    jobs = [TimedJob(name, partial(noting, tmp_path / "log", name)) for name in "AB"]
    seen = []
    timings = measure_rounds(jobs, 3, progress=lambda *what: seen.append(what))
    assert (tmp_path / "log").read_text() == "AB" + "AB" * 3
    assert [len(timing.seconds) for timing in timings] == [3, 3]
    assert [timing.facts["name"] for timing in timings] == ["A", "B"]
    assert timings[1].results == [{"name": "B"}] * 3
    assert all(timing.start_seconds > 0 and timing.prepare_seconds >= 0 and not timing.error for timing in timings)
    assert seen[0] == ("A", 0, 8) and seen[-1] == ("B", 7, 8)


def test_peak_memory_is_that_of_the_passes_of_this_row_alone():
    small, large = measure_rounds([TimedJob("small", partial(holding, 2)), TimedJob("large", partial(holding, 200))], 1)
    assert 5 * MEGABYTE < small.peak_memory < large.peak_memory
    assert 150 * MEGABYTE < large.peak_memory - small.peak_memory < 450 * MEGABYTE


def test_failures_are_recorded_and_the_others_go_on(tmp_path):
    jobs = [TimedJob(when, partial(failing, when)) for when in ("made", "pass", "killed")]
    good = TimedJob("good", partial(noting, tmp_path / "log", "g"))
    lambda_job = TimedJob("lambda", lambda: None)
    made, at_pass, killed, fine, unsent = measure_rounds([*jobs, good, lambda_job], 2)
    assert made.error == "no such thing"
    assert at_pass.error.startswith("out of memory: DefaultCPUAllocator")
    assert killed.error.startswith("out of memory") and "SIGKILL" in killed.error
    assert not fine.error and len(fine.seconds) == 2
    assert "cannot be sent" in unsent.error


def test_short_memory_gives_back_heaps_between_turns(tmp_path, monkeypatch):
    monkeypatch.setattr("nnslim.benchmark.alternated.available_bytes", lambda: 1)
    jobs = [TimedJob(name, partial(noting, tmp_path / "log", name)) for name in "AB"]
    measure_rounds(jobs, 2, limit_memory=False)
    assert (tmp_path / "log").read_text() == "AB" + "AABB" * 2  # each turn begins with a pass that is not counted


def test_memory_figures_are_plausible():
    assert reset_peak() and 10 * MEGABYTE < peak_bytes() < 100_000 * MEGABYTE
    assert available_bytes() > 10 * MEGABYTE


def test_reason_names_memory_first():
    assert reason(MemoryError()) == "out of memory: MemoryError"
    assert reason(ValueError("a\nb")) == "ValueError: a b"


@pytest.fixture
def kept_net(tiny_net, tmp_path) -> Path:
    keep_network(tiny_net("plain3d"), tmp_path / "net.pt")
    return tmp_path / "net.pt"


def test_pass_of_a_network_counts_exactly(kept_net, tiny_net, tiny_shape):
    shape = (2, *tiny_shape("plain3d")[1:])
    (timing,) = measure_rounds([job_of("net", kept_net, shape, Way("stock", threads=1))], 2)
    cost = measure_cost(tiny_net("plain3d"), shape)
    row = timed_row(timing, {"name": "net", "batch_size": 2})
    assert (row["macs"], row["parameters"]) == (cost.macs(), cost.parameters)
    assert row["g_flops"] == cost.macs("fvcore") / 1e9 and row["m_params"] == cost.parameters / 1e6
    assert row["status"] == "done" and row["eval_passes"] == 2 and row["threads"] == 1
    assert row["time_q1_ms"] <= row["time_median_ms"] <= row["time_q3_ms"]
    assert 50 < row["peak_memory_mb"] < 5000


def test_published_columns_come_first_and_are_the_23():
    assert COLUMNS[:23] == PUBLISHED_COLUMNS and len(PUBLISHED_COLUMNS) == 23 and len(set(COLUMNS)) == len(COLUMNS)
    assert {"peak_memory_mb", "backend", "precision", "threads", "end_to_end_s"} < set(COLUMNS[23:])


def test_table_survives_writing_and_reading(tmp_path):
    write_table([{"name": "a, b", "macs": 12, "reason": "no | way"}], tmp_path / "t.csv", COLUMNS)
    (row,) = read_timings(tmp_path / "t.csv")
    assert tuple(row) == COLUMNS and (row["name"], row["macs"], row["device"]) == ("a, b", "12", "")
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    with pytest.raises(InputError, match=r"other.csv is not the expected table: no column"):
        read_timings(tmp_path / "other.csv")
    with pytest.raises(InputError, match="no column dice"):
        read_dice(tmp_path / "other.csv")
    (tmp_path / "dice.csv").write_text("name,dice\ndense,high\n")
    with pytest.raises(InputError, match=r"dice.csv should have the columns 'name'"):
        read_dice(tmp_path / "dice.csv")


def test_merit_is_speedup_over_mac_reduction():
    rows = [
        {"name": "dense", "backend": "stock", "time_median_ms": 8.0, "macs": 400},
        {"name": "dense", "backend": "openvino-plain", "time_median_ms": 6.0, "macs": 400},
        {"name": "slim", "backend": "eager", "time_median_ms": 2.0, "macs": 100},
        {"name": "slim", "backend": "openvino", "status": "failed"},
    ]
    compare(rows)
    assert rows[1]["merit"] == 1
    assert (rows[2]["speedup_stock"], rows[2]["speedup_openvino"], rows[2]["merit"]) == (4, 3, 0.75)
    assert "merit" not in rows[3]


def test_rows_are_compared_with_the_dense_network_that_is_run_alike():
    dense = {"name": "dense", "backend": "stock", "macs": 400}
    rows = [
        {**dense, "threads": 1, "time_median_ms": 8.0, "autocast": True},
        {**dense, "threads": 1, "time_median_ms": 16.0, "autocast": False},
        {**dense, "threads": 2, "time_median_ms": 6.0},
        {**dense, "threads": 2, "time_median_ms": 1.0, "precision": "int8"},
        {"name": "slim", "backend": "eager", "threads": 1, "time_median_ms": 2.0, "macs": 100},
        {"name": "slim", "backend": "eager", "threads": "2", "time_median_ms": "3.0", "macs": "100"},  # as from a CSV
        {"name": "slim", "backend": "eager", "threads": 4, "time_median_ms": 3.0, "macs": 100},
    ]
    compare(rows)
    assert [row.get("speedup_stock") for row in rows] == [2, 1, 1, 6, 8, 2, None]
    assert rows[5]["mac_reduction"] == 4


def build(net, point):
    """Return the tiny network for every point."""
    return net, (point.batch_size, 1, 16, 16, 16)


def stand_in_row(point: GridPoint, log: list[str], fail: str = "") -> dict:
    log.append(point.name)
    if fail and fail in point.name:
        return timed_row(Timing(point.name, error="out of memory: enough"), point.columns())
    facts = {"macs": 8, "macs_fvcore": 9, "parameters": 3, "traffic_bytes": 64, "threads": 1}
    seconds = 0.008 if not point.apply_tucker else 0.002
    return timed_row(Timing(point.name, [seconds] * 3, facts=facts), point.columns())


def test_grid_row_of_a_real_pass_and_of_a_backend_that_fails(tiny_net, tmp_path, monkeypatch):
    make = partial(build, tiny_net("plain3d"))
    row = measure_point(GridPoint(Way("stock", threads=1), apply_tucker=False), make, 2, lambda point: 1.23456)
    assert row["status"] == "done" and row["end_to_end_s"] == 1.235 and row["patch_size"] == (1, 16, 16, 16)
    failed = measure_point(GridPoint(Way("stock", "bf16")), make, 1)
    assert failed["status"] == "failed" and "precision bf16 needs the openvino backend" in failed["reason"]
    broken = measure_point(GridPoint(rule="nonsense"), lambda point: 1 / 0, 1)
    assert broken["reason"].startswith("ZeroDivisionError")


def test_points_with_one_network_build_it_once_and_alternate(tiny_net):
    built = []

    def make(point):
        built.append(point.network)
        return build(tiny_net("plain3d"), point)

    points = [GridPoint(Way(backend, threads=1), apply_tucker=False) for backend in ("stock", "eager")]
    rows, timings = measure_points(points, make, 2)
    assert built == ["1.5mm dense"] and [row["name"] for row in rows] == [point.name for point in points]
    assert [len(timing.seconds) for timing in timings] == [2, 2] and rows[0]["macs"] == rows[1]["macs"] > 0


def test_grid_goes_on_where_it_stopped_and_stops_batches_at_the_end_of_memory(tmp_path):
    table, log = tmp_path / "grid.csv", []
    points = [GridPoint(Way("stock"), batch, apply) for batch in (1, 2, 3) for apply in (False, True)]
    rows = run_grid(points[:2], table, here_pool(lambda point: stand_in_row(point, log)))
    assert len(rows) == 2 and len(log) == 2
    rows = run_grid(points, table, here_pool(lambda point: stand_in_row(point, log, "dense, stock f32 cpu, batch 2")))
    assert len(log) == len(set(log)) == 5  # the dense network is not tried with batch 3
    assert [row["name"] for row in read_timings(table)] == log
    again = run_grid(points, table, here_pool(lambda point: stand_in_row(point, log)))
    assert len(again) == 5 and len(log) == 5
    retried = run_grid(points, table, here_pool(lambda point: stand_in_row(point, log)), retry=True)
    assert len(retried) == 6 and {row["status"] for row in retried} == {"done"}
    finish_grid(points, retried, table)
    assert {float(row["speedup_stock"]) for row in retried} == {1.0, 4.0}


def test_grid_killed_in_the_middle_keeps_a_whole_table(tmp_path):
    table = tmp_path / "grid.csv"
    code = (
        "import time, sys; sys.path[:0] = sys.argv[2:]\n"
        "from pathlib import Path\n"
        "from test_benchmark import *\n"
        "work = lambda point: (time.sleep(0.05), stand_in_row(point, []))[1]\n"
        "points = [GridPoint(Way('stock'), batch) for batch in range(1, 1000)]\n"
        "run_grid(points, Path(sys.argv[1]), here_pool(work))\n"
    )
    places = [str(directory) for directory in Path(__file__).parents[:2]]
    process = subprocess.Popen([sys.executable, "-c", code, str(table), *places])
    deadline = time.time() + 120
    while time.time() < deadline and (not table.exists() or len(table.read_text().splitlines()) < 4):
        time.sleep(0.02)
    process.kill()
    process.wait()
    done = read_timings(table)
    log: list[str] = []
    points = [GridPoint(Way("stock"), batch) for batch in range(1, len(done) + 3)]
    rows = run_grid(points, table, here_pool(lambda point: stand_in_row(point, log)))
    assert len(done) >= 3 and len(log) == 2 and len(rows) == len(done) + 2


def test_points_have_names_of_their_own():
    points = [
        GridPoint(),
        GridPoint(batch_size=2),
        GridPoint(Way("eager")),
        GridPoint(Way(threads=2)),
        GridPoint(Way(autocast=True)),
        GridPoint(Way("openvino", "int8")),
        GridPoint(apply_tucker=False),
        GridPoint(rank_factor=0.3),
        GridPoint(rank_min=16),
        GridPoint(rule="published"),
        GridPoint(low_resolution=True),
        GridPoint(decompose=True),
        GridPoint(patch=(32, 32, 32)),
        GridPoint(model="m"),
    ]
    assert len({point.name for point in points}) == len(points)
    with pytest.raises(ConfigError, match="unknown backend 'openvinno'; nearest: openvino"):
        Way("openvinno")


def test_ray_missing_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(Exception, match=r"ray is not installed; --ray needs it; pip install nnslim\[ray\]"):
        ray_pool(lambda point: {}, 1)


def row_with_priority(point: GridPoint) -> dict:
    return {**stand_in_row(point, []), "reason": f"nice {os.nice(0)}"}


def test_ray_measures_a_grid(tmp_path):
    ray = pytest.importorskip("ray")
    cloudpickle = pytest.importorskip("ray.cloudpickle")
    cloudpickle.register_pickle_by_value(sys.modules[__name__])  # Ray's workers cannot import the tests
    try:
        pool = ray_pool(row_with_priority, 1)
        rows = run_grid([GridPoint(batch_size=batch) for batch in (1, 2)], tmp_path / "g.csv", pool)
    finally:
        cloudpickle.unregister_pickle_by_value(sys.modules[__name__])
        ray.shutdown()
    assert [row["reason"] for row in rows] == [f"nice {os.nice(0)}"] * 2, "timed at our own priority"
    assert [row["status"] for row in rows] == ["done", "done"]


def drawn(path: Path) -> float:
    """Return the share of pixels that are not white."""
    from matplotlib.image import imread

    return float(np.mean(imread(path)[..., :3].min(-1) < 0.95))


def test_pictures_have_content_and_nothing_is_drawn_of_nothing(tmp_path):
    points = [GridPoint(Way(backend), apply_tucker=slim) for backend in ("stock", "eager") for slim in (False, True)]
    rows = [stand_in_row(point, []) for point in points]
    (axes,) = time_figure(rows, Roofline(100.0, 20.0, 2)).axes
    names = [line.get_label() for line in axes.lines]
    assert names == ["stock f32", "eager f32", "100 GFLOP/s matrix product, 2 thread(s)"]
    assert axes.lines[0].get_ydata().tolist() == [0.008, 0.002]
    assert time_figure([{"reason": "failed"}], None) is None and dice_figure(rows) is None and stage_figure({}) is None
    (tmp_path / "dice.csv").write_text("setting,dice\ndense,0.9\nrank_factor=0.5,0.8\n")
    finish_grid(points, rows, tmp_path / "grid.csv", read_dice(tmp_path / "dice.csv"))
    assert sorted({row["dice"] for row in rows}) == [0.8, 0.9]
    assert [row["dice"] for row in read_timings(tmp_path / "grid.csv")] == ["0.9", "0.8"] * 2
    assert drawn(tmp_path / "grid_time.png") > 0.01 and drawn(tmp_path / "grid_dice.png") > 0.01
    save_timing_figures([], None, lambda kind: tmp_path / f"{kind}.png", {"stock": {"read": 1.0, "forward": 2.0}}, "t")
    assert drawn(tmp_path / "stages.png") > 0.1 and not (tmp_path / "time.png").exists()
    assert "| 1.5mm dense" in markdown_table(rows)


def test_names_with_a_dollar_are_drawn_as_they_are(tmp_path):
    rows = [{**stand_in_row(GridPoint(), []), "name": "a $b_", "backend": "$"}]
    save_timing_figures(rows, None, lambda kind: tmp_path / f"{kind}.png", {"a $b_": {"$c": 1.0}}, "$")
    assert drawn(tmp_path / "time.png") > 0.01 and drawn(tmp_path / "stages.png") > 0.1


def test_dice_is_found_by_name_and_by_setting():
    rows = [{"name": "dense"}, {"name": "half", "rank_factor": 0.5}, {"name": "sauron"}, {"name": "mine"}]
    add_dice(rows, {"dense": 0.9, "rank_factor=0.5": 0.8, "mine": 0.7})
    assert [row.get("dice") for row in rows] == [0.9, 0.8, None, 0.7]


def test_pareto_keeps_what_nothing_beats():
    assert pareto([(3, 0.9), (1, 0.5), (2, 0.4), (4, 0.9), (1, 0.6)]) == [4, 0]


def test_roofline_is_measured_and_threads_are_put_back():
    before = torch.get_num_threads()
    found = measure_roofline(1, side=128, size=1 << 16)
    assert found.gflops > 0.1 and found.copy_gbs > 0.05 and found.threads == 1
    assert torch.get_num_threads() == before
    assert found.compute_seconds(1e9) == pytest.approx(2 / found.gflops)
    assert found.traffic_seconds(1e9) == pytest.approx(1 / found.copy_gbs)
