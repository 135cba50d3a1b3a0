"""How a training runs: one class, and one environment variable that hands it to trainers which nnU-Net starts."""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, field_validator, model_validator

from nnslim.compression.config import changed_settings, load_config, presets
from nnslim.errors import ConfigError, nearest
from nnslim.inflation.window_net import WindowConfig
from nnslim.methods.base import MethodConfig
from nnslim.methods.sauron import SauronConfig
from nnslim.methods.token_sparse.config import TokenSparseConfig

VARIABLE = "NNSLIM_TRAINING"
# What a fine-tuning does where nothing else is said.
FINETUNING = {"epochs": 50, "optimizer": "adamw", "learning_rate": 1e-4}
FINETUNING |= {"schedule": "constant", "precision": "auto", "seed": 0}
_log = logging.getLogger("nnslim")


class DAEFormerConfig(MethodConfig):
    """What the trainer of DAEFormer builds and how it learns; by default as Embedded-ViT was published."""

    form: str = Field("224", description="full, 224, 128, 64, and each with -dense")
    patch_size: Literal["form", "plans"] | tuple[int, int] = Field(
        "form", description="the slices that the form is published for, the plans' patch, or [height, width]"
    )
    epochs: int = Field(400, ge=1)
    learning_rate: float = Field(0.05, gt=0)
    weight_decay: float = Field(1e-4, ge=0)

    @field_validator("form", mode="before")
    @classmethod
    def _number(cls, value: Any) -> str:
        return str(value)  # YAML reads 128 as a number


KINDS: dict[str, type[MethodConfig]] = {"sauron": SauronConfig, "token_sparse": TokenSparseConfig}
KINDS |= {"window": WindowConfig, "daeformer": DAEFormerConfig}
# What every trainer of nnslim takes, whatever its kind.
SHARED = ("epochs", "iterations", "validation_iterations", "batch_size", "learning_rate", "weight_decay")
SHARED += ("accumulate", "warmup_steps", "gradient_clip", "precision", "seed", "run_name")


class TrainingSettings(MethodConfig):
    """How a training runs; None: as the trainer, the plans or `FINETUNING` say."""

    epochs: int | None = Field(None, ge=1, description="in all")
    iterations: int | None = Field(None, ge=1, description="per epoch")
    validation_iterations: int | None = Field(None, ge=1, description="per epoch")
    batch_size: int | None = Field(None, ge=1, description="patches per iteration, on all GPUs together")
    learning_rate: float | None = Field(None, gt=0, allow_inf_nan=False, description="of the first epoch")
    weight_decay: float | None = Field(None, ge=0, allow_inf_nan=False, description="factor per step")
    accumulate: int = Field(1, ge=1, description="iterations whose gradients make one step of the optimiser")
    warmup_steps: int = Field(0, ge=0, description="steps of the optimiser over which the rate rises from 0")
    gradient_clip: float | None = Field(None, gt=0, le=12, description="norm of a step's gradient; default: nnU-Net's")
    precision: Literal["auto", "f32", "bf16"] | None = Field(
        None, description="on a CPU; auto: bf16 where the processor is fast in it. On CUDA nnU-Net decides"
    )
    seed: int | None = Field(
        None, ge=0, description="of augmentation; a run repeats bit by bit where the variable nnUNet_n_proc_DA is 0"
    )
    run_name: str | None = Field(
        None,
        pattern=r"^[A-Za-z0-9.-]+(_[A-Za-z0-9.-]+)*$",
        description="added to the plans' name, and so to that of the results: TRAINER__PLANS_NAME__CONFIGURATION",
    )
    optimizer: Literal["adamw", "sgd"] | None = Field(None, description="sgd: nnU-Net's, momentum 0.99, Nesterov")
    schedule: Literal["constant", "poly"] | None = Field(None, description="of the rate; poly: nnU-Net's decay to 0")
    teacher: Path | None = Field(None, description="dense model to distil from")
    distill: float = Field(1.0, ge=0, allow_inf_nan=False, description="weight of the distillation term")
    trainer: str | None = Field(None, description="class name; default: the one that the checkpoint names")
    folds: tuple[str, ...] | None = Field(None, description="numbers or all; default: those of the model")
    device: Literal["cpu", "cuda", "mps"] = "cpu"
    num_gpus: int = Field(1, ge=1, description="CUDA devices to train on together")
    resume: bool = Field(False, description="go on where the training stopped")
    validation: bool = Field(False, description="then predict the validation cases, as nnUNetv2_train does")
    checkpoint: str | None = Field(None, description="see `read_trained_model`")
    trust: bool = Field(False, description="see `read_trained_model`")
    processes: int = Field(2, ge=1, description="that preprocess, where the data are not there yet")
    previous_stage: Path | None = Field(None, description="of a cascade: the previous stage's segmentations")
    sauron: SauronConfig | None = None
    token_sparse: TokenSparseConfig | None = None
    window: WindowConfig | None = None
    daeformer: DAEFormerConfig | None = None

    @field_validator("folds", mode="before")
    @classmethod
    def _fold_names(cls, folds: Any) -> Any:
        for fold in folds or ():
            if not (str(fold).isdigit() or fold == "all"):
                raise ValueError(f"fold '{fold}': expected a number or 'all'")
        return tuple(str(fold) for fold in folds) if folds else None

    @model_validator(mode="after")
    def _several_devices(self) -> TrainingSettings:
        if self.num_gpus > 1 and self.device != "cuda":
            raise ValueError(f"num_gpus = {self.num_gpus}: nnU-Net trains on several devices with cuda only")
        return self

    def with_defaults(self, **defaults: Any) -> TrainingSettings:
        """Return the settings with values for what is None."""
        return self.model_copy(update={key: value for key, value in defaults.items() if getattr(self, key) is None})

    def for_kind(self, kind: str) -> TrainingSettings:
        """Return the settings for one kind of trainer: its section and the shared keys agree.

        A shared key that is given wins over the section's; one that is not takes the section's value.
        """
        default = "token-sparse-train" if kind == "token_sparse" else {}
        section = getattr(self, kind) or read_section(kind, default, kind)
        own = section.recipe if kind == "token_sparse" else section
        known = [key for key in SHARED if key in type(own).model_fields]
        given = {key: value for key in known if (value := getattr(self, key)) is not None}
        if kind == "token_sparse" and "learning_rate" in given:
            given["rate_per_256"] = None
        own = own.model_copy(update=given)
        section = section.model_copy(update={"recipe": own}) if kind == "token_sparse" else own
        return self.model_copy(update={**{key: getattr(own, key) for key in known}, kind: section})


