"""`nnslim inflate`: a trained 2D model as the start of a 3D one."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from nnslim.commands.common import CheckpointOption, FoldOption, QuietOption, TrustOption, start, tell
from nnslim.errors import ConfigError

Mode = Enum("Mode", {name: name for name in ("center", "average")}, type=str)
Fit = Enum("Fit", {name: name for name in ("error", "cut-or-pad")}, type=str)


def inflate(
    model: Annotated[Path, typer.Option("-m", "--model", help="trained 2D model")],
    plans: Annotated[
        str | None, typer.Option("-p", "--plans", help="3D plans: a file, or with -d a name; default: the 2D model's")
    ] = None,
    dataset: Annotated[str | None, typer.Option("-d", "--dataset", help="preprocessed dataset with the plans")] = None,
    configuration: Annotated[str, typer.Option("-c", "--configuration", help="3D configuration")] = "3d_fullres",
    output: Annotated[Path | None, typer.Option("-o", "--output", help=".pth for -pretrained_weights")] = None,
    folder: Annotated[Path | None, typer.Option(help="3D model directory to write, to predict with untuned")] = None,
    mode: Annotated[Mode, typer.Option(help="where along depth the 2D kernels go")] = Mode["center"],
    fit: Annotated[Fit, typer.Option(help="what to do with other widths")] = Fit["error"],
    fold: FoldOption = None,
    seed: Annotated[int, typer.Option(help="seed of what the 2D model cannot fill")] = 0,
    checkpoint: CheckpointOption = None,
    trust: TrustOption = False,
    quiet: QuietOption = False,
) -> None:
    """Make 3D weights from a trained 2D model: nnUNetv2_train -pretrained_weights FILE starts from them.

    Example: nnslim inflate -m MODEL_2D -f 0 -o start.pth
    """
    if output is None and folder is None:
        raise ConfigError("nothing to write: name a file (-o FILE.pth), a model directory (--folder DIR), or both")
    if output is not None and output.suffix != ".pth":
        raise ConfigError(f"-o {output}: expected a file that ends in .pth; a model directory is --folder")
    from nnslim.hosts.nnunet.model.inflated import inflate_model, preprocessed_files, target_of, write_inflated
    from nnslim.hosts.nnunet.model.trained_model import read_trained_model

    start(quiet)
    flat = read_trained_model(model, fold, checkpoint, trust=trust)
    if output is not None and len(flat.checkpoints) > 1:
        raise ConfigError(f"a .pth file holds one fold, the model has {', '.join(flat.checkpoints)}: choose with -f")
    files: tuple[Path | None, Path | None] = (Path(plans) if plans else None, None)
    if dataset is not None:
        files = preprocessed_files(dataset, plans or "nnUNetPlans")
    target = target_of(flat, configuration, *files)
    made = inflate_model(flat, target, mode.value, fit=fit.value, seed=seed)
    write_inflated(target, made, file=output, folder=folder)
    notes = next(iter(made.values()))["nnslim_inflation"]["notes"]
    tell(*notes, *(f"written: {path}" for path in (output, folder) if path is not None))
