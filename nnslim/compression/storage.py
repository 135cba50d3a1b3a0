"""Weights on disk: in half precision or as they are, and what that costs."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from nnslim.evaluation.agreement import Agreement, compare_answers
from nnslim.evaluation.expected import harden
from nnslim.surgery.streaming import Tiles

StateDict = dict[str, Tensor]
_LARGEST = torch.finfo(torch.half).max
_log = logging.getLogger("nnslim")


def in_half(weights: Mapping[str, Tensor]) -> bool:
    """Return whether all weights, counters aside, are float16."""
    kinds = {tensor.dtype for tensor in weights.values() if tensor.is_floating_point()}
    return kinds == {torch.half}


def too_large(weights: Mapping[str, Tensor]) -> list[str]:
    """Return the names of tensors with a value that float16 does not hold (above 65504, or not a number)."""
    return [n for n, one in weights.items() if one.is_floating_point() and not bool((one.abs() <= _LARGEST).all())]


def half_precision(weights: Mapping[str, Tensor]) -> StateDict:
    """Return the weights in float16, counters as they are.

    Stock nnU-Net loads the result: `load_state_dict` copies into the network's float32 parameters.
    """
    return _once_each(weights, lambda tensor: tensor.half() if tensor.is_floating_point() else tensor)


def _once_each(state: Mapping[str, Tensor], make: Callable[[Tensor], Tensor]) -> StateDict:
    """Return what is made of each tensor; names that share one tensor go on sharing it."""
    made: dict[tuple[int, torch.Size], Tensor] = {}
    for tensor in state.values():
        if (key := (tensor.data_ptr(), tensor.shape)) not in made:
            made[key] = make(tensor.detach())
    return {name: made[tensor.data_ptr(), tensor.shape] for name, tensor in state.items()}


def bytes_of(weights: Mapping[str, Tensor]) -> int:
    """Return the bytes of a state dict's tensors, each counted once."""
    return sum({(t.data_ptr(), t.shape): t.nbytes for t in weights.values()}.values())


def stored(network: nn.Module, half: bool) -> tuple[nn.Module, StateDict]:
    """Return the network with the weights as they will be read back, and those weights as they are to be written.

    So a model gives the same result from a folder, from the cache and in memory. The network is in float32, on the
    CPU, and not modified. `half` stores in float16 where all values fit.
    """
    state = network.state_dict()
    if half and (large := too_large(state)):
        _log.warning("weights are stored in float32: float16 does not hold those of %s", ", ".join(large[:3]))
        half = False
    if not half:  # copies: nnU-Net loads one fold after the other into the network that is handed out
        return network, _once_each(state, Tensor.clone)
    halves = half_precision(state)
    rounded = copy.deepcopy(network)
    rounded.load_state_dict(halves)
    return rounded, halves


@torch.inference_mode()
def tile_agreement(
    wanted: nn.Module, found: nn.Module, tiles: Tiles, class_names: Sequence[str], *, regions: bool = False
) -> Agreement:
    """Compare two networks' labels on tiles, each tile as a case of its own.

    Args:
        wanted, found: in eval mode, on one device. tiles: (1, C, *patch) each.
        class_names: in the order of the channels, without background. regions: channels are independent.
    """
    device = next(wanted.parameters()).device
    agreement = Agreement(tuple(class_names))
    for number, tile in enumerate(tiles):
        outputs = [network(tile.to(device)) for network in (wanted, found)]
        logits = [(one[0] if isinstance(one, (list, tuple)) else one)[0].float().cpu() for one in outputs]
        truth, other = (one.sigmoid() if regions else one.softmax(0) for one in logits)
        given = truth, harden(other, not regions), [1.0] * (truth.dim() - 1), class_names
        agreement.cases.append(compare_answers(f"tile {number}", *given))
    return agreement


def agreement_record(agreement: Agreement) -> dict[str, Any]:
    """Return the Dice per class of an agreement on tiles, as JSON values."""
    full = agreement.to_dict()
    classes = {name: {"dice": one["dice"], "worst_dice": one["worst_dice"]} for name, one in full["classes"].items()}
    return {"tiles": len(agreement.cases), "mean_dice": full["mean_dice"], "classes": classes}
