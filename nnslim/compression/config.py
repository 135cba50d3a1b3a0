"""SlimConfig: which methods, with which settings, and how the slim network is run and kept."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import pydantic
import torch
from pydantic import BaseModel, ConfigDict, Field, SerializeAsAny, field_validator, model_validator

from nnslim.errors import ConfigError, nearest
from nnslim.files import read_yaml, sha256_of
from nnslim.methods.base import MethodConfig, method_named, methods
from nnslim.running.engine import Backend, Precision, Settings

CONFIG_VERSION = 1
_LEGACY = {"tucker_args", "apply_tucker", "inference_bs", "ckpt_path", "save_model", "load_model"}
# Keys of tucker-cnn's files for its scripts, around that dictionary.
_LEGACY_FILE = {"tucker_config", "out_root", "out_id", "label_root", "metric_csv_path", "eval_workers", "fast_model"}
_LEGACY_FILE |= {"dataset_id", "pretrained_weights", "epochs", "learning_rate", "optimizer"}

_log = logging.getLogger("nnslim")


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class RunConfig(_Section):
    """How the network runs."""

    backend: Backend = Field("auto", description="stock (untouched), eager, compile, openvino; auto: the fastest here")
    precision: Precision = Field(
        "f32", description="bf16, f16, int8 need the openvino backend on a CPU; on CUDA f32 is float16 autocast"
    )
    threads: int | None = Field(None, ge=1, description="CPU threads; default: all that the process may use")
    tile_batch: int = Field(1, ge=1, description="tiles per forward pass")
    keep_models: bool = Field(False, description="models loaded in a context serve later predictors of the same folder")
    export: Literal["streamed", "stock"] = Field(
        "streamed",
        description="streamed: labels without full-size scores, preprocessing without float64 copies; stock: nnU-Net's",
    )
    processes: Literal["auto", "stock"] = Field(
        "auto", description="auto: one image alone is read and exported in this process; stock: by nnU-Net's workers"
    )
    guard: bool = Field(True, description="measure dense and slim here; layers that make it slower stay dense")
    deterministic: bool = Field(
        False, description="the same bytes, run after run on one machine: nothing is chosen by measuring"
    )

    def settings(self) -> Settings:
        """Return what the running side needs."""
        return Settings(self.backend, self.precision, self.threads, self.deterministic)

    @property
    def measures(self) -> bool:
        """Whether a guard may decide by time which layers stay dense."""
        return self.guard and not self.deterministic


class CacheConfig(_Section):
    """Where compressed weights are kept between runs."""

    folder: Path | None = Field(None, description="default: NNSLIM_CACHE, else nnslim in the user's cache folder")
    read: bool = Field(True, description="use weights that are already there")
    write: bool = Field(True, description="keep what was compressed")


class CalibrationConfig(_Section):
    """Unlabelled images: for fitting the weights and for measuring agreement with the dense model."""

    images: Path | None = Field(None, description="folder, as for prediction; default: none, fit by the weights alone")
    count: int = Field(8, ge=1, le=32, description="images for the statistics, at most")
    tiles_per_image: int = Field(2, ge=1, description="sliding-window tiles of each image, at most")
    mirrored: bool | None = Field(
        None,
        description="whether mirrored answers are judged, and tiles mirrored too; default: as nnU-Net predicts, where "
        "the model may be mirrored; false: for --disable_tta",
    )
    seed: int = Field(0, ge=0, description="for the choice of images, tiles and positions, and for augmentation")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto: a GPU where there is one")

    def torch_device(self) -> torch.device:
        """Return the device to compute on.

        Raises:
            ConfigError: it is a GPU, and there is none.
        """
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ConfigError("device cuda was asked for, but torch finds no CUDA device; use cpu or auto")
        return torch.device("cuda" if self.device != "cpu" and torch.cuda.is_available() else "cpu")


class RecoveryConfig(_Section):
    """How accuracy is recovered without labels, in order of cost; skipped without calibration images."""

    compensate: bool = Field(True, description="refit dense layers after compressed ones (ridge, closed form)")
    norms: bool = Field(False, description="recalibrate the affine weights of norm layers")
    block_steps: int = Field(0, ge=0, description="steps that learn the dense outputs of each resolution stage")
    steps: int = Field(0, ge=0, description="steps that learn the dense logits")
    images: int = Field(40, ge=1, description="images to learn from, at most, including the calibration images")
    batch_size: int = Field(2, ge=1, description="patches per step; 1 is slow on CPUs (torch's slow convolutions)")
    learning_rate: float = Field(5e-4, gt=0, description="AdamW's; warm-up, then cosine to 0")
    mirrored_teacher: bool = Field(
        True, description="learn the mean of the dense answers to mirror images, where the model may be mirrored"
    )
    teacher: Literal["auto", "live"] = Field(
        "auto",
        description="live: the dense network answers each patch; auto: it predicts each image once, whole, and the "
        "prediction is augmented with the image, where that takes at most twice as many passes",
    )
    target: Literal["same", "mirrored", "ensemble"] = Field(
        "same",
        description="same: the slim model predicts as the dense one; mirrored: it learns the mirrored answer, and "
        "gives it in one pass; ensemble: one slim fold learns the mean of all folds' answers, mirrored where the model "
        "may be mirrored, and gives it in one pass",
    )
    precision: Literal["auto", "f32", "bf16"] = Field(
        "auto", description="while learning; auto: bf16 where the device is fast in it"
    )
    seconds: float | None = Field(None, gt=0, description="time budget; the result then depends on the machine's speed")
    every: int = Field(50, ge=1, description="steps between two measurements of agreement")
    patience: int = Field(0, ge=0, description="stop after this many measurements without a gain; 0: never")
    workers: int = Field(0, ge=0, description="processes for augmentation; 0: this process")

    @property
    def learns(self) -> bool:
        """Whether there are gradient steps to take."""
        return self.steps + self.block_steps > 0

    @property
    def sees_mirrored(self) -> bool:
        """Whether the answers to learn are those to mirror images."""
        return self.mirrored_teacher or self.target == "mirrored"

    @property
    def one_pass(self) -> bool:
        """Whether the slim model gives in one pass what the dense one gives in several, and is not to be mirrored."""
        return self.target != "same"


class MethodEntry(_Section):
    """One step: the name of a method and its settings, e.g. {"method": "tucker", "rank_factor": 0.5}."""

    method: str
    settings: SerializeAsAny[MethodConfig]


class SlimConfig(_Section):
    """The whole configuration. `methods` are applied in order; an empty list, or apply: false, leaves models dense."""

    version: int = CONFIG_VERSION
    apply: bool = Field(True, description="false: the context is entered, but models stay as they are")
    methods: tuple[MethodEntry, ...] = ()
    calibration: CalibrationConfig = CalibrationConfig()
    recovery: RecoveryConfig = RecoveryConfig()
    run: RunConfig = RunConfig()
    cache: CacheConfig = CacheConfig()
    store: Literal["as-is", "half"] = Field(
        "as-is", description="weights on disk: as-is, in the dense model's precision; half: float16, half the size"
    )

    @field_validator("methods", mode="before")
    @classmethod
    def _read_methods(cls, raw: Any) -> Any:
        if not isinstance(raw, (list, tuple)):
            raise ConfigError(f"'methods' is a list of objects with a 'method' each, found {raw!r}")
        return tuple(_method_entry(item) for item in raw)

    @model_validator(mode="after")
    def _learns_its_target(self) -> SlimConfig:
        """Refuse a target that nothing learns, or that is judged otherwise."""
        target = self.recovery.target
        if self.recovery.one_pass and not self.recovery.learns:
            raise ConfigError(f"recovery.target: {target} is learned: give recovery.steps, such as 400")
        if target == "mirrored" and self.calibration.mirrored is False:
            raise ConfigError("recovery.target: mirrored does not go with calibration.mirrored: false")
        return self

    @model_validator(mode="after")
    def _measures_no_time(self) -> SlimConfig:
        """Refuse what depends on time where the result shall not."""
        timed = [entry.method for entry in self.methods if entry.settings.timed]
        timed += ["recovery.seconds"] if self.recovery.seconds is not None else []
        if self.run.deterministic and timed:
            raise ConfigError(f"run.deterministic does not go with a budget of time, found one in {timed[0]}")
        return self

    @property
    def active(self) -> bool:
        """Whether networks change."""
        return self.apply and bool(self.methods)

    @property
    def training(self) -> MethodEntry | None:
        """The method that works while a network trains, or None."""
        return next((entry for entry in self.methods if method_named(entry.method).trains), None)

    def for_trained(self) -> SlimConfig:
        """Return the configuration for a trained model: without methods that work only in training."""
        left = tuple(entry for entry in self.methods if not method_named(entry.method).trains)
        return self.model_copy(update={"methods": left})

    def identity(self) -> dict[str, Any]:
        """Return what the compressed weights depend on, as JSON values: methods, and how data are used.

        The images themselves are not part of it, see `Calibration.fingerprint`.
        """
        if not self.active:
            return {"methods": []}
        made: dict[str, Any] = {"methods": [entry.model_dump(mode="json") for entry in self.methods]}
        paths = [value for entry in self.methods for _, value in entry.settings if isinstance(value, Path)]
        if plans := [path for path in paths if path.is_file()]:  # edited by hand under the same name
            made["plans"] = [sha256_of(path) for path in plans]
        if self.calibration.images is not None:
            made |= self.data_identity()
        if self.store != "as-is":
            made["store"] = self.store
        return made

    def data_identity(self) -> dict[str, Any]:
        """Return how data are used, as JSON values."""
        calibration = self.calibration.model_dump(mode="json", exclude={"images"})
        return {"calibration": calibration, "recovery": self.recovery.model_dump(mode="json", exclude={"workers"})}

    def judged_as(self, mirrored: bool) -> SlimConfig:
        """Return the configuration for a model that will predict mirrored or not, unless it says so itself."""
        if self.calibration.images is None or self.calibration.mirrored is not None:
            return self
        return self.model_copy(update={"calibration": self.calibration.model_copy(update={"mirrored": mirrored})})

    def with_images(self, images: Path | None) -> SlimConfig:
        """Return the configuration with another folder of calibration images; unchanged for None."""
        if images is None:
            return self
        return self.model_copy(update={"calibration": self.calibration.model_copy(update={"images": Path(images)})})


def training_settings(config: SlimConfig, method: str) -> MethodConfig:
    """Return a configuration's settings of a method that works in training; a ConfigError says what is wrong."""
    if not method_named(method).trains:
        known = ", ".join(name for name, one in methods().items() if one.trains)
        raise ConfigError(f"{method} needs no training: use nnslim compress; methods for training: {known}")
    found = [entry.settings for entry in config.methods if entry.method == method]
    if not found:
        raise ConfigError(f"the configuration has no method {method}")
    return found[0]


