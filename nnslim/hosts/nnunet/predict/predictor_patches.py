"""The patches on nnUNetPredictor: every model that it loads is compressed by the context in force, and may be kept."""

from __future__ import annotations

import functools
import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nnslim.compression.cache import cache_folder, cache_key, recall_weights, store_weights
from nnslim.compression.compress_network import Slimmed, StateDict, compress
from nnslim.compression.config import RunConfig, SlimConfig, changed_settings, load_config
from nnslim.compression.guard import Guard
from nnslim.compression.model_report import ModelReport, Report
from nnslim.errors import OutputError, SpecError
from nnslim.hosts.nnunet.cases.calibration_tiles import calibration_of, images_fingerprint
from nnslim.hosts.nnunet.model.checked_plans import LimitedBuild, check_directory
from nnslim.hosts.nnunet.model.compatibility import predictor_class
from nnslim.hosts.nnunet.model.slim_plans import refuse_changed_plans, trained_base
from nnslim.hosts.nnunet.predict.sliding_window import window_logits
from nnslim.network.walk import is_compiled, unwrap
from nnslim.patching import AttributePatch
from nnslim.running.engine import check_precision
from nnslim.running.runner import Runner, kept_random_state

_log = logging.getLogger("nnslim")
_MOST = 8  # models that are kept, the latest used; TotalSegmentator has five parts and a rough one
_TRAINS_ONLY = "its method works while a network trains, and does nothing to a trained model"
# What initialize_from_trained_model_folder sets, in every version that we know.
_LOADED = (
    "plans_manager",
    "configuration_manager",
    "list_of_parameters",
    "network",
    "dataset_json",
    "trainer_name",
    "allowed_mirroring_axes",
    "label_manager",
)


class KeptPredictors(OrderedDict[tuple[Any, ...], dict[str, Any]]):
    """Loaded models that outlive the predictor that loaded them: the next one of the same folder gets them at once.

    TotalSegmentator makes a new predictor, and reads its weights again, for every image and every one of its parts.
    One network serves all predictors that share it, in turn.
    """

    def give(self, predictor: Any, key: tuple[Any, ...]) -> bool:
        """Hand the predictor what is kept under the key; return whether there was anything."""
        if key not in self:
            return False
        self.move_to_end(key)
        for name, value in self[key].items():
            setattr(predictor, name, value)
        return True

    def keep(self, predictor: Any, key: tuple[Any, ...]) -> None:
        """Keep what the predictor has loaded."""
        self[key] = {name: getattr(predictor, name) for name in _LOADED}
        if len(self) > _MOST:
            self.popitem(last=False)


@dataclass(eq=False)
class Session:
    """A configuration, what was done with it model by model, and the models that are kept."""

    config: SlimConfig
    report: Report = field(default_factory=Report)
    kept: KeptPredictors = field(default_factory=KeptPredictors)


def own_session(config: Any, run: dict[str, Any], began: Mapping[str, Any]) -> Session:
    """Return a session for what NNSlimContext takes, or None.

    Args:
        run: settings that are changed, where they are not None.
        began: how an interrupted run began, see `Record`: its backend is kept where nothing else is asked for, and
            its threads where results must not change.
    """
    slim = SlimConfig() if config is None else load_config(config)
    run = {**dict(slim.run), **{key: value for key, value in run.items() if value is not None}}
    if run["backend"] == "auto":
        run["backend"] = began.get("backend", "auto")
    if run["deterministic"] and run["threads"] is None:
        run["threads"] = began.get("threads")
    return Session(changed_settings(slim, {"run": changed_settings(slim.run, run, "run")}, "config"))


