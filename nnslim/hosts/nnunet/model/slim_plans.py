"""What nnslim changes in a model's plans: the architecture with its spec, and what methods want of a configuration.

Each fold of a model that was pruned in training has its own widths, which the plans do not name."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from nnslim.compression.config import SlimConfig
from nnslim.errors import ConfigError, InputError, ModelError, SpecError, nearest
from nnslim.hosts.nnunet.model.checked_plans import BASE_KEY, SPEC_KEY
from nnslim.hosts.nnunet.model.slim_network import NETWORK_CLASS_NAME
from nnslim.hosts.nnunet.model.trained_model import TrainedModel, build_network, build_untrained
from nnslim.methods.base import method_named
from nnslim.network.spec import Edit, SlimSpec, spec_of
from nnslim.surgery.narrow import ElasticEdit, NarrowEdit, as_base, fit_widths, widths_of
from nnslim.tables import read_table


def resolved(configurations: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Return a configuration with what it inherits."""
    own = copy.deepcopy(configurations[name])
    parent = own.pop("inherits_from", None)
    return {**resolved(configurations, parent), **own} if parent else own


def trained_settings(configuration_manager: Any) -> dict[str, Any]:
    """Return a copy of a configuration as nnU-Net reads it: inheritance resolved, old formats in the new one."""
    settings = copy.deepcopy(configuration_manager.configuration)
    settings.pop("inherits_from", None)
    return settings


