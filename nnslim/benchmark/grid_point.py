"""One setting of a benchmark grid."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field

from nnslim.benchmark.passes import Way, way_columns
from nnslim.benchmark.timings import Row


@dataclass(frozen=True)
class GridPoint:
    """One setting of the grid.

    Attributes:
        way: backend, precision, threads, device, autocast.
        batch_size: patches per pass.
        apply_tucker: False: the dense network; the rank settings then mean nothing.
        rank_factor, rank_min: see `TuckerConfig`. rule: "published" (every layer, as the predecessor did) or "nnslim".
        low_resolution: the 3 mm architecture instead of the 1.5 mm one. decompose: False: random weights.
        patch: voxels; None: the network's own. model: folder of a trained model instead of an untrained architecture.
    """

    way: Way = field(default_factory=Way)
    batch_size: int = 1
    apply_tucker: bool = True
    rank_factor: float = 0.5
    rank_min: int = 8
    rule: str = "nnslim"
    low_resolution: bool = False
    decompose: bool = False
    patch: tuple[int, ...] | None = None
    model: str = ""

    @property
    def network(self) -> str:
        """Name of the network, independent of how it is run."""
        base = self.model or ("3mm" if self.low_resolution else "1.5mm")
        base += "" if self.patch is None else f" patch {'x'.join(map(str, self.patch))}"
        if not self.apply_tucker:
            return f"{base} dense"
        weights = " decomposed" if self.decompose else ""
        return f"{base} tucker {self.rank_factor:g} min {self.rank_min} {self.rule}{weights}"

    @property
    def setting(self) -> str:
        """All but the batch size."""
        way = self.way
        threads = "" if way.threads is None else f" threads {way.threads}"
        autocast = " autocast" if way.autocast else ""
        return f"{self.network}, {way.backend} {way.precision} {way.device}{threads}{autocast}"

    @property
    def name(self) -> str:
        """Unique in the table: a row of this name is not measured again."""
        return f"{self.setting}, batch {self.batch_size}"

    def columns(self) -> Row:
        """Return what the table says about the setting."""
        values = asdict(self)
        columns = {key: values[key] for key in ("batch_size", "apply_tucker", "decompose")}
        columns |= way_columns(self.way)
        columns |= {"name": self.name, "3mm": self.low_resolution, "nnunet_path": self.model}
        columns |= {"load_params": bool(self.model), "patch_size": self.patch or ""}
        if self.apply_tucker:
            columns |= {"rank_mode": "relative", "rank_factor": self.rank_factor, "rank_min": self.rank_min}
            columns["rule"] = self.rule
        return columns
