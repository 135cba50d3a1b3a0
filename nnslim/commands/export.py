"""`nnslim export`: a file that runs without torch and nnU-Net."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from nnslim.commands.common import CheckpointOption, QuietOption, TrustOption, start, stepping, tell
from nnslim.errors import InputError

_Format = Enum("_Format", {name: name for name in ("onnx", "openvino")}, type=str)
_ExportPrecision = Enum("_ExportPrecision", {name: name for name in ("f32", "f16", "int8")}, type=str)


def export(
    model: Annotated[Path, typer.Option("-m", "--model", help="model folder, dense or slim")],
    output: Annotated[
        Path | None,
        typer.Option(
            "-o", "--output", help="file to write, .onnx or .xml; without it: int8 models beside the checkpoints"
        ),
    ] = None,
    format_: Annotated[
        _Format | None, typer.Option("--format", help="default: by the file ending of the output")
    ] = None,
    precision: Annotated[
        _ExportPrecision, typer.Option(help="f16: weights in 16 bits; int8: calibrated on images")
    ] = _ExportPrecision.f32,  # type: ignore[attr-defined]
    images: Annotated[
        Path | None, typer.Option("-i", "--images", help="folder of images: to calibrate int8, and to compare on")
    ] = None,
    fold: Annotated[str | None, typer.Option("-f", "--fold", help="default: the first")] = None,
    patch: Annotated[str | None, typer.Option(help="sizes in voxels, such as 96,96,96; default: the model's")] = None,
    checkpoint: CheckpointOption = None,
    trust: TrustOption = False,
    quiet: QuietOption = False,
) -> None:
    """Write the network as an ONNX or OpenVINO file that runs without torch and nnU-Net, and compare it on a tile.

    Example: nnslim export -m MODEL --format onnx -o network.onnx
    """
    from nnslim.hosts.nnunet.export.export_model import ExportSettings, export_model, keep_int8, read_patch
    from nnslim.hosts.nnunet.model.trained_model import read_trained_model

    start(quiet)
    if output is None and (precision.value != "int8" or images is None):
        raise InputError(
            "name a file to write with -o; only --precision int8 with -i can be written beside the checkpoints"
        )
    asked = None if patch is None else read_patch(patch)
    source = read_trained_model(model, fold and [fold], checkpoint, trust=trust)
    with stepping(quiet) as step:
        if output is None:
            checked = keep_int8(source, images, progress=step)
            lines = [f"fold {fold}: {found.line()}" for fold, found in checked.items()]
            passed = all(found.passed for found in checked.values())
        else:
            named = format_.value if format_ else {".onnx": "onnx"}.get(output.suffix, "openvino")
            exported = export_model(source, output, ExportSettings(named, precision.value, images, asked), step)
            lines, passed = exported.lines(), bool(exported.files)
    tell(*lines, failed=not passed)
