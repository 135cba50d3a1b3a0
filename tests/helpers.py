"""What several tests share: models, datasets, predictors, jobs."""

from __future__ import annotations

import copy
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
# Begins a script that runs as in a container: by a user without a home and without an entry in the list of users.
NOBODY = """
import os, pwd
def nobody(uid): raise KeyError(uid)
pwd.getpwuid = nobody
for name in ("HOME", "USER", "LOGNAME", "LNAME", "USERNAME", "XDG_CACHE_HOME", "NNSLIM_CACHE"):
    os.environ.pop(name, None)
"""
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


def make_predictor(**options: Any) -> Any:
    """Return a stock predictor on the CPU."""
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    return nnUNetPredictor(device=torch.device("cpu"), allow_tqdm=False, **{"use_mirroring": False, **options})


def random_data(predictor: Any, size: int = 20) -> torch.Tensor:
    """Return (channels, size, size, size) noise with the channels that the predictor's network takes."""
    from nnunetv2.utilities.label_handling.label_handling import determine_num_input_channels

    managers = predictor.plans_manager, predictor.configuration_manager, predictor.dataset_json
    shape = (determine_num_input_channels(*managers), size, size, size)
    return torch.randn(shape, generator=torch.Generator().manual_seed(5))


def final_of(model: Path, fold: int | str = 0, name: str = "checkpoint_final.pth") -> dict[str, Any]:
    """Return a checkpoint of a fold."""
    from nnslim.hosts.nnunet.model.trained_model import load_checkpoint

    return load_checkpoint(Path(model) / f"fold_{fold}" / name, trust=True)


def stock_prediction(
    model: Path, folds: tuple[int | str, ...] = (0,), name: str = "checkpoint_final.pth"
) -> tuple[Any, torch.Tensor]:
    """Load by nnU-Net's own predictor; return it and the logits of noise."""
    predictor = make_predictor()
    predictor.initialize_from_trained_model_folder(str(model), folds, name)
    return predictor, predictor.predict_logits_from_preprocessed_data(random_data(predictor))


def write_ball_dataset(folder: Path) -> None:
    """Write six volumes with a bright ball each, in nnU-Net's raw layout."""

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


def load_stock(folder: Path, folds: Any = (0,), **options: Any) -> Any:
    """Return nnU-Net's predictor with that model loaded, on the CPU."""
    predictor = make_predictor(**options)
    predictor.initialize_from_trained_model_folder(str(folder), folds)
    return predictor


def images_source(folder: Path) -> Any:
    """Return what preprocessing needs of a model folder."""
    from nnslim.hosts.nnunet.cases.prepared_images import Source
    from nnslim.hosts.nnunet.model.trained_model import read_trained_model

    return Source.of(read_trained_model(folder))


def slim_model(source: Path, target: Path, factor: float = 0.4, images: Path | None = None, **run: Any) -> Path:
    """Compress a model by Tucker with that rank factor, into `target`."""
    from nnslim.compression.config import load_config
    from nnslim.hosts.nnunet.compress.compress_model import compress_model
    from nnslim.hosts.nnunet.model.trained_model import read_trained_model

    methods = [{"method": "tucker", "rank_factor": factor, "rank_min": 2}]
    compress_model(
        read_trained_model(source), target, load_config({"version": 1, "methods": methods, "run": run}), images=images
    )
    return target


def smooth_tiles(shape: tuple[int, ...], count: int, seed: int = 3) -> list[torch.Tensor]:
    """Return `count` smooth random tiles of a shape (1, 1, *patch): white noise tells no layers apart."""
    generator = torch.Generator().manual_seed(seed)
    coarse = [torch.randn(1, 1, 3, 3, 3, generator=generator) for _ in range(count)]
    return [torch.nn.functional.interpolate(one, shape[2:], mode="trilinear") for one in coarse]


def tiny_primus(size: tuple[int, ...], kind: Any = None, registers: int = 0, **changes: Any) -> torch.nn.Module:
    """Return a Primus of four blocks and 48 channels in eval mode, nothing in it at its initial 0 or 1."""
    from dynamic_network_architectures.architectures.primus import Primus

    torch.manual_seed(1)
    settings = {"num_register_tokens": registers, "init_values": 0.1, **changes}
    network = (kind or Primus)(1, 48, (8, 8, 8), 3, 4, 4, size, **settings)
    for parameter in network.parameters():
        parameter.data.add_(0.02 * torch.randn_like(parameter))
    return network.eval()


