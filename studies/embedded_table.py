"""The levers one by one and composed on one model: what each costs and saves, a row each."""

from __future__ import annotations

import csv
import io
import logging
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nnslim.compression.config import SlimConfig, from_dict
from nnslim.errors import ConfigError, InputError
from nnslim.evaluation.classes import read_dataset_json
from nnslim.evaluation.directories import evaluate_directories
from nnslim.files import write_bytes
from nnslim.hosts.nnunet.compress.compress_model import compress_model
from nnslim.hosts.nnunet.model.trained_model import build_network, input_shape, read_trained_model
from nnslim.hosts.nnunet.train.finetune_model import finetune_model
from nnslim.hosts.nnunet.train.finetune_settings import FinetuneSettings
from nnslim.network.operations import count_operations
from nnslim.network.reached import reached_parameters
from nnslim.network.walk import deep_supervision
from nnslim.running.int8 import INT8_NAME
from studies.board_profile import ProfileJob, profile

_log = logging.getLogger("nnslim")
_STEPS = 50  # of an epoch


@dataclass(frozen=True)
class Row:
    """One row.

    Attributes:
        name: of the row, and of its folder. methods: of the configuration. store: half or as-is.
        precision: f32 or int8. tuned: whether the model is fine-tuned afterwards.
    """

    name: str
    methods: tuple[dict[str, Any], ...] = ()
    store: str = "as-is"
    precision: str = "f32"
    tuned: bool = True


def _levers(**settings: Any) -> dict[str, Any]:
    return {"method": "embedded", **settings}


ROWS = (
    Row("dense", tuned=False),
    Row("half", store="half", tuned=False),
    Row("int8", precision="int8", tuned=False),
    Row("dense_tuned"),
    Row("drop_stage", (_levers(drop_stages=1),)),
    Row("depthwise", (_levers(depthwise="separable"),)),
    Row("coarser_1.5", (_levers(coarser=1.5),)),
    Row("pruned_50", (_levers(sparsity=0.5, start_sparsity=0.05),)),
    Row("structured_50", ({"method": "filters", "macs": 0.5, "multiple": 8, "min_filters": 8},)),
    Row(
        "composed",
        (_levers(drop_stages=1, coarser=1.5), {"method": "filters", "macs": 0.5, "multiple": 8, "min_filters": 8}),
        store="half",
    ),
    Row(
        "composed_int8",
        (_levers(drop_stages=1, coarser=1.5), {"method": "filters", "macs": 0.5, "multiple": 8, "min_filters": 8}),
        precision="int8",
    ),
)


@dataclass(frozen=True)
class TableSettings:
    """What all rows have in common.

    Attributes:
        model: dense model folder. images, labels: of test cases. dataset: number or name to fine-tune on; None: no
            row is fine-tuned.
        work: folder of the models that are made. iterations: of fine-tuning. batch_size: None: the plans'.
        learning_rate: of SGD, poly decay. cases: test images, at most. repeats: timed passes.
        calibration: images for int8, and to fold filters that go into others; None: those of the test.
        rows: to make.
    """

    model: Path
    images: Path
    labels: Path
    work: Path
    dataset: int | str | None = None
    iterations: int = 250
    batch_size: int | None = None
    learning_rate: float = 1e-3
    cases: int = 1000
    repeats: int = 9
    calibration: Path | None = None
    rows: Sequence[Row] = field(default=ROWS)


def measure_rows(settings: TableSettings, output: Path) -> None:
    """Make one row after the other and add each to a CSV as it is done; rows that are there are left alone.

    Raises:
        ConfigError: the CSV has other columns than these rows.
        NNSlimError: what a row ran into; the rows before it are kept.
    """
    done = _read(output)
    for row in settings.rows:
        if row.name in {each["row"] for each in done}:
            continue
        made = {"row": row.name, **_row(row, settings)}
        if done and list(done[0]) != list(made):
            raise ConfigError(f"{output} has the columns {list(done[0])}, expected {list(made)}; choose another file")
        done.append(made)
        _write(output, done)
        _log.info("%s", made)


def compressed_bytes(path: Path) -> int:
    """Return the bytes that zlib makes of a file: where zeros in a file count."""
    packer, size = zlib.compressobj(6), 0
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            size += len(packer.compress(block))
    return size + len(packer.flush())


