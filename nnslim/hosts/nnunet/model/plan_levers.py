"""What the levers for embedded boards change in plans: stages that go, and a coarser spacing."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from typing import Any

import numpy as np

from nnslim.compression.config import SlimConfig
from nnslim.errors import ConfigError, SpecError
from nnslim.hosts.nnunet.model.slim_plans import resolved
from nnslim.hosts.nnunet.model.trained_model import TrainedModel, managers_of
from nnslim.methods.embedded import DropStageEdit, EmbeddedConfig
from nnslim.methods.embedded.drop_stage import shorter_arguments
from nnslim.methods.embedded.resolution import coarser_settings
from nnslim.network.spec import SlimSpec


def without_stages(model: TrainedModel, spec: SlimSpec) -> tuple[dict[str, Any], SlimSpec]:
    """Return plans of an architecture with fewer stages, and the rest of the spec.

    nnU-Net's trainer reads the strides in the plans (deep supervision), so the plans must tell the stages that are
    there. A model that only dropped stages is then one that nnU-Net loads without nnslim.

    Raises:
        SpecError: stages are dropped after something else has changed the network.
    """
    count = 0
    for edit in spec.edits:
        if not isinstance(edit, DropStageEdit):
            break
        count += edit.stages
    rest = SlimSpec(tuple(edit for edit in spec.edits if not isinstance(edit, DropStageEdit)))
    plans = copy.deepcopy(model.plans)
    if len(rest.edits) == len(spec.edits):
        return plans, rest
    if count != sum(edit.stages for edit in spec.edits if isinstance(edit, DropStageEdit)):
        raise SpecError("stages are dropped first: put embedded with drop_stages before the other methods")
    settings = _settings(model)
    architecture = settings["architecture"]
    architecture["arch_kwargs"] = shorter_arguments(architecture["arch_kwargs"], count)
    return _with_settings(plans, model.configuration, settings), rest


def coarser_model(model: TrainedModel, config: SlimConfig) -> TrainedModel:
    """Return the model with plans of the coarser spacing that a configuration asks for, and the weights as they are.

    Raises:
        ConfigError: there are factors for another number of axes, or two methods ask for a spacing.
    """
    asked = _coarser(config)
    if not asked:
        return model
    if len(asked) > 1:
        raise ConfigError("embedded: two methods ask for a coarser spacing; name the factor once")
    settings = _settings(model)
    axes = len(settings["patch_size"])
    try:
        factors = asked[0].factors(axes)
    except ValueError as error:
        raise ConfigError(f"embedded: {error}") from None
    strides = settings["architecture"]["arch_kwargs"].get("strides")
    if strides is None:
        raise ConfigError(f"{model.path}: the plans tell no strides, so the patch of a coarser spacing is not known")
    # All stages count, also those that will be dropped: the whole network is measured on this patch first.
    per_stage = [stride if isinstance(stride, (list, tuple)) else [stride] * axes for stride in strides]
    multiple = [math.prod(int(stride[axis]) for stride in per_stage) for axis in range(axes)]
    name = "x".join(f"{factor:g}" for factor in (factors if len(set(factors)) > 1 else factors[:1]))
    identifier = f"{settings.get('data_identifier') or model.configuration}_coarser{name}"
    changed = coarser_settings(settings, factors, multiple, identifier)
    plans = _with_settings(copy.deepcopy(model.plans), model.configuration, changed)
    managers = managers_of(model.path, plans, model.dataset, model.configuration)
    return replace(model, plans=plans, plans_manager=managers[0], configuration_manager=managers[1])


def _coarser(config: SlimConfig) -> list[EmbeddedConfig]:
    levers = [entry.settings for entry in config.methods if isinstance(entry.settings, EmbeddedConfig)]
    return [each for each in levers if config.active and np.any(np.array(each.coarser) != 1)]


def refuse_coarser(config: SlimConfig) -> None:
    """Refuse a coarser spacing for a model in memory, whose images are preprocessed by plans that are read already.

    Raises:
        ConfigError: the configuration asks for one.
    """
    if _coarser(config):
        raise ConfigError("embedded: a coarser spacing is written into plans: use nnslim compress, then the new folder")


def resolutions(finer: TrainedModel, coarser: TrainedModel) -> dict[str, Any]:
    """Return what nnslim.json says of a coarser model: spacing (mm) and patch (voxels), before and after."""
    pair = [model.configuration_manager for model in (finer, coarser)]
    return {
        "spacing": [[float(size) for size in one.spacing] for one in pair],
        "patch": [[int(size) for size in one.patch_size] for one in pair],
    }


def _settings(model: TrainedModel) -> dict[str, Any]:
    """Return the trained configuration as nnU-Net reads it: inheritance resolved, old formats in the new one."""
    settings = copy.deepcopy(model.configuration_manager.configuration)
    settings.pop("inherits_from", None)
    return settings


def _with_settings(plans: dict[str, Any], configuration: str, settings: dict[str, Any]) -> dict[str, Any]:
    known = plans["configurations"]
    plans["configurations"] = {name: resolved(known, name) for name in known}
    plans["configurations"][configuration] = settings
    return plans
