"""Small trained-model folders of every kind that nnU-Net writes: real plans, real architectures, random weights."""

from __future__ import annotations

import copy
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch

LEAKY = {"nonlin": "torch.nn.LeakyReLU", "nonlin_kwargs": {"inplace": True}}
RESAMPLING = {f"resampling_fn_{what}": "resample_data_or_seg_to_shape" for what in ("data", "seg", "probabilities")} | {
    f"resampling_fn_{what}_kwargs": {"is_seg": what == "seg", "order": order, "order_z": 0, "force_separate_z": None}
    for what, order in (("data", 3), ("seg", 1), ("probabilities", 1))
}


def _configuration(kind: str) -> dict[str, Any]:
    dims = 2 if kind == "2d" else 3
    stages = 3
    kernels = [[3] * dims for _ in range(stages)]
    strides = [[1] * dims] + [[2] * dims for _ in range(stages - 1)]
    patch = [16] * dims
    if kind == "anisotropic":
        kernels[0], strides[1], patch = [1, 3, 3], [1, 2, 2], [8, 16, 16]
    blocks = "n_blocks_per_stage" if kind == "residual" else "n_conv_per_stage"
    architecture = "ResidualEncoderUNet" if kind == "residual" else "PlainConvUNet"
    return {
        "data_identifier": f"nnUNetPlans_{dims}d",
        "preprocessor_name": "DefaultPreprocessor",
        "batch_size": 2,
        "patch_size": patch,
        "median_image_size_in_voxels": patch,
        "spacing": [1.0] * dims,
        "normalization_schemes": ["ZScoreNormalization"],
        "use_mask_for_norm": [False],
        "batch_dice": False,
        **RESAMPLING,
        "architecture": {
            "network_class_name": f"dynamic_network_architectures.architectures.unet.{architecture}",
            "arch_kwargs": {
                "n_stages": stages,
                "features_per_stage": [8, 16, 32],
                "conv_op": f"torch.nn.modules.conv.Conv{dims}d",
                "kernel_sizes": kernels,
                "strides": strides,
                blocks: [2] * stages,
                "n_conv_per_stage_decoder": [2] * (stages - 1),
                "conv_bias": True,
                "norm_op": f"torch.nn.modules.instancenorm.InstanceNorm{dims}d",
                "norm_op_kwargs": {"eps": 1e-5, "affine": True},
                "dropout_op": None,
                "dropout_op_kwargs": None,
                **LEAKY,
            },
            "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
        },
    }


def _old_format(settings: dict[str, Any]) -> dict[str, Any]:
    """Rewrite a configuration as nnU-Net up to 2.2 did (and as TotalSegmentator's weights have it)."""
    kwargs = settings.pop("architecture")["arch_kwargs"]
    return settings | {
        "UNet_class_name": "PlainConvUNet",
        "UNet_base_num_features": 8,
        "unet_max_num_features": 32,
        "n_conv_per_stage_encoder": kwargs["n_conv_per_stage"],
        "n_conv_per_stage_decoder": kwargs["n_conv_per_stage_decoder"],
        "num_pool_per_axis": [2, 2, 2],
        "pool_op_kernel_sizes": kwargs["strides"],
        "conv_kernel_sizes": kwargs["kernel_sizes"],
    }


