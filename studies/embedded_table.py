"""The levers for embedded boards on a trained model, one by one and composed: a row each; for docs/embedded.md.

./run.sh -m studies.embedded_table -m MODEL -i imagesTs -g labelsTs -d 4 -o table.csv --iterations 250
Rows that the file has are kept, so an interrupted run goes on. Models are written to NAME.work beside the file.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from nnslim.compression.config import SlimConfig, from_dict
from nnslim.evaluation.classes import read_dataset_json
from nnslim.evaluation.directories import evaluate_directories
from nnslim.hosts.nnunet.compress.compress_model import compress_model
from nnslim.hosts.nnunet.model.trained_model import build_network, input_shape, read_trained_model
from nnslim.hosts.nnunet.train.finetune_model import finetune_model
from nnslim.hosts.nnunet.train.settings import TrainingSettings
from nnslim.network.operations import count_operations
from nnslim.network.reached import reached_parameters
from nnslim.network.walk import deep_supervision
from nnslim.running.int8 import INT8_NAME
from nnslim.tables import markdown
from studies.board_profile import ProfileJob, profile
from studies.command import new_parser, run_command
from studies.table import GrowingTable

_STEPS = 50  # per epoch


@dataclass(frozen=True)
class Variant:
    """What a row is made of.

    Attributes:
        name: names the row and its folder. methods: the configuration's. store: half or as-is.
        precision: f32 or int8. tuned: whether the model is fine-tuned afterwards.
    """

    name: str
    methods: tuple[dict[str, Any], ...] = ()
    store: str = "as-is"
    precision: str = "f32"
    tuned: bool = True


def _levers(**settings: Any) -> dict[str, Any]:
    return {"method": "embedded", **settings}


_FEWER_FILTERS = {"method": "filters", "macs": 0.5, "multiple": 8, "min_filters": 8}
_COMPOSED = (_levers(drop_stages=1, coarser=1.5), _FEWER_FILTERS)
VARIANTS = (
    Variant("dense", tuned=False),
    Variant("half", store="half", tuned=False),
    Variant("int8", precision="int8", tuned=False),
    Variant("dense_tuned"),
    Variant("drop_stage", (_levers(drop_stages=1),)),
    Variant("depthwise", (_levers(depthwise="separable"),)),
    Variant("coarser_1.5", (_levers(coarser=1.5),)),
    Variant("pruned_50", (_levers(sparsity=0.5, start_sparsity=0.05),)),
    Variant("structured_50", (_FEWER_FILTERS,)),
    Variant("composed", _COMPOSED, store="half"),
    Variant("composed_int8", _COMPOSED, precision="int8"),
)


@dataclass(frozen=True)
class TableSettings:
    """What all rows have in common.

    Attributes:
        model: dense model folder. images, labels: test cases. work: folder of the models that are made.
        dataset: number or name to fine-tune on; None: no row is fine-tuned.
        iterations, batch_size, rate: of fine-tuning by SGD with poly decay; batch_size None: the plans'.
        calibration: images for int8, and to fold filters that go into others; None: the test images.
        cases: test images, at most. repeats: timed passes. rows: what to make.
    """

    model: Path
    images: Path
    labels: Path
    work: Path
    dataset: int | str | None = None
    iterations: int = 250
    batch_size: int | None = None
    rate: float = 1e-3
    calibration: Path | None = None
    cases: int = 1000
    repeats: int = 9
    rows: Sequence[Variant] = field(default=VARIANTS)


def measure_rows(settings: TableSettings, output: Path) -> list[dict[str, Any]]:
    """Make the rows that the CSV file lacks, and return all of them.

    Raises:
        ConfigError: the file has other columns than these rows.
        NNSlimError: what a row ran into; the rows before it are kept.
    """
    table = GrowingTable(output, "row")
    table.fill({variant.name: partial(_row, variant, settings) for variant in settings.rows})
    return table.rows


def compressed_bytes(path: Path) -> int:
    """Return the bytes that zlib makes of a file: where zeros in a file count."""
    packer, size = zlib.compressobj(6), 0
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            size += len(packer.compress(block))
    return size + len(packer.flush())


def _row(row: Variant, settings: TableSettings) -> dict[str, Any]:
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
    counts = {"cases": settings.cases, "repeats": settings.repeats}
    where = (str(folder), str(settings.images), str(predictions))
    found = profile(ProfileJob(*where, backends, row.precision, **counts))
    classes = read_dataset_json(folder / "dataset.json")
    scores = evaluate_directories(predictions, settings.labels, classes, surfaces=False, workers=1)
    dice = dict(zip((one.name for one in scores.classes), scores.class_means("dice"), strict=True))
    return {
        "row": row.name,
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


def _made(row: Variant, settings: TableSettings) -> tuple[Path, int]:
    """Return the folder of a row's model, made if it does not exist, and the steps of its fine-tuning."""
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
        tuning = TrainingSettings(
            epochs=epochs,
            iterations=steps // epochs,
            validation_iterations=1,
            batch_size=settings.batch_size,
            optimizer="sgd",
            learning_rate=settings.rate,
            schedule="poly",
            processes=1,
            resume=tuned.is_dir(),
        )
        folder = finetune_model(folder, tuned, settings.dataset, tuning)
    compress_model(read_trained_model(folder, None, "checkpoint_final.pth"), final, last)
    return final, steps


def main(arguments: Sequence[str] | None = None) -> None:
    parser = new_parser(__doc__)
    parser.add_argument("-m", "--model", type=Path, required=True, help="dense model folder")
    parser.add_argument("-i", "--images", type=Path, required=True, help="test images")
    parser.add_argument("-g", "--labels", type=Path, required=True, help="their labels")
    parser.add_argument("-o", "--output", type=Path, required=True, help="CSV file")
    parser.add_argument("-d", "--dataset", help="number or name to fine-tune on; default: nothing is fine-tuned")
    parser.add_argument("--iterations", type=int, default=250, help="steps of fine-tuning (250)")
    parser.add_argument("--batch-size", type=int, help="patches per step of fine-tuning; default: the plans'")
    parser.add_argument("--rate", type=float, default=1e-3, help="learning rate of fine-tuning (1e-3)")
    parser.add_argument("--calibration", type=Path, help="images for int8 and folding; default: the test images")
    parser.add_argument("--cases", type=int, default=1000, help="test images, at most (1000)")
    parser.add_argument("--repeats", type=int, default=9, help="timed forward passes; the median counts (9)")
    parser.add_argument("--only", nargs="+", choices=[row.name for row in VARIANTS], help="rows; default: all")
    chosen = vars(parser.parse_args(arguments))
    output, only = chosen.pop("output"), chosen.pop("only")
    rows = [row for row in VARIANTS if only is None or row.name in only]
    print(markdown(measure_rows(TableSettings(**chosen, work=output.with_suffix(".work"), rows=rows), output)))


if __name__ == "__main__":
    run_command(main)
