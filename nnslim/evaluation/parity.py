"""How far the logits of an exported file are from those of the network, and how far they may be."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

# precision: (mean error as a share of the logits' standard deviation, smallest share of voxels with the same label).
# Not the largest error: OpenVINO sums norms in single precision, which at 128^3 moves single logits by 5e-3.
TOLERANCES: dict[str, tuple[float, float]] = {
    "f32": (1e-3, 0.9999),
    "f16": (0.02, 0.999),
    "int8": (float("inf"), 0.9),
}


@dataclass(frozen=True)
class Parity:
    """One tile, compared.

    Attributes:
        precision: key of TOLERANCES.
        tile: what the tile shows.
        max_error, mean_error: absolute errors of the logits.
        spread: standard deviation of the network's logits.
        same_label: share of voxels with the same label; with regions, the same for each of them.
    """

    precision: str
    tile: str
    max_error: float
    mean_error: float
    spread: float
    same_label: float

    @property
    def passed(self) -> bool:
        """Whether both tolerances hold; NaN does not pass."""
        error, labels = TOLERANCES[self.precision]
        return self.mean_error <= error * self.spread and self.same_label >= labels

    def line(self) -> str:
        """Return one line for the user."""
        error, labels = TOLERANCES[self.precision]
        most = "" if self.precision == "int8" else f"at most {error:g} and "
        return (
            f"parity on {self.tile}: logits off by {self.mean_error / self.spread:.1e} of their spread on average, "
            f"{self.max_error / self.spread:.1e} at most, {self.same_label:.4%} of voxels with the same label; "
            f"allowed {most}at least {labels:.2%}: {'passed' if self.passed else 'FAILED'}"
        )

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values."""
        error, labels = TOLERANCES[self.precision]
        allowed = {"mean_error_of_spread": None if self.precision == "int8" else error, "same_label": labels}
        return {**asdict(self), "allowed": allowed, "passed": self.passed}


def parity(wanted: Tensor, found: Tensor, *, precision: str, tile: str, regions: bool = False) -> Parity:
    """Compare (B, heads, *patch) logits.

    Args:
        wanted: the network's. found: the file's. regions: each channel is decided on its own.
    """
    off = (found.double() - wanted.double()).abs()
    same = ((found > 0) == (wanted > 0)).all(1) if regions else found.argmax(1) == wanted.argmax(1)
    spread = max(float(wanted.double().std()), 1e-12)
    return Parity(precision, tile, float(off.max()), float(off.mean()), spread, float(same.double().mean()))
