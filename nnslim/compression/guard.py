"""Put layers back to dense until the slim network is faster than the dense one on this machine."""

from __future__ import annotations

import copy
import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import nn

from nnslim.methods.base import Decision, Plan
from nnslim.network.spec import extend_spec
from nnslim.running.engine import Settings
from nnslim.running.speed import Speed, compare_speed, layer_gains, place

_log = logging.getLogger("nnslim")


@dataclass(frozen=True)
class Guard:
    """Checks that plans are faster than the dense network.

    Attributes:
        settings: how the network will run. device: where.
        puts_back: False only measures.
    """

    settings: Settings
    device: torch.device
    puts_back: bool = True

    @cached_property
    def where(self) -> str:
        """Device, threads and torch version for which this guard's measurements hold."""
        return place(self.device, self.settings)

    def measure(self, dense: nn.Module, slim: nn.Module, shape: Sequence[int]) -> Speed:
        """Compare two networks, which are not modified."""
        pair = [copy.deepcopy(network).to(self.device).eval() for network in (dense, slim)]
        return compare_speed(*pair, shape, self.settings)

    def check(
        self, dense: nn.Module, plans: tuple[Plan, ...], shape: Sequence[int]
    ) -> tuple[tuple[Plan, ...], Speed | None]:
        """Measure the network that the plans make; return plans, of fewer edits if it does not win, and the speed.

        The last method's layers are measured one by one. Those that save no time go back to dense first, then those
        that save least, half of the remaining ones at a time, until the network as a whole wins. If it never does, the
        returned plans have no edits, and the speed is that of the last try. Plans without edits have no speed.
        `dense` may have any weights and is not modified; the shape is (1, channels, *patch).
        """
        if not any(plan.edits for plan in plans):
            return plans, None
        dense = copy.deepcopy(dense).to(self.device).eval()
        slim = _structure(dense, plans)
        planned = speed = compare_speed(dense, slim, shape, self.settings)
        if planned.gains or not self.puts_back:
            return plans, planned
        names = [edit.layer for edit in plans[-1].edits if edit.separable]
        gains = layer_gains(_structure(dense, plans[:-1]), slim, names, shape, planned.backend)
        order = sorted(gains, key=gains.__getitem__)
        count = max(1, sum(gain <= 0 for gain in gains.values()))
        while count <= len(order):
            left = (*plans[:-1], _without(plans[-1], order[:count], gains))
            if not any(plan.edits for plan in left):
                speed = replace(speed, put_back=tuple(order)) if speed is planned else speed
                break
            speed = compare_speed(dense, _structure(dense, left), shape, self.settings)
            speed = replace(speed, planned=planned.slim, put_back=tuple(order[:count]))
            _log.info("guard: %s", speed)
            if speed.gains:
                return left, speed
            count += max(1, (len(order) - count + 1) // 2)
        all_dense = (_without(plan, {decision.layer for decision in plan.decisions}, gains) for plan in plans)
        return tuple(replace(plan, edits=()) for plan in all_dense), speed


def _structure(dense: nn.Module, plans: tuple[Plan, ...]) -> nn.Module:
    """Return a slim network with arbitrary weights: their values do not change its time."""
    slim = copy.deepcopy(dense)
    known = {id(parameter) for parameter in slim.parameters()}
    for plan in plans:
        slim = extend_spec(plan.edits, slim)
    with torch.no_grad():
        for parameter in slim.parameters():
            if id(parameter) not in known:  # uninitialised memory may hold denormal numbers, which are slow
                parameter.normal_(0, 0.05)
    return slim.eval()


def _without(plan: Plan, names: Collection[str], gains: Mapping[str, float]) -> Plan:
    """Return the plan without the edits of some layers."""

    def dense(one: Decision) -> Decision:
        if one.action == "dense" or one.layer not in names:
            return one
        counts = {"macs_after": one.macs_before, "parameters_after": one.parameters_before}
        saved = f" (saves {gains[one.layer] * 1e3:.3g} ms of a pass)" if one.layer in gains else ""
        return replace(one, action="dense", ranks=None, error=None, reason=f"not faster here{saved}", **counts)

    edits = tuple(edit for edit in plan.edits if not (edit.separable and edit.layer in names))
    return Plan(edits, tuple(map(dense, plan.decisions)))
