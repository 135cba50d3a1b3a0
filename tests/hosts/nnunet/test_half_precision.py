"""Trainings in half precision: every trainer of nnslim, on a CPU and on CUDA."""

from __future__ import annotations

import json

import pytest
import torch
from helpers import write_ball_dataset
from torch import nn

from nnslim.hosts.nnunet.train.ext.nnslim_trainers import trainer_named, trainer_names
from studies.short_training import preprocess_once

SMALL = {
    "daeformer": {"form": 64, "patch_size": [16, 16]},
    "token_sparse": {"unetr": {"decoder": "x8", "dim": 24, "depth": 9, "heads": 2, "features": 4}},
    "window": {"encoder": "vit", "options": {"embed_dim": 24, "depth": 2, "num_heads": 2, "patch_size": 4}},
}
# Those of other sizes differ in numbers only.
ONE_OF_EACH = [name for name in trainer_names() if not any(size in name for size in ("_B_", "_M_", "_L_", "V2", "V3"))]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """The plans and the description of a made dataset."""
    root = tmp_path_factory.mktemp("half")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("raw", "preprocessed", "results"):
            patch.setenv(f"nnUNet_{name}", str(root / name))
        patch.setenv("nnUNet_n_proc_DA", "1")
        patch.setenv("nnUNet_compile", "f")
        write_ball_dataset(root / "raw" / "Dataset998_Ball")
        preprocess_once(998, "2d", 1)
        folder = preprocess_once(998, "3d_fullres", 1)
        yield [(folder / name).read_text() for name in ("nnUNetPlans.json", "dataset.json")]


def step_of(name, precision, device, prepared, monkeypatch):
    """Return the types of what the layers of a trainer put out in one step of training, the loss, and the network."""
    monkeypatch.setenv(
        "NNSLIM_TRAINING", json.dumps({**SMALL, "precision": precision, "batch_size": 2, "run_name": name})
    )
    plans, dataset = map(json.loads, prepared)
    configuration = "2d" if "DAEFormer" in name else "3d_fullres"
    trainer = trainer_named(name)(
        {**plans, "continue_training": False}, configuration, 0, dataset, torch.device(device)
    )
    trainer.initialize()
    trainer.set_deep_supervision_enabled(trainer.enable_deep_supervision)
    trainer.network.train()
    if hasattr(trainer, "pruner"):
        trainer.pruner.begin_epoch(0)
    size = trainer.configuration_manager.patch_size
    scales = trainer._get_deep_supervision_scales() if trainer.enable_deep_supervision else [[1] * len(size)]
    target = [torch.ones(2, 1, *[round(n * s) for n, s in zip(size, scale, strict=True)]) for scale in scales]
    seen = set()
    for layer in trainer.network.modules():
        if isinstance(layer, (nn.Linear, nn.Conv2d, nn.Conv3d, nn.ConvTranspose3d)):
            layer.register_forward_hook(lambda _, __, output: seen.add(output.dtype))
    batch = {"data": torch.randn(2, 1, *size), "target": target if trainer.enable_deep_supervision else target[0]}
    loss = float(trainer.train_step(batch)["loss"])
    assert float(trainer.validation_step(batch)["loss"]) == pytest.approx(loss, abs=1.0)
    return seen, loss, trainer.network


@pytest.mark.parametrize("name", ONE_OF_EACH)
@pytest.mark.parametrize(("precision", "type_"), [("f32", torch.float32), ("bf16", torch.bfloat16)])
def test_every_trainer_computes_in_the_precision_asked_for_on_a_cpu(name, precision, type_, prepared, monkeypatch):
    seen, loss, network = step_of(name, precision, "cpu", prepared, monkeypatch)
    assert seen == {type_} and torch.isfinite(torch.tensor(loss))
    assert all(p.dtype == torch.float32 and bool(p.isfinite().all()) for p in network.parameters())


@pytest.mark.parametrize("name", ONE_OF_EACH)
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_every_trainer_computes_in_float16_on_cuda(name, prepared, monkeypatch):
    seen, loss, network = step_of(name, "auto", "cuda", prepared, monkeypatch)
    assert seen == {torch.float16} and torch.isfinite(torch.tensor(loss))
    assert all(p.dtype == torch.float32 and bool(p.isfinite().all()) for p in network.parameters())
