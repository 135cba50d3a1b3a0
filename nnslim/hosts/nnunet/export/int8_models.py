"""Eight-bit models of a model's folds: calibrate, check, keep beside the checkpoints or in the cache."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nnslim.compression.config import SlimConfig
from nnslim.compression.storage import StateDict
from nnslim.errors import BackendError, ConfigError
from nnslim.evaluation.parity import Parity, parity
from nnslim.hosts.nnunet.cases.calibration_tiles import Source
from nnslim.hosts.nnunet.export.export_model import ExportSettings, Progress, calibration_tiles
from nnslim.hosts.nnunet.model.trained_model import TrainedModel, build_network, input_shape
from nnslim.running.int8 import INT8_NAME, Quantised, offer, quantize
from nnslim.running.kept_models import (
    keep,
    network_fingerprint,
    network_key,
    openvino_module,
    recall_model,
    replace_model,
)
from nnslim.running.openvino import OpenVINOEngine

_log = logging.getLogger("nnslim")


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
    tell = progress or (lambda what, done, total: None)
    shape = input_shape(model)
    checked = {}
    data = _Data(model, shape, images, seed, tell)
    for number, (fold, checkpoint) in enumerate(model.checkpoints.items()):
        network = build_network(replace(model, checkpoints={fold: checkpoint}))
        tell("calibrating", number, len(model.checkpoints))
        quantised, checked[fold] = data.quantise(network, f"fold {fold}")
        if checked[fold].passed:
            replace_model(quantised.model, model.path / f"fold_{fold}" / INT8_NAME)
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
    openvino_module()
    files = [] if folder is None else sorted(Path(folder).glob(f"fold_*/{INT8_NAME}"))
    images, data = config.calibration.images, None
    for number, state in enumerate(weights):
        network.load_state_dict(state)
        key = network_key(network_fingerprint(network), shape, "int8")
        if recall_model(key, None) is not None or any(offer(network, shape, file) for file in files):
            continue
        if images is None:
            others = f"; {files[0]} was made from other weights" if files else ""
            raise ConfigError(
                "int8 is calibrated on images: name a folder of them (nnslim predict --calibration, nnslim run -i, "
                f"NNSlimContext(images=...) or calibration.images){others}"
            )
        if data is None:
            data = _Data(predictor, shape, Path(images), config.calibration.seed, lambda what, done, total: None)
        quantised, checked = data.quantise(network, f"weights {number + 1} of {len(weights)}")
        if not checked.passed:
            raise BackendError(f"int8 is too far from the network that it was made from: {checked.line()}")
        keep(quantised.model, key, None)


class _Data:
    """Calibration tiles of some images, and a tile to compare on."""

    def __init__(self, model: Any, shape: tuple[int, ...], images: Path, seed: int, tell: Progress) -> None:
        self.shape, self.regions = shape, Source.of(model).regions
        settings = ExportSettings("openvino", "int8", images, seed=seed)
        self.tiles, self.tile, self.name = calibration_tiles(model, shape, settings, tell)

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
