"""What compression would do to a model, before any weights are made: the error grid, and a plan alone."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from nnslim.compression.config import SlimConfig
from nnslim.compression.plan_and_fit import plan_methods, searched
from nnslim.compression.recover import Progress
from nnslim.errors import ConfigError, OutputError
from nnslim.files import make_folder, whole_folder
from nnslim.hosts.nnunet.cases.calibration_tiles import ImageTiles, calibration_of
from nnslim.hosts.nnunet.cases.prepared_images import Source, prepare_images
from nnslim.hosts.nnunet.model.slim_plans import base_of
from nnslim.hosts.nnunet.model.trained_model import TrainedModel, input_shape
from nnslim.methods.base import Decision, method_named, write_decisions
from nnslim.network.cost import measure_cost

_TILES_PER_IMAGE = 2


def error_grid_folder(
    model: TrainedModel,
    target: Path,
    *,
    images: Path | None = None,
    count: int = 8,
    method: str = "tucker",
    step: int | None = None,
    progress: Progress | None = None,
) -> Sequence[Any]:
    """Write what each setting of a method would cost the layers of a dense model's first fold: errors.csv and pictures.

    The method fills the folder, see `Method.survey`; it is written whole or not at all.

    Args:
        target: folder to write; must not exist, or be empty.
        images: folder of unlabelled images, for the error of the outputs. count: images at most.
        method: one with a survey. step: between two settings; see the method.
    Raises:
        ModelError: see `base_of`, or it cannot be built. InputError: no images, or one that cannot be read.
        ConfigError: step or count below 1, or a method without a survey.
        OutputError: the target exists or cannot be written.
    """
    survey = method_named(method).survey
    if survey is None:
        raise ConfigError(f"{method} has no survey of errors")
    if count < 1:
        raise ConfigError(f"the number of images is at least 1, found {count}")
    fold = next(iter(model.checkpoints))
    title = f"{model.plans.get('dataset_name', model.path.name)}, {model.configuration}, fold {fold}"
    with whole_folder(Path(target)) as side, ExitStack() as stack:
        network, tiles = base_of(model)[0], None
        cost = measure_cost(network, input_shape(model))
        if images is not None:
            shown = progress and partial(progress, "images")
            prepared = prepare_images(Source.of(model), Path(images), count, progress=shown)
            tiles = ImageTiles(stack.enter_context(prepared), _TILES_PER_IMAGE)
            network = network.to("cuda" if torch.cuda.is_available() else "cpu")
        return survey(network, cost, tiles, side, step=step, title=title, progress=progress)


@dataclass(frozen=True)
class Planned:
    """A plan without weights.

    Attributes:
        decisions: one per layer that a method looked at.
        parameters, macs: of the network before and after; MACs of one patch.
        patch: voxels along each axis.
    """

    decisions: tuple[Decision, ...]
    parameters: tuple[int, int]
    macs: tuple[int, int]
    patch: tuple[int, ...]

    def lines(self) -> list[str]:
        """Return the totals as text."""
        changed = sum(decision.action != "dense" for decision in self.decisions)
        (before, after), (macs, macs_after) = self.parameters, self.macs
        return [
            f"parameters {before:,} -> {after:,} ({after / before:.1%})",
            f"MACs per {'x'.join(map(str, self.patch))} patch {macs / 1e9:.2f} G -> {macs_after / 1e9:.2f} G "
            f"({macs_after / macs:.1%})",
            f"layers changed {changed}, kept dense {len(self.decisions) - changed}",
        ]


def plan_model(model: TrainedModel, target: Path, config: SlimConfig, *, progress: Progress | None = None) -> Planned:
    """Choose the ranks of a dense model by the weights of its first fold, and write the table; no weights are made.

    The CSV file `target` is to be edited and passed back as the key `plan` of the method. It must not exist, since it
    may have been edited.

    Raises:
        ConfigError: nothing to plan, or a budget `max_drop`. RankError: a budget that cannot be met.
        ModelError: see `base_of`. InputError: no images. OutputError: the target exists or cannot be written.
    """
    if not config.active:
        raise ConfigError("the config has no method that is applied, so there is nothing to plan")
    if searched(config) is not None:
        raise ConfigError(
            "max_drop cannot be planned alone: it is found by compressing and recovering on images; use nnslim "
            "compress -i IMAGES, whose output folder holds the plan.csv that was found"
        )
    target = Path(target)
    if target.exists():
        raise OutputError(f"{target} exists and is not overwritten; remove it first, or choose another file")
    make_folder(target.parent)
    network, shape = base_of(model)[0], input_shape(model)
    cost = measure_cost(network, shape)
    with calibration_of(model, config, progress) as data:
        if progress is not None:
            progress("planning", 0, 1)
        if data is not None:
            network = network.to(config.calibration.torch_device())
        plans = plan_methods(network, config, cost, shape, data)
    decisions = tuple(decision for plan in plans for decision in plan.decisions)
    write_decisions(decisions, target)
    parameters = cost.parameters - sum(one.parameters_before - one.parameters_after for one in decisions)
    macs = cost.macs() - sum(one.macs_before - one.macs_after for one in decisions)
    return Planned(decisions, (cost.parameters, parameters), (cost.macs(), macs), shape[2:])
