"""Recover accuracy without labels: the slim network learns the dense network's answers on augmented images."""

from __future__ import annotations

import copy
import logging
import math
import pickle
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset

from nnslim.compression.calibration import Calibration
from nnslim.compression.config import RecoveryConfig
from nnslim.compression.distillation import distillation_loss
from nnslim.compression.norms import NORMS, recalibrate_norms
from nnslim.compression.referee import Referee
from nnslim.compression.teacher import Teacher
from nnslim.files import save_checkpoint
from nnslim.network.spec import held_by
from nnslim.network.walk import LayerIndex
from nnslim.running.bfloat16 import bfloat16_is_safe, has_fast_bfloat16
from nnslim.surgery.streaming import hooked

_log = logging.getLogger("nnslim")
_MEMORY = 0.97  # of the running mean of the weights, per step

Progress = Callable[[str, int, int], None]


@dataclass
class Recovery:
    """How recovery went.

    Attributes:
        steps: steps taken.
        before, after: estimated drop in Dice on the held-out tiles, see `Agreement`.
        history: (step, estimated drop).
        stopped: why it ended: "steps", "time", "no gain" or "target".
        seconds: spent; not part of `to_dict`, which is reproducible.
    """

    steps: int = 0
    before: float = math.nan
    after: float = math.nan
    history: list[tuple[int, float]] = field(default_factory=list)
    stopped: str = "steps"
    seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values."""
        return {
            "steps": self.steps,
            "estimated_drop_before": _rounded(self.before),
            "estimated_drop_after": _rounded(self.after),
            "history": [[step, _rounded(drop)] for step, drop in self.history],
            "stopped": self.stopped,
        }


def _rounded(value: float) -> float | None:
    return None if math.isnan(value) else round(value, 5)


def stage_ends(network: nn.Module, tile: Tensor) -> list[str]:
    """Return the last norm layer of each resolution stage, in order of execution.

    Args:
        network: in eval mode. tile: (1, C, *patch).
    """
    ran: list[tuple[str, tuple[int, ...]]] = []
    names = [layer.name for layer in LayerIndex(network).of_type(*NORMS)]
    hooks = {n: lambda m, i, o, n=n: ran.append((n, tuple(o.shape[2:]))) for n in names}
    with hooked(network, {}, hooks), torch.no_grad():
        network(tile)
    following = [*ran[1:], ("", ())]
    return [name for (name, shape), (_, then) in zip(ran, following, strict=True) if shape != then]


class _Learner:
    """Slim network, optimiser and schedule of one stage of distillation."""

    def __init__(self, dense: nn.Module, slim: nn.Module, data: Calibration, settings: RecoveryConfig) -> None:
        self.dense, self.slim, self.data, self.settings = dense, slim, data, settings
        self.device = next(slim.parameters()).device
        self.trained = [p for p in slim.parameters() if p.requires_grad]
        self.optimiser = torch.optim.AdamW(self.trained, lr=settings.learning_rate, betas=(0.9, 0.99), weight_decay=0.0)
        self.teacher: Teacher | None = None  # made with the first patch
        self.half = False
        self.ends: list[str] = []
        # Judged and kept is a running mean of the weights: single steps are noisy, above all at batch 1 or 2.
        self.mean = copy.deepcopy(slim).eval().requires_grad_(False)
        self.taken = 0
        self.held = held_by(slim)

    def prepare(self, batch: Tensor) -> None:
        """Decide, by the first patches, in which precision to learn, and make the teacher."""
        wanted = self.settings.precision
        self.half = wanted == "bf16" or (wanted == "auto" and _fast_in_bfloat16(self.device))
        # torch computes some bfloat16 convolutions wrongly on CPUs.
        for network in (self.dense, self.slim):
            if self.half and self.device.type == "cpu" and not bfloat16_is_safe(network, batch.shape):
                _log.warning("recovery computes in float32: torch gets a layer of this network wrong in bfloat16")
                self.half = False
        axes = self.data.mirror_axes if self.settings.mirrored_teacher else ()
        self.teacher = Teacher(self.dense, axes=axes, half=self.half, seed=self.data.seed)

    def step(self, batch: Tensor, number: int, share: float, warm: float, blocks: bool) -> float:
        """Take step `number` at the given share of the schedule, 0..1."""
        rate = self.settings.learning_rate * min(1.0, warm) * 0.5 * (1 + math.cos(math.pi * min(share, 1.0)))
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        batch = batch.to(self.device)
        if self.teacher is None:
            self.prepare(batch)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.half):
            loss = self._block_loss(batch) if blocks else self._logit_loss(batch, number)
        self.optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimiser.step()
        for held in self.held:
            held.hold()
        self._average()
        return float(loss.detach())

    @torch.no_grad()
    def _average(self) -> None:
        self.taken += 1
        share = 1 - min(_MEMORY, (1 + self.taken) / (10 + self.taken))
        for kept, now in zip(self.mean.parameters(), self.slim.parameters(), strict=True):
            kept.lerp_(now, share)

    def _logit_loss(self, batch: Tensor, number: int) -> Tensor:
        return distillation_loss(self.slim(batch), self.teacher.answer(batch, number), regions=self.data.regions)

    def _block_loss(self, batch: Tensor) -> Tensor:
        """Mean over the stages of the squared error of their outputs, as a share of the dense outputs' variance."""
        if not self.ends:
            self.ends = stage_ends(self.dense, batch[:1])
        wanted: dict[str, Tensor] = {}
        found: dict[str, Tensor] = {}
        # Held by reference: the activation that works in place on them makes both the stage's outputs.
        with (
            hooked(self.dense, {}, {n: lambda m, i, o, n=n: wanted.update({n: o}) for n in self.ends}),
            torch.no_grad(),
        ):
            self.dense(batch)
        with hooked(self.slim, {}, {n: lambda m, i, o, n=n: found.update({n: o}) for n in self.ends}):
            self.slim(batch)
        parts = []
        for name in self.ends:
            target = wanted[name].float()
            parts.append((found[name].float() - target).square().mean() / target.var().clamp(min=1e-6))
        return torch.stack(parts).mean()


