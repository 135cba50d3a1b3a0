"""Run one function on many jobs in processes of their own, and lose only the job whose process died."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from itertools import islice
from typing import Any

Jobs = Mapping[str, tuple[Any, ...]]  # name -> arguments
Outcome = tuple[str, Any]  # name, and what the function returned; or the exception


def run_jobs(function: Callable[..., Any], jobs: Jobs, workers: int) -> Iterator[Outcome]:
    """Yield what the function returns for each job, as they end.

    Args:
        function: importable by name; called with the arguments of a job.
        workers: processes, started afresh (spawned, so that no thread of this one is copied); 1: this process.
    Yields:
        (name, result), or (name, exception) where the function raised, or where its process died.
    """
    if workers <= 1:
        for name, arguments in jobs.items():
            try:
                yield name, function(*arguments)
            except Exception as error:
                yield name, error
        return
    left, alone = dict(jobs), False
    while left:
        # A pool, loky's too, loses all its jobs when a process dies. Those that may have been running are then done by
        # one process, in their order: where it dies, the first that is left was the cause.
        chosen = dict(islice(left.items(), 2 * workers + 1)) if alone else left
        for name, outcome in _in_pool(function, chosen, 1 if alone else workers):
            del left[name]
            yield name, outcome
        if alone and (died := next((name for name in chosen if name in left), None)) is not None:
            del left[died]
            yield died, RuntimeError("its process died (killed, or out of memory?); fewer workers need less memory")
        alone = not alone


def _in_pool(function: Callable[..., Any], jobs: Jobs, processes: int) -> Iterator[Outcome]:
    """Yield the outcomes of all jobs, or of those that ended before a process died."""
    pool = ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn"))
    try:
        futures = {}
        with suppress(BrokenProcessPool):
            for name, arguments in jobs.items():
                futures[pool.submit(function, *arguments)] = name
        for future in as_completed(futures):
            error = future.exception()
            if not isinstance(error, BrokenProcessPool):
                yield futures[future], error or future.result()
    finally:
        pool.shutdown(cancel_futures=True)