def changed_settings(settings: BaseModel, changes: Mapping[str, Any], where: str) -> Any:
    """Return settings with some values changed, checked as a whole; a ConfigError names the key that is wrong."""
    return _validated(type(settings), {**dict(settings), **changes}, where)


def tucker(**settings: Any) -> SlimConfig:
    """Return a configuration with the Tucker method alone: `tucker(rank_factor=0.5)`."""
    return from_dict({"methods": [{"method": "tucker", **settings}]})


def _method_entry(item: Any) -> MethodEntry:
    if isinstance(item, MethodEntry):
        return item
    if isinstance(item, MethodConfig):
        for method in methods().values():
            if type(item) is method.config_class:
                return MethodEntry(method=method.name, settings=item)
    if not isinstance(item, Mapping) or "method" not in item:
        raise ConfigError(f"each of 'methods' is an object with a 'method', found {item!r}")
    method = method_named(str(item["method"]))
    settings = {key: value for key, value in item.items() if key != "method"}
    return MethodEntry(method=method.name, settings=_validated(method.config_class, settings, f"method {method.name}"))


def _validated(model: type[BaseModel], values: Mapping[str, Any], where: str) -> Any:
    try:
        return model.model_validate(dict(values))
    except pydantic.ValidationError as error:
        problem = error.errors()[0]
        key = ".".join(str(part) for part in problem["loc"]) or where
        if problem["type"] == "extra_forbidden":
            known = _known_keys(model, problem["loc"])
            raise ConfigError(f"{where}: unknown key '{key}'; {nearest(str(problem['loc'][-1]), known)}") from None
        raise ConfigError(f"{where}: {key}: {problem['msg']}, found {problem.get('input')!r}") from None


