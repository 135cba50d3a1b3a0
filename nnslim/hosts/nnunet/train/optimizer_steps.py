"""Several batches for one step, a rate that rises over the first steps, a tighter bound of the gradient's norm."""

from __future__ import annotations

import functools

import torch
from torch import Tensor


class OptimizerSteps:
    """Stands in for the `step` of an optimiser, so that it works whatever the `train_step` of a trainer is.

    That one clips the gradients of each batch by itself (nnU-Net at a norm of 12, for Primus 1); their mean is clipped
    again here.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, *, accumulate: int = 1, warmup: int = 0, clip: float | None = None
    ) -> None:
        """Replace `optimizer.step`.

        Args:
            accumulate: batches for one step. warmup: steps over which the rate rises linearly. clip: bound of the norm.
        """
        self.optimizer, self.accumulate, self.warmup, self.clip = optimizer, accumulate, warmup, clip
        self.taken = 0  # steps
        self._sums: dict[Tensor, Tensor] = {}
        self._batches = 0
        self._inner = optimizer.step
        # Wrapped, since a schedule looks for what it noted on the method.
        optimizer.step = functools.wraps(self._inner)(lambda *_, **__: self.step())  # type: ignore[method-assign]

    def step(self) -> None:
        """Take in the gradients of a batch, and step if it was the last of its group."""
        gradients = {parameter: parameter.grad for parameter in self._parameters() if parameter.grad is not None}
        if self.accumulate == 1:
            return self._step()
        if all(bool(gradient.isfinite().all()) for gradient in gradients.values()):  # half precision overflows at times
            for parameter, gradient in gradients.items():
                total = self._sums.get(parameter)
                self._sums[parameter] = gradient.clone() if total is None else total.add_(gradient)
            self._batches += 1
        return self.finish() if self._batches == self.accumulate else None

    def finish(self) -> None:
        """Step with the batches that wait; an epoch may end within a group."""
        if self._batches:
            for parameter, total in self._sums.items():
                parameter.grad = total / self._batches
            self._sums, self._batches = {}, 0
            self._step()

    def _step(self) -> None:
        if self.clip is not None:
            torch.nn.utils.clip_grad_norm_(self._parameters(), self.clip)
        groups = self.optimizer.param_groups
        rates = [group["lr"] for group in groups]
        share = min(1.0, (self.taken + 1) / max(1, self.warmup))
        for group, rate in zip(groups, rates, strict=True):
            group["lr"] = rate * share
        self._inner()
        for group, rate in zip(groups, rates, strict=True):
            group["lr"] = rate
        self.taken += 1

    def _parameters(self) -> list[Tensor]:
        return [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
