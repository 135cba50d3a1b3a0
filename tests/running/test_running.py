"""The choice of a backend, the guard and the heap."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import threading

import pytest
from helpers import damages
from torch import nn

from nnslim.running import engine as backends
from nnslim.running import machine
from nnslim.running.engine import Settings
from nnslim.running.speed import Speed, compare_speed
from nnslim.running.timing import alternated, pass_seconds

SHAPE = (1, 1, 16, 16, 16)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("NNSLIM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(backends, "_settled", {})


def test_memory_that_is_damaged_is_not_used(tiny_net, tmp_path, caplog):
    network = tiny_net("plain3d").eval()
    assert backends.remembered(network, SHAPE, Settings()) is None
    backends.remember(network, SHAPE, Settings(), "stock")
    assert backends.remembered(network, SHAPE, Settings()) is None, "stock is no candidate where openvino is installed"
    backends.remember(network, SHAPE, Settings(), "eager")
    assert backends.remembered(network, SHAPE, Settings()) == "eager"
    for name in damages(tmp_path / "cache" / "backends.json"):
        caplog.clear()
        assert backends.remembered(network, SHAPE, Settings()) is None, name
        assert len(caplog.records) == 1, name
        backends.remember(network, SHAPE, Settings(), "eager")
        assert backends.remembered(network, SHAPE, Settings()) == "eager", name
        assert len(caplog.records) == 1, name


def test_measure_alternates_after_a_pass_that_is_not_counted():
    order = []

    class Note(nn.Module):
        def __init__(self, name: str) -> None:
            super().__init__()
            self.name = name

        def forward(self, x):
            order.append(self.name)
            return x

    seconds = pass_seconds([Note("a"), Note("b")], SHAPE, rounds=2)
    assert order == ["a", "b", "a", "b", "a", "b"] and len(seconds) == 2 and min(seconds) > 0


def test_alternated_stops_when_patience_is_over_and_does_one_round_at_least():
    order = []
    works = [lambda: order.append("a"), lambda: order.append("b")]
    assert [len(values) for values in alternated(works, 3, warmups=0)] == [3, 3]
    assert order == ["a", "b"] * 3
    assert [len(values) for values in alternated(works, 3, warmups=2, patience=0.0)] == [1, 1]
    assert order == ["a", "b"] * 6


def test_guard_compares_on_one_backend_and_says_by_how_much(tiny_net):
    speed = compare_speed(tiny_net("plain3d").eval(), tiny_net("plain3d").eval(), SHAPE, Settings())
    assert speed.backend == "eager" and speed.dense > 0 and speed.slim > 0
    assert speed.gains, "milliseconds do not matter"
    assert not Speed(0.5, 0.6, "eager").gains and Speed(0.5, 0.4, "eager").gains
    assert Speed(0.03, 0.04, "eager").gains and not Speed(0.03, 0.04, "eager", device="cuda").gains
    assert Speed(0.0005, 0.0006, "eager", device="cuda").gains
    assert str(Speed(0.5, 0.25, "eager")) == "0.25 s per patch, dense 0.5 s (2.00x, eager)"


glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="settings of glibc's malloc")


_FAULTS = """
import resource, torch
from nnslim.running.machine import keep_heap
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        torch.ones(16 * 2**20)  # 64 MB
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
outside = faults()
with keep_heap() as kept:
    faults(), faults()  # until the heap has grown
    inside = faults()
after = faults()
print(kept, outside, inside, after)
"""


@glibc
def test_heap_is_kept_inside_and_given_back_after():
    made = subprocess.run([sys.executable, "-c", _FAULTS], capture_output=True, text=True, check=True)
    kept, outside, inside, after = made.stdout.split()
    assert kept == "True"
    # 5 x 64 MB are 81920 pages of 4 kB, or far fewer of 2 MB; what counts is that kept pages are not touched anew.
    assert int(inside) < int(outside) / 4 and int(after) > int(inside)


_ALLOCATOR = """
#include <stddef.h>
void *__libc_malloc(size_t); void __libc_free(void *); void *__libc_calloc(size_t, size_t);
void *__libc_realloc(void *, size_t);
void *malloc(size_t n) { return __libc_malloc(n); }
void free(void *p) { __libc_free(p); }
void *calloc(size_t n, size_t m) { return __libc_calloc(n, m); }
void *realloc(void *p, size_t n) { return __libc_realloc(p, n); }
int mallopt(int what, int value) { return 1; }
"""


@glibc
def test_heap_is_left_alone_where_the_user_or_another_allocator_rules(tmp_path):
    code = "from nnslim.running.machine import keep_heap\nwith keep_heap() as kept: print(kept)"
    (tmp_path / "other.c").write_text(_ALLOCATOR)
    environments = [{name: "1048576"} for name in ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_")]
    environments += [{name: "2"} for name in ("MALLOC_TOP_PAD_", "MALLOC_ARENA_MAX", "MALLOC_MMAP_MAX_")]
    environments.append({"GLIBC_TUNABLES": "glibc.cpu.x86_rep_movsb_threshold=4096:glibc.malloc.arena_max=1"})
    if (compiler := shutil.which("cc")) is not None:
        made = tmp_path / "other.so"
        subprocess.run([compiler, "-shared", "-fPIC", "-o", made, tmp_path / "other.c"], check=True)
        environments.append({"LD_PRELOAD": str(made)})
    plain = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_", "LD_PRE"))}
    for given, wanted in [({"GLIBC_TUNABLES": "glibc.rtld.nns=4"}, "True"), *((one, "False") for one in environments)]:
        command = [sys.executable, "-c", code]
        ran = subprocess.run(command, env={**plain, **given}, capture_output=True, text=True, check=True)
        assert ran.stdout.strip() == wanted, (given, ran.stderr)


def test_heap_nests_over_threads_and_does_nothing_elsewhere(monkeypatch):
    calls = []
    monkeypatch.setattr(machine, "set_malloc", lambda *values: calls.append(values))
    monkeypatch.setattr(machine, "heap_can_be_kept", lambda: True)

    class Trim:
        def malloc_trim(self, keep: int) -> None:
            calls.append("trim")

    monkeypatch.setattr(machine, "c_library", Trim)
    with machine.keep_heap():

        def inner() -> None:
            with machine.keep_heap():
                pass

        thread = threading.Thread(target=inner)
        thread.start()
        thread.join()
        assert len(calls) == 1
    assert len(calls) == 3 and calls[-1] == "trim"
    monkeypatch.setattr(machine, "heap_can_be_kept", lambda: False)
    with machine.keep_heap() as kept:
        assert not kept and len(calls) == 3


@pytest.mark.parametrize(
    ("files", "asked", "expected"),
    [
        ({}, None, 8),
        ({"cpu.max": "150000 100000\n"}, None, 2),
        ({"cpu.max": "50000 100000\n"}, None, 1),
        ({"cpu.max": "max 100000\n"}, None, 8),
        ({"cpu/cpu.cfs_quota_us": "300000\n", "cpu/cpu.cfs_period_us": "100000\n"}, None, 3),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, None, 8),
        ({}, "3", 3),
        ({}, "5,2", 5),
        ({}, "64", 8),
        ({}, "many", 8),
        ({"cpu.max": "400000 100000\n"}, "2", 2),
    ],
)
def test_machine_threads_keep_to_the_containers_quota_and_to_openmps_variable(
    files, asked, expected, tmp_path, monkeypatch
):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(machine, "_GROUP", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(8)), raising=False)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if asked is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", asked)
    assert machine.machine_threads() == expected and machine.cpus() == 8