def _row(row: Row, settings: TableSettings) -> dict[str, Any]:
    folder, steps = _made(row, settings)
    model = read_trained_model(folder)
    network, shape = build_network(model), input_shape(model)
    with deep_supervision(network, False):
        reached, cost = reached_parameters(network, shape), count_operations(network, shape)
    files = [folder / f"fold_{fold}" / model.checkpoint_name for fold in model.checkpoints]
    if row.precision == "int8":
        names = (INT8_NAME, INT8_NAME.replace(".xml", ".bin"))
        files = [folder / f"fold_{fold}" / name for fold in model.checkpoints for name in names]
    predictions = settings.work / "predictions" / row.name
    backends = ("openvino",) if row.precision == "int8" else ("stock", "openvino")
    found = profile(
        ProfileJob(
            str(folder),
            str(settings.images),
            str(predictions),
            backends,
            row.precision,
            settings.cases,
            settings.repeats,
        )
    )
    classes = read_dataset_json(folder / "dataset.json")
    scores = evaluate_directories(predictions, settings.labels, classes, surfaces=False, workers=1)
    dice = dict(zip((one.name for one in scores.classes), scores.class_means("dice"), strict=True))
    return {
        "parameters": reached.built,
        "reached": reached.reached,
        "non_zero": reached.non_zero,
        "mmacs": round(cost.macs() / 1e6, 3),
        "patch": "x".join(str(size) for size in shape[2:]),
        "weights": row.precision if row.precision != "f32" else {"half": "f16"}.get(row.store, "f32"),
        "file_mb": round(sum(file.stat().st_size for file in files) / 1e6, 3),
        "compressed_mb": round(sum(map(compressed_bytes, files)) / 1e6, 3),
        "torch_ms": found["forward_ms"].get("stock", ""),
        "openvino_ms": found["forward_ms"].get("openvino", ""),
        "slice_ms": found["slice_ms"],
        "volume_s": found["volume_s"],
        "peak_mb": found["peak_mb"],
        "tuned_steps": steps,
        "cases": len(scores.cases),
        "dice": round(scores.mean("dice"), 4),
        **{f"dice_{name}": round(float(value), 4) for name, value in dice.items()},
    }


def _made(row: Row, settings: TableSettings) -> tuple[Path, int]:
    """Return the folder of a row's model, made where it is not there yet, and the steps of its fine-tuning."""
    final = settings.work / row.name
    steps = settings.iterations if row.tuned and settings.dataset is not None else 0
    if final.is_dir():
        return final, steps
    images = {"calibration": {"images": str(settings.calibration or settings.images)}}
    plain = images if row.precision == "int8" else {}
    run = {"guard": False, "backend": "openvino" if row.precision == "int8" else "auto", "precision": row.precision}
    last: SlimConfig = from_dict({"methods": [], "run": run, "store": row.store, **plain})
    folder = settings.model
    if row.methods:
        folder = settings.work / f"{row.name}.start"
        if not folder.is_dir():
            uses = images if any(each["method"] == "filters" for each in row.methods) else {}
            start = from_dict({"methods": list(row.methods), "run": {"guard": False}, **uses})
            compress_model(read_trained_model(settings.model), folder, start)
    if steps:
        tuned = settings.work / f"{row.name}.tuned"
        epochs = max(1, steps // _STEPS)
        tuning = FinetuneSettings(
            epochs=epochs,
            iterations=steps // epochs,
            validation_iterations=1,
            batch_size=settings.batch_size,
            optimizer="sgd",
            learning_rate=settings.learning_rate,
            schedule="poly",
            processes=1,
            resume=tuned.is_dir(),
        )
        folder = finetune_model(folder, tuned, settings.dataset, tuning)
    compress_model(read_trained_model(folder, None, "checkpoint_final.pth"), final, last)
    return final, steps


def _read(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    try:
        with path.open(newline="", encoding="utf-8") as stream:
            rows = list(csv.DictReader(stream))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path} cannot be read as a table: {error}") from error
    if rows and "row" not in rows[0]:
        raise InputError(f"{path} is not a table of this script: it has no column 'row'")
    return rows


def _write(path: Path, rows: list[dict[str, Any]]) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_bytes(path, text.getvalue().encode())
