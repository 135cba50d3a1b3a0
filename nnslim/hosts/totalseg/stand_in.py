"""Untrained weights in the layout of TotalSegmentator's own: for timing and tests where no download is possible.

Shapes, plans and folders are those of the published models (nnU-Net's old plans format included); the numbers
are noise.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nnslim.compression.storage import half_precision
from nnslim.errors import ConfigError, HostError
from nnslim.files import read_json, whole_folder
from nnslim.hosts.nnunet.model.trained_model import write_model
from nnslim.hosts.totalseg.task_weights import STAND_IN_NOTE, task_source
from nnslim.hosts.totalseg.tasks import task_classes, totalseg_table

if TYPE_CHECKING:
    from torch import nn

CONFIGURATION = "3d_fullres"
_PARTS = (291, 292, 293, 294, 295)
_NOTE = """Untrained weights, made by nnslim (seed {seed}, base width {base}).

They have the layout of TotalSegmentator's task {task} and random numbers inside. For timing and tests only: what a
network with these weights draws means nothing and must never be used for diagnosis. Remove this folder to download
the real weights.
"""


@dataclass(frozen=True)
class Layout:
    """What tells the networks of TotalSegmentator's tasks apart.

    Attributes:
        stages: resolutions of the U-Net; each after the first halves every axis.
        spacing: voxel edge in mm, the same on all axes.
        patch: patch size in voxels, (z, y, x).
        trainer: nnU-Net trainer that the published checkpoint names.
    """

    stages: int
    spacing: float
    patch: tuple[int, int, int]
    trainer: str


_FINE = Layout(6, 1.5, (128, 128, 128), "nnUNetTrainerNoMirroring")
LAYOUTS: dict[int, Layout] = {
    **dict.fromkeys(_PARTS, _FINE),
    297: Layout(5, 3.0, (112, 112, 128), "nnUNetTrainer_4000epochs_NoMirroring"),
    # Assumed: published figures exist for 297 only; 298 is taken to differ in spacing alone.
    298: Layout(5, 6.0, (112, 112, 128), "nnUNetTrainer_4000epochs_NoMirroring"),
}


def write_stand_in(
    task_id: int, folder: Path, *, base_features: int = 32, seed: int = 0, patch_size: Sequence[int] | None = None
) -> Path:
    """Write a model folder with untrained weights where TotalSegmentator looks for task `task_id`.

    Args:
        task_id: 291 to 295 (1.5 mm), 297 (3 mm) or 298 (6 mm, layout assumed).
        folder: weights folder; created if missing.
        base_features: channels of the first stage; 32 as published, less for quick tests.
        seed: the same seed gives the same weights; torch's global generator is not touched.
        patch_size: (z, y, x) in voxels; default as published.
    Returns:
        The dataset folder. Weights are stored as float16 (half the disk); nnU-Net copies them into float32.
    Raises:
        ConfigError: no layout for the task, or a width or patch size that the network cannot have.
        HostError: nnU-Net or TotalSegmentator is missing.
        OutputError: the dataset folder exists, or cannot be written. Nothing half-written is left.
    """
    layout = LAYOUTS.get(task_id)
    if layout is None:
        raise ConfigError(f"no stand-in for task {task_id}; known: {', '.join(str(task) for task in LAYOUTS)}")
    if base_features < 1:
        raise ConfigError(f"stand-in {task_id}: base_features is {base_features}; use 1 or more (published: 32)")
    patch = layout.patch if patch_size is None else tuple(int(size) for size in patch_size)
    step = 2 ** (layout.stages - 1)
    # One voxel left at the bottom of the U-Net would make its InstanceNorm output zero.
    if len(patch) != 3 or any(size < 1 or size % step for size in patch) or set(patch) == {step}:
        raise ConfigError(
            f"stand-in {task_id}: patch_size {list(patch)} does not fit {layout.stages} stages; use three "
            f"multiples of {step}, at least one of them {2 * step} or more"
        )
    name, _ = task_source(task_id)
    target = Path(folder) / name
    plans = stand_in_plans(layout, name, base_features, patch)
    labels = {"background": 0, **{organ: label for label, organ in part_classes(task_id).items()}}
    dataset = {"channel_names": {"0": "CT"}, "labels": labels, "numTraining": 0, "file_ending": ".nii.gz"}
    weights = half_precision(build_stand_in(plans, len(labels), seed=seed).state_dict())
    with whole_folder(target) as made:
        model = made / f"{layout.trainer}__nnUNetPlans__{CONFIGURATION}"
        model.mkdir()
        checkpoint = {
            "network_weights": weights,
            "trainer_name": layout.trainer,
            "init_args": {"plans": plans, "configuration": CONFIGURATION, "fold": 0, "dataset_json": dataset},
            "inference_allowed_mirroring_axes": None,
            "nnslim_stand_in": True,
        }
        write_model(model, plans, dataset, [("0", checkpoint)])
        note = _NOTE.format(seed=seed, base=base_features, task=task_id)
        (made / STAND_IN_NOTE).write_text(note, encoding="utf-8")
    return target


def is_stand_in(folder: Path) -> bool:
    """True if `folder`, a dataset folder or a trainer folder inside one, holds untrained weights written here."""
    return (folder / STAND_IN_NOTE).exists() or read_json(folder / "plans.json").get("nnslim_stand_in") is True


def part_classes(task_id: int) -> dict[int, str]:
    """Return the classes of a task from TotalSegmentator's own table, label number to name, without background.

    Raises:
        HostError: TotalSegmentator is missing or has no such table.
    """
    if task_id in _PARTS:
        return dict(list(totalseg_table("map_to_binary", "class_map_5_parts").values())[_PARTS.index(task_id)])
    return task_classes("total")


def stand_in_plans(layout: Layout, name: str, base_features: int, patch: tuple[int, ...]) -> dict[str, Any]:
    """Return plans in nnU-Net's format before 2.3, which the published weights have and nnU-Net converts on reading.

    The intensity statistics (Hounsfield units) are round figures of a whole-body CT, not the published ones.
    """
    stages = layout.stages
    shape = [float(size) for size in patch]
    configuration = {
        "data_identifier": f"nnUNetPlans_{CONFIGURATION}",
        "preprocessor_name": "DefaultPreprocessor",
        "batch_size": 2,
        "patch_size": list(patch),
        "median_image_size_in_voxels": shape,
        "spacing": [layout.spacing] * 3,
        "normalization_schemes": ["CTNormalization"],
        "use_mask_for_norm": [False],
        "UNet_class_name": "PlainConvUNet",
        "UNet_base_num_features": base_features,
        "n_conv_per_stage_encoder": [2] * stages,
        "n_conv_per_stage_decoder": [2] * (stages - 1),
        "num_pool_per_axis": [stages - 1] * 3,
        "pool_op_kernel_sizes": [[1, 1, 1]] + [[2, 2, 2]] * (stages - 1),
        "conv_kernel_sizes": [[3, 3, 3]] * stages,
        "unet_max_num_features": 10 * base_features,  # 320 as published, in proportion for narrower nets
        "batch_dice": False,
    }
    for what, order in (("data", 3), ("seg", 1), ("probabilities", 1)):
        settings = {"is_seg": what == "seg", "order": order, "order_z": 0, "force_separate_z": None}
        configuration[f"resampling_fn_{what}"] = "resample_data_or_seg_to_shape"
        configuration[f"resampling_fn_{what}_kwargs"] = settings
    intensities = {"min": -1024.0, "max": 3071.0, "mean": 0.0, "median": 40.0, "std": 400.0}
    return {
        "dataset_name": name,
        "plans_name": "nnUNetPlans",
        "original_median_spacing_after_transp": [layout.spacing] * 3,
        "original_median_shape_after_transp": shape,
        "image_reader_writer": "SimpleITKIO",
        "transpose_forward": [0, 1, 2],
        "transpose_backward": [0, 1, 2],
        "configurations": {CONFIGURATION: configuration},
        "experiment_planner_used": "ExperimentPlanner",
        "label_manager": "LabelManager",
        "foreground_intensity_properties_per_channel": {
            "0": {**intensities, "percentile_00_5": -1000.0, "percentile_99_5": 1500.0}
        },
        "nnslim_stand_in": True,
    }


def build_stand_in(plans: dict[str, Any], heads: int, *, seed: int = 0, device: str = "cpu") -> nn.Module:
    """Build the untrained network through nnU-Net's own classes, as its predictor would.

    Args:
        plans: see `stand_in_plans`; not modified. heads: output channels, background included.
        seed: of torch's CPU generator, which is put back as it was.
        device: cpu, or meta to count parameters without memory.
    Raises:
        HostError: nnU-Net is missing.
    """
    try:
        import torch
        from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
        from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
    except ImportError as error:
        raise HostError(f"nnU-Net cannot be imported ({error}); run pip install nnunetv2") from error
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Detected old nnU-Net plans format")  # that is the point here
        configuration = PlansManager(copy.deepcopy(plans)).get_configuration(CONFIGURATION)
    architecture = configuration.configuration["architecture"]
    with torch.random.fork_rng(devices=[]), torch.device(device):
        # Not torch.manual_seed: that would reseed the accelerators too, which fork_rng(devices=[]) does not restore.
        torch.random.default_generator.manual_seed(seed)
        return get_network_from_plans(
            architecture["network_class_name"],
            architecture["arch_kwargs"],
            architecture["_kw_requires_import"],
            1,
            heads,
            allow_init=True,
            deep_supervision=False,
        )
