"""Decide on the stages of a network's encoder, and fit what completes its tokens to unlabelled images."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from nnslim.errors import ConfigError
from nnslim.methods.base import Decision, Plan
from nnslim.methods.token_sparse.config import TokenSparseConfig
from nnslim.methods.token_sparse.edit import TokenSparseEdit, encoders_of, token_count
from nnslim.methods.token_sparse.sparse_encoders import _SparseEncoder
from nnslim.network.cost import Cost
from nnslim.network.operations import count_operations
from nnslim.network.spec import extend_spec
from nnslim.network.walk import unwrap
from nnslim.surgery.streaming import Tiles


def token_sparse_edits(network: nn.Module, config: TokenSparseConfig) -> tuple[TokenSparseEdit, ...]:
    """Return the edits that make every encoder of a network token-sparse.

    Raises:
        ConfigError: it has none.
    """
    found = encoders_of(unwrap(network))
    if not found:
        raise ConfigError(
            "token_sparse: the network has no transformer encoder that nnslim knows (nnU-Net's Primus, MONAI's UNETR); "
            "convolutional networks have no tokens to drop, use method tucker for them"
        )
    edits = []
    for layer in found:
        places, ratios, scorers = config.stages(len(layer.module.blocks))
        if not len(places) == len(ratios) == len(scorers):
            raise ConfigError(
                f"token_sparse: {len(places)} locations, {len(ratios)} ratios and {len(scorers)} scorers do not match"
            )
        edits.append(
            TokenSparseEdit(
                layer.name,
                places,
                ratios,
                scorers,
                config.mode,
                config.shared,
                config.tau,
                config.perturbation == "gumbel",
                config.completion,
                config.completion_depth,
                config.skips,
            )
        )
    return tuple(edits)


def plan_token_sparse(network: nn.Module, config: TokenSparseConfig, cost: Cost, tiles: Tiles | None = None) -> Plan:
    """Make every encoder token-sparse. Reads only.

    Args:
        network: the dense network. config: the stages. cost: of the network at its patch. tiles: not looked at.
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
        before, after = (_macs(net, cost, edit.layer) for net in (network, sparse))
        counts = [sum(p.numel() for p in module.parameters()) for module in (dense, slim)]
        width = next(dense.norm.parameters()).shape[0]
        decisions.append(
            Decision(edit.layer, "token_sparse", (length or 0, width), None, before, after, counts[0], counts[1])
        )
    return Plan(edits, tuple(decisions))


def _macs(network: nn.Module, cost: Cost, layer: str) -> int:
    return count_operations(network, cost.input_shape).macs("torch", layer)


def fit_completion(
    dense: nn.Module,
    slim: nn.Module,
    config: TokenSparseConfig,
    cost: Cost,
    tiles: Tiles,
    *,
    compensate: bool = True,
    seed: int = 0,
    on_layer: Callable[[int, int], None] | None = None,
) -> dict[str, float]:
    """Fit the linears of a `fusion` completion to unlabelled images, in closed form, in place.

    What a dropped token would have become at the end of the dense encoder is regressed (ridge, towards the identity)
    on its last value; one regression per stage, and one for the tokens that stay.

    Returns:
        The relative error of the encoder's output tokens, by encoder, after the fit.
    """
    errors: dict[str, float] = {}
    for name, module in slim.named_modules():
        if not isinstance(module, _SparseEncoder):
            continue
        if compensate and module.completion is not None and len(module.completion.linears):
            _fit_linears(dense, slim, name, module, tiles)
        errors[name] = _error(dense, slim, name, tiles)
    return errors


class _Caught(Exception):  # noqa: N818  ends a pass early; never seen by users
    pass


def _outputs(network: nn.Module, layer: str, tiles: Tiles) -> list[Tensor]:
    """Return what the encoder puts out for each batch of tiles, before its last norm."""
    seen: list[Tensor] = []
    device = next(network.parameters()).device

    def catch(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        seen.append(inputs[0].detach().double())
        raise _Caught

    hook = network.get_submodule(layer).norm.register_forward_pre_hook(catch)
    try:
        with torch.no_grad():
            for batch in tiles:
                try:
                    network(batch.to(device))
                except _Caught:
                    continue
    finally:
        hook.remove()
    return seen


def _fit_linears(dense: nn.Module, slim: nn.Module, layer: str, encoder: _SparseEncoder, tiles: Tiles) -> None:
    wanted = _outputs(dense, layer, tiles)
    completion = encoder.completion
    count, width = len(completion.linears), completion.linears[0].in_features
    empty = torch.zeros(2, width + 1, width + 1, dtype=torch.float64, device=wanted[0].device)
    moments = [empty.clone() for _ in range(count)]
    done = 0

    def gather(parts: list[tuple[int, Tensor]]) -> list[Tensor]:
        nonlocal done
        now = current[0]
        places = [*now.group_positions, now.positions]
        target = wanted[done]
        for (stage, tokens), where in zip(parts, places, strict=True):
            source = tokens.double().flatten(0, 1)
            source = torch.cat((source, source.new_ones(len(source), 1)), dim=1)
            index = where.unsqueeze(-1).expand(-1, -1, width)
            missing = (target.gather(1, index) - tokens.double()).flatten(0, 1)
            moments[stage][0] += source.T @ source
            moments[stage][1, :, :width] += source.T @ missing
        done += 1
        raise _Caught

    current: list = []
    hook = encoder.reduction.register_forward_hook(lambda _, __, now: current.__setitem__(slice(None), [now]))
    completion.map = gather  # the instance's own, in front of the class's
    try:
        with torch.no_grad():
            for batch in tiles:
                try:
                    slim(batch.to(wanted[0].device))
                except _Caught:
                    continue
    finally:
        hook.remove()
        del completion.map
    with torch.no_grad():
        for linear, (gram, cross) in zip(completion.linears, moments, strict=True):
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