def read_settings(text: str, where: str = VARIABLE) -> TrainingSettings:
    """Read settings for a trainer that nnU-Net starts.

    Args:
        text: YAML or JSON, the path of such a file (.yml, .yaml, .json), or a preset. Keys are those of `SHARED` and
            one section per kind of trainer; a section is keys and values, or again a text, a path or a preset.
        where: named in errors.
    Raises:
        ConfigError: unreadable, an unknown key (the nearest is named), or a value out of bounds.
    """
    content, whole = _content(text, where)
    if whole and not (content := {kind: content[kind] for kind in KINDS if kind in content}):
        raise ConfigError(f"{where}: that configuration has no method of {', '.join(KINDS)}")
    for key in content:
        if key in TrainingSettings.model_fields and key not in (*SHARED, *KINDS):
            raise ConfigError(f"{where}: '{key}' is not read here; it is an option of the command that trains")
    sections = {kind: read_section(kind, content[kind], f"{where}: {kind}") for kind in KINDS if kind in content}
    return changed_settings(TrainingSettings(), {**content, **sections}, where)


def settings_in_force(kind: str = "") -> TrainingSettings:
    """Return what NNSLIM_TRAINING says for one kind of trainer; else one of the former variables; else the defaults.

    Without a kind, the shared keys alone count.

    Raises:
        ConfigError: see `read_settings`.
    """
    text = os.environ.get(VARIABLE, "").strip()
    settings = read_settings(text) if text else TrainingSettings()
    if not kind:
        return settings
    former = f"NNSLIM_{kind.upper()}"  # what each kind of trainer had to itself: NNSLIM_SAURON and so on
    if getattr(settings, kind) is None and (text := os.environ.get(former, "").strip()):
        _hint(former, kind)
        section = read_section(kind, {"form": text} if kind == "daeformer" else text, f"{former} = '{text}'")
        settings = settings.model_copy(update={kind: section})
    return settings.for_kind(kind)


@functools.cache
def _hint(former: str, kind: str) -> None:
    _log.info("%s is read; %s='{%s: ...}' does the same for every trainer", former, VARIABLE, kind)


def read_section(kind: str, given: Any, where: str) -> Any:
    """Return the section of one kind of trainer from keys and values, a text, file or preset; see `read_settings`."""
    if isinstance(given, str):
        given, whole = _content(given, where)
        if whole and kind not in given:
            raise ConfigError(f"{where}: that configuration has no method {kind}")
        given = given.get(kind, given)
    if isinstance(given, MethodConfig):
        return given
    if not isinstance(given, Mapping):
        raise ConfigError(f"{where}: expected a YAML file, a preset, or keys and values, found {given!r}")
    return changed_settings(KINDS[kind](), given, where)


def _content(text: str, where: str) -> tuple[Mapping[str, Any], bool]:
    """Return keys and values of a text, file or preset; of a whole configuration its methods, and True."""
    known = presets()
    path = known.get(text, Path(text))
    is_file = text in known or path.suffix in (".yml", ".yaml", ".json")
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8") if is_file else text) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{where}: not readable YAML: {str(error).splitlines()[0]}") from error
    if not isinstance(raw, dict):
        hint = f"; {nearest(raw, known)}" if isinstance(raw, str) else ""
        raise ConfigError(f"{where}: expected a YAML file, a preset, or keys and values, found {raw!r}{hint}")
    if "methods" not in raw:
        return raw, False
    return {entry.method: entry.settings for entry in load_config(path if is_file else raw).methods}, True
