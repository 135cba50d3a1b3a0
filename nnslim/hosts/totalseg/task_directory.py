"""TotalSegmentator's tasks in workers that go through a folder, the weights loaded once; this imports fast."""

from __future__ import annotations

import functools
import logging
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nnslim.errors import InputError
from nnslim.hosts.nnunet.cases.preprocess import silent
from nnslim.hosts.nnunet.model.model_files import content_digest
from nnslim.hosts.nnunet.predict.predict_settings import absolute_config, config_identity, digest
from nnslim.hosts.totalseg.task_weights import download, locked_home, weights_folder
from nnslim.hosts.totalseg.tasks import Task, find_task, totalseg_version
from nnslim.prediction.case import Case, Crew, Place, Record, versions
from nnslim.prediction.images import check_image, count_voxels
from nnslim.prediction.run_directory import FolderSettings, run_folder

if TYPE_CHECKING:
    from nnslim.running.engine import Backend, Precision

_ENDINGS = (".nii.gz", ".nii")
_SUBJECT_FILES = tuple(f"{name}{ending}" for name in ("ct", "mri") for ending in _ENDINGS)
_log = logging.getLogger("nnslim")


@dataclass(frozen=True)
class TaskSettings:
    """What TotalSegmentator does; all else is its default.

    Attributes:
        task: its name, with _fast or _fastest for the coarser models.
        device: cpu, cuda or mps.
        ml: one label map per case; else a folder with one file per class.
        roi: classes to segment; all if empty.
        backend, precision, threads: see `nnslim.running.engine.Settings`; without config and backend nnU-Net's own code
            runs, and the results are those of `totalsegmentator()`, bit by bit.
    """

    task: str = "total"
    device: str = "cpu"
    ml: bool = False
    roi: tuple[str, ...] = ()
    backend: Backend | None = None
    precision: Precision | None = None
    threads: int | None = None


def predict_task_folder(
    images: Path,
    output: Path,
    settings: TaskSettings,
    config: Any = None,
    progress: Callable[[int, int], None] | None = None,
    folder: FolderSettings | None = None,
) -> list[Record]:
    """Run a task of TotalSegmentator on every image of a folder.

    Args:
        images: see `task_cases`. output: for `<case>.nii.gz`, or `<case>/<class>.nii.gz`, and manifest.jsonl.
        settings: the task. config: what NNSlimContext takes, to compress its models on the fly.
        progress: called with (cases done, cases in all).
        folder: engine and workers; default: in this process.
    Raises:
        InputError: no images. HostError: TotalSegmentator is missing. ConfigError: no such task or class.
        DownloadError: the weights are not here and cannot be fetched.
        OutputError: the output folder cannot be written, or holds other results. A single bad case raises nothing.
    """
    task = find_task(settings.task, settings.roi)  # before anything is read
    cases = task_cases(Path(images).absolute(), ml=settings.ml)
    fetch_missing(task)
    job = TotalsegJob(settings, absolute_config(config))
    return run_folder(job, cases, Path(output), folder or FolderSettings(crew=Crew(threads=settings.threads)), progress)


def fetch_missing(task: Task) -> None:
    """Fetch the weights that are not here yet, before the run asks which ones it is about: they are its identity.

    Raises:
        DownloadError: they need a licence, or cannot be fetched. OutputError: they cannot be written.
    """
    for number in task.missing(weights_folder()):
        _log.info("fetching the weights of TotalSegmentator's model %d", number)
        with locked_home():  # of tasks of a Slurm array one fetches, the others find
            download(number, weights_folder())


def task_cases(images: Path, *, ml: bool) -> list[Case]:
    """Return the images of a folder: `<case>.nii.gz` or .nii, and `<case>/ct.nii.gz` (or mri), or one image.

    A name that two images claim is a case that cannot be predicted; other files are named in a warning.

    Raises:
        InputError: no image was found.
    """
    if not images.exists():
        raise InputError(f"{images} does not exist; expected a folder of images or one image")
    claims: dict[str, list[Path]] = {}
    left_out = []
    for path in [images] if images.is_file() else sorted(images.iterdir()):
        if path.name.startswith("."):
            continue
        ending = next((end for end in _ENDINGS if path.name.endswith(end)), "")
        inside = [path / name for name in _SUBJECT_FILES if (path / name).is_file()] if path.is_dir() else []
        if path.is_file() and ending:
            claims.setdefault(path.name.removesuffix(ending), []).append(path)
        elif inside:
            claims.setdefault(path.name, []).extend(inside)
        else:
            left_out.append(path.name)
    if not claims:
        raise InputError(f"{images} holds no image named <case>.nii.gz, <case>.nii or <case>/ct.nii.gz")
    if left_out:
        _log.warning("%d files or folders are no images and left out: %s", len(left_out), ", ".join(left_out[:5]))
    return [_case(name, files, images, ml) for name, files in sorted(claims.items())]