def _fast_in_bfloat16(device: torch.device) -> bool:
    return torch.cuda.is_bf16_supported() if device.type == "cuda" else device.type == "cpu" and has_fast_bfloat16()


def distil(
    dense: nn.Module,
    slim: nn.Module,
    data: Calibration,
    settings: RecoveryConfig,
    *,
    checkpoint: Path | None = None,
    identity: str = "",
    target: float | None = None,
    progress: Progress | None = None,
) -> Recovery:
    """Let the slim network learn from the dense one, in place: stages first, then logits. Keeps the best state.

    Reproducible for given data and settings, but for a time budget. With a checkpoint an interrupted run goes on where
    it stopped.

    Args:
        dense, slim: on one device; left in eval mode.
        data: patches to learn from, held-out tiles to judge on.
        settings: steps, rate, budgets.
        checkpoint: file for the state in between; removed by the caller when all is written.
        identity: a checkpoint of another identity is not used.
        target: stop as soon as the estimated drop is at most this.
        progress: called with (what, steps done, steps in all).
    """
    dense.eval()
    referee = Referee.of(dense, data, images=settings.mirrored_teacher)
    learner = _Learner(dense, slim, data, settings)
    run = _Run(learner, referee, settings, checkpoint, identity, target, progress)
    try:
        return run.go()
    finally:
        slim.eval()