def make_plans(kind: str) -> tuple[dict[str, Any], str]:
    """Return plans and the name of the trained configuration."""
    settings = _configuration(kind)
    name = "2d" if kind == "2d" else "3d_fullres"
    configurations = {name: settings}
    if kind == "old plans":
        configurations[name] = _old_format(settings)
    if kind == "cascade":
        name = "3d_cascade_fullres"
        configurations["3d_lowres"] = copy.deepcopy(settings) | {"next_stage": name}
        configurations[name] = {"inherits_from": "3d_fullres", "previous_stage": "3d_lowres"}
    plans = {
        "dataset_name": "Dataset999_Tiny",
        "plans_name": "nnUNetPlans",
        "original_median_spacing_after_transp": [1.0, 1.0, 1.0],
        "original_median_shape_after_transp": [20, 20, 20],
        "image_reader_writer": "SimpleITKIO",
        "transpose_forward": [0, 1, 2],
        "transpose_backward": [0, 1, 2],
        "configurations": configurations,
        "experiment_planner_used": "ExperimentPlanner",
        "label_manager": "LabelManager",
        "foreground_intensity_properties_per_channel": {
            "0": {"max": 4, "mean": 0, "median": 0, "min": -4, "percentile_00_5": -3, "percentile_99_5": 3, "std": 1}
        },
    }
    return plans, name


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Tiny networks run fastest on one thread, by far so on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def make_model(tmp_path: Path) -> Callable[..., Path]:
    """Return a factory: kind (plain, residual, 2d, anisotropic, regions, cascade, old plans) -> model folder."""

    def make(
        kind: str = "plain",
        folds: tuple[int | str, ...] = (0,),
        checkpoint: str = "checkpoint_final.pth",
        trainer: str = "nnUNetTrainer",
        parent: str = "models",
    ) -> Path:
        from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
        from nnunetv2.utilities.label_handling.label_handling import determine_num_input_channels
        from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

        plans, name = make_plans(kind)
        labels: dict[str, Any] = {"background": 0, "one": 1, "two": 2}
        dataset: dict[str, Any] = {"channel_names": {"0": "MRI"}, "numTraining": 3, "file_ending": ".nii.gz"}
        if kind == "regions":
            labels = {"background": 0, "whole": [1, 2], "core": 2}
            dataset["regions_class_order"] = [1, 2]
        dataset["labels"] = labels
        manager = PlansManager(copy.deepcopy(plans))
        settings = manager.get_configuration(name)
        folder = tmp_path / parent / f"{trainer}__nnUNetPlans__{name}"
        folder.mkdir(parents=True)
        (folder / "plans.json").write_text(json.dumps(plans))
        (folder / "dataset.json").write_text(json.dumps(dataset))
        for number, fold in enumerate(folds):
            torch.manual_seed(number)
            network = get_network_from_plans(
                settings.network_arch_class_name,
                settings.network_arch_init_kwargs,
                settings.network_arch_init_kwargs_req_import,
                determine_num_input_channels(manager, settings, dataset),
                manager.get_label_manager(dataset).num_segmentation_heads,
                deep_supervision=False,
            )
            for parameter in network.parameters():  # biases and affine weights, too, are not at their start values
                parameter.data += 0.05 * torch.randn_like(parameter)
            (folder / f"fold_{fold}").mkdir()
            content = {
                "network_weights": network.state_dict(),
                "optimizer_state": {"state": {}, "param_groups": []},
                "grad_scaler_state": None,
                "logging": {"mean_fg_dice": [np.float32(0.5)]},
                "_best_ema": np.float64(0.5),
                "current_epoch": 1,
                "init_args": {
                    "plans": plans,
                    "configuration": name,
                    "fold": fold,
                    "dataset_json": dataset,
                    "device": torch.device("cpu"),
                },
                "trainer_name": trainer,
                "inference_allowed_mirroring_axes": tuple(range(2 if kind == "2d" else 3)),
            }
            torch.save(content, folder / f"fold_{fold}" / checkpoint)
        return folder

    return make


@pytest.fixture
def stock_logits() -> Callable[..., torch.Tensor]:
    """Return a function: predict random data with nnU-Net's own predictor -> (heads, *spatial) logits."""

    def predict(folder: Path, folds: Any = None, checkpoint: str = "checkpoint_final.pth", **options: Any) -> Any:
        predictor = make_predictor(**options)
        predictor.initialize_from_trained_model_folder(str(folder), folds, checkpoint)
        return predictor.predict_logits_from_preprocessed_data(random_data(predictor)).float()

    return predict


def make_predictor(**options: Any) -> Any:
    """Return a stock predictor on the CPU."""
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    return nnUNetPredictor(device=torch.device("cpu"), allow_tqdm=False, **{"use_mirroring": False, **options})


