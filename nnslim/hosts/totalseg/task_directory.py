"""TotalSegmentator's tasks in workers that go through a folder, the weights loaded once; this imports fast."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nnslim.errors import InputError
from nnslim.files import temporary_folder
from nnslim.hosts.nnunet.cases.preprocess import silent
from nnslim.hosts.nnunet.model.model_files import content_digest
from nnslim.hosts.nnunet.predict.predict_settings import absolute_config, config_identity, digest
from nnslim.hosts.totalseg.task_weights import download, locked_home, weights_folder
from nnslim.hosts.totalseg.tasks import Task, find_task, totalseg_version
from nnslim.patching import AttributePatch
from nnslim.prediction.case import Case, Crew, Place, Record, versions
from nnslim.prediction.images import check_image, count_voxels
from nnslim.prediction.run_directory import FolderSettings, run_folder
from nnslim.running.machine import measured_backends

if TYPE_CHECKING:
    from nnslim.hosts.nnunet.predict.predictor_patches import Session
    from nnslim.running.engine import Backend, Precision

_ENDINGS = (".nii.gz", ".nii")
_SUBJECT_FILES = tuple(f"{name}{ending}" for name in ("ct", "mri") for ending in _ENDINGS)
# What reads or writes files in TotalSegmentator's home, each written in place.
_HOME = (
    "setup_totalseg",
    "get_config_key",
    "set_config_key",
    "increase_prediction_counter",
    "download_pretrained_weights",
)


_log = logging.getLogger("nnslim")


@dataclass(frozen=True)
class TaskSettings:
    """What TotalSegmentator does; all else is its default.

    Attributes:
        task: its name, with _fast or _fastest for the coarser models.
        device: cpu, cuda or mps.
        ml: one label map per case; else a folder with one file per class.
        roi: classes to segment; all if empty.
        backend, precision, threads, deterministic: see `nnslim.running.engine.Settings`; without config and backend
            nnU-Net's own code runs, and the results are those of `totalsegmentator()`, bit by bit.
    """

    task: str = "total"
    device: str = "cpu"
    ml: bool = False
    roi: tuple[str, ...] = ()
    backend: Backend | None = None
    precision: Precision | None = None
    threads: int | None = None
    deterministic: bool = False


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
        DownloadError: the weights are not here and need a licence, or cannot be fetched.
        OutputError: the output folder cannot be written, or holds other results. A single bad case raises nothing.
    """
    task = find_task(settings.task, settings.roi)  # before anything is read
    cases = task_cases(Path(images).absolute(), ml=settings.ml)
    for number in task.missing(weights_folder()):  # now: what is there is part of the identity of the run
        _log.info("fetching the weights of TotalSegmentator's model %d", number)
        with locked_home():  # of tasks of a Slurm array one fetches, the others find
            download(number, weights_folder())
    job = TotalsegJob(settings, absolute_config(config), measured_backends())
    return run_folder(job, cases, Path(output), folder or FolderSettings(crew=Crew(threads=settings.threads)), progress)


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
    cases = []
    for name, files in sorted(claims.items()):
        names = " and ".join(str(file.relative_to(images)) for file in files if file != images)
        problem = f"{names} are both case '{name}'; rename or remove one" if len(files) > 1 else ""
        target = f"{name}.nii.gz" if ml else name
        cases.append(Case(name, tuple(files), target, max(map(count_voxels, files)), problem))
    return cases


@dataclass(frozen=True)
class TotalsegJob:
    """A task with settings; implements `PredictionJob`. `measured` and `began`: see `NNUNetJob`."""

    settings: TaskSettings
    config: Any = None
    measured: dict[str, Any] = field(default_factory=dict)
    began: dict[str, Any] = field(default_factory=dict)

    @property
    def first_alone(self) -> bool:
        """The first worker compresses; the others find its result in the cache."""
        return self.config is not None

    def stamp(self) -> tuple[str, dict[str, str]]:
        """See `Record`: the weights that are there, the task, the layout, and the versions."""
        task = find_task(self.settings.task, self.settings.roi)
        folds, folders = list(map(str, task.folds)), task.model_folders(weights_folder())
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

    def keeping(self, run: dict[str, Any]) -> TotalsegJob:
        """See `PredictionJob`."""
        return replace(self, began=run)

    @contextmanager
    def open(self, place: Place) -> Iterator[TotalsegModel]:
        """Make `totalsegmentator()` ready; it loads weights as needed, and fetches those of its rough cropping model.

        Raises:
            HostError, ConfigError: what cannot be used.
        """
        from nnslim.hosts.nnunet.predict.predictor_patches import own_session
        from nnslim.running.engine import believing
        from nnslim.running.machine import keep_heap

        settings = self.settings
        stock = self.config is None and settings.backend is None and settings.precision is None
        run = {"backend": "stock" if stock else settings.backend, "precision": settings.precision}
        run |= {"keep_models": True, "threads": place.threads, "deterministic": settings.deterministic or None}
        session = own_session(self.config, run, self.began)
        with _many_images(session, place.threads) as segment, keep_heap(), believing(self.measured):
            device = {"cuda": "gpu" if place.gpu is None else f"gpu:{place.gpu}"}.get(settings.device, settings.device)
            task = find_task(settings.task, settings.roi)
            options = {"device": device, "quiet": True, "nr_thr_saving": 1, "roi_subset": list(settings.roi) or None}
            options |= task.options
            # TotalSegmentator writes with 6 processes.
            yield TotalsegModel(functools.partial(segment, **options), task, settings, session, place.threads or 6)


