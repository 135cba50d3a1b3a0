"""Run one function on many jobs in processes of their own, and lose only the job whose process died."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any

Outcome = tuple[str, Any]  # name of the job, and what the function returned; or the exception


def run_jobs(function: Callable[..., Any], jobs: Mapping[str, tuple[Any, ...]], workers: int) -> Iterator[Outcome]:
    """Yield what the function returns for each job, as they end.

    Args:
        function: importable by name; called as function(*arguments).
        jobs: name -> arguments.
        workers: processes, started afresh (spawned, so that no thread of this one is copied); 1: this process.
    Yields:
        (name, result), or (name, exception) where the function raised, or where its process died.
    """
    if workers <= 1:
        for name, arguments in jobs.items():
            yield name, _call(function, arguments)
        return
    waiting = dict(jobs)
    suspects: dict[str, tuple[Any, ...]] = {}
    while waiting:
        yield from _run_pool(function, waiting, workers, suspects)
    # When a process dies, all of its pool's jobs fail. Alone, each shows whether it was the cause.
    for name, arguments in suspects.items():
        alone = {name: arguments}
        died: dict[str, tuple[Any, ...]] = {}
        yield from _run_pool(function, alone, 1, died)
        if died:
            yield name, RuntimeError("its process died (killed, or out of memory?); fewer workers need less memory")


def _call(function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    try:
        return function(*arguments)
    except Exception as error:
        return error


def _run_pool(
    function: Callable[..., Any],
    waiting: dict[str, tuple[Any, ...]],
    workers: int,
    suspects: dict[str, tuple[Any, ...]],
) -> Iterator[Outcome]:
    """Take jobs out of `waiting` until all are done or the pool breaks; what was running then goes to `suspects`."""
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        running: dict[Future, tuple[str, tuple[Any, ...]]] = {}
        broken = False
        while running or (waiting and not broken):
            while waiting and len(running) < workers and not broken:
                name = next(iter(waiting))
                try:
                    future = pool.submit(_call, function, waiting[name])
                except BrokenProcessPool:
                    broken = True
                    break
                running[future] = (name, waiting.pop(name))
            for future in wait(running, return_when=FIRST_COMPLETED).done if running else ():
                name, arguments = running.pop(future)
                try:
                    yield name, future.result()
                except BrokenProcessPool:
                    broken = True
                    suspects[name] = arguments
