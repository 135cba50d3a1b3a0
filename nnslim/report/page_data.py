"""All that the page shows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from nnslim.benchmark.timings import Benchmark
from nnslim.compression.record import SlimRecord
from nnslim.evaluation.scores import ScoreTable
from nnslim.report.viewer import Scene


@dataclass(frozen=True)
class FileFact:
    """A file of the model: name, bytes, SHA-256."""

    name: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Viewer:
    """NiiVue's script, label -> name, and the bytes that the volumes of a case may take in the page."""

    script: str
    labels: Mapping[int, str]
    limit: int = 24_000_000


@dataclass(frozen=True)
class ReportData:
    """All that the page shows.

    Attributes:
        model: a short name. record: its nnslim.json. made: date of the page. folder: name of the model folder.
        written: date of the checkpoint file.
        files: the checkpoints.
        benchmarks: timings. scores: against labels, of any predictions. others: more models to compare with, by name.
        scenes: cases to show. viewer: None without one.
    """

    model: str
    record: SlimRecord
    made: str
    folder: str = ""
    written: str = ""
    files: Sequence[FileFact] = ()
    benchmarks: Sequence[Benchmark] = ()
    scores: Sequence[ScoreTable] = ()
    others: Mapping[str, SlimRecord] = field(default_factory=dict)
    scenes: Sequence[Scene] = ()
    viewer: Viewer | None = None
