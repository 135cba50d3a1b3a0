"""nnU-Net models in workers that go through a folder; importing this takes no time."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from nnslim.files import read_json_object
from nnslim.hosts.nnunet.cases.preprocess import check_stage, list_cases
from nnslim.hosts.nnunet.model.model_files import chosen_folds, content_digest
from nnslim.hosts.nnunet.predict.predict_settings import PredictSettings, absolute_config, config_identity, digest
from nnslim.prediction.case import Case, Crew, Place, Record, versions
from nnslim.prediction.images import count_voxels
from nnslim.prediction.run_directory import FolderSettings, run_folder
from nnslim.running.machine import measured_backends

_log = logging.getLogger("nnslim")


def predict_folder(
    images: Path,
    output: Path,
    model: Path,
    config: Any = None,
    settings: PredictSettings | None = None,
    progress: Callable[[int, int], None] | None = None,
    folder: FolderSettings | None = None,
) -> list[Record]:
    """Predict every case of a folder; one that fails is reported, the others continue, finished ones are kept.

    Args:
        images: folder of `<case>_0000<ending>` files, one per channel, or one such file.
        output: folder for `<case><ending>` and manifest.jsonl.
        model: model folder, dense or slim.
        config: what NNSlimContext takes, to compress on the fly.
        settings: device, tiles, mirroring, folds.
        progress: called with (cases done, cases in all).
        folder: engine and workers; default: in this process.
    Returns:
        One record per case, by name.
    Raises:
        InputError: no images. ModelError, ConfigError: unusable model or config. OutputError: the output folder
        cannot be written, or holds another model's results. A single bad case raises nothing.
    """
    settings = settings or PredictSettings()
    # Absolute, as a worker on another machine does not start in this folder.
    job = NNUNetJob(Path(model).absolute(), absolute_config(config), settings, measured_backends())
    cases = nnunet_cases(Path(images).absolute(), job.ending)
    return run_folder(job, cases, Path(output), folder or FolderSettings(crew=Crew(threads=settings.threads)), progress)


def nnunet_cases(images: Path, ending: str) -> list[Case]:
    """Return the cases of a folder, or of one file; files that belong to no case are named in a warning.

    Raises:
        InputError: no case was found.
    """
    found = list_cases(images, ending)
    if found.left_out:
        names = ", ".join(path.name for path in found.left_out[:5])
        _log.warning("%d files are not named <case>_0000%s and left out: %s", len(found.left_out), ending, names)
    for name in found.problems:
        found.cases.setdefault(name, [])
    return [
        Case(name, tuple(files), name + ending, max(map(count_voxels, files), default=0), found.problems.get(name, ""))
        for name, files in sorted(found.cases.items())
    ]


@dataclass(frozen=True)
class NNUNetJob:
    """A model folder, dense or slim, with settings; implements `PredictionJob`.

    Attributes:
        model: model folder. config: what NNSlimContext takes, to compress on the fly. settings: how to predict.
        measured: the fastest backends, as they were known when the run began. began: see `own_session`.
    """

    model: Path
    config: Any
    settings: PredictSettings
    measured: dict[str, Any] = field(default_factory=dict)
    began: dict[str, Any] = field(default_factory=dict)

    @property
    def ending(self) -> str:
        """File ending of images and results."""
        return str(read_json_object(self.model / "dataset.json").get("file_ending", ".nii.gz"))

    @property
    def first_alone(self) -> bool:
        """The first worker compresses; the others find its result in the cache."""
        return self.config is not None

    def stamp(self) -> tuple[str, dict[str, str]]:
        """Return the identity of the model with its settings, see `Record`, and the versions.

        What only changes the time, or the rounding, does not count: device, threads, backend.

        Raises:
            ModelError: no such folder, or no fold. ConfigError: the config cannot be used.
        """
        settings = self.settings
        decisive = {
            "weights": content_digest(self.model, *chosen_folds(self.model, settings.folds, settings.checkpoint)),
            "step_size": settings.step_size,
            "mirroring": settings.mirroring,
            "previous_stage": settings.previous_stage and str(settings.previous_stage),
            "precision": settings.precision,
            "config": config_identity(self.config),
        }
        return digest(decisive), versions("nnunetv2")

    def keeping(self, run: dict[str, Any]) -> NNUNetJob:
        """See `PredictionJob`."""
        return replace(self, began=run)

    @contextmanager
    def open(self, place: Place) -> Iterator[Any]:
        """Load the model.

        Raises:
            ModelError, ConfigError, HostError: what cannot be used.
        """
        import torch

        from nnslim.hosts.nnunet.predict.load import NNUNetModel, load_predictor
        from nnslim.running.engine import believing
        from nnslim.running.machine import keep_heap

        settings = replace(self.settings, threads=place.threads or self.settings.threads)
        if place.gpu is not None and settings.device == "cuda":
            settings = replace(settings, device=f"cuda:{place.gpu}")
        before = torch.get_num_threads()
        if place.threads is not None:
            torch.set_num_threads(place.threads)
        try:
            predictor = load_predictor(self.model, self.config, settings, self.began)
            check_stage(predictor, settings.previous_stage)
            with keep_heap(), believing(self.measured):
                yield NNUNetModel(predictor, settings)
        finally:
            torch.set_num_threads(before)