@contextmanager
def _many_images(session: Session, threads: int | None) -> Iterator[Callable[..., Any]]:
    """Yield `totalsegmentator`, made to keep its models and to start no processes; nothing remains patched afterwards.

    Its results are the same: the same functions are called with the same arguments, in this process, with so many CPU
    threads of torch; None: all, as TotalSegmentator does.
    """
    from totalsegmentator import python_api

    from nnslim.hosts.nnunet.cases.export_patches import ExportPatches
    from nnslim.hosts.nnunet.model.compatibility import predictor_class
    from nnslim.hosts.nnunet.predict.predictor_patches import predictor_patches

    with locked_home():
        python_api.setup_nnunet()  # nnU-Net's folders: some versions read them as they are imported
        python_api.setup_totalseg()
    import totalsegmentator.nnunet  # noqa: F401  patches nnU-Net's predictor; ours go on top of that

    exports = ExportPatches(lambda: session.config.run)
    patches = [
        *predictor_patches(lambda: session, exports.apply),
        AttributePatch(predictor_class(), "predict_from_files", functools.partial(_with_threads, threads)),
        *(AttributePatch(python_api, name, locked_home()) for name in _HOME if hasattr(python_api, name)),
    ]
    with ExitStack() as stack:
        stack.callback(exports.undo)
        exports.apply()  # before the others: the one that sets threads goes around it
        for patch in patches:
            patch.apply()
            stack.callback(patch.undo)
        yield python_api.totalsegmentator


def _with_threads(threads: int | None, original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def predict_from_files(*args: Any, **options: Any) -> Any:
        import torch

        if threads is not None:  # TotalSegmentator has just set all that the machine has
            torch.set_num_threads(threads)
        return original(*args, **options)

    return predict_from_files


@dataclass(frozen=True)
class TotalsegModel:
    """`totalsegmentator()` with its task, stage by stage, and how its result is written; implements `Model`."""

    segment: Callable[..., Any]
    task: Task
    settings: TaskSettings
    session: Session
    threads: int

    def read(self, case: Case) -> Path:
        """Check the image: TotalSegmentator would take a file that is cut short as it is."""
        check_image(case.files[0])
        return case.files[0]

    def forward(self, case: Case, data: Path) -> Any:
        """Return the label map in the image's geometry, a nibabel image."""
        # With an output it returns early where there is nothing to crop to; it goes wrong there without one.
        with silent(), temporary_folder() as folder:
            return self.segment(data, folder / "labels.nii.gz", ml=True, skip_saving=True)

    def write(self, case: Case, result: Any, beside: Path) -> None:
        """Write what `totalsegmentator()` would."""
        import nibabel as nib

        if self.settings.ml:
            nib.save(result, beside)
            return
        beside.mkdir()
        roi = self.settings.roi
        wanted = {label: name for label, name in self.task.classes.items() if not roi or name in roi}
        _write_classes(result, wanted, beside, self.threads)
        if self.task.name == "body":  # two masks are derived from its own
            from totalsegmentator.libs import combine_masks
            from totalsegmentator.postprocessing import extract_skin

            nib.save(combine_masks(beside, "body"), beside / "body.nii.gz")
            nib.save(extract_skin(nib.load(case.files[0]), nib.load(beside / "body.nii.gz")), beside / "skin.nii.gz")

    def run(self) -> dict[str, Any]:
        """See `Model`."""
        from nnslim.hosts.nnunet.predict.load import run_facts

        return run_facts([loaded["network"] for loaded in self.session.kept.values()])


def _write_classes(labels: Any, classes: dict[int, str], folder: Path, threads: int) -> None:
    """Write one mask per class, so many at a time; the last header extension of the label map holds its names."""
    import nibabel as nib
    import numpy as np

    data = np.asarray(labels.dataobj)
    header = labels.header.copy()
    del header.extensions[-1]

    def write(label: int, name: str) -> None:
        nib.save(nib.Nifti1Image((data == label).astype(np.uint8), labels.affine, header), folder / f"{name}.nii.gz")

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(write, classes, classes.values()))
