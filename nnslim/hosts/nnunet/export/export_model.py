"""Models as files that run without torch and nnU-Net, and eight-bit models of the folds; each is checked on a tile."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nnslim._version import __version__
from nnslim.compression.config import SlimConfig
from nnslim.compression.storage import StateDict
from nnslim.errors import BackendError, ConfigError, InputError, ModelError, OutputError, first_line
from nnslim.evaluation.parity import Parity, parity
from nnslim.files import make_folder, output_error, temporary_folder, write_bytes, write_json
from nnslim.hosts.nnunet.cases.calibration_tiles import ImageTiles
from nnslim.hosts.nnunet.cases.prepared_images import Source, prepare_images
from nnslim.hosts.nnunet.model.trained_model import TrainedModel, build_network, input_shape
from nnslim.running import kept_models
from nnslim.running.int8 import INT8_NAME, Quantised, offer, quantize
from nnslim.running.onnx_file import in_int8, run_onnx, to_onnx, with_half_weights
from nnslim.running.openvino import OpenVINOEngine, convert

ENDINGS = {"onnx": ".onnx", "openvino": ".xml"}
PRECISIONS = ("f32", "f16", "int8")
_IMAGES, _TILES = 8, 2  # to calibrate on
Progress = Callable[[str, int, int], None]
_log = logging.getLogger("nnslim")


@dataclass(frozen=True)
class ExportSettings:
    """What to write.

    Attributes:
        format: "onnx" or "openvino". precision: f32, f16 (of the weights) or int8.
        images: to calibrate on and to compare on; a made-up tile is compared on if None.
        patch: voxels; the model's if None. seed: chooses images and tiles.
    """

    format: str
    precision: str = "f32"
    images: Path | None = None
    patch: tuple[int, ...] | None = None
    seed: int = 0


@dataclass(frozen=True)
class Exported:
    """What was written: the files, or none where the check failed; `notes` are lines for the user."""

    files: tuple[Path, ...]
    fold: str
    parity: Parity
    size: int
    notes: tuple[str, ...]

    def lines(self) -> list[str]:
        """Return what the user should know."""
        if not self.files:
            return [*self.notes, self.parity.line(), "nothing was written: the file does not do what the network does"]
        written = ", ".join(str(file) for file in self.files)
        return [*self.notes, self.parity.line(), f"written: {written} ({self.size / 1e6:.1f} MB)"]


def export_model(
    model: TrainedModel, output: Path, settings: ExportSettings, progress: Progress | None = None
) -> Exported:
    """Write the network of the first fold that was read, compare it with the network, and describe how to use it.

    Args:
        model: dense or slim.
        output: file to write, ending in .onnx or .xml; `<output>.json` and OpenVINO's .bin lie beside it.
        settings: format, precision, images.
        progress: called with (what, done, in all).
    Returns:
        Exported; `parity.passed` is False where nothing was written.
    Raises:
        InputError: unusable settings or images. OutputError: something is there already, or cannot be written.
        ModelError: the network cannot be built. BackendError: a package is missing, or cannot take the network.
    """
    output = Path(output)
    targets = _targets(output, settings)
    tell = progress or (lambda what, done, total: None)
    tell("reading", 0, 1)
    network = build_network(model)
    shape = _shape(network, input_shape(model), settings.patch)
    calibration, tile, name = calibration_tiles(model, shape, settings, tell)
    tell("converting", 0, 1)
    with _beside(output) as folder:
        file = folder / output.name
        notes = _write(network, shape, calibration, file, settings)
        tell("comparing", 0, 1)
        with torch.inference_mode():
            wanted = network(tile)
        found = run_exported(file, tile)
        checked = parity(wanted, found, precision=settings.precision, tile=name, regions=Source.of(model).regions)
        fold = next(iter(model.checkpoints))
        if len(model.checkpoints) > 1:
            notes = (f"fold {fold} of {', '.join(model.checkpoints)}; export the others to files of their own", *notes)
        size = sum(part.stat().st_size for part in folder.iterdir())
        if not checked.passed:
            return Exported((), fold, checked, size, notes)
        write_json(folder / targets[-1].name, describe(model, fold, shape, found.shape, checked, output, settings))
        for target in targets:  # the description last: where it is, all is
            (folder / target.name).replace(target)
    return Exported(targets, fold, checked, size, notes)


def read_patch(text: str) -> tuple[int, ...]:
    """Return the sizes of "96,96,96", or raise an InputError."""
    try:
        sizes = tuple(int(part) for part in text.split(","))
    except ValueError:
        sizes = ()
    if not sizes or min(sizes) < 1:
        raise InputError(f"the patch {text!r} is not understood; expected sizes in voxels, such as 96,96,96")
    return sizes


def run_exported(file: Path, image: Tensor) -> Tensor:
    """Return what an exported file makes of (1, C, *patch): (1, heads, *patch) logits; or raise a BackendError."""
    return run_onnx(file, image) if file.suffix == ".onnx" else OpenVINOEngine(file, tuple(image.shape))(image)


def describe(
    model: TrainedModel,
    fold: str,
    shape: Sequence[int],
    put_out: Sequence[int],
    checked: Parity,
    output: Path,
    settings: ExportSettings,
) -> dict[str, Any]:
    """Return what somebody without nnU-Net needs to use the file, as JSON values."""
    plans, configuration, dataset = model.plans, model.configuration_manager, model.dataset
    axes = model.checkpoints[fold].get("inference_allowed_mirroring_axes")
    return {
        "file": output.name,
        "format": settings.format,
        "precision": settings.precision,
        "nnslim": __version__,
        "source": {"folder": str(model.path), "fold": fold, "checkpoint": model.checkpoint_name, "slim": model.is_slim},
        "input": {"name": "image", "shape": list(shape), "dtype": "float32", "axes": "batch, channel, then space"},
        "output": {"name": "logits", "shape": list(put_out), "dtype": "float32", "axes": "batch, class, then space"},
        "preprocessing": {
            "order": "transpose, crop to nonzero, normalise, resample",
            "channels": dataset.get("channel_names") or dataset.get("modality"),
            "transpose_forward": plans["transpose_forward"],
            "spacing_mm": [float(size) for size in configuration.spacing],
            "normalization_schemes": list(configuration.normalization_schemes),
            "use_mask_for_norm": list(configuration.use_mask_for_norm),
            "intensities": plans.get("foreground_intensity_properties_per_channel"),
            "preprocessor": configuration.preprocessor_name,
            "previous_stage": configuration.previous_stage_name,
        },
        "labels": dataset["labels"],
        "regions_class_order": dataset.get("regions_class_order"),
        "activation": "sigmoid" if Source.of(model).regions else "softmax",
        "tiles": {"step": 0.5, "weight": "Gaussian, sigma 1/8 of the patch"},
        "mirror_axes": None if axes is None else [int(axis) for axis in axes],
        "parity": checked.to_dict(),
    }


def _targets(output: Path, settings: ExportSettings) -> tuple[Path, ...]:
    if settings.format not in ENDINGS:
        raise InputError(f"format {settings.format!r} is not known; expected one of {', '.join(ENDINGS)}")
    if settings.precision not in PRECISIONS:
        raise InputError(f"precision {settings.precision!r} is not exported; expected one of {', '.join(PRECISIONS)}")
    if settings.precision == "int8" and settings.images is None:
        raise InputError("int8 needs images to calibrate on; name a folder with -i")
    ending = ENDINGS[settings.format]
    if output.suffix != ending:
        raise InputError(f"{output} should end in {ending} for format {settings.format}")
    weights = (output.with_suffix(".bin"),) if settings.format == "openvino" else ()
    targets = (*weights, output, output.with_name(f"{output.name}.json"))
    for target in targets:
        if target.exists():
            raise OutputError(f"{target} exists and is not overwritten; remove it first, or choose another name")
    return targets


def _shape(network: nn.Module, shape: tuple[int, ...], asked: tuple[int, ...] | None) -> tuple[int, ...]:
    """Return (1, C, *patch) with the patch that was asked for; one that is not the model's is tried."""
    own = shape[2:]
    if asked is None or tuple(asked) == own:
        return shape
    if len(asked) != len(own) or min(asked) < 1:
        raise InputError(f"the patch {asked} does not fit the model; expected {len(own)} sizes in voxels, like {own}")
    try:
        with torch.inference_mode():
            network(torch.zeros(*shape[:2], *asked))
    except (RuntimeError, ValueError) as error:
        reason = first_line(error)
        raise InputError(f"the network does not take the patch {asked} ({reason}); its own is {own}") from error
    return (*shape[:2], *asked)


