"""What methods and their edits change in a model's plans."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from nnslim.compression.config import SlimConfig
from nnslim.errors import ConfigError, SpecError
from nnslim.hosts.nnunet.model.slim_plans import resolved
from nnslim.hosts.nnunet.model.trained_model import TrainedModel, managers_of
from nnslim.methods.base import method_named
from nnslim.network.spec import SlimSpec


def in_architecture(model: TrainedModel, spec: SlimSpec) -> tuple[dict[str, Any], SlimSpec]:
    """Return plans whose architecture has the edits that its own arguments can say, and the rest of the spec.

    A model with nothing left in the spec is one that nnU-Net loads without nnslim.

    Raises:
        SpecError: such an edit comes after one that only the spec can say.
    """
    settings = trained_settings(model.configuration_manager)
    architecture, rest = settings["architecture"], []
    for edit in spec.edits:
        arguments = edit.arguments(architecture["arch_kwargs"])
        if arguments is None:
            rest.append(edit)
        elif rest:
            raise SpecError(f"'{edit.kind}' is an edit of the architecture: put its method before the others")
        else:
            architecture["arch_kwargs"] = arguments
    plans = copy.deepcopy(model.plans)
    changed = len(rest) < len(spec.edits)
    return _with_settings(plans, model.configuration, settings) if changed else plans, SlimSpec(tuple(rest))


def changed_by(config: SlimConfig, settings: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return what the methods make of a configuration's settings; the very same object where no method changes them.

    Args:
        settings: see `trained_settings`; not modified.
    Raises:
        ConfigError: they do not fit a method, or two methods change them.
    """
    made = settings
    for entry in config.methods if config.active else ():
        if (change := method_named(entry.method).plans) is None:
            continue
        changed = change(settings, entry.settings)
        if changed is not None and made is not settings:
            raise ConfigError(f"{entry.method}: two methods change spacing or patch in the plans; let only one do so")
        made = made if changed is None else changed
    return made


def with_changed_plans(model: TrainedModel, config: SlimConfig) -> TrainedModel:
    """Return the model with plans as the methods want them and the weights as they are; the same where none does.

    Raises:
        ConfigError: see `changed_by`.
    """
    settings = trained_settings(model.configuration_manager)
    changed = changed_by(config, settings)
    if changed is settings:
        return model
    plans = _with_settings(copy.deepcopy(model.plans), model.configuration, dict(changed))
    managers = managers_of(model.path, plans, model.dataset, model.configuration)
    return replace(model, plans=plans, plans_manager=managers[0], configuration_manager=managers[1])


def refuse_changed_plans(config: SlimConfig, configuration_manager: Any) -> None:
    """Refuse methods that change plans for a model in memory, whose images are preprocessed by plans read already.

    Raises:
        ConfigError: the configuration has such a method, or see `changed_by`.
    """
    settings = trained_settings(configuration_manager)
    if changed_by(config, settings) is not settings:
        raise ConfigError("a method changes spacing or patch in the plans: use nnslim compress, then the new folder")


def resolutions(before: TrainedModel, after: TrainedModel) -> dict[str, Any]:
    """Return what nnslim.json says of changed plans: spacing (mm) and patch (voxels), before and after."""
    pair = [model.configuration_manager for model in (before, after)]
    return {
        "spacing": [[float(size) for size in one.spacing] for one in pair],
        "patch": [[int(size) for size in one.patch_size] for one in pair],
    }


def trained_settings(configuration_manager: Any) -> dict[str, Any]:
    """Return a copy of a configuration as nnU-Net reads it: inheritance resolved, old formats in the new one."""
    settings = copy.deepcopy(configuration_manager.configuration)
    settings.pop("inherits_from", None)
    return settings


def _with_settings(plans: dict[str, Any], configuration: str, settings: dict[str, Any]) -> dict[str, Any]:
    known = plans["configurations"]
    plans["configurations"] = {name: resolved(known, name) for name in known}
    plans["configurations"][configuration] = settings
    return plans