class _Run:
    """The loop: schedule, measurements, best state, checkpoints."""

    def __init__(
        self,
        learner: _Learner,
        referee: Referee,
        settings: RecoveryConfig,
        checkpoint: Path | None,
        identity: str,
        target: float | None,
        progress: Progress | None,
    ) -> None:
        self.learner, self.referee, self.settings = learner, referee, settings
        self.checkpoint, self.identity, self.target, self.progress = checkpoint, identity, target, progress
        self.total = settings.block_steps + settings.steps
        self.recovery = Recovery()
        self.best: dict[str, Tensor] = {}
        self.spent = 0.0
        self.started = time.perf_counter()

    def go(self) -> Recovery:
        """Run to the end and leave the best state in the slim network."""
        resumed = self._resume()
        recovery = self.recovery
        if not resumed:
            recovery.before = recovery.after = self.referee.drop(self.learner.slim)
            self._keep()
        if self.target is not None and recovery.after <= self.target:
            recovery.stopped = "target"
        elif recovery.stopped == "steps":  # else an earlier call ended it
            self._learn()
        self.learner.slim.load_state_dict(self.best)
        recovery.seconds = self._elapsed()
        return recovery

    def _elapsed(self) -> float:
        return self.spent + time.perf_counter() - self.started

    def _learn(self) -> None:
        settings, recovery = self.settings, self.recovery
        size = settings.batch_size
        patches = self.learner.data.patches(self.total * size)
        rest = Subset(patches, range(recovery.steps * size, self.total * size))
        loader = DataLoader(rest, batch_size=size, shuffle=False, num_workers=settings.workers)
        self.learner.slim.train()
        for step, batch in enumerate(loader, start=recovery.steps):
            if settings.seconds is not None and self._elapsed() >= settings.seconds:
                recovery.stopped = "time"
                self._measure()
                return
            self.learner.step(batch, step, *self._schedule(step))
            recovery.steps = step + 1
            if self.progress is not None:
                self.progress("recovery", recovery.steps, self.total)
            last = recovery.steps == self.total
            if (recovery.steps % settings.every == 0 or last) and self._measure() and not last:
                return

    def _schedule(self, step: int) -> tuple[float, float, bool]:
        """Return the share of the stage's schedule, the share of its warm-up, and whether it is the block stage."""
        blocks = step < self.settings.block_steps
        first, length = (0, self.settings.block_steps) if blocks else (self.settings.block_steps, self.settings.steps)
        share = (step - first) / length
        if self.settings.seconds is not None:
            share = max(share, self._elapsed() / self.settings.seconds)
        return share, (step - first + 1) / max(1, min(20, length // 10)), blocks

    def _measure(self) -> bool:
        """Measure agreement, keep the best state, write the checkpoint; True where learning should stop."""
        recovery = self.recovery
        drop = self.referee.drop(self.learner.mean)
        recovery.history.append((recovery.steps, drop))
        if not recovery.after <= drop:  # also where it was NaN
            recovery.after = drop
            self._keep()
        recent = [value for _, value in recovery.history[-self.settings.patience :]]
        if self.target is not None and drop <= self.target:
            recovery.stopped = "target"
        elif self.settings.patience and len(recovery.history) > self.settings.patience and min(recent) > recovery.after:
            recovery.stopped = "no gain"
        self._save()
        return recovery.stopped in ("target", "no gain")

    def _keep(self) -> None:
        self.best = {key: value.detach().clone() for key, value in self.learner.mean.state_dict().items()}

    def _save(self) -> None:
        if self.checkpoint is None:
            return
        save_checkpoint(
            {
                "identity": self.identity,
                "recovery": vars(self.recovery) | {"seconds": self._elapsed()},
                "best": self.best,
                "slim": self.learner.slim.state_dict(),
                "mean": self.learner.mean.state_dict(),
                "optimiser": self.learner.optimiser.state_dict(),
            },
            self.checkpoint,
        )

    def _resume(self) -> bool:
        """Take up the state of an interrupted run; False where there is none that fits."""
        if self.checkpoint is None or not self.checkpoint.is_file():
            return False
        try:
            content: Mapping[str, Any] = torch.load(self.checkpoint, map_location="cpu", weights_only=True)
            if content["identity"] != self.identity:
                _log.warning("%s belongs to another run and is not used", self.checkpoint)
                return False
            recovery, best = Recovery(**content["recovery"]), content["best"]
            mean, optimiser = content["mean"], content["optimiser"]  # all there, before anything is changed
            self.learner.slim.load_state_dict(content["slim"])
            self.learner.mean.load_state_dict(mean)
            self.learner.optimiser.load_state_dict(optimiser)
            recovery.history = [tuple(item) for item in recovery.history]
            self.learner.taken = recovery.steps
            self.recovery, self.best, self.spent = recovery, best, recovery.seconds
            if recovery.stopped == "target" and not (self.target is not None and recovery.after <= self.target):
                recovery.stopped = "steps"  # no longer the target: it goes on
        except (OSError, RuntimeError, KeyError, TypeError, ValueError, EOFError, pickle.PickleError) as error:
            _log.warning("%s cannot be used (%s); recovery starts afresh", self.checkpoint, type(error).__name__)
            return False
        _log.info("recovery goes on after step %d", self.recovery.steps)
        return True


def recover(
    dense: nn.Module,
    slim: nn.Module,
    data: Calibration,
    settings: RecoveryConfig,
    *,
    checkpoint: Path | None = None,
    identity: str = "",
    target: float | None = None,
    progress: Progress | None = None,
) -> Recovery:
    """Run what the settings switch on (compensation is part of the fit), in place; see `distil` for the arguments."""
    if settings.norms:
        referee = Referee.of(dense, data, images=settings.mirrored_teacher)
        before, saved = referee.drop(slim), {k: v.clone() for k, v in slim.state_dict().items()}
        recalibrate_norms(dense, slim, data.tiles)
        if not referee.drop(slim) <= before:  # a line per channel can overshoot where the error is large
            slim.load_state_dict(saved)
    if settings.learns:
        return distil(
            dense, slim, data, settings, checkpoint=checkpoint, identity=identity, target=target, progress=progress
        )
    drop = Referee.of(dense, data, images=settings.mirrored_teacher).drop(slim)
    return Recovery(before=drop, after=drop)
