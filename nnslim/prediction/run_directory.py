"""Predict what is left of a folder: skip finished cases, order the rest, keep the manifest."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

from nnslim.errors import ConfigError, InputError, OutputError, nearest
from nnslim.files import make_folder
from nnslim.prediction.case import Case, Crew, Place, PredictionJob, Record, Report, now
from nnslim.prediction.manifest import NAME, Manifest, alone, checksum
from nnslim.prediction.pipeline import Pipeline, input_facts, remove_leftovers
from nnslim.prediction.schedule import Schedule, in_order, share

_ENGINES = {"here": __name__, "local": "nnslim.prediction.engines.local", "ray": "nnslim.prediction.engines.ray_actors"}
# Predicts into a folder until the schedule is empty, and reports each case once, in the calling thread or another one;
# raises an NNSlimError where the model cannot be loaded, or workers die before they have loaded it.
Engine = Callable[[PredictionJob, Schedule, Path, Crew, Report], None]
_log = logging.getLogger("nnslim")


@dataclass(frozen=True)
class FolderSettings:
    """How a folder is gone through.

    Attributes:
        engine: "here": in this process; "local": worker processes; "ray".
        crew: see `Crew`.
        overwrite: predict again what is there.
        attempts: workers that may die with a case before it is given up.
        part: (number, count): this run does one of `count` shares of the folder, the others are done elsewhere.
    """

    engine: str = "here"
    crew: Crew = field(default_factory=Crew)
    overwrite: bool = False
    attempts: int = 3
    part: tuple[int, int] | None = None


def run_folder(
    job: PredictionJob,
    cases: Sequence[Case],
    output: Path,
    settings: FolderSettings,
    progress: Callable[[int, int], None] | None = None,
) -> list[Record]:
    """Predict the cases that are not done, and return one record for each case, in the order given.

    A case is done if the manifest has it as done by the same model with the same settings from the same images, and
    the file has the checksum that the manifest gives. A file that the manifest does not mention is kept.

    Args:
        job: the model. cases: of the folder, all of them. output: created if missing. settings: see there.
        progress: called with (cases done, cases in all).
    Raises:
        OutputError: the folder cannot be written, holds another model's results, another run is writing to it, or a
            result would take the place of an image.
        HostError, ModelError: the model cannot be used.
        ConfigError: no such engine.
    """
    if settings.engine not in _ENGINES:
        raise ConfigError(f"no engine '{settings.engine}'; {nearest(settings.engine, _ENGINES)}")
    engine: Engine = importlib.import_module(_ENGINES[settings.engine]).run
    if shared := settings.part is not None:
        cases = share(cases, *settings.part)
    with _folder(output, shared), alone(output, shared=shared):
        _spare_images(cases, output)
        manifest = Manifest(output, settings.part)
        manifest.tidy()
        keeper = _Keeper(manifest, *job.stamp(), len(cases), progress)
        begun = manifest.begun()
        known = None if settings.overwrite else manifest.read()
        left = in_order(_left(cases, output, begun, keeper, known), begun)
        began = [record for record in (known or {}).values() if record.model == keeper.model and record.run]
        if began:
            job = job.keeping(max(began, key=lambda record: record.time).run)
        remove_leftovers(output, cases)
        schedule = Schedule(left, settings.attempts, begin=lambda case: manifest.begin(case.name))
        try:
            if left:
                engine(job, schedule, output, settings.crew, keeper.keep)
        finally:
            remove_leftovers(output, cases)
        manifest.finish(keeper.records.values())
    return [keeper.records[case.name] for case in cases]


@contextmanager
def _folder(output: Path, shared: bool) -> Iterator[None]:
    """Make a folder; a new one that is still empty when a run is refused is removed, unless it is shared."""
    there = output.exists()
    make_folder(output)
    try:
        yield
    except BaseException:
        if not (there or shared):
            with suppress(OSError):  # something is in it
                output.rmdir()
        raise


def _spare_images(cases: Sequence[Case], output: Path) -> None:
    """Refuse an output folder in which a result has the place of an image, or of the folder that holds it."""
    folder = output.resolve()
    places = [(folder / case.target, file.parent.resolve() / file.name) for case in cases for file in case.files]
    for target, place in places:
        if target == place or target in place.parents:
            raise OutputError(f"the result {target} would replace the image {place}; choose another output folder")


@dataclass
class _Keeper:
    """Writes each record down as it comes."""

    manifest: Manifest
    model: str
    versions: dict[str, str]
    total: int
    progress: Callable[[int, int], None] | None
    records: dict[str, Record] = field(default_factory=dict)

    def keep(self, record: Record) -> None:
        record = replace(record, model=self.model, versions=self.versions)
        self.manifest.append(record)
        self.note(record)

    def note(self, record: Record) -> None:
        self.records[record.name] = record
        if self.progress is not None:
            self.progress(len(self.records), self.total)


def _left(
    cases: Sequence[Case], output: Path, begun: Mapping[str, int], keeper: _Keeper, known: Mapping[str, Record] | None
) -> list[Case]:
    """Return the cases to predict; the others get their records. `known`: those of earlier runs; None: overwrite."""
    overwrite, known = known is None, known or {}
    done = {case.name: known[case.name] for case in cases if case.name in known and known[case.name].status == "done"}
    other = [
        c.name for c in cases if c.name in done and done[c.name].model != keeper.model and (output / c.target).exists()
    ]
    if other:
        raise OutputError(
            f"{output} holds results of another model or of other settings ({len(other)} in {NAME}, "
            f"{other[0]} among them); choose another folder, or --overwrite"
        )
    left, strangers = [], []
    for case in cases:
        if case.problem:
            keeper.keep(Record(case.name, "failed", case.problem, target=case.target, time=now()))
        elif case.name in done and _is_whole(done[case.name], case, output / case.target):
            keeper.note(replace(done[case.name], status="there"))
        elif not overwrite and case.name not in known and case.name not in begun and (output / case.target).exists():
            strangers.append(case.target)
            keeper.note(Record(case.name, "there", voxels=case.voxels, target=case.target))
        else:
            left.append(case)
    if strangers:
        text = "%d results are kept that %s does not name (%s ...); --overwrite predicts them again"
        _log.warning(text, len(strangers), NAME, strangers[0])
    return left


def _is_whole(record: Record, case: Case, target: Path) -> bool:
    try:
        facts = input_facts(case.files)
    except InputError:  # gone since it was listed; the case itself says so
        return False
    if facts != record.input:  # an older time, too: a copy of another image keeps its own
        _log.warning("%s: its images have changed; it is predicted again", case.name)
        return False
    found = checksum(target)
    lacking = [name for name, digest in record.side_files.items() if checksum(target.with_name(name)) != digest]
    if found and (found != record.sha256 or lacking):
        _log.warning("%s is not what was written (another checksum); it is predicted again", target)
    return found == record.sha256 != "" and not lacking


def run(job: PredictionJob, schedule: Schedule, output: Path, crew: Crew, report: Report) -> None:
    """Predict in this process: nothing is started, and nothing continues if this process is killed."""
    with job.open(Place(0, crew.threads, crew.gpu(0))) as model:
        Pipeline(model, output, overlap=crew.overlap).run(lambda: schedule.take(()), report)
