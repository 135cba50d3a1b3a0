"""Compare all cases of two folders, in processes of their own; only a case whose process dies is lost."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

from nnslim.errors import InputError
from nnslim.evaluation.classes import Classes, LabelClass
from nnslim.evaluation.compare import CaseScores, CompareSettings, compare_case
from nnslim.evaluation.label_files import pair_cases
from nnslim.evaluation.scores import Evaluation
from nnslim.running.machine import machine_threads

Jobs = Mapping[str, tuple[Any, ...]]  # name -> arguments
Outcome = tuple[str, Any]  # name, and what the function returned; or the exception
_START = 10.0  # seconds of work that make starting processes worth while; each imports numpy and scipy first


def evaluate_directories(
    predictions: Path,
    references: Path,
    classes: Classes | None = None,
    *,
    tolerance: float = 1.0,
    surfaces: bool = True,
    shapes: bool = False,
    wanted: tuple[str, ...] | None = None,
    workers: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Compare each prediction with its reference; a case that fails is listed, and the rest goes on.

    Args:
        predictions, references: folders of label maps or of folders of masks, or one file each; see `pair_cases`.
        classes: what the labels mean; None: every label is a class.
        tolerance: mm within which surfaces agree (NSD).
        surfaces: NSD and HD95 besides Dice. shapes: and the largest distance (HD) and compactness.
        wanted: names or keys of classes; None: all.
        workers: processes over cases; what is left over are threads over classes. None: all CPUs of this process, or
            this process alone where the first case shows that the rest is done sooner without others.
        progress: called with (cases done, cases in all).
    Raises:
        InputError: folders that cannot be paired, a tolerance below 0, an unknown class, or no case at all could be
        compared.
    """
    if not tolerance >= 0:
        raise InputError(f"the tolerance is a distance in mm, found {tolerance}")
    names = [one.name for one in classes.classes] if classes else ()
    pairing = pair_cases(predictions, references, classes and classes.ending, names)
    if classes is not None and wanted is not None:
        classes = classes.only(wanted)
    settings = CompareSettings(classes, tolerance, surfaces, 1, wanted if classes is None else None, shapes)
    done: dict[str, CaseScores] = {}
    failed: dict[str, str] = {}
    for number, (name, outcome) in enumerate(_run(pairing.pairs, settings, workers), start=1):
        if isinstance(outcome, Exception):
            text = " ".join(str(outcome).split())
            told = text and isinstance(outcome, (InputError, RuntimeError))
            failed[name] = text if told else f"{type(outcome).__name__}: {text}"
        else:
            done[name] = outcome
        if progress is not None:
            progress(number, len(pairing.pairs))
    if not done:
        name, reason = next(iter(failed.items()))
        raise InputError(f"none of {len(failed)} case(s) of {predictions} could be compared; {name}: {reason}")
    cases = [done[name] for name in pairing.pairs if name in done]
    found = classes.classes if classes else _found(cases)
    if wanted is not None:
        Classes(found).only(wanted)
    return Evaluation(found, cases, failed, pairing.missing, pairing.extra, tolerance, shapes)


def _run(pairs: dict[str, tuple[Path, Path]], settings: CompareSettings, workers: int | None) -> Iterator[Outcome]:
    """Compare all pairs: a case per process first, because Python's threads share one interpreter."""
    threads, names = workers or machine_threads(), list(pairs)
    processes = min(threads, len(names))
    if workers is None:
        started = time.perf_counter()
        settings = replace(settings, threads=threads)
        yield from run_jobs(compare_case, {names[0]: (names[0], *pairs[names[0]], settings)}, 1)
        names = names[1:]
        soon = (time.perf_counter() - started) * len(names) < _START
        processes = 1 if soon else min(threads, len(names))
    settings = replace(settings, threads=threads // processes)
    yield from run_jobs(compare_case, {name: (name, *pairs[name], settings) for name in names}, processes)


def _found(cases: list[CaseScores]) -> tuple[LabelClass, ...]:
    """Return the classes of all cases, numbers in their order."""
    found = {one.key: one for case in cases for one in case.found}
    return tuple(found[key] for key in sorted(found, key=lambda key: (not key.isdigit(), key.zfill(5))))


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
