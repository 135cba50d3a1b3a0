"""What nnslim.json says about a fine-tuning."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

from nnslim._version import __version__
from nnslim.compression.record import read_record, write_record
from nnslim.errors import ConfigError
from nnslim.files import read_json
from nnslim.hosts.nnunet.model.trained_model import TrainedModel, load_checkpoint
from nnslim.hosts.nnunet.train.finetune_settings import FinetuneSettings
from nnslim.hosts.nnunet.train.finetune_trainer import BEFORE
from nnslim.hosts.nnunet.train.prepared_data import PreparedData

FINAL = "checkpoint_final.pth"


def plain_settings(settings: FinetuneSettings) -> dict[str, Any]:
    """Return the settings as JSON holds them."""
    return json.loads(json.dumps(dataclasses.asdict(settings), default=str))


def begin_record(
    source: TrainedModel, output: Path, data: PreparedData, trainer_name: str, settings: FinetuneSettings
) -> dict[str, Any]:
    """Write nnslim.json: the source's, if it has one, with what this run was asked to do.

    Raises:
        ConfigError: the output was begun from another model, dataset or trainer.
    """
    begun = read_record(output, required=False).get("finetune", {})
    before = read_record(source.path, required=False) or {"nnslim": __version__, "source": source.path.name}
    entry = {
        "nnslim": __version__,
        "source": source.path.name,
        "dataset": data.name,
        "trainer": trainer_name,
        "settings": plain_settings(settings),
        "folds": begun.get("folds", {}),
    }
    for name in ("source", "dataset", "trainer"):
        if begun and begun.get(name) != entry[name]:
            raise ConfigError(f"{output} was begun with {name} {begun.get(name)}, now it is {entry[name]}")
    if "finetune" in before:
        entry["earlier"] = before["finetune"]
    return write_record(output, before, finetune=entry)


def finish_record(output: Path, content: dict[str, Any], folds: list[str], data: PreparedData) -> None:
    """Add the results of the folds to what `begin_record` wrote."""
    results = content["finetune"]["folds"]
    for fold in folds:
        results[fold] = fold_result(output / f"fold_{fold}", data.dataset)
    write_record(output, content, checkpoint=FINAL, folds=sorted(results))


def fold_result(folder: Path, dataset: dict[str, Any]) -> dict[str, Any]:
    """Return epochs, seconds and pseudo-Dice (nnU-Net's, on random validation patches) of a finished fold."""
    checkpoint = load_checkpoint(folder / FINAL, trust=True)  # this process, or one that it started, wrote it
    log, before = checkpoint["logging"], read_json(folder / BEFORE)
    spans = zip(log["epoch_start_timestamps"], log["epoch_end_timestamps"], strict=True)
    return {
        "epochs": int(checkpoint["current_epoch"]),
        "seconds": round(sum(end - start for start, end in spans), 1),
        "pseudo_dice_before": _by_class(before.get("dice_per_class_or_region", []), dataset),
        "pseudo_dice": _by_class(log["dice_per_class_or_region"][-1], dataset),
        "best_mean_pseudo_dice": float(max(log["mean_fg_dice"])),
    }


def _by_class(values: list[float], dataset: dict[str, Any]) -> dict[str, float | None]:
    """Name nnU-Net's list: regions in the order of dataset.json, labels in the order of their numbers."""
    named = [(name, value) for name, value in dataset["labels"].items() if name != "ignore" and value not in (0, [0])]
    if not any(isinstance(value, list) for _, value in named):
        named.sort(key=lambda pair: pair[1])
    # NaN, where no patch showed the class, is no JSON
    return {
        name: None if math.isnan(dice) else round(float(dice), 4)
        for (name, _), dice in zip(named, values, strict=False)
    }