def _known_keys(model: type[BaseModel], location: tuple[Any, ...]) -> list[str]:
    for part in location[:-1]:
        inner = model.model_fields[str(part)].annotation
        if not (isinstance(inner, type) and issubclass(inner, BaseModel)):
            break
        model = inner
    return list(model.model_fields)


def from_dict(raw: Mapping[str, Any], where: str = "config") -> SlimConfig:
    """Read a configuration dictionary, ours or tucker-cnn's, or the content of one of its files.

    Raises:
        ConfigError: an unknown method or key (the nearest are named), or a value out of bounds.
    """
    if not isinstance(raw, Mapping):
        raise ConfigError(f"{where}: expected keys and values, found {raw!r}")
    if "tucker_config" in raw:
        if unknown := sorted(set(raw) - _LEGACY_FILE):
            raise ConfigError(f"{where}: unknown key '{unknown[0]}'; {nearest(unknown[0], _LEGACY_FILE)}")
        return from_dict(raw["tucker_config"], f"{where}: tucker_config")
    if _LEGACY & set(raw):
        return _from_legacy(raw, where)
    if raw.get("version", CONFIG_VERSION) != CONFIG_VERSION:
        raise ConfigError(f"{where}: version {raw['version']!r} found, this nnslim reads version {CONFIG_VERSION}")
    return _validated(SlimConfig, raw, where)