def random_data(predictor: Any, size: int = 20) -> torch.Tensor:
    """Return (channels, size, size, size) noise with the channels that the predictor's network takes."""
    from nnslim.hosts.nnunet.predict.predictor_patches import _input_channels

    return torch.randn(_input_channels(predictor), size, size, size, generator=torch.Generator().manual_seed(5))


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Run `nnslim` in this process (importing torch anew takes seconds); return exit code, stdout and stderr."""
    from nnslim.cli import main

    def run(*arguments: object, expect: int | None = None) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["nnslim", *map(str, arguments)])
        monkeypatch.setattr("rich.console.Console.width", 1000)
        capfd.readouterr()
        try:
            main()
            code = 0
        except SystemExit as end:
            code = end.code or 0
        out, err = capfd.readouterr()
        assert expect in (None, code), f"exit code {code}\n{out}\n{err}"
        return code, out, err

    return run


@pytest.fixture
def case_labels(case_folder: Path, tmp_path: Path) -> Path:
    """Labels of the cases a and b (not of c), on the grid of the images."""
    folder = tmp_path / "labels"
    folder.mkdir()
    for name in "ab":
        image = nib.load(case_folder / f"{name}_0000.nii.gz")
        made = np.digitize(image.get_fdata(), (0.0, 1.0)).astype(np.uint8)
        nib.save(nib.Nifti1Image(made, image.affine), folder / f"{name}.nii.gz")
    return folder


@pytest.fixture
def case_folder(tmp_path: Path) -> Path:
    """A folder with three small readable images."""
    import nibabel as nib

    folder = tmp_path / "images"
    folder.mkdir()
    rng = np.random.default_rng(0)
    affine = np.array([[0, -1.0, 0, 5], [1.2, 0, 0, -3], [0, 0, 0.9, 2], [0, 0, 0, 1]])
    for name in ("a", "b", "c"):
        image = rng.standard_normal((18, 20, 17)).astype(np.float32)
        nib.save(nib.Nifti1Image(image, affine), folder / f"{name}_0000.nii.gz")
    return folder


def write_ball_dataset(folder: Path) -> None:
    """Write six volumes with a bright ball each, in nnU-Net's raw layout."""
    import nibabel as nib

    rng = np.random.default_rng(0)
    for kind in ("imagesTr", "labelsTr"):
        (folder / kind).mkdir(parents=True)
    grid = np.stack(np.meshgrid(*[np.arange(16)] * 3, indexing="ij"))
    for number in range(6):
        centre = rng.integers(5, 11, 3).reshape(3, 1, 1, 1)
        ball = (((grid - centre) ** 2).sum(0) < 16).astype(np.uint8)
        image = (ball + 0.3 * rng.standard_normal(ball.shape)).astype(np.float32)
        nib.save(nib.Nifti1Image(image, np.eye(4)), folder / "imagesTr" / f"case_{number}_0000.nii.gz")
        nib.save(nib.Nifti1Image(ball, np.eye(4)), folder / "labelsTr" / f"case_{number}.nii.gz")
    names = [f"case_{number}" for number in range(6)]
    (folder / "splits_final.json").write_text(json.dumps([{"train": names[:4], "val": names[4:]}]))
    dataset = {"channel_names": {"0": "MRI"}, "labels": {"background": 0, "ball": 1}}
    (folder / "dataset.json").write_text(json.dumps({**dataset, "numTraining": 6, "file_ending": ".nii.gz"}))


@pytest.fixture
def ct(data_root: Path, tmp_path: Path) -> Path:
    """The middle of the sample CT, small enough for seconds: 48x48x30 voxels of 3 mm."""
    import nibabel as nib

    path = data_root / "data" / "totalsegmentator_samples" / "example_ct_sm.nii.gz"
    if not path.is_file():
        pytest.skip(f"{path} is absent; set NNSLIM_DATA to the folder that holds data/totalsegmentator_samples")
    nib.save(nib.load(path).slicer[40:88, 30:78, :], tmp_path / "ct.nii.gz")
    return tmp_path / "ct.nii.gz"


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A TotalSegmentator home of its own, without statistics; nnU-Net's variables are put back afterwards."""
    from nnslim.hosts.totalseg.task_weights import disable_usage_statistics

    monkeypatch.setenv("TOTALSEG_HOME_DIR", str(tmp_path / "home"))
    monkeypatch.delenv("TOTALSEG_WEIGHTS_PATH", raising=False)
    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        monkeypatch.setenv(name, os.environ.get(name, str(tmp_path)))
    disable_usage_statistics()
    return tmp_path / "home"