def calibration_tiles(
    model: Any, shape: tuple[int, ...], settings: ExportSettings, progress: Progress | None
) -> tuple[list[Tensor], Tensor, str]:
    """Return tiles to calibrate on, one to compare on (of an image of its own if there are two) and its description.

    Args:
        model: a TrainedModel or an initialised nnUNetPredictor.
    """
    if settings.images is None:
        return [], _made_up(shape, settings.seed), "a made-up tile (no images were given)"
    source, count = Source.of(model), _IMAGES if settings.precision == "int8" else 1
    if settings.patch is not None:
        manager = copy.deepcopy(source.configuration_manager)
        manager.configuration["patch_size"] = list(shape[2:])
        source = replace(source, configuration_manager=manager)
    seed, step = settings.seed, None if progress is None else partial(progress, "images")
    with prepare_images(source, settings.images, count + 1, seed=seed, progress=step) as images:
        tile = next(iter(ImageTiles(images.part(len(images) - 1), 1, seed=seed)))
        rest = images.part(0, max(len(images) - 1, 1) if settings.precision == "int8" else 0)
        calibration = list(ImageTiles(rest, _TILES, seed=seed))
    if tile.shape[1] != shape[1]:
        raise ModelError(f"the network takes {shape[1]} channels, its images have {tile.shape[1]}")
    return calibration, tile, f"a tile of {settings.images}"