def _from_legacy(raw: Mapping[str, Any], where: str) -> SlimConfig:
    """Translate the dictionary of tucker-cnn's TuckerContext.

    Its `ckpt_path` names a TorchScript file. Here that file's folder becomes the cache, which keeps folds and models
    apart; `save_model` and `load_model` say whether the cache is written and read.
    """
    if unknown := set(raw) - _LEGACY:
        word = sorted(unknown)[0]
        raise ConfigError(f"{where}: unknown key '{word}' beside tucker-cnn's; {nearest(word, _LEGACY)}")
    arguments = raw.get("tucker_args") or {}
    if not isinstance(arguments, Mapping):
        raise ConfigError(f"{where}: 'tucker_args' holds keys and values, found {arguments!r}")
    made = {
        "apply": bool(raw.get("apply_tucker", True)),
        "methods": [{"method": "tucker", **arguments}],
        "run": {"tile_batch": raw.get("inference_bs", 1)},
    }
    if path := raw.get("ckpt_path"):
        used = {"read": bool(raw.get("load_model", False)), "write": bool(raw.get("save_model", False))}
        made["cache"] = {"folder": Path(path).parent / "nnslim", **used}
    return _validated(SlimConfig, made, where)


def presets() -> dict[str, Path]:
    """Return the presets that ship with nnslim, by name: inside an installed package, or `configs/` of the sources."""
    package = Path(__file__).resolve().parents[1]
    inside = package / "configs"
    folder = inside if inside.is_dir() else package.parent / "configs"
    return {path.stem: path for path in sorted(folder.glob("*.yml"))}


def default_config(images: str | Path | None) -> str:
    """Return the preset that is meant where none is named, and log which it is and what to expect of it."""
    if images is None:
        _log.info(
            "no config is named: tucker-balanced, which keeps half of the channels as ranks. Without images (-i) the "
            "weights alone decide: in our measurements this cost 0.02 of Dice with 2 classes, and most of it with 41"
        )
        return "tucker-balanced"
    _log.info(
        "no config is named: tucker-auto, which searches for the fewest MACs with an estimated drop in Dice of at most "
        "0.005; it takes a quarter of an hour for a small network, longer for a large one"
    )
    return "tucker-auto"


def load_config(config: SlimConfig | MethodConfig | Mapping[str, Any] | str | Path) -> SlimConfig:
    """Return a SlimConfig from any form in which a user may give it.

    Args:
        config: a SlimConfig, the configuration of one method, a dictionary (ours or tucker-cnn's), the path of a YAML
            file (a relative path of a plan in it is looked for in the current folder, then in the file's own), or the
            name of a preset.
    Raises:
        ConfigError: no such preset or file, neither YAML nor JSON, unknown key, value out of bounds.
    """
    if isinstance(config, SlimConfig):
        return config
    if isinstance(config, MethodConfig):
        return SlimConfig(methods=(config,))
    if isinstance(config, Mapping):
        return from_dict(config)
    if not isinstance(config, (str, Path)):
        raise ConfigError(f"a config is a preset name, YAML path, dictionary or SlimConfig, found {config!r}")
    known = presets()
    name = str(config)
    path = known.get(name, Path(name))
    if not path.is_file():
        kind = "file" if "/" in name or path.suffix in (".yml", ".yaml") else "preset or file"
        raise ConfigError(f"no config {kind} '{name}'; {nearest(name, known)}")
    raw = read_yaml(path, ConfigError)
    read = from_dict(raw if raw is not None else {}, str(path))
    entries = []
    for entry in read.methods:
        paths = {key: value for key, value in entry.settings if isinstance(value, Path) and not value.exists()}
        moved = {key: path.parent / value for key, value in paths.items()}  # an absolute path stays as it is
        entries.append(entry.model_copy(update={"settings": entry.settings.model_copy(update=moved)}))
    return read.model_copy(update={"methods": tuple(entries)})
