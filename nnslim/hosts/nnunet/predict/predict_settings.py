"""How to predict; importing this takes no time."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from nnslim.running.engine import Backend, Precision


@dataclass(frozen=True)
class PredictSettings:
    """How to predict; the defaults are nnU-Net's, but on the CPU and without mirroring.

    Attributes:
        device: cpu, cuda or mps. step_size: tile step as a share of the patch. mirroring: at test time.
        folds: all that have the checkpoint if None.
        checkpoint: checkpoint_final.pth, else checkpoint_best.pth, if None. trust: see `load_checkpoint`.
        previous_stage: for a cascade, folder of the segmentations of the stage before.
        out_filters, in_filters: see `with_filters`.
        backend, precision, threads: see `nnslim.running.engine.Settings`; None: the config's.
        export: "streamed" or nnU-Net's own, "stock"; None: the config's.
        deterministic: see `nnslim.running.engine.Settings`.
    """

    device: str = "cpu"
    step_size: float = 0.5
    mirroring: bool = False
    folds: list[str] | None = None
    checkpoint: str | None = None
    trust: bool = False
    previous_stage: Path | None = None
    out_filters: Path | None = None
    in_filters: Path | None = None
    backend: Backend | None = None
    precision: Precision | None = None
    threads: int | None = None
    export: Literal["streamed", "stock"] | None = None
    deterministic: bool = False


def absolute_config(config: Any) -> Any:
    """Return the same, the path of a YAML file absolute."""
    is_file = isinstance(config, (str, Path)) and Path(config).suffix in (".yml", ".yaml")
    return Path(config).absolute() if is_file else config


def config_identity(config: Any) -> dict[str, Any] | None:
    """Return what decides the result of a configuration, None without one."""
    if config is None:
        return None
    from nnslim.compression.config import load_config  # takes torch's seconds

    loaded = load_config(config)
    identity = {**loaded.identity(), "precision": loaded.run.precision}
    if loaded.run.precision == "int8":  # calibrated on them, where the model has none
        identity["images"] = loaded.calibration.images and str(loaded.calibration.images)
    return identity


def digest(decisive: dict[str, Any]) -> str:
    """Return 16 hexadecimal digits of JSON values."""
    return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()[:16]