def predictor_patches(current: Callable[[], Session | None], prepare: Callable[[], None]) -> list[AttributePatch]:
    """Return the patches, not yet applied.

    Only methods that TotalSegmentator leaves alone are replaced, and on the class: whoever imported the class before
    gets them, too. Each replacement asks `current` at call time, so one set of patches serves nested contexts and
    several threads.

    Args:
        current: returns the session in force for the calling thread, or None to leave the model as it is.
        prepare: called whenever a model is made ready.
    Raises:
        HostError: nnU-Net is missing or not one that we know; nothing is changed.
    """
    cls = predictor_class()

    def from_folder(original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def initialize_from_trained_model_folder(
            self: Any, model_training_output_dir: str, use_folds: Any, checkpoint_name: str = "checkpoint_final.pth"
        ) -> Any:
            session = current()
            keeps = session is not None and session.config.run.keep_models
            key = loading_key(self, model_training_output_dir, use_folds, checkpoint_name) if keeps else ()
            if keeps and session.kept.give(self, key):
                prepare()
                return None
            if session is not None:
                check_directory(Path(model_training_output_dir))  # nnU-Net would import and call whatever plans name
            with nullcontext() if session is None else LimitedBuild(model_training_output_dir):
                result = original(self, model_training_output_dir, use_folds, checkpoint_name)
            prepare()
            if session is not None:
                folder = str(model_training_output_dir)
                slim_predictor(self, session, folder, Path(folder))
            if keeps:
                session.kept.keep(self, key)
            return result

        return initialize_from_trained_model_folder

    def manually(original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def manual_initialization(self: Any, *given: Any, **named: Any) -> Any:
            result = original(self, *given, **named)
            prepare()
            if (session := current()) is not None:
                slim_predictor(self, session, f"{self.plans_manager.dataset_name} ({self.trainer_name}, in memory)")
            return result

        return manual_initialization

    def window(original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def _internal_predict_sliding_window_return_logits(
            self: Any, data: torch.Tensor, slicers: Sequence[Any], do_on_device: bool = True
        ) -> torch.Tensor:
            session = current()
            if session is None or not session.config.apply or _untouched(session.config.run):
                return original(self, data, slicers, do_on_device)
            run = session.config.run
            return window_logits(self, data, slicers, do_on_device, run.tile_batch, contiguous=run.export == "stock")

        return _internal_predict_sliding_window_return_logits

    return [
        AttributePatch(cls, "initialize_from_trained_model_folder", from_folder),
        AttributePatch(cls, "manual_initialization", manually),
        AttributePatch(cls, "_internal_predict_sliding_window_return_logits", window),
    ]


@kept_random_state()
def slim_predictor(predictor: Any, session: Session, source: str, folder: Path | None = None) -> None:
    """Replace the network and the fold weights of an initialised predictor, and report it.

    nnU-Net loads `list_of_parameters` into the network again for every case and fold, so both are replaced together.
    A trainer hands over its own network and no parameters: the predictor then gets a slim copy, and the trainer's
    network is not touched.

    Args:
        source: what the report calls the model. folder: of the model, where it has one.
    Raises:
        BackendError: the precision that was asked for is not available here, or goes wrong for this network.
        ConfigError: int8 without images to calibrate it on.
    """
    from nnunetv2.utilities.label_handling.label_handling import determine_num_input_channels

    compiled = is_compiled(predictor.network)
    dense = unwrap(predictor.network)
    # A DataParallel-trained checkpoint may carry "module." prefixes; nnU-Net would refuse it before us.
    given = predictor.list_of_parameters
    folds: list[StateDict] = list(given) if given else [dense.state_dict()]
    mirrored = bool(predictor.use_mirroring and predictor.allowed_mirroring_axes)
    config = session.config.for_trained().judged_as(mirrored)
    refuse_changed_plans(config, predictor.configuration_manager)
    started = time.perf_counter()
    slimmed, cached, speed = None, False, None
    plans, configuration = predictor.plans_manager, predictor.configuration_manager
    channels = determine_num_input_channels(plans, configuration, predictor.dataset_json)
    shape = (1, channels, *configuration.patch_size)
    base, note = _base(session.config, dense, folds)
    if given and note == _TRAINS_ONLY and all(model.note != note for model in session.report.models):
        _log.warning("NNSlimContext: %s; models are predicted with as they are", note)
    if base is not None:
        slimmed, cached = _compress_or_recall(predictor, base, folds, config, shape)
        speed = slimmed.speed
        if slimmed.refused:
            slimmed, note = None, f"the slim model would be slower here: {speed}"
    network = dense if slimmed is None else slimmed.network
    if slimmed is not None and given:
        predictor.list_of_parameters = list(slimmed.weights)
    if slimmed is not None and config.recovery.one_pass:
        predictor.allowed_mirroring_axes = None  # one pass gives the mirrored answer
    if not config.apply or _untouched(config.run):
        network = torch.compile(network) if compiled else network
    elif slimmed is not None or given:  # a trainer's own network goes on learning: an engine would keep old weights
        settings = config.run.settings()
        check_precision(network, shape, settings, predictor.device)
        if slimmed is None and settings.precision != "f32":
            note += f"; it runs in {settings.precision}"
        if settings.precision == "int8":
            from nnslim.hosts.nnunet.export.export_model import prepare_int8

            prepare_int8(predictor, network, slimmed.weights if slimmed else folds, shape, config, folder)
        if compiled and settings.backend == "auto":  # nnUNet_compile asks for it
            settings = replace(settings, backend="compile")
        network = Runner(network.eval(), settings)
    predictor.network = network
    seconds = time.perf_counter() - started
    session.report.models.append(ModelReport(source, len(folds), slimmed, seconds, cached, note, speed))
    for line in session.report.models[-1].lines():
        _log.info(line)


def _base(config: SlimConfig, network: nn.Module, folds: Sequence[StateDict]) -> tuple[nn.Module | None, str]:
    """Return what there is to compress, or None and why the model is left as it is."""
    if not config.apply:
        return None, "compression is switched off"
    if not config.for_trained().active:
        return None, _TRAINS_ONLY if config.training else "no method is named"
    try:
        return trained_base(network, folds)[0], ""
    except SpecError as error:
        return None, str(error)


def loading_key(predictor: Any, folder: str, folds: Any, checkpoint_name: str) -> tuple[Any, ...]:
    """Return what decides the content of a loaded predictor: folder, files as they are now, device and mirroring."""
    path = Path(folder).resolve()
    files = sorted(path.glob("*.json")) + sorted(path.glob(f"fold_*/{checkpoint_name}"))
    state = tuple((str(file), (stat := file.stat()).st_mtime_ns, stat.st_size) for file in files)
    wanted = folds if folds is None or isinstance(folds, (str, int)) else tuple(folds)
    return str(path), wanted, checkpoint_name, str(predictor.device), bool(predictor.use_mirroring), state


def _untouched(run: RunConfig) -> bool:
    return run.backend == "stock" and run.tile_batch == 1 and run.precision == "f32"


def _compress_or_recall(
    predictor: Any, network: nn.Module, folds: Sequence[StateDict], config: SlimConfig, shape: Sequence[int]
) -> tuple[Slimmed, bool]:
    folder = cache_folder(config)
    key = cache_key(network, folds, config, shape, images_fingerprint(config))
    guard = Guard(config.run.settings(), predictor.device) if config.run.measures else None
    if config.cache.read and (found := recall_weights(network, key, folder, guard)) is not None:
        return found, True
    with calibration_of(predictor, config) as data:
        slimmed = compress(network, folds, config, shape, data=data, guard=guard)
    if config.cache.write:
        try:
            store_weights(slimmed, key, folder)
        except OutputError as error:  # a full or read-only cache must not stop a prediction
            _log.warning("compressed weights are not kept: %s", error)
    return slimmed, False
