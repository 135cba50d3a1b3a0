"""What was done to each model, as text and as JSON values."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from nnslim.compression.compress_network import Slimmed
from nnslim.running.speed import Speed

# of `Recovery.judged`
ANSWERS = {"plain": "plain answers", "mirrored": "mirrored answers", "one pass": "one pass against mirrored answers"}


def times_fewer(before: float, after: float, fewer: str = "fewer") -> str:
    """Return "3.10x fewer", "1.20x more", or "unchanged" where the two digits would say 1.00."""
    many = max(before, after) / min(before, after)
    return "unchanged" if many < 1.005 else f"{many:.2f}x {fewer if after < before else 'more'}"


@dataclass(frozen=True)
class ModelReport:
    """One model that was loaded while a context was active.

    Attributes:
        source: its folder, or a name for a network that was handed over in memory.
        folds: number of folds.
        slimmed: what compression gave; None where the model was left as it was.
        seconds: spent on compressing or on reading the cache.
        from_cache: whether the weights came from the cache.
        note: why the model was left as it was.
        speed: forward pass dense and slim, measured here; None where it was not.
    """

    source: str
    folds: int
    slimmed: Slimmed | None
    seconds: float
    from_cache: bool = False
    note: str = ""
    speed: Speed | None = None

    def lines(self) -> list[str]:
        """Return the report as lines of text."""
        if self.slimmed is None:
            return [f"{self.source}: left as it is ({self.note})"]
        before, after, speed = self.slimmed.dense, self.slimmed.slim, self.speed or self.slimmed.speed
        changed = sum(decision.action != "dense" for decision in self.slimmed.decisions)
        kept = Counter(one.why for one in self.slimmed.decisions if one.action == "dense")
        reasons = ", ".join(f"{reason}: {count}" for reason, count in kept.items())
        patch = "x".join(str(size) for size in self.slimmed.input_shape[2:])
        how = "read from the cache" if self.from_cache else "compressed"
        lines = [
            f"{self.source}: {self.folds} fold(s), {how} in {self.seconds:.1f} s",
            f"  parameters {before.parameters:,} -> {after.parameters:,} "
            f"({times_fewer(before.parameters, after.parameters)})",
            f"  MACs per {patch} patch {before.macs / 1e9:.2f} G -> {after.macs / 1e9:.2f} G "
            f"({times_fewer(before.macs, after.macs)})",
            f"  layers changed {changed}, kept dense {sum(kept.values())}{f' ({reasons})' if kept else ''}",
        ]
        for number, recovery in enumerate(self.slimmed.recovery):
            drops = [recovery["estimated_drop_before"], recovery["estimated_drop_after"]]
            before_drop, after_drop = ("unknown" if drop is None else f"{drop:.4f}" for drop in drops)
            where = f" (fold number {number + 1})" if len(self.slimmed.recovery) > 1 else ""
            lines.append(
                f"  estimated drop in Dice ({ANSWERS[recovery.get('judged', 'plain')]}) {after_drop}, was "
                f"{before_drop} before {recovery['steps']} steps of recovery{where}"
            )
            classes = {name: drop for name, drop in recovery.get("classes", {}).items() if drop is not None}
            if len(classes) > 1:
                worst = max(classes, key=classes.__getitem__)
                lines.append(f"  of {len(classes)} classes {worst} loses most: {classes[worst]:.4f}{where}")
        if speed:
            lines.append(f"  forward pass {speed}")
        if sizes := self.slimmed.weight_bytes:  # not of the files: a trained one holds the optimiser's state, too
            change = times_fewer(*sizes, fewer="less")
            lines.append(f"  weights {sizes[0] / 1e6:.1f} MB -> {sizes[1] / 1e6:.1f} MB ({change})")
        if half := self.slimmed.half_agreement:
            dices = {name: one["dice"] for name, one in half["classes"].items()}
            shown = ", ".join(f"{name} {'-' if dice is None else f'{dice:.4f}'}" for name, dice in dices.items())
            lines.append(f"  Dice of half with single precision on {half['tiles']} tile(s): {shown}")
        if self.slimmed.decisions and not changed and before == after:
            lines.append("  nothing changed: no layer would get cheaper with these settings")
        return lines

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON values."""
        return {
            "source": self.source,
            "folds": self.folds,
            "seconds": round(self.seconds, 3),
            "from_cache": self.from_cache,
            "note": self.note,
            "speed": self.speed.to_dict() if self.speed else None,
            "spec": self.slimmed.spec.to_dict() if self.slimmed else None,
            **(self.slimmed.summary() if self.slimmed else {}),
        }


@dataclass
class Report:
    """All models of one context, in the order of loading. `str(report)` is for people, `to_dict` for programs."""

    models: list[ModelReport] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [line for model in self.models for line in model.lines()]
        return "\n".join(lines) if lines else "no model was loaded inside the context"

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON values."""
        return {"models": [model.to_dict() for model in self.models]}
