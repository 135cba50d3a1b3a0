"""What the points of a benchmark grid run: TotalSegmentator's architectures or a model folder, dense or with Tucker."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from nnslim.benchmark.grid import GridPoint
from nnslim.compression.compress_network import compress
from nnslim.compression.config import RunConfig, SlimConfig, load_config
from nnslim.errors import ConfigError, NNSlimError
from nnslim.files import temporary_folder
from nnslim.hosts.nnunet.judge.stages import TimedPipeline, predict_settings, stage_medians, time_pipelines
from nnslim.hosts.nnunet.model.trained_model import build_network, input_shape, read_trained_model
from nnslim.methods.base import method_named
from nnslim.running.engine import BACKENDS

_TASKS = {False: (291, 25), True: (297, 118)}  # 3 mm? -> TotalSegmentator's task, heads with background
_ALIGNED = 8  # channels of a CPU's vector


def grid_network(point: GridPoint) -> tuple[nn.Module, tuple[int, ...]]:
    """Return the network of a grid's point and its input, (B, C, *patch); without a model with seeded random weights.

    Raises:
        ModelError, ConfigError: unusable model or settings. HostError: nnU-Net is missing.
    """
    if point.model:
        source = read_trained_model(Path(point.model))
        network, shape = build_network(source), input_shape(source)
    else:
        from nnslim.hosts.totalseg.stand_in import LAYOUTS, build_stand_in, stand_in_plans

        task, heads = _TASKS[point.low_resolution]
        layout = LAYOUTS[task]
        network = build_stand_in(stand_in_plans(layout, "stand-in", 32, layout.patch), heads).eval()
        shape = (1, 1, *layout.patch)
    shape = (1, shape[1], *(point.patch or shape[2:]))
    if point.apply_tucker:
        network = compress(network, [network.state_dict()], tucker_config(point), shape).network
    return network, (point.batch_size, *shape[1:])


def tucker_config(point: GridPoint) -> SlimConfig:
    """Return the configuration of a grid's point."""
    chosen = {"rank_min": point.rank_min, "decompose": point.decompose}
    rule = method_named("tucker").config_class
    if point.rule == "published":
        return load_config(rule.published(point.rank_factor, **chosen))
    if point.rule != "nnslim":
        raise ConfigError(f"unknown rule '{point.rule}'; known: nnslim, published")
    return load_config(rule(rank_factor=point.rank_factor, rank_multiple=_ALIGNED, **chosen))


def end_to_end(point: GridPoint, images: Path, cases: int = 1) -> float | None:
    """Return the median seconds of a case from reading to writing, None where `nnslim predict` has no such backend.

    Args:
        point: an untrained architecture is written as a model folder first, with TotalSegmentator's table of classes.
        images: directory of cases. cases: how many are predicted.
    Raises:
        NNSlimError: the prediction failed.
    """
    if point.way.backend not in BACKENDS or point.way.autocast != (point.way.device == "cuda"):
        return None
    with temporary_folder() as folder:
        model = Path(point.model) if point.model else _stand_in(point, folder)
        config = tucker_config(point) if point.apply_tucker else SlimConfig()
        config = config.model_copy(update={"run": RunConfig(tile_batch=point.batch_size)})
        pipeline = TimedPipeline(point.name, model, config, predict_settings(point.way))
        (timing,) = time_pipelines([pipeline], images, cases, point.way.device == "cpu")
    if timing.error:
        raise NNSlimError(f"the whole pipeline failed: {timing.error}")
    return sum(stage_medians(timing).values())


def _stand_in(point: GridPoint, folder: Path) -> Path:
    from nnslim.hosts.totalseg.stand_in import write_stand_in

    task, _ = _TASKS[point.low_resolution]
    written = write_stand_in(task, folder, patch_size=point.patch)
    return next(path.parent for path in written.glob("*/plans.json"))
