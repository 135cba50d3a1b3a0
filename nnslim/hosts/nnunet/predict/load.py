"""A loaded predictor, and a folder predicted with it."""

from __future__ import annotations

import functools
import logging
from pathlib import Path
from typing import Any

import torch

from nnslim.compression.config import SlimConfig, load_config
from nnslim.errors import InputError, ModelError, OutputError
from nnslim.hosts.nnunet.cases.preprocess import silent
from nnslim.hosts.nnunet.cases.write_labels import write_prediction
from nnslim.hosts.nnunet.model.compatibility import predictor_class
from nnslim.hosts.nnunet.model.trained_model import build_network, read_trained_model
from nnslim.hosts.nnunet.predict.predict_settings import PredictSettings
from nnslim.hosts.nnunet.predict.predictor_patches import OwnSession, slim_predictor
from nnslim.hosts.nnunet.predict.sliding_window import window_logits
from nnslim.prediction.images import check_complete
from nnslim.running.select import machine_threads

_log = logging.getLogger("nnslim")


def load_predictor(model: Path, config: Any, settings: PredictSettings) -> Any:
    """Return an initialised nnUNetPredictor, compressed by `config` where one is given.

    Raises:
        ModelError, ConfigError, HostError: what cannot be used.
    """
    cls = predictor_class()
    slim = SlimConfig() if config is None else load_config(config)
    chosen = {key: getattr(settings, key) for key in ("backend", "precision", "threads", "export")}
    slim = slim.model_copy(
        update={"run": slim.run.model_copy(update={key: value for key, value in chosen.items() if value is not None})}
    )
    # Read, checked and built here, once: nnU-Net would run code in checkpoints, and reports faults as bare KeyErrors.
    source = read_trained_model(model, settings.folds, settings.checkpoint, trust=settings.trust)
    device = torch.device(settings.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ModelError("device cuda was asked for, but torch finds no CUDA device; use --device cpu")
    with silent():
        predictor = cls(
            tile_step_size=settings.step_size,
            use_mirroring=settings.mirroring,
            device=device,
            allow_tqdm=False,
        )
        predictor.manual_initialization(
            build_network(source),
            source.plans_manager,
            source.configuration_manager,
            source.weights,
            source.dataset,
            source.trainer_name,
            next(iter(source.checkpoints.values())).get("inference_allowed_mirroring_axes"),
        )
    slim_predictor(predictor, OwnSession(slim), str(model), Path(model))
    predictor.nnslim_export = slim.run.export
    if slim.run.backend != "stock":
        # On this object alone: nothing of nnU-Net's class is touched outside a context.
        predictor._internal_predict_sliding_window_return_logits = functools.partial(
            window_logits, predictor, batch=slim.run.tile_batch, contiguous=slim.run.export == "stock"
        )
    return predictor


def streams(predictor: Any) -> bool:
    """Return whether a predictor of `load_predictor` exports, and so preprocesses, in our way."""
    return getattr(predictor, "nnslim_export", "stock") == "streamed"


def write_segmentation(
    predictor: Any, logits: torch.Tensor, properties: dict[str, Any], path: Path, threads: int | None = None
) -> None:
    """Resample logits to the image's geometry, label, and write.

    Args:
        predictor: an initialised nnUNetPredictor.
        logits: (heads, *spatial) on the CPU, at the model's spacing.
        properties: nnU-Net's, of the case.
        path: file to write, with the dataset's ending.
        threads: of torch, for the resampling; None: all.
    Raises:
        OutputError: it cannot be written.
    """
    truncated = Path(str(path).removesuffix(predictor.dataset_json["file_ending"]))
    try:
        with silent():
            write_prediction(
                predictor,
                logits,
                properties,
                truncated,
                streamed=streams(predictor),
                threads=threads or machine_threads(),
            )
    except RuntimeError as error:  # SimpleITK's way to report a failed write
        raise OutputError(f"cannot write {path}: {' '.join(str(error).split())[-300:]}") from error
    try:
        check_complete(path)  # ITK writes what fits on a full disk, and says nothing
    except InputError as error:
        raise OutputError(f"cannot write {path}: it came out cut short; the disk is probably full") from error
