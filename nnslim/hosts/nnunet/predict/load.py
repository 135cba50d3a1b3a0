"""A loaded predictor, and the three stages of a case with it."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from nnslim.errors import InputError, ModelError
from nnslim.hosts.nnunet.cases.preprocess import preprocess_case, silent
from nnslim.hosts.nnunet.cases.write_labels import write_segmentation
from nnslim.hosts.nnunet.model.compatibility import predictor_class
from nnslim.hosts.nnunet.model.slim_plans import with_filters
from nnslim.hosts.nnunet.model.trained_model import build_network, read_trained_model
from nnslim.hosts.nnunet.predict.predict_settings import PredictSettings
from nnslim.hosts.nnunet.predict.predictor_patches import own_session, slim_predictor
from nnslim.hosts.nnunet.predict.sliding_window import window_logits
from nnslim.prediction.case import Case
from nnslim.running.engine import Settings
from nnslim.running.machine import machine_threads
from nnslim.running.runner import Runner

_log = logging.getLogger("nnslim")


def load_predictor(model: Path, config: Any, settings: PredictSettings, began: Mapping[str, Any] | None = None) -> Any:
    """Return an initialised nnUNetPredictor, compressed by `config` where one is given.

    Args:
        began: see `own_session`.
    Raises:
        ModelError, ConfigError, HostError, InputError: what cannot be used.
    """
    named = ("backend", "precision", "threads", "export")
    chosen = {key: getattr(settings, key) for key in named} | {"deterministic": settings.deterministic or None}
    session = own_session(config, chosen, began or {})
    # Read, checked and built here, once: nnU-Net would run code in checkpoints, and reports faults as bare KeyErrors.
    source = read_trained_model(model, settings.folds, settings.checkpoint, trust=settings.trust)
    source = with_filters(source, settings.out_filters, settings.in_filters)
    device = torch.device(settings.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ModelError("device cuda was asked for, but torch finds no CUDA device; use --device cpu")
    run = session.config.run
    with silent():
        base = predictor_class()

    class SettledPredictor(base):  # type: ignore[misc, valid-type]
        """nnU-Net's predictor with our sliding window; the backend "stock" keeps nnU-Net's."""

        export = run.export

        def _internal_predict_sliding_window_return_logits(
            self, data: torch.Tensor, slicers: Sequence[Any], do_on_device: bool = True
        ) -> torch.Tensor:
            if run.backend == "stock":
                return super()._internal_predict_sliding_window_return_logits(data, slicers, do_on_device)
            return window_logits(self, data, slicers, do_on_device, run.tile_batch, contiguous=run.export == "stock")

    with silent():
        predictor = SettledPredictor(
            tile_step_size=settings.step_size, use_mirroring=settings.mirroring, device=device, allow_tqdm=False
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
    mirrors = settings.mirroring and not session.config.recovery.one_pass
    axes = predictor.allowed_mirroring_axes if mirrors else None
    mirrored = f"mirrored in {2 ** len(axes)} ways" if axes else "not mirrored"
    _log.info("device %s, %s, backend %s, precision %s", device, mirrored, run.backend, run.precision)
    slim_predictor(predictor, session, str(model), Path(model))
    return predictor


@dataclass(frozen=True)
class NNUNetModel:
    """A predictor from `load_predictor`, stage by stage; implements `nnslim.prediction.case.Model`."""

    predictor: Any
    settings: PredictSettings

    @property
    def streamed(self) -> bool:
        """Whether it exports labels without full-size scores, and so preprocesses without large copies."""
        return self.predictor.export == "streamed"

    def read(self, case: Case) -> tuple[Any, dict[str, Any]]:
        """Return (channels, *spatial) preprocessed data and nnU-Net's properties."""
        previous = self.settings.previous_stage and self.settings.previous_stage / case.target
        data, properties = preprocess_case(self.predictor, list(case.files), previous, lean=self.streamed, finite=False)
        if len(properties.get("sitk_stuff", {}).get("spacing", ())) > 3:  # its reader takes them, its writer does not
            raise InputError(f"{case.files[0].name} has 4 axes; nnU-Net cannot write labels for it, only for 3")
        return data, properties

    def forward(self, case: Case, data: tuple[Any, dict[str, Any]]) -> tuple[Any, dict[str, Any]]:
        """Return (heads, *spatial) logits on the CPU, and the properties."""
        array, properties = data
        with silent():
            return self.predictor.predict_logits_from_preprocessed_data(torch.from_numpy(array)), properties

    def write(self, case: Case, result: tuple[Any, dict[str, Any]], beside: Path) -> None:
        """Resample the logits to the image, label, and write."""
        threads = self.settings.threads or machine_threads()
        write_segmentation(self.predictor, *result, beside, streamed=self.streamed, threads=threads)

    def run(self) -> dict[str, Any]:
        """See `Model`."""
        return run_facts([self.predictor.network])


def run_facts(networks: Sequence[torch.nn.Module]) -> dict[str, Any]:
    """Return "backend", "precision" and "threads" of networks that run; see `Record`."""
    held = [network for network in networks if isinstance(network, Runner)]
    backends = "+".join(sorted({runner.backend for runner in held})) or "stock"
    settings = held[0].settings if held else Settings()
    return {"backend": backends, "precision": settings.precision, "threads": settings.threads or machine_threads()}
