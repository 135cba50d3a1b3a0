"""Eight-bit models beside the checkpoints of a model folder: calibrate, check, keep, and offer to the engine."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from nnslim.hosts.nnunet.calibrate import Source
from nnslim.hosts.nnunet.export import ExportSettings, Progress, calibration_tiles
from nnslim.hosts.nnunet.folder import ModelFolder, build_network, input_shape
from nnslim.running.int8 import INT8_NAME, offer, quantize
from nnslim.running.kept_models import replace_model
from nnslim.running.openvino import OpenVINOEngine
from nnslim.work.parity import Parity, parity

_log = logging.getLogger("nnslim")


def keep_int8(
    model: ModelFolder, images: Path, *, seed: int = 0, progress: Progress | None = None
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
    settings = ExportSettings("openvino", "int8", images, seed=seed)
    tiles, tile, name = calibration_tiles(model, shape, settings, tell)
    checked = {}
    for number, (fold, network) in enumerate(_networks(model)):
        tell("calibrating", number, len(model.checkpoints))
        quantised = quantize(network, shape, tiles)
        with torch.inference_mode():
            wanted = network(tile)
        found = OpenVINOEngine(quantised.model, shape, precision="int8")(tile)
        checked[fold] = parity(wanted, found, precision="int8", tile=name, regions=Source.of(model).regions)
        _log.info("fold %s: %s", fold, quantised.line())
        if checked[fold].passed:
            replace_model(quantised.model, _file(model, fold))
    return checked


def offer_int8(model: ModelFolder, cache: Path | None = None) -> list[str]:
    """Let `OpenVINOEngine(network, precision="int8")` find the models beside the checkpoints that were read.

    Args:
        model: dense or slim. cache: folder of converted models; None for nnslim's.
    Returns:
        The folds that have one of their present weights; others are named in a warning.
    Raises:
        BackendError: openvino is missing, or a file cannot be read. OutputError: the cache cannot be written.
    """
    offered = []
    for fold, network in _networks(model):
        file = _file(model, fold)
        if not file.is_file():
            _log.warning("fold %s has no %s; make it with: nnslim export --precision int8", fold, INT8_NAME)
        elif not offer(network, input_shape(model), file, cache):
            _log.warning("%s was made from other weights and is not used; make it again", file)
        else:
            offered.append(fold)
    return offered


def _networks(model: ModelFolder) -> Iterator[tuple[str, nn.Module]]:
    for fold, checkpoint in model.checkpoints.items():
        yield fold, build_network(replace(model, checkpoints={fold: checkpoint}))


def _file(model: ModelFolder, fold: str) -> Path:
    return model.path / f"fold_{fold}" / INT8_NAME
