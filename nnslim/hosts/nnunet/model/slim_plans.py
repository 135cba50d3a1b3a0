"""Put a slim architecture into plans."""

from __future__ import annotations

import copy
from typing import Any

from nnslim.hosts.nnunet.model.slim_network import BASE_KEY, NETWORK_CLASS_NAME, SPEC_KEY
from nnslim.network.spec import SlimSpec


def with_architecture(plans: dict[str, Any], configuration: str, spec: SlimSpec) -> dict[str, Any]:
    """Return a copy of plans in which one configuration names nnslim's network class and carries the spec.

    Inheritance is resolved in all configurations first, since others may inherit from the one that changes; an old
    plans format is written in the new one. A configuration that is slim already gets the new spec in place of its own.

    Args:
        plans: content of plans.json. configuration: name of the one to change. spec: the whole spec.
    """
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    made = copy.deepcopy(plans)
    settings = copy.deepcopy(PlansManager(copy.deepcopy(plans)).get_configuration(configuration).configuration)
    made["configurations"] = {name: resolved(made["configurations"], name) for name in made["configurations"]}
    settings.pop("inherits_from", None)
    architecture = settings["architecture"]
    base = architecture["arch_kwargs"].get(BASE_KEY, architecture["network_class_name"])
    architecture["arch_kwargs"] = {**architecture["arch_kwargs"], BASE_KEY: base, SPEC_KEY: spec.to_dict()}
    architecture["network_class_name"] = NETWORK_CLASS_NAME
    made["configurations"][configuration] = settings
    return made


def resolved(configurations: dict[str, Any], name: str) -> dict[str, Any]:
    """Return a configuration with what it inherits."""
    own = copy.deepcopy(configurations[name])
    parent = own.pop("inherits_from", None)
    return {**resolved(configurations, parent), **own} if parent else own
