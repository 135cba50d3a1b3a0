"""One worker, in this process."""

from __future__ import annotations

from pathlib import Path

from nnslim.prediction.case import Place, PredictionJob, Report
from nnslim.prediction.engines import Crew
from nnslim.prediction.pipeline import Pipeline
from nnslim.prediction.schedule import Schedule


def run(job: PredictionJob, schedule: Schedule, output: Path, crew: Crew, report: Report) -> None:
    """Predict without other processes: nothing to start, and nobody to go on if this process is killed."""
    with job.open(Place(0, crew.threads, crew.gpu(0))) as model:
        Pipeline(model, output, overlap=crew.overlap).run(lambda: schedule.take(()), report)
