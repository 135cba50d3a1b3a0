"""Recover accuracy without labels: the slim network learns the dense network's answers on augmented images."""

from __future__ import annotations

import io
import logging
import math
import pickle
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, Subset

from nnslim.caches import read_kept, write_kept
from nnslim.compression.calibration import Calibration
from nnslim.compression.config import RecoveryConfig
from nnslim.compression.distillation import (
    Teacher,
    as_logits,
    distillation_loss,
    recalibrate_norms,
    stage_ends,
    stage_loss,
    to_training_mode,
)
from nnslim.compression.referee import Judgement, Referee
from nnslim.errors import InputError
from nnslim.files import checkpoint_bytes, no_memory, unreadable
from nnslim.network.spec import held_by
from nnslim.running.bfloat16 import bfloat16_is_safe, has_fast_bfloat16

_log = logging.getLogger("nnslim")
_MEMORY = 0.97  # of the running mean of the weights, per step
_WORSE, _SLOWER = 0.02, 0.3  # a drop so much beyond the best says that the rate is too high; it falls to this share
_STATE_VERSION = 4  # of the file that an interrupted recovery leaves; raise it when its content changes

Progress = Callable[[str, int, int], None]  # called with (what is done, units done, units in all)


@dataclass
class Recovery:
    """How recovery went.

    Attributes:
        steps: steps taken.
        before, after: estimated drop in Dice on the held-out tiles, see `Agreement`.
        history: (step, estimated drop).
        stopped: why it ended: "steps", "time", "no gain" or "target".
        slowed: how often the rate was lowered because learning did harm.
        judged: which answers the drops are of, see `Referee`.
        classes: estimated drop of each class that a tile shows, after recovery.
        seconds: spent; not part of `to_dict`, which is reproducible.
    """

    steps: int = 0
    before: float = math.nan
    after: float = math.nan
    history: list[tuple[int, float]] = field(default_factory=list)
    stopped: str = "steps"
    slowed: int = 0
    judged: str = "plain"
    classes: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def worst(self) -> tuple[str, float]:
        """The class that is estimated to lose most, and its drop; ("", NaN) where no tile shows any class."""
        return max(self.classes.items(), key=lambda item: item[1], default=("", math.nan))

    def take(self, judgement: Judgement, names: Sequence[str]) -> None:
        """Keep the drops after recovery; classes without a name are numbered."""
        self.after = judgement.drop
        named = enumerate(judgement.classes.tolist(), start=1)
        self.classes = {
            names[number - 1] if number <= len(names) else str(number): drop for number, drop in named if drop == drop
        }

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values."""

        def rounded(value: float) -> float | None:
            return None if math.isnan(value) else round(value, 5)

        return {
            "steps": self.steps,
            "estimated_drop_before": rounded(self.before),
            "estimated_drop_after": rounded(self.after),
            "history": [[step, rounded(drop)] for step, drop in self.history],
            "stopped": self.stopped,
            "slowed": self.slowed,
            "judged": self.judged,
            "classes": {name: rounded(drop) for name, drop in self.classes.items()},
        }


def schedule(step: int, settings: RecoveryConfig, spent: float = 0.0) -> tuple[float, bool]:
    """Return the learning rate of a step, and whether it learns the stages' outputs (block steps) or the logits.

    Each of the two phases warms up for a tenth of its steps, 20 at most, and then follows a cosine to 0. The first
    step is 0; `spent` is the share of the time budget, 0..1.
    """
    blocks = step < settings.block_steps
    first, length = (0, settings.block_steps) if blocks else (settings.block_steps, settings.steps)
    share = min(1.0, max((step - first) / length, spent))
    warm = min(1.0, (step - first + 1) / max(1, min(20, length // 10)))
    return settings.learning_rate * warm * 0.5 * (1 + math.cos(math.pi * share)), blocks


def learns_in_bfloat16(networks: Sequence[nn.Module], batch: Tensor, wanted: str) -> bool:
    """Return whether to learn in bfloat16: "bf16", or "auto" where it is fast, if torch computes it correctly."""
    kind = batch.device.type
    fast = torch.cuda.is_bf16_supported() if kind == "cuda" else kind == "cpu" and has_fast_bfloat16()
    half = wanted == "bf16" or (wanted == "auto" and fast)
    # torch computes some bfloat16 convolutions wrongly on CPUs.
    if half and kind == "cpu" and not all(bfloat16_is_safe(network, batch.shape) for network in networks):
        _log.warning("recovery computes in float32: torch gets a layer of this network wrong in bfloat16")
        return False
    return half


def _running_mean(kept: list[Tensor], now: list[Tensor], taken: Tensor | int) -> None:
    count = int(taken)
    get_ema_multi_avg_fn(min(_MEMORY, (1 + count) / (10 + count)))(kept, now, taken)


@dataclass
class _Learning:
    """One run of gradient steps; see `recover` for the fields."""

    dense: nn.Module
    slim: nn.Module
    answering: nn.Module
    data: Calibration
    settings: RecoveryConfig
    referee: Referee
    checkpoint: Path | None
    identity: str
    target: float | None
    target_worst: float | None
    progress: Progress | None

    def __post_init__(self) -> None:
        rate = self.settings.learning_rate
        self.device = next(self.slim.parameters()).device
        self.trained = [p for p in self.slim.parameters() if p.requires_grad]
        self.optimiser = torch.optim.AdamW(self.trained, lr=rate, betas=(0.9, 0.99), weight_decay=0.0)
        # Judged and kept is a running mean of the weights: single steps are noisy, above all at batch 1 or 2.
        mean = AveragedModel(self.slim, multi_avg_fn=_running_mean, use_buffers=True)
        self.mean = mean.eval().requires_grad_(False)
        self.mean.update_parameters(self.slim)  # the start counts as one of the states
        self.held = held_by(self.slim)
        self._total = self.settings.block_steps + self.settings.steps
        self.recovery = Recovery(judged=self.data.judged)
        self.best: dict[str, Tensor] = {}
        self.started = time.perf_counter()

    def go(self) -> Recovery:
        """Run to the end and leave the best state in the slim network."""
        if not self._resume():
            judgement = self.referee.judge(self.slim)
            self.recovery.before = judgement.drop
            self._keep(judgement)
        if self._reached():
            self.recovery.stopped = "target"
        elif self.recovery.stopped == "steps":  # else an earlier call ended it
            self._learn()
        self.slim.load_state_dict(self.best)
        self.recovery.seconds = self._elapsed()
        return self.recovery

    def _reached(self) -> bool:
        """Whether the state that is kept meets the targets."""
        if self.target is None or not self.recovery.after <= self.target:
            return False
        return self.target_worst is None or not self.recovery.worst[1] > self.target_worst

    def _elapsed(self) -> float:
        return time.perf_counter() - self.started

    def _learn(self) -> None:
        settings, recovery, size = self.settings, self.recovery, self.settings.batch_size
        total = self._total
        patches = self.data.patches(total * size)
        first = torch.stack([patches[number] for number in range(size)]).to(self.device)
        half = learns_in_bfloat16((self.answering, self.slim), first, settings.precision)
        axes = self.data.mirror_axes if settings.sees_mirrored else ()
        teacher = Teacher(self.answering, axes=axes, half=half, seed=self.data.seed)
        ends = stage_ends(self.dense, first[:1]) if settings.block_steps else []
        answered = None
        if self.data.answered is not None and settings.teacher == "auto" and settings.steps:
            answered = self.data.answered(self.answering, teacher.logits, tuple(axes), 2 * settings.steps * size)
            patches = answered(total * size) if answered else patches
        rest = Subset(patches, range(recovery.steps * size, total * size))
        loader = DataLoader(rest, batch_size=size, shuffle=False, num_workers=settings.workers)
        to_training_mode(self.slim)
        for step, batch in enumerate(loader, start=recovery.steps):
            if settings.seconds is not None and self._elapsed() >= settings.seconds:
                recovery.stopped = "time"
                self._measure()
                return
            batch, wanted = batch if answered else (batch, None)
            batch = batch.to(self.device)
            rate, blocks = schedule(step, settings, self._elapsed() / settings.seconds if settings.seconds else 0.0)
            for group in self.optimiser.param_groups:
                group["lr"] = rate * _SLOWER**recovery.slowed
            with torch.autocast(self.device.type, torch.bfloat16, enabled=half):
                if blocks:
                    loss = stage_loss(self.dense, self.slim, ends, batch)
                else:
                    if wanted is None:
                        target = teacher.answer(batch, step)
                    else:
                        target = as_logits(wanted.to(self.device), self.data.regions)
                    loss = distillation_loss(self.slim(batch), target, regions=self.data.regions)
            self._update(loss)
            recovery.steps = step + 1
            if self.progress is not None:
                self.progress("recovery", recovery.steps, total)
            last = recovery.steps == total
            if (recovery.steps % settings.every == 0 or last) and self._measure() and not last:
                return

    def _update(self, loss: Tensor) -> None:
        self.optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimiser.step()
        for held in self.held:
            held.hold()
        self.mean.update_parameters(self.slim)

    def _measure(self) -> bool:
        """Measure agreement, keep the best state, write the checkpoint; True where learning should stop."""
        recovery = self.recovery
        judgement = self.referee.judge(self.mean.module)
        recovery.history.append((recovery.steps, judgement.drop))
        left = self._elapsed() * (self._total / max(1, recovery.steps) - 1) / 60
        told = (recovery.steps, self._total, judgement.drop, left)
        _log.info("recovery: step %d of %d, estimated drop %.4f, at most %.0f min to go", *told)
        if not recovery.after <= judgement.drop:  # also where it was NaN
            self._keep(judgement)
        elif judgement.drop > recovery.after + _WORSE:
            self._slow_down()
        recent = [value for _, value in recovery.history[-self.settings.patience :]]
        if self._reached():
            recovery.stopped = "target"
        elif self.settings.patience and len(recovery.history) > self.settings.patience and min(recent) > recovery.after:
            recovery.stopped = "no gain"
        self._save()
        return recovery.stopped in ("target", "no gain")

    def _slow_down(self) -> None:
        """Go on from the best state at a lower rate: without instance norms a network bears only small steps."""
        self.recovery.slowed += 1
        for network in (self.slim, self.mean.module):
            network.load_state_dict(self.best)
        self.mean.n_averaged.fill_(1)
        self.optimiser.state.clear()
        _log.info("recovery: learning does harm at step %d; it goes on more slowly", self.recovery.steps)

    def _keep(self, judgement: Judgement) -> None:
        self.recovery.take(judgement, self.data.class_names)
        self.best = {key: value.detach().clone() for key, value in self.mean.module.state_dict().items()}

    def _save(self) -> None:
        if self.checkpoint is not None:
            state = {name: part.state_dict() for name, part in self._parts().items()}
            recovery = vars(self.recovery) | {"seconds": self._elapsed()}
            head = {"version": _STATE_VERSION, "identity": self.identity, "recovery": recovery, "best": self.best}
            write_kept(self.checkpoint, checkpoint_bytes(head | state))

    def _parts(self) -> dict[str, Any]:
        return {"slim": self.slim, "mean": self.mean, "optimiser": self.optimiser}

    def _resume(self) -> bool:
        """Take up the state of an interrupted run; False where there is none that fits."""
        if self.checkpoint is None or not (content := _read_state(self.checkpoint)):
            return False
        if content["identity"] != self.identity:
            _log.warning("%s belongs to another run and is not used", self.checkpoint)
            return False
        for name, part in self._parts().items():
            part.load_state_dict(content[name])
        self.recovery, self.best = Recovery(**content["recovery"]), content["best"]
        self.recovery.history = [tuple(item) for item in self.recovery.history]
        self.started -= self.recovery.seconds
        if self.recovery.stopped == "target" and not self._reached():
            self.recovery.stopped = "steps"  # no longer the target: it goes on
        _log.info("recovery goes on after step %d", self.recovery.steps)
        return True


def _read_state(path: Path) -> Mapping[str, Any]:
    """Return the state of an interrupted recovery; {} where there is none, or with a warning none that can be used.

    Raises:
        InputError: it cannot be read now, as for want of memory; a new start would overwrite it.
    """
    try:
        if (kept := read_kept(path)) is None:
            return {}
        content = torch.load(io.BytesIO(kept), map_location="cpu", weights_only=True)
        reason = "it is incomplete"
    except (OSError, RuntimeError, ValueError, EOFError, MemoryError, pickle.PickleError) as error:
        if no_memory(error):
            raise InputError(unreadable(path, error)) from error
        content, reason = None, type(error).__name__
    if isinstance(content, dict) and content.get("version", 1) != _STATE_VERSION:
        reason = "another version of nnslim wrote it"
    elif isinstance(content, dict) and {"identity", "recovery", "best", "slim", "mean", "optimiser"} <= set(content):
        return content
    _log.warning("%s cannot be used (%s); recovery starts afresh", path, reason)
    return {}


def recover(
    dense: nn.Module,
    slim: nn.Module,
    data: Calibration,
    settings: RecoveryConfig,
    *,
    teacher: nn.Module | None = None,
    checkpoint: Path | None = None,
    identity: str = "",
    target: float | None = None,
    target_worst: float | None = None,
    progress: Progress | None = None,
) -> Recovery:
    """Run what the settings switch on, in place: norms, then learning from the dense network, stages before logits.

    Learning keeps the best state. It is reproducible for given data and settings, except with a time budget. With a
    checkpoint, an interrupted run goes on where it stopped.

    Args:
        dense, slim: on one device; left in eval mode.
        teacher: whose logits are learned and judged by, such as the mean of several folds; default: `dense`, to whose
            layers the norms and stages are fitted in any case.
        checkpoint: file for the state in between; the caller removes it when all is written.
        identity: a checkpoint of another identity is not used.
        target, target_worst: stop as soon as the estimated drop, and that of the class that loses most, are at most
            these.
    """
    dense, answering = dense.eval(), (teacher or dense).eval()
    referee = Referee.of(answering, data, images=settings.sees_mirrored)
    if settings.norms:
        before, saved = referee.drop(slim), {k: v.clone() for k, v in slim.state_dict().items()}
        recalibrate_norms(dense, slim, data.tiles)
        if not referee.drop(slim) <= before:  # a line per channel can overshoot where the error is large
            slim.load_state_dict(saved)
    if not settings.learns:
        judgement = referee.judge(slim)
        recovery = Recovery(before=judgement.drop, judged=data.judged)
        recovery.take(judgement, data.class_names)
        return recovery
    limits = (target, target_worst)
    run = _Learning(dense, slim, answering, data, settings, referee, checkpoint, identity, *limits, progress)
    try:
        return run.go()
    finally:
        slim.eval()
