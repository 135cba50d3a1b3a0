"""Decide on the stages of a network's encoder, and fit what completes its tokens to unlabelled images."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from nnslim.errors import ConfigError
from nnslim.methods.base import Decision, Plan
from nnslim.methods.token_sparse.config import TokenSparseConfig
from nnslim.methods.token_sparse.edit import TokenSparseEdit
from nnslim.methods.token_sparse.reduction import TokenReduction
from nnslim.methods.token_sparse.sequence import take
from nnslim.methods.token_sparse.sparse_encoders import SparseEncoder, is_encoder, token_count
from nnslim.network.cost import Cost
from nnslim.network.operations import count_operations
from nnslim.network.spec import extend_spec
from nnslim.network.walk import LayerIndex, unwrap
from nnslim.surgery.streaming import EndOfPass, Tiles, run_hooked


def token_sparse_edits(network: nn.Module, config: TokenSparseConfig) -> tuple[TokenSparseEdit, ...]:
    """Return the edits that make every encoder of a network token-sparse.

    Raises:
        ConfigError: it has none.
    """
    found = [layer for layer in LayerIndex(unwrap(network)).values() if is_encoder(layer.module)]
    if not found:
        if active := [module for module in network.modules() if isinstance(module, TokenReduction) and module.active]:
            raise ConfigError(f"token_sparse: the network drops tokens already, by ratios of {active[0].ratios}")
        raise ConfigError(
            "token_sparse: the network has no transformer encoder that nnslim knows (nnU-Net's Primus, UNETR); "
            "convolutional networks have no tokens to drop, use method tucker for them"
        )
    edits = []
    for layer in found:
        places, ratios, scorers = config.stages(len(layer.module.blocks))
        if not len(places) == len(ratios) == len(scorers):
            raise ConfigError(
                f"token_sparse: {len(places)} locations, {len(ratios)} ratios and {len(scorers)} scorers do not match"
            )
        same = config.model_dump(include={"mode", "shared", "tau", "completion", "completion_depth", "skips"})
        noise = config.perturbation == "gumbel"
        edits.append(TokenSparseEdit(layer.name, places, ratios, scorers, noise=noise, **same))
    return tuple(edits)


def plan_token_sparse(network: nn.Module, config: TokenSparseConfig, cost: Cost, tiles: Tiles | None = None) -> Plan:
    """Make every encoder token-sparse; see `Method.plan`. The tiles are not used.

    Raises:
        ConfigError: no encoder, or stages that do not fit it. SpecError: the network does not take the stages.
    """
    network = unwrap(network)
    edits = token_sparse_edits(network, config)
    sparse = extend_spec(edits, copy.deepcopy(network))
    decisions = []
    for edit in edits:
        dense, slim = network.get_submodule(edit.layer), sparse.get_submodule(edit.layer)
        length = token_count(dense)
        if length is not None:
            slim.reduction.kept_counts(length)  # warns where few are left
        counts = [count_operations(net, cost.input_shape).macs("torch", edit.layer) for net in (network, sparse)]
        counts += [sum(p.numel() for p in module.parameters()) for module in (dense, slim)]
        shape = (length or 0, next(dense.norm.parameters()).shape[0])
        decisions.append(Decision(edit.layer, "token_sparse", shape, None, *counts))
    return Plan(edits, tuple(decisions))


def fit_completion(
    dense: nn.Module, slim: nn.Module, config: Any, cost: Cost, tiles: Tiles, *, compensate: bool = True, **_: Any
) -> dict[str, float]:
    """Fit the linears of a `fusion` completion to unlabelled images, in closed form, in place; see `Method.fit`.

    The value that a dropped token would have had at the end of the dense encoder is regressed (ridge, towards the
    identity) on its last value; one regression per stage, and one for the tokens that stay.
    Returns, by encoder, the relative error of its output tokens after the fit.
    """
    errors: dict[str, float] = {}
    for name, module in slim.named_modules():
        if not isinstance(module, SparseEncoder):
            continue
        if compensate and module.completion is not None and len(module.completion.linears):
            _fit_linears(dense, slim, name, module.completion.linears, tiles)
        errors[name] = _error(dense, slim, name, tiles)
    return errors


def _outputs(network: nn.Module, layer: str, tiles: Tiles) -> list[Tensor]:
    """Return the encoder's output for each batch of tiles, before its last norm."""
    seen: list[Tensor] = []

    def catch(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        seen.append(inputs[0].detach().double())
        raise EndOfPass

    run_hooked(network, tiles, before={f"{layer}.norm": catch})
    return seen


def _fit_linears(dense: nn.Module, slim: nn.Module, layer: str, linears: nn.ModuleList, tiles: Tiles) -> None:
    wanted = iter(outputs := _outputs(dense, layer, tiles))
    width = linears[0].in_features
    moments = torch.zeros(len(linears), 2, width + 1, width + 1, dtype=torch.float64, device=outputs[0].device)

    def gather(_: nn.Module, inputs: tuple[Any, ...]) -> None:
        now, target = inputs[0], next(wanted)
        for (stage, tokens), where in zip(now.parts(), [*now.group_positions, now.positions], strict=True):
            source = tokens.double().flatten(0, 1)
            source = torch.cat((source, source.new_ones(len(source), 1)), dim=1)
            missing = (take(target, where) - tokens.double()).flatten(0, 1)
            moments[stage, 0] += source.T @ source
            moments[stage, 1, :, :width] += source.T @ missing
        raise EndOfPass

    run_hooked(slim, tiles, before={f"{layer}.completion": gather})
    with torch.no_grad():
        for linear, (gram, cross) in zip(linears, moments, strict=True):
            if not gram.any():  # a stage whose ratio is 0
                continue
            ridge = 1e-2 * gram.diagonal()[:-1].mean() * gram.new_ones(width + 1)
            solved = torch.linalg.solve(gram + torch.diag(ridge), cross[:, :width])
            linear.weight.add_(solved[:-1].T.to(linear.weight))
            linear.bias.add_(solved[-1].to(linear.bias))


def _error(dense: nn.Module, slim: nn.Module, layer: str, tiles: Tiles) -> float:
    missing = power = 0.0
    for wanted, found in zip(_outputs(dense, layer, tiles), _outputs(slim, layer, tiles), strict=True):
        missing += (found - wanted).square().sum().item()
        power += (wanted - wanted.mean(dim=(0, 1))).square().sum().item()
    return (missing / power) ** 0.5 if power else 0.0
