"""Tiny networks and folders that the tests share."""

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
from dynamic_network_architectures.architectures.unet import PlainConvUNet, ResidualEncoderUNet
from helpers import make_plans, make_predictor, random_data
from torch import nn

REPOSITORY = Path(__file__).resolve().parents[1]
# kind: (class, spatial axes, kernel size of each stage, stride of each stage, patch in voxels)
_KINDS = {
    "plain3d": (PlainConvUNet, 3, [3, 3, 3], [1, 2, 2], (16, 16, 16)),
    "plain2d": (PlainConvUNet, 2, [3, 3, 3], [1, 2, 2], (16, 16)),
    "residual3d": (ResidualEncoderUNet, 3, [3, 3, 3], [1, 2, 2], (16, 16, 16)),
    "anisotropic": (
        PlainConvUNet,
        3,
        [(1, 3, 3), (1, 3, 3), (3, 3, 3)],
        [(1, 1, 1), (1, 2, 2), (2, 2, 2)],
        (4, 16, 16),
    ),
}
_CONV = {2: nn.Conv2d, 3: nn.Conv3d}
_NORM = {2: nn.InstanceNorm2d, 3: nn.InstanceNorm3d}


@pytest.fixture(autouse=True)
def slim_networks_as_torch_runs_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let tests compare bits; those of `self_running` take this back."""
    monkeypatch.setenv("NNSLIM_BACKEND", "stock")


def _tiny_net(
    kind: str,
    deep_supervision: bool = False,
    *,
    channels: int = 1,
    classes: int = 3,
    features: tuple[int, ...] = (6, 8, 12),
    seed: int = 0,
) -> nn.Module:
    maker, axes, kernels, strides, _ = _KINDS[kind]
    depth = "n_blocks_per_stage" if maker is ResidualEncoderUNet else "n_conv_per_stage"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = maker(
            input_channels=channels,
            n_stages=len(features),
            features_per_stage=list(features),
            conv_op=_CONV[axes],
            kernel_sizes=kernels,
            strides=strides,
            num_classes=classes,
            n_conv_per_stage_decoder=1,
            conv_bias=True,
            norm_op=_NORM[axes],
            norm_op_kwargs={"eps": 1e-5, "affine": True},
            nonlin=nn.LeakyReLU,
            nonlin_kwargs={"inplace": True},
            deep_supervision=deep_supervision,
            **{depth: [1, 2, 1]},
        )
        for module in network.modules():  # trained norms are not ones and zeros
            if isinstance(module, _NORM[axes]):
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.uniform_(module.bias, -0.2, 0.2)
    return network.eval()


# What `-m fast` runs: the core that tells within three minutes on two cores whether nnslim still works.
FAST = (
    "network",
    "maths",
    "surgery",
    "resampling",
    "evaluation",
    "compression",
    "methods/test_tucker.py",
    "methods/test_filters.py",
    "methods/test_sauron.py",
    "methods/test_toy_method.py",
    "methods/test_method_stays_in_its_folder.py",
    "prediction/test_folder_manifest.py",
    "prediction/test_images.py",
    "running/test_rewrites.py",
    "running/test_running.py",
    "hosts/nnunet/test_compress_model.py",
    "test_architectures.py",
    "test_context.py",
    "test_former_names.py",
    "test_import_rule.py",
    "test_tables.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests of `FAST`."""
    folder = Path(__file__).parent
    for item in items:
        if "slow" not in item.keywords and item.path.relative_to(folder).as_posix().startswith(FAST):
            item.add_marker("fast")


@pytest.fixture(scope="session")
def tiny_net() -> Callable[..., nn.Module]:
    """Factory: tiny_net(kind, deep_supervision=False, channels=1, classes=3, features=(6, 8, 12), seed=0), eval mode.

    Kinds: plain3d, plain2d, residual3d (skip projections without bias), anisotropic (kernels 1x3x3, strides 1x2x2).
    """
    return _tiny_net


@pytest.fixture(scope="session")
def tiny_shape() -> Callable[..., tuple[int, ...]]:
    """Factory: tiny_shape(kind, channels=1) gives (1, channels, *patch), voxels."""
    return lambda kind, channels=1: (1, channels, *_KINDS[kind][4])


@pytest.fixture(scope="session")
def data_root() -> Path:
    """Folder of the test data: NNSLIM_DATA, else `shared` beside the repository."""
    root = Path(os.environ.get("NNSLIM_DATA") or REPOSITORY.parent / "shared")
    if not (root / "data" / "Dataset004_Hippocampus").is_dir():
        pytest.skip(f"no data/Dataset004_Hippocampus in {root}; set NNSLIM_DATA to the folder that holds data/")
    return root


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Tiny tensors: a second thread only costs time, above all on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory):
    """Keep every test, and every process that a test starts, away from the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NNSLIM_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


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
def prepared(tmp_path: Path) -> Callable[..., Any]:
    """Factory: images of these shapes, as if preprocessed, with the source of a model folder."""
    from helpers import images_source

    from nnslim.hosts.nnunet.cases.prepared_images import PreparedImages

    def make(folder: Path, *shapes: tuple[int, ...], channels: int = 1) -> PreparedImages:
        paths = []
        for number, shape in enumerate(shapes):
            paths.append(tmp_path / f"{number}.npy")
            data = np.random.default_rng(number).standard_normal((channels, *shape)).astype(np.float32)
            np.save(paths[-1], data)
        return PreparedImages(images_source(folder), paths)

    return make


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