def with_settings(plans: Mapping[str, Any], configuration: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy of plans with other settings for one configuration.

    Inheritance is resolved in all configurations, since others may inherit from the one that changes.
    """
    known = plans["configurations"]
    made = {name: resolved(known, name) for name in known} | {configuration: dict(settings)}
    return {**copy.deepcopy(dict(plans)), "configurations": made}


def plans_with_architecture(plans: dict[str, Any], configuration: str, architecture: dict[str, Any]) -> dict[str, Any]:
    """Return a copy of the plans in which one configuration names another architecture."""
    settings = resolved(plans["configurations"], configuration)
    kept = {key: value for key, value in settings.items() if not key.startswith("UNet_")}  # of the old format
    return with_settings(plans, configuration, {**kept, "architecture": architecture})


def with_spec(architecture: Mapping[str, Any], spec: SlimSpec) -> dict[str, Any]:
    """Return the `architecture` entry that applies a spec to an architecture, in place of the spec that it has."""
    kwargs = architecture["arch_kwargs"]
    base = kwargs.get(BASE_KEY, architecture["network_class_name"])
    kwargs = {**kwargs, BASE_KEY: base, SPEC_KEY: spec.to_dict()}
    return {**architecture, "network_class_name": NETWORK_CLASS_NAME, "arch_kwargs": kwargs}


def with_architecture(plans: dict[str, Any], configuration: str, spec: SlimSpec) -> dict[str, Any]:
    """Return a copy of plans in which one configuration names nnslim's network and carries the whole spec.

    An old plans format is written in the new one.
    """
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    settings = trained_settings(PlansManager(copy.deepcopy(plans)).get_configuration(configuration))
    return with_settings(plans, configuration, {**settings, "architecture": with_spec(settings["architecture"], spec)})


def spec_in_plans(model: TrainedModel) -> SlimSpec:
    """Return the spec that the plans carry, an empty one for a dense model."""
    raw = model.configuration_manager.network_arch_init_kwargs.get(SPEC_KEY)
    return SlimSpec() if raw is None else SlimSpec.from_dict(raw)


def slim_plans(model: TrainedModel, spec: SlimSpec) -> dict[str, Any]:
    """Return the plans of a model with the spec in the trained configuration; as they are where there is none to add.

    What the architecture's own arguments can say is said by them: a model with nothing left in the spec is one that
    nnU-Net loads without nnslim.

    Raises:
        SpecError: such an edit comes after one that only the spec can say.
    """
    if not spec.edits or spec == spec_in_plans(model):
        return copy.deepcopy(model.plans)
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
    architecture = with_spec(architecture, SlimSpec(tuple(rest))) if rest else architecture
    return with_settings(model.plans, model.configuration, {**settings, "architecture": architecture})


def named_after(folder_name: str, plans: dict[str, Any]) -> dict[str, Any]:
    """Return the plans with the name in a folder called trainer__plans__configuration, by which nnU-Net finds it."""
    parts = folder_name.split("__")
    return {**plans, "plans_name": parts[1]} if len(parts) == 3 and parts[1] else plans


def in_run(plans: dict[str, Any], run_name: str | None) -> dict[str, Any]:
    """Return the plans under a name that ends with that of a run, where it has one."""
    return {**plans, "plans_name": f"{plans['plans_name']}_{run_name}"} if run_name else plans


def differences(before: Mapping[str, Any], now: Mapping[str, Any], configuration: str) -> str:
    """Return in words what two plans say differently of how a configuration predicts, nothing where they agree.

    Batches count for training alone, and the weights decide the widths of a pruned network.
    """
    found, made = (dict(_leaves(_predicting(plans, configuration))) for plans in (before, now))
    keys = [key for key in {**found, **made} if found.get(key) != made.get(key)]
    said = [f"{key} {found.get(key)}, now {made.get(key)}" for key in keys[:3]]
    return "; ".join([*said, f"{len(keys) - 3} more"] if len(keys) > 3 else said)


def _predicting(plans: Mapping[str, Any], configuration: str) -> dict[str, Any]:
    """Return what a prediction reads, as JSON keeps it."""
    known = plans.get("configurations", {})
    settings = json.loads(json.dumps(resolved(known, configuration) if configuration in known else {}))
    settings.pop("batch_size", None)
    if spec := settings.get("architecture", {}).get("arch_kwargs", {}).get(SPEC_KEY):
        widths = NarrowEdit.kind, ElasticEdit.kind
        spec["edits"] = [edit for edit in spec.get("edits", ()) if edit.get("kind") not in widths]
    return {**json.loads(json.dumps({**plans, "configurations": None})), **settings}


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the values inside objects, and inside lists of objects, with their places."""
    if isinstance(value, list) and value and isinstance(value[0], dict):
        value = dict(enumerate(value))
    if not isinstance(value, dict):
        yield path, value
        return
    for key, each in value.items():
        yield from _leaves(each, f"{path}.{key}".lstrip("."))


def changed_by(config: SlimConfig, settings: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return what the methods make of `trained_settings`; the very same object where no method changes them.

    Raises:
        ConfigError: they do not fit a method, or two methods change them.
    """
    made = settings
    for entry in config.methods if config.active else ():
        change = method_named(entry.method).plans
        if change is None or (changed := change(settings, entry.settings)) is None:
            continue
        if made is not settings:
            raise ConfigError(f"{entry.method}: two methods change spacing or patch in the plans; let only one do so")
        made = changed
    return made


def with_changed_plans(model: TrainedModel, config: SlimConfig) -> TrainedModel:
    """Return the model with plans as the methods want them and the weights as they are; see `changed_by`."""
    settings = trained_settings(model.configuration_manager)
    changed = changed_by(config, settings)
    return model if changed is settings else model.with_plans(with_settings(model.plans, model.configuration, changed))


def refuse_changed_plans(config: SlimConfig, configuration_manager: Any) -> None:
    """Raise a ConfigError where methods change the plans of a model in memory: its images follow plans read already."""
    settings = trained_settings(configuration_manager)
    if changed_by(config, settings) is not settings:
        raise ConfigError("a method changes spacing or patch in the plans: use nnslim compress, then the new folder")


def _widths(network: nn.Module) -> tuple[NarrowEdit, ...]:
    return tuple(NarrowEdit(name, *widths) for name, widths in widths_of(network).items())


def plans_for_fold(model: TrainedModel, fold: str) -> dict[str, Any]:
    """Return the plans of a model for a training to start from.

    Where the weights of each fold decide its widths (an elastic model), these are the widths of this fold.
    """
    edits = spec_in_plans(model).edits
    if not any(isinstance(edit, ElasticEdit) for edit in edits):
        return copy.deepcopy(model.plans)
    others = [edit for edit in edits if not isinstance(edit, (NarrowEdit, ElasticEdit))]
    spec = SlimSpec((*others, *_widths(build_network(model, fold)), ElasticEdit()))
    return with_architecture(model.plans, model.configuration, spec)


def with_filters(model: TrainedModel, out_filters: Path | None, in_filters: Path | None) -> TrainedModel:
    """Return the model as one whose weights decide its widths, as Sauron's tables say, whatever its plans say.

    Args:
        out_filters, in_filters: tab-separated, a column per layer and a row per epoch, the last one in force; None: not
            asked for.
    Raises:
        InputError: no such table, a layer that the network does not have, or a width that a fold's weights do not have.
    """
    tables = [(path, side) for side, path in enumerate((out_filters, in_filters)) if path is not None]
    if not tables:
        return model
    network = build_untrained(model)
    for fold, checkpoint in model.checkpoints.items():
        fit_widths(network, checkpoint["network_weights"])
        widths = widths_of(network)
        for path, side in tables:
            rows = read_table(path, separator="\t").to_dict("records")
            if not rows:
                raise InputError(f"{path} has no row; expected a column per layer and a row per epoch")
            for name, width in rows[-1].items():
                if name not in widths:
                    raise InputError(f"{path}: '{name}' is no layer of {model.path}; {nearest(name, widths)}")
                if width != str(found := widths[name][side]):
                    wanted = f"{width} {('filters', 'input channels')[side]}"
                    raise InputError(f"{path}: layer '{name}' has {wanted}, the weights of fold {fold} have {found}")
    edits = spec_in_plans(model).edits
    if any(isinstance(edit, ElasticEdit) for edit in edits):
        return model
    return model.with_plans(with_architecture(model.plans, model.configuration, SlimSpec((*edits, ElasticEdit()))))


def trained_base(network: nn.Module, weights: Sequence[Mapping[str, Tensor]]) -> tuple[nn.Module, tuple[Edit, ...]]:
    """Return a base to compress, and the edits by which a training made it slim: none for a dense network, as it is.

    Args:
        network: dense, pruned, or with `trained` edits alone; not modified. weights: of each fold.
    Raises:
        SpecError: other edits made it slim, or its folds differ in width.
    """
    if (spec := spec_of(network)) is None:
        return network, ()
    if all(edit.trained for edit in spec.edits):
        return as_base(network), spec.edits
    if not {edit.kind for edit in spec.edits} <= {"narrow", "elastic"}:
        raise SpecError("it is a slim model already; name the model that it was made from")
    first, *others = [{key: value.shape for key, value in fold.items()} for fold in weights]
    if any(other != first for other in others):
        raise SpecError("it is pruned, and its folds have widths of their own: take them one by one (-f FOLD)")
    base = as_base(network)
    fit_widths(base, weights[0])  # nnU-Net before 2.6 has loaded no weights yet
    return base, _widths(base)


def base_of(model: TrainedModel) -> tuple[nn.Module, tuple[Edit, ...]]:
    """Return the `trained_base` of a model, with the weights of its first fold.

    Raises:
        ModelError: it has none.
    """
    try:
        return trained_base(build_network(model), model.weights)
    except SpecError as error:
        raise ModelError(f"{model.path}: {error}") from None
