"""The error grid of a trained nnU-Net model folder: table and pictures."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from nnslim.cost import measure_cost
from nnslim.errors import ConfigError, ModelFolderError
from nnslim.files import whole_folder
from nnslim.hosts.nnunet.calibrate import ImageTiles, Source, prepare_images
from nnslim.hosts.nnunet.folder import ModelFolder, build_network, input_shape
from nnslim.streaming import Tiles
from nnslim.work.error_grid import LayerGrid, error_grid, write_grid
from nnslim.work.grid_figures import equal_factor_lines, heat_maps
from nnslim.work.recover import Progress

_TILES_PER_IMAGE = 2


def error_grid_folder(
    model: ModelFolder,
    target: Path,
    *,
    images: Path | None = None,
    count: int = 8,
    step: int | None = None,
    progress: Progress | None = None,
) -> list[LayerGrid]:
    """Write errors.csv and pictures for the first fold that was read.

    The folder holds errors.csv, `weights` (heat maps) and `equal_factor` (lines) as PNG and PDF, and `outputs` (heat
    maps) where there are images. It is written whole or not at all.

    Args:
        model: dense, from `read_model_folder`.
        target: folder to write; must not exist, or be empty.
        images: folder of unlabelled images; with them the error of the outputs is told as well.
        count: images at most.
        step: channels between the ranks of a side; a sixteenth of the channels if None.
        progress: called with (what is done, units done, units in all).
    Raises:
        ModelFolderError: a slim model, or one that cannot be built. InputError: no images, or one that cannot be read.
        ConfigError: step or count below 1. OutputError: the target exists or cannot be written.
    """
    if model.is_slim:
        raise ModelFolderError(f"{model.path} is a slim model already; name the model that it was made from")
    if count < 1:
        raise ConfigError(f"the number of images is at least 1, found {count}")
    fold = next(iter(model.checkpoints))
    title = f"{model.plans.get('dataset_name', model.path.name)}, {model.configuration}, fold {fold}"

    def report(done: int, total: int) -> None:
        if progress is not None:
            progress("layers", done, total)

    with whole_folder(Path(target)) as side:
        network = build_network(model)
        cost = measure_cost(network, input_shape(model))
        with _tiles(model, images, count, progress) as tiles:
            if tiles is not None and torch.cuda.is_available():
                network = network.to("cuda")
            grids = error_grid(network, cost, tiles, step=step, progress=report)
        write_grid(grids, side / "errors.csv")
        if progress is not None:
            progress("pictures", 0, 1)
        heat_maps(grids, side, title=title)
        heat_maps(grids, side, outputs=True, title=title)
        equal_factor_lines(grids, side, title=title)
    return grids


@contextmanager
def _tiles(model: ModelFolder, images: Path | None, count: int, progress: Progress | None) -> Iterator[Tiles | None]:
    if images is None:
        yield None
        return
    step = None if progress is None else lambda done, total: progress("images", done, total)
    with prepare_images(Source.of(model), Path(images), count, progress=step) as prepared:
        yield ImageTiles(prepared, _TILES_PER_IMAGE)
