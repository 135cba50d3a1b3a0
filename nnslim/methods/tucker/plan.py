"""Choose Tucker ranks for every convolution of a network."""

from __future__ import annotations

import logging
import math
from fnmatch import fnmatchcase

from torch import nn

from nnslim.cost import Cost
from nnslim.errors import ConfigError, RankError, nearest
from nnslim.methods.base import Decision, Plan
from nnslim.methods.tucker.config import TuckerConfig
from nnslim.methods.tucker.edit import TuckerEdit
from nnslim.methods.tucker.layers import CONVOLUTIONS, is_transposed, kernel_of
from nnslim.surgery.walk import Layer, LayerIndex, unwrap

_log = logging.getLogger("nnslim")


def plan_tucker(network: nn.Module, config: TuckerConfig, cost: Cost) -> Plan:
    """Decide for each convolution: ranks, or dense with a reason. Reads only.

    Ranks follow from shapes alone, so all folds of a model get the same structure.

    Args:
        network: the dense network.
        config: rank rule and choice of layers.
        cost: of this network at its patch shape (`measure_cost`); tells shapes, order and segmentation heads.
    Raises:
        ConfigError: a pattern of include, exclude or overrides matches no convolution.
        RankError: an override asks for a rank outside 1..channels.
    """
    layers = LayerIndex(unwrap(network)).of_type(*CONVOLUTIONS)
    _check_patterns(config, layers)
    ran = [name for name in cost.layers if any(name == layer.name for layer in layers)]
    first = ran[0] if ran else None
    edits, decisions = [], []
    for layer in layers:
        decision, edit = _decide(layer, config, cost, is_first=layer.name == first)
        decisions.append(decision)
        if edit is not None:
            edits.append(edit)
        if config.verbose:
            _log.info("%s %s -> %s %s", layer.name, decision.shape, decision.ranks or "dense", decision.reason)
    return Plan(tuple(edits), tuple(decisions))


def _matches(layer: Layer, pattern: str) -> bool:
    return any(fnmatchcase(alias, pattern) for alias in layer.aliases)


def _check_patterns(config: TuckerConfig, layers: list[Layer]) -> None:
    for key, patterns in (
        ("include", config.include),
        ("exclude", config.exclude),
        ("overrides", tuple(config.overrides)),
    ):
        for pattern in patterns:
            if layers and not any(_matches(layer, pattern) for layer in layers):
                # Compared with whole names and with their beginnings: "encodr.*" is nearest to "encoder".
                parts = [layer.name.split(".") for layer in layers]
                names = {".".join(part[:depth]) for part in parts for depth in range(1, len(part) + 1)}
                hint = nearest(pattern.strip("*."), names)
                raise ConfigError(f"tucker: no convolution matches {key} pattern '{pattern}'; {hint}")


def _ranks(layer: Layer, config: TuckerConfig) -> tuple[int, int]:
    outputs, inputs = kernel_of(layer.module).shape[:2]
    for pattern, wanted in config.overrides.items():
        if not _matches(layer, pattern):
            continue
        if isinstance(wanted, float):
            return config.rank(outputs, wanted), config.rank(inputs, wanted)
        for side, rank, channels in (("output", wanted[0], outputs), ("input", wanted[1], inputs)):
            if not 1 <= rank <= channels:
                raise RankError(
                    f"tucker: override '{pattern}' asks for {side} rank {rank} at '{layer.name}', "
                    f"which has {channels} {side} channels; use 1..{channels}"
                )
        return wanted
    return config.rank(outputs), config.rank(inputs)


def _kept_dense(layer: Layer, config: TuckerConfig, cost: Cost, is_first: bool) -> str:
    """Return why the layer stays dense whatever its ranks, or an empty string."""
    conv = layer.module
    if not any(_matches(layer, pattern) for pattern in config.include):
        return "not included"
    if any(_matches(layer, pattern) for pattern in config.exclude):
        return "excluded"
    if conv.groups != 1:
        return f"grouped convolution (groups={conv.groups})"
    if layer.name not in cost.layers:
        return "not reached by the forward pass"
    if is_first and not config.first_layer:
        return "first layer"
    if layer.name in cost.heads and not config.heads:
        return "segmentation head"
    if math.prod(conv.kernel_size) == 1 and layer.name not in cost.heads and not config.pointwise:
        return "1x1 kernel"
    return ""


def chain_macs(conv: nn.Module, rank_out: int | None, rank_in: int | None, v_in: int, v_out: int) -> int:
    """Return the MACs of a Tucker chain on v_in input and v_out output voxels, samples and calls counted in."""
    inputs, outputs = conv.in_channels, conv.out_channels
    core_voxels = v_in if is_transposed(conv) else v_out
    core = (rank_in or inputs) * (rank_out or outputs) * math.prod(conv.kernel_size) * core_voxels
    return core + (inputs * rank_in * v_in if rank_in else 0) + (rank_out * outputs * v_out if rank_out else 0)


def chain_parameters(conv: nn.Module, rank_out: int | None, rank_in: int | None) -> int:
    """Return the parameters of a Tucker chain, bias included."""
    inputs, outputs = conv.in_channels, conv.out_channels
    core = (rank_in or inputs) * (rank_out or outputs) * math.prod(conv.kernel_size)
    factors = (inputs * rank_in if rank_in else 0) + (rank_out * outputs if rank_out else 0)
    return core + factors + (0 if conv.bias is None else outputs)


def _decide(layer: Layer, config: TuckerConfig, cost: Cost, *, is_first: bool) -> tuple[Decision, TuckerEdit | None]:
    conv = layer.module
    shape = tuple(kernel_of(conv).shape)
    parameters = sum(p.numel() for p in conv.parameters())
    ran = cost.layers.get(layer.name)
    macs = ran.macs if ran else 0

    def dense(reason: str) -> tuple[Decision, None]:
        return Decision(layer.name, "dense", shape, None, macs, macs, parameters, parameters, reason), None

    if reason := _kept_dense(layer, config, cost, is_first):
        return dense(reason)
    ranks = _ranks(layer, config)
    sides = tuple(
        None if config.one_sided and rank == channels else rank for rank, channels in zip(ranks, shape[:2], strict=True)
    )
    if sides == (None, None):
        return dense("full rank")
    macs_after = chain_macs(conv, *sides, ran.voxels_in, ran.voxels_out)
    parameters_after = chain_parameters(conv, *sides)
    if config.only_if_cheaper and macs_after >= macs:
        return dense(f"would not get cheaper ({macs_after:,} MACs against {macs:,})")
    edit = TuckerEdit(layer.name, *sides, decompose=config.decompose)
    return Decision(layer.name, "tucker", shape, ranks, macs, macs_after, parameters, parameters_after), edit