def _made_up(shape: tuple[int, ...], seed: int) -> Tensor:
    """Return smooth blobs with some noise: of noise alone, networks make more ties between classes than of images."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn((*shape[:2], *(max(size // 8, 2) for size in shape[2:])), generator=generator)
    smooth = nn.functional.interpolate(coarse, shape[2:], mode="trilinear" if len(shape) == 5 else "bilinear")
    return smooth + 0.2 * torch.randn(shape, generator=generator)


def _write(
    network: nn.Module, shape: tuple[int, ...], tiles: list[Tensor], file: Path, settings: ExportSettings
) -> tuple[str, ...]:
    """Write the file and return lines for the user."""
    if settings.format == "onnx":
        made = to_onnx(network, shape)
        if settings.precision == "f16":
            made = with_half_weights(made)
        elif settings.precision == "int8":
            made = in_int8(made, tiles)
        write_bytes(file, made.SerializeToString())
    elif settings.precision == "int8":
        quantised = quantize(network, shape, tiles, channels_last=False)
        kept_models.write_openvino_model(quantised.model, file)
        return (quantised.line(),)
    else:
        kept_models.write_openvino_model(
            convert(network, shape, channels_last=False), file, half=settings.precision == "f16"
        )
    return ()


@contextmanager
def _beside(output: Path) -> Iterator[Path]:
    """Give a folder beside `output` that goes away with what is still in it."""
    make_folder(output.parent)
    try:
        with temporary_folder(output) as folder:
            yield folder
    except OSError as error:
        raise output_error(output, error) from error


def keep_int8(
    model: TrainedModel, images: Path, *, seed: int = 0, progress: Progress | None = None
) -> dict[str, Parity]:
    """Calibrate each fold that was read and write fold_X/nnslim_int8.xml and .bin, which replace older ones.

    Args:
        model: dense or slim. images: folder, as for prediction. seed: chooses images and tiles.
        progress: called with (what, done, in all).
    Returns:
        By fold, the comparison with the network on a tile that was not calibrated on, where there are two images; where
        it did not pass, nothing was written.
    Raises:
        InputError: unusable images. OutputError: a file cannot be written. BackendError: openvino or nncf is missing,
        or cannot take the network.
    """
    checked, data = {}, _Data(model, input_shape(model), images, seed, progress)
    for number, fold in enumerate(model.checkpoints):
        network = build_network(model, fold)
        if progress is not None:
            progress("calibrating", number, len(model.checkpoints))
        quantised, checked[fold] = data.quantise(network, f"fold {fold}")
        if checked[fold].passed:
            kept_models.replace_model(quantised.model, model.path / f"fold_{fold}" / INT8_NAME)
    return checked


def prepare_int8(
    predictor: Any,
    network: nn.Module,
    weights: Sequence[StateDict],
    shape: tuple[int, ...],
    config: SlimConfig,
    folder: Path | None = None,
) -> None:
    """Make sure that `OpenVINOEngine(network, precision="int8")` finds a model for each set of weights.

    It may be there from an earlier time, or lie beside a checkpoint of the folder; else it is calibrated on the images
    of the configuration, and kept for the next time.

    Args:
        predictor: an initialised nnUNetPredictor.
        network: the one that will run, dense or slim; left with the last weights.
        weights: state dicts of the folds. shape: (1, C, *patch).
        folder: of the model, where it has one.
    Raises:
        ConfigError: a model is missing, and no images are named. BackendError: openvino or nncf is missing, or the
        eight bits are too far from the network. InputError: unusable images. OutputError: the cache cannot be written.
    """
    kept_models.openvino_module()
    files = [] if folder is None else sorted(Path(folder).glob(f"fold_*/{INT8_NAME}"))
    images, data = config.calibration.images, None
    for number, state in enumerate(weights):
        network.load_state_dict(state)
        key = kept_models.network_key(kept_models.network_fingerprint(network), shape, "int8")
        if kept_models.recall_model(key, None) is not None or any(offer(network, shape, file) for file in files):
            continue
        if images is None:
            others = f"; {files[0]} was made from other weights" if files else ""
            raise ConfigError(
                "int8 is calibrated on images: name a folder of them (nnslim predict --calibration, nnslim run -i, "
                f"NNSlimContext(images=...) or calibration.images){others}"
            )
        data = data or _Data(predictor, shape, Path(images), config.calibration.seed, None)
        quantised, checked = data.quantise(network, f"weights {number + 1} of {len(weights)}")
        if not checked.passed:
            raise BackendError(f"int8 is too far from the network that it was made from: {checked.line()}")
        kept_models.keep(quantised.model, key, None)


class _Data:
    """Calibration tiles of some images, and a tile to compare on."""

    def __init__(self, model: Any, shape: tuple[int, ...], images: Path, seed: int, progress: Progress | None) -> None:
        self.shape, self.regions = shape, Source.of(model).regions
        settings = ExportSettings("openvino", "int8", images, seed=seed)
        self.tiles, self.tile, self.name = calibration_tiles(model, shape, settings, progress)

    def quantise(self, network: nn.Module, what: str) -> tuple[Quantised, Parity]:
        """Return the model in eight bits and how it compares on a tile that was not calibrated on, if there are two."""
        network.eval()
        quantised = quantize(network, self.shape, self.tiles)
        with torch.inference_mode():
            wanted = network(self.tile)
        found = OpenVINOEngine(quantised.model, self.shape, precision="int8")(self.tile)
        checked = parity(wanted, found, precision="int8", tile=self.name, regions=self.regions)
        _log.info("%s: %s; %s", what, quantised.line(), checked.line())
        return quantised, checked
