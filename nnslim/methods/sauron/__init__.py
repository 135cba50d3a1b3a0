"""Sauron: filters pruned while the network trains (Valverde et al., arXiv 2209.13590)."""

from typing import Any

from torch import nn

from nnslim.errors import ConfigError
from nnslim.methods.base import Method, Plan, register_method
from nnslim.methods.sauron.config import SauronConfig
from nnslim.methods.sauron.pruner import Pruner, Removal
from nnslim.network.cost import Cost


def _no_plan(network: nn.Module, config: SauronConfig, cost: Cost, tiles: Any = None) -> Plan:
    raise ConfigError(
        "sauron prunes while a network trains: use nnslim train --method sauron (with --start MODEL for a trained one)"
    )


register_method(Method("sauron", SauronConfig, _no_plan, trains=True))

__all__ = ["Pruner", "Removal", "SauronConfig"]