GLOO_TRAINER = '''
"""nnU-Net's trainer takes CUDA devices under DDP; this one stays on the CPU, so that two processes can be tested."""
import torch
import nnunetv2.training.nnUNetTrainer.nnUNetTrainer as module
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

wrap = torch.nn.parallel.DistributedDataParallel
module.DDP = lambda network, device_ids: wrap(network)


class nnUNetTrainerGloo(nnUNetTrainer):
    def __init__(self, plans, configuration, fold, dataset_json, device=torch.device("cpu")):
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.device, self.grad_scaler = torch.device("cpu"), None
'''


def offer_gloo_trainer(folder: Path, monkeypatch: Any) -> None:
    """Let nnU-Net find nnUNetTrainerGloo, also in the processes of a test, which take a thread each."""
    folder.mkdir()
    (folder / "gloo.py").write_text(GLOO_TRAINER)
    monkeypatch.setenv("nnUNet_extTrainer", str(folder))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def train_sauron_rank(rank: int, meeting: str, config: Any) -> None:
    """One of two processes of a training: both end with the same network."""
    import torch.distributed as dist

    from nnslim.hosts.nnunet.model.trained_model import trainer_class
    from nnslim.hosts.nnunet.train.sauron_trainer import sauron_trainer_class
    from nnslim.surgery.narrow import widths_of

    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=2)
    folder = Path(os.environ["nnUNet_preprocessed"]) / "Dataset998_Ball"
    plans, dataset = (json.loads((folder / name).read_text()) for name in ("nnUNetPlans.json", "dataset.json"))
    cls = sauron_trainer_class(config, trainer_class("nnUNetTrainerGloo"))
    trainer = cls({**plans, "continue_training": False}, "3d_fullres", 0, dataset, torch.device("cpu"))
    trainer.run_training()
    widths: list[Any] = [None, None]
    dist.all_gather_object(widths, widths_of(trainer.pruner.network))
    assert widths[0] == widths[1] != trainer.start_widths
    mine = torch.cat([p.detach().flatten() for p in trainer.network.parameters()])
    theirs = [torch.zeros_like(mine), torch.zeros_like(mine)]
    dist.all_gather(theirs, mine)
    assert torch.equal(theirs[0], theirs[1])
    dist.destroy_process_group()


class Bomb:
    """What a checkpoint with code in it holds: unpickled without a check, it prints."""

    def __reduce__(self) -> Any:
        return (print, ("code ran",))


def plant_bomb(path: Path) -> None:
    """Put code into a checkpoint."""
    torch.save({**torch.load(path, weights_only=False), "logging": Bomb()}, path)


def damages(path: Path, *, kinds: bool = True) -> Iterator[str]:
    """Put one damage after the other in the place of a file and yield its name; the file is whole again at the end.

    Args:
        kinds: also put a folder, a link and a pipe there.
    """
    content = path.read_bytes()

    def put(new: bytes) -> None:
        remove(path)
        path.write_bytes(new)

    for bit in np.linspace(0, 8 * len(content) - 1, 40).astype(int):
        changed = bytearray(content)
        changed[bit // 8] ^= 1 << bit % 8
        put(bytes(changed))
        yield f"bit {bit}"
    for size in {0, 1, 63, 64, 65, len(content) // 3, len(content) - 65, len(content) - 64, len(content) - 1}:
        put(content[: max(size, 0)])
        yield f"cut to {size}"
    for more in (b"\0", content):
        put(content + more)
        yield f"{len(more)} bytes more"
    if kinds:
        remove(path)
        path.mkdir()
        (path / "file").write_bytes(content)
        yield "folder"
        remove(path)
        elsewhere = path.with_name("elsewhere")
        elsewhere.write_bytes(content)
        path.symlink_to(elsewhere)
        yield "link"
        elsewhere.unlink()
        remove(path)
        os.mkfifo(path)
        yield "pipe"
    put(content)


def spied(kind: type, monkeypatch: Any) -> list[Any]:
    """Return a list that is given each object of a class as it is made."""
    made, real = [], kind.__init__

    def watched(self: Any, *given: Any, **options: Any) -> None:
        made.append(self)
        real(self, *given, **options)

    monkeypatch.setattr(kind, "__init__", watched)
    return made


def remove(path: Path) -> None:
    """Remove whatever is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def in_process(code: str, **environment: str) -> subprocess.CompletedProcess:
    """Run code in a process of its own, with more environment variables."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