def _case(name: str, files: list[Path], images: Path, ml: bool) -> Case:
    names = [str(file.relative_to(images)) if file != images else file.name for file in files]
    problem = f"{' and '.join(names)} are both case '{name}'; rename or remove one" if len(files) > 1 else ""
    voxels = max(map(count_voxels, files))
    return Case(name, tuple(files), f"{name}.nii.gz" if ml else name, voxels, problem)


@dataclass(frozen=True)
class TotalsegJob:
    """A task with settings; implements `PredictionJob`."""

    settings: TaskSettings
    config: Any = None

    @property
    def first_alone(self) -> bool:
        """The first worker compresses; the others find its result in the cache."""
        return self.config is not None

    def stamp(self) -> tuple[str, dict[str, str]]:
        """See `Record`: the weights that are there, the task, the layout, and the versions."""
        task = find_task(self.settings.task, self.settings.roi)
        folders = task.model_folders(weights_folder())
        folds = [str(fold) for fold in task.folds]
        decisive = {
            "task": task.options,
            "roi": sorted(self.settings.roi),
            "ml": self.settings.ml,
            "totalsegmentator": totalseg_version(),
            "weights": [content_digest(folder, folds, "checkpoint_final.pth") for folder in folders],
            "precision": self.settings.precision,
            "config": config_identity(self.config),
        }
        return digest(decisive), versions("nnunetv2", "TotalSegmentator")

    @contextmanager
    def open(self, place: Place) -> Iterator[TotalsegModel]:
        """Make `totalsegmentator()` ready; it loads weights as needed, and fetches those of its rough cropping model.

        Raises:
            HostError, ConfigError: what cannot be used.
        """
        from nnslim.hosts.nnunet.predict.predictor_patches import own_session
        from nnslim.hosts.totalseg.many_images import many_images
        from nnslim.running.machine import keep_heap

        settings = self.settings
        run = {"keep_models": True, "threads": place.threads}
        chosen = {"backend": settings.backend, "precision": settings.precision}
        if self.config is None and settings.backend is None and settings.precision is None:
            chosen["backend"] = "stock"
        run |= {key: value for key, value in chosen.items() if value is not None}
        with many_images(own_session(self.config, run), place.threads) as segment, keep_heap():
            device = {"cuda": "gpu" if place.gpu is None else f"gpu:{place.gpu}"}.get(settings.device, settings.device)
            task = find_task(settings.task, settings.roi)
            options = {"device": device, "quiet": True, "nr_thr_saving": 1, **task.options}
            if settings.roi:
                options["roi_subset"] = list(settings.roi)
            yield TotalsegModel(functools.partial(segment, **options), task, settings, place.threads)


class TotalsegModel:
    """`totalsegmentator()` with its task, stage by stage; implements `Model`."""

    def __init__(self, segment: Callable[..., Any], task: Task, settings: TaskSettings, threads: int | None) -> None:
        """Hold the function and how its result is written."""
        self._segment = segment
        self._task = task
        self._settings = settings
        self._threads = threads or 6  # as many processes as TotalSegmentator writes with

    def read(self, case: Case) -> Path:
        """Check the image: TotalSegmentator would take a file that is cut short as it is."""
        check_image(case.files[0])
        return case.files[0]

    def forward(self, case: Case, data: Path) -> Any:
        """Return the label map in the image's geometry, a nibabel image."""
        # With an output it returns early where there is nothing to crop to; it goes wrong there without one.
        with silent(), tempfile.TemporaryDirectory(prefix="nnslim-") as folder:
            return self._segment(data, Path(folder) / "labels.nii.gz", ml=True, skip_saving=True)

    def write(self, case: Case, result: Any, beside: Path) -> None:
        """Write what `totalsegmentator()` would."""
        import nibabel as nib

        if self._settings.ml:
            nib.save(result, beside)
            return
        beside.mkdir()
        write_classes(result, self._wanted(), beside, self._threads)
        if self._task.name == "body":
            _write_body(case.files[0], beside)

    def _wanted(self) -> dict[int, str]:
        roi = set(self._settings.roi)
        return {label: name for label, name in self._task.classes.items() if not roi or name in roi}


def write_classes(labels: Any, classes: dict[int, str], folder: Path, threads: int) -> None:
    """Write one mask per class, as TotalSegmentator does.

    Args:
        labels: nibabel image of the label map, its names in the last header extension.
        classes: label -> file name without ending. threads: files at a time.
    """
    import nibabel as nib
    import numpy as np

    data = np.asarray(labels.dataobj)
    header = labels.header.copy()
    del header.extensions[-1]

    def write(item: tuple[int, str]) -> None:
        label, name = item
        nib.save(nib.Nifti1Image((data == label).astype(np.uint8), labels.affine, header), folder / f"{name}.nii.gz")

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(write, classes.items()))


def _write_body(image: Path, folder: Path) -> None:
    """Write the two masks that TotalSegmentator derives from those of its body task."""
    import nibabel as nib
    from totalsegmentator.libs import combine_masks
    from totalsegmentator.postprocessing import extract_skin

    nib.save(combine_masks(folder, "body"), folder / "body.nii.gz")
    nib.save(extract_skin(nib.load(image), nib.load(folder / "body.nii.gz")), folder / "skin.nii.gz")
