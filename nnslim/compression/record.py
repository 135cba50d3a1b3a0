"""nnslim.json, which lies in every model folder that nnslim writes: the one place that reads and writes it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nnslim.errors import InputError, ModelError
from nnslim.evaluation.agreement import Agreement
from nnslim.files import read_json_object, write_json
from nnslim.methods.base import Decision
from nnslim.network.cost import Counts
from nnslim.running.speed import Speed

RECORD = "nnslim.json"


def read_record(model: Path, *, required: bool = True) -> dict[str, Any]:
    """Return the content of a model's nnslim.json; {} where there is none and none is required.

    Raises:
        ModelError: it is missing, so the model is not a slim one, or it cannot be read.
    """
    path = Path(model) / RECORD
    if path.is_file():
        return read_json_object(path)
    if required:
        raise ModelError(f"{model} has no {RECORD}, which every slim model folder has; was the dense one named?")
    return {}


def write_record(model: Path, content: Mapping[str, Any], **entries: Any) -> dict[str, Any]:
    """Write a model's nnslim.json, whole or not at all, and return what it holds.

    A compression and a training fill the file; what is done to the model later is an entry of its own: "agreement",
    "distill", "finetune", "stored".

    Args:
        content: what the file holds already, or that of the model that this one was made from.
        entries: to add or replace; one that is None is left out.
    Raises:
        OutputError: it cannot be written; the file is then as it was.
    """
    made = {key: value for key, value in {**content, **entries}.items() if value is not None or key not in entries}
    write_json(Path(model) / RECORD, made)
    return made


@dataclass(frozen=True)
class SlimRecord:
    """Content of nnslim.json; what a model was not asked for is None or empty.

    Attributes:
        input_shape: (1, channels, *patch) in voxels, for which the counts hold.
        dense, slim: counts for one patch.
        decisions: one per layer.
        recovery: of each fold, see `Recovery.to_dict`.
        config: the SlimConfig as JSON values.
        speed: one forward pass, measured when the model was compressed.
        agreement: with the dense model, on images.
        facts: the rest: nnslim (version), source, dataset, configuration, checkpoint, folds, distill, finetune.
        stored: precision of the weights, bytes of them and of the files, of the dense model's too.
    """

    input_shape: tuple[int, ...]
    dense: Counts
    slim: Counts
    decisions: tuple[Decision, ...]
    recovery: tuple[Mapping[str, Any], ...] = ()
    config: Mapping[str, Any] = field(default_factory=dict)
    speed: Speed | None = None
    agreement: Agreement | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)
    stored: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def from_dict(cls, content: Mapping[str, Any], where: str = "nnslim.json") -> SlimRecord:
        """Return a record from what `read_record` gives; `where` is named in errors.

        Raises:
            InputError: it says nothing about layers (a dense model that was fine-tuned), or is no such record.
        """
        if missing := [key for key in ("input_shape", "dense", "slim", "layers") if key not in content]:
            raise InputError(f"{where} lacks {', '.join(missing)}, which nnslim writes for every compressed model")
        speed, agreement = content.get("speed"), content.get("agreement")
        try:
            return cls(
                tuple(int(size) for size in content["input_shape"]),
                Counts(**content["dense"]),
                Counts(**content["slim"]),
                tuple(Decision.from_dict(layer) for layer in content["layers"]),
                tuple(dict(fold) for fold in content.get("recovery") or ()),
                dict(content.get("config") or {}),
                speed and Speed.from_dict({"where": "", "planned_ms": None, "put_back": (), **speed}),
                agreement and Agreement.from_dict(agreement),
                {key: content.get(key) for key in _FACTS},
                dict(content.get("stored") or {}),
            )
        except (TypeError, ValueError, KeyError, AttributeError) as error:
            raise InputError(f"{where} is not what nnslim writes: {type(error).__name__}: {error}") from error

    @property
    def patch(self) -> str:
        """The patch as text, voxels: "40x56x40"."""
        return "x".join(str(size) for size in self.input_shape[2:])


_FACTS = ("nnslim", "source", "dataset", "configuration", "checkpoint", "folds", "distill", "finetune")
