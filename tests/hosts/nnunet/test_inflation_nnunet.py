"""Inflation inside nnU-Net: checkpoints that stock nnU-Net starts from and predicts with, and the window trainer."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import timm
import torch
from helpers import make_plans, make_predictor, write_ball_dataset
from nnunetv2.run.load_pretrained_weights import load_pretrained_weights
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from torch import nn
from torch.testing import assert_close

import nnslim.hosts.nnunet.train.ext.nnslim_trainers as ext_trainers
from nnslim.errors import ConfigError, ModelError
from nnslim.hosts.nnunet.model.inflated import inflate_model, preprocessed_files, target_of, write_inflated
from nnslim.hosts.nnunet.model.shipped import shipped_model
from nnslim.hosts.nnunet.model.trained_model import build_network, build_untrained, read_trained_model, trainer_class
from nnslim.hosts.nnunet.train.window_trainer import PlannedWindowNet, WindowLoss, window_trainer_class
from nnslim.inflation import WindowConfig
from nnslim.tables import read_table
from studies.inflation_table import InflationRun, Study, draw_curves, measure_inflation, rows_of
from studies.short_training import ShortTraining, preprocess_once, train_short

TINY = ShortTraining(epochs=2, iterations=2, validation_iterations=1, batch_size=2, learning_rate=1e-3)
WINDOW = WindowConfig(
    encoder="vit",
    decoder="setrpup",
    width=8,
    depth=3,
    options={"embed_dim": 24, "depth": 3, "num_heads": 2, "patch_size": 4},
    patch_size=(4, 16, 16),
    batch_size=2,
    learning_rate=1e-3,
)


@pytest.fixture
def plans_3d(tmp_path) -> Path:
    """The 3D twin of the plans of a 2D model of `make_model`."""
    path = tmp_path / "plans3d.json"
    path.write_text(json.dumps(make_plans("plain")[0]))
    return path


def logits_of(folder: Path, data: torch.Tensor, fold: int = 0) -> torch.Tensor:
    predictor = make_predictor(use_gaussian=False)  # whose corners are lost in half precision
    predictor.initialize_from_trained_model_folder(str(folder), (fold,))
    return predictor.predict_logits_from_preprocessed_data(data).float()


def test_inflate_command_writes_what_stock_nnunet_starts_from_and_predicts_with(
    make_model, plans_3d, tmp_path, command
):
    flat = make_model("2d", folds=(0, 1))
    folder, file = tmp_path / "made" / "nnUNetTrainer__nnUNetPlans__3d_fullres", tmp_path / "start" / "start.pth"
    command("inflate", "-m", flat, "-p", plans_3d, "--folder", folder, "-q", expect=0)
    _, out, _ = command("inflate", "-m", flat, "-p", plans_3d, "-o", file, "-f", "0", "-q", expect=0)
    assert f"written: {file}" in out

    target = build_untrained(target_of(read_trained_model(flat), "3d_fullres", plans_3d))
    heads = {key: value.clone() for key, value in target.state_dict().items() if ".seg_layers." in key}
    load_pretrained_weights(target, str(file))
    weights = torch.load(file, weights_only=False)["network_weights"]
    for key, value in target.state_dict().items():
        assert torch.equal(value, heads.get(key, weights[key])), key

    # Equal slices, so that norms over the volume and over the slice agree: stock predictions agree, heads included.
    image = torch.randn(1, 1, 20, 20, generator=torch.Generator().manual_seed(0)).expand(1, 20, 20, 20).contiguous()
    for fold in (0, 1):
        assert_close(logits_of(folder, image, fold), logits_of(flat, image, fold), atol=2e-2, rtol=2e-2)
    record = torch.load(folder / "fold_1" / "checkpoint_final.pth", weights_only=False)
    assert record["nnslim_inflation"]["mode"] == "center" and record["nnslim_inflation"]["depth_axis"] == 0
    assert record["inference_allowed_mirroring_axes"] == (1, 2)  # the slices' own


def test_inflated_folder_is_predicted_from_files_with_their_geometry(make_model, plans_3d, case_folder, tmp_path):
    flat = read_trained_model(make_model("2d"))
    target = target_of(flat, "3d_fullres", plans_3d)
    folder = tmp_path / "made" / "nnUNetTrainer__nnUNetPlans__3d_fullres"
    write_inflated(target, inflate_model(flat, target, "average"), file=None, folder=folder)
    _predicts_with_geometry(folder, case_folder, tmp_path / "out")


def _predicts_with_geometry(folder: Path, images: Path, out: Path) -> None:
    predictor = make_predictor()
    predictor.initialize_from_trained_model_folder(str(folder), (0,))
    out.mkdir()
    predictor.predict_from_files_sequential(str(images), str(out))
    for path in sorted(images.glob("*.nii.gz")):
        source, made = nib.load(path), nib.load(out / path.name.replace("_0000", ""))
        assert made.shape == source.shape
        np.testing.assert_allclose(made.affine, source.affine, atol=1e-5)


def test_transpose_forward_of_the_3d_plan_moves_the_depth_axis(make_model, tmp_path):
    plans, _ = make_plans("plain")
    plans |= {"transpose_forward": [2, 0, 1], "transpose_backward": [1, 2, 0]}
    (tmp_path / "turned.json").write_text(json.dumps(plans))
    flat = read_trained_model(make_model("2d"))
    target = target_of(flat, "3d_fullres", tmp_path / "turned.json")
    made = inflate_model(flat, target)["0"]
    assert made["nnslim_inflation"]["depth_axis"] == 1
    key = "encoder.stages.0.0.convs.0.conv.weight"
    kernel, source = made["network_weights"][key], flat.weights[0][key]
    # Axis 0 of the 3D plan is the image's third, the columns of the 2D model's slices; axis 1 its first, their order.
    assert_close(kernel[:, :, :, 1], source.transpose(2, 3))
    assert float(kernel[:, :, :, [0, 2]].abs().sum()) == 0
    assert made["inference_allowed_mirroring_axes"] == (0, 2)


def test_what_is_no_2d_model_or_no_3d_plan_is_refused(make_model, plans_3d, tmp_path, command, monkeypatch):
    flat, deep = make_model("2d"), make_model("plain", parent="deep")
    code, _, err = command("inflate", "-m", flat, "-o", tmp_path / "a.pth", "-q")
    assert code == 2 and "has no configuration '3d_fullres'; it has 2d" in err
    code, _, err = command("inflate", "-m", deep, "-o", tmp_path / "a.pth", "-q")
    assert code == 2 and "is not 2D; nothing to inflate" in err
    code, _, err = command("inflate", "-m", flat, "-c", "2d", "-o", tmp_path / "a.pth", "-q")
    assert code == 2 and "configuration '2d' is not a 3D one" in err
    code, _, err = command("inflate", "-m", flat, "-q")
    assert code == 2 and "nothing to write" in err
    code, _, err = command("inflate", "-m", flat, "-o", tmp_path / "a.pt", "-q")
    assert code == 2 and "ends in .pth" in err
    both = make_model("2d", folds=(0, 1), parent="both")
    code, _, err = command("inflate", "-m", both, "-p", plans_3d, "-o", tmp_path / "a.pth", "-q")
    assert code == 2 and "a .pth file holds one fold, the model has 0, 1" in err
    assert not list(tmp_path.glob("a.pt*"))
    wide = json.loads(plans_3d.read_text())
    wide["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"]["features_per_stage"] = [8, 16, 24]
    plans_3d.write_text(json.dumps(wide))
    code, _, err = command("inflate", "-m", flat, "-p", plans_3d, "-o", tmp_path / "a.pth", "-q")
    assert code == 2 and "allow cutting and padding (--fit cut-or-pad)" in err
    _, out, _ = command(
        "inflate", "-m", flat, "-p", plans_3d, "-o", tmp_path / "a.pth", "--fit", "cut-or-pad", "-q", expect=0
    )
    assert "channels were cut" in out
    monkeypatch.setenv("nnUNet_preprocessed", str(tmp_path))
    with pytest.raises(ModelError, match=r"no Dataset007_\* in"):
        preprocessed_files("7", "nnUNetPlans")


def test_plans_of_a_preprocessed_dataset_are_found_by_number_and_name(plans_3d, tmp_path, monkeypatch):
    folder = tmp_path / "pre" / "Dataset007_Lungs"
    folder.mkdir(parents=True)
    (folder / "nnUNetPlans.json").write_text(plans_3d.read_text())
    monkeypatch.setenv("nnUNet_preprocessed", str(tmp_path / "pre"))
    expected = (folder / "nnUNetPlans.json", folder / "dataset.json")
    assert preprocessed_files("7", "nnUNetPlans") == preprocessed_files("Dataset007_Lungs", "nnUNetPlans") == expected
    with pytest.raises(ModelError, match=r"no plans 'other' in .*; it has nnUNetPlans"):
        preprocessed_files("7", "other")


def untrained_2d(folder: Path, plans: dict, dataset: dict) -> Path:
    """Write the folder of a 2D model with random weights."""
    (folder / "fold_0").mkdir(parents=True)
    (folder / "plans.json").write_text(json.dumps(plans))
    (folder / "dataset.json").write_text(json.dumps(dataset))
    manager = PlansManager(copy.deepcopy(plans))
    settings = manager.get_configuration("2d")
    network = get_network_from_plans(
        settings.network_arch_class_name,
        settings.network_arch_init_kwargs,
        settings.network_arch_init_kwargs_req_import,
        len(dataset["channel_names"]),
        manager.get_label_manager(dataset).num_segmentation_heads,
    )
    content = {
        "network_weights": network.state_dict(),
        "init_args": {"plans": plans, "configuration": "2d", "fold": 0, "dataset_json": dataset},
        "trainer_name": "nnUNetTrainer",
        "inference_allowed_mirroring_axes": (0, 1),
    }
    torch.save(content, folder / "fold_0" / "checkpoint_final.pth")
    return folder


def test_hippocampus_plans_2d_inflate_to_3d_fullres(tmp_path):
    """nnU-Net plans both alike for these data: 4 stages, 32 to 256 channels, kernels of 3. The weights are random."""
    shipped = read_trained_model(shipped_model())
    plans = copy.deepcopy(shipped.plans)
    flat = copy.deepcopy(plans["configurations"]["3d_fullres"])
    kwargs = flat["architecture"]["arch_kwargs"]
    for key in ("kernel_sizes", "strides"):
        kwargs[key] = [sizes[1:] for sizes in kwargs[key]]
    for key in ("conv_op", "norm_op"):
        kwargs[key] = kwargs[key].replace("3d", "2d")
    flat["patch_size"], flat["spacing"] = [56, 40], [1.0, 1.0]
    plans["configurations"]["2d"] = flat
    model = read_trained_model(untrained_2d(tmp_path / "nnUNetTrainer__nnUNetPlans__2d", plans, shipped.dataset))
    target = target_of(model, "3d_fullres")
    write_inflated(target, inflate_model(model, target), file=tmp_path / "start.pth", folder=None)
    load_pretrained_weights(build_untrained(target), str(tmp_path / "start.pth"))
    weights = torch.load(tmp_path / "start.pth", weights_only=False)["network_weights"]
    key = "encoder.stages.3.0.convs.1.conv.weight"
    assert weights[key].shape == (256, 256, 3, 3, 3)
    assert torch.equal(weights[key], weights[f"decoder.{key}"])
    assert torch.equal(weights[key], weights[key.replace(".conv.", ".all_modules.0.")])


# The window network


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Path:
    """A made dataset, 998, planned and preprocessed once."""
    folder = tmp_path_factory.mktemp("balls")
    write_ball_dataset(folder / "raw" / "Dataset998_Ball")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("nnUNet_raw", str(folder / "raw"))
        patch.setenv("nnUNet_preprocessed", str(folder / "preprocessed"))
        patch.setenv("nnUNet_n_proc_DA", "1")
        preprocess_once(998, "3d_fullres", 1)
    return folder


@pytest.fixture
def balls(prepared, tmp_path, monkeypatch) -> Path:
    """The variables that nnU-Net needs for it, and an empty results folder."""
    for name in ("raw", "preprocessed"):
        monkeypatch.setenv(f"nnUNet_{name}", str(prepared / name))
    monkeypatch.setenv("nnUNet_results", str(tmp_path / "results"))
    monkeypatch.setenv("nnUNet_n_proc_DA", "0")
    return tmp_path


def test_window_model_trains_from_2d_weights_resumes_and_is_predicted_by_stock_nnunet(balls, case_folder):
    torch.manual_seed(0)
    flat = timm.create_model("vit_base_patch16_224", img_size=16, num_classes=0, **WINDOW.options)
    torch.save(flat.state_dict(), balls / "vit.pth")
    settings = WINDOW.model_copy(update={"weights": str(balls / "vit.pth"), "mode": "average", "predict_slices": 8})
    started = []

    def look(trainer):
        started.append(trainer.network.encoder.embed.weight.detach().clone())

    trainer = window_trainer_class(settings)
    folder = train_short(998, "3d_fullres", 0, TINY, trainer_base=trainer, on_start=look).parent
    expected = flat.patch_embed.proj.weight.sum(1, keepdim=True) / 3
    assert_close(started[0], expected.unsqueeze(2).expand(-1, -1, 3, -1, -1))

    model = read_trained_model(folder)
    assert model.trainer_name == "nnUNetTrainer" and list(model.configuration_manager.patch_size) == [8, 16, 16]
    network = build_network(model)
    assert isinstance(network, PlannedWindowNet) and network.encoder.grid == (4, 4) and network.reach == 1
    data = torch.randn(1, 9, 21, 18, generator=torch.Generator().manual_seed(0))
    logits = logits_of(folder, data)
    assert logits.shape == (2, 9, 21, 18) and bool(torch.isfinite(logits).all())
    _predicts_with_geometry(folder, case_folder, balls / "out")

    (folder / "fold_0" / "checkpoint_final.pth").rename(folder / "fold_0" / "checkpoint_latest.pth")
    longer = ShortTraining(3, 2, 1, 2, 1e-3)
    train_short(998, "3d_fullres", 0, longer, trainer_base=trainer, resume=True)
    log = torch.load(folder / "fold_0" / "checkpoint_final.pth", weights_only=False)["logging"]
    assert len(log["mean_fg_dice"]) == 3
    text = "".join(path.read_text() for path in (folder / "fold_0").glob("training_log*.txt"))
    assert "a window of 3 slices, 1 mm apart, sees 3 mm of depth" in text


def test_window_trainers_are_found_by_stock_nnunet_with_settings_of_the_environment(balls, monkeypatch):
    monkeypatch.setenv("nnUNet_extTrainer", str(Path(ext_trainers.__file__).parent))
    monkeypatch.setenv("NNSLIM_TRAINING", "{window: {encoder: swin, depth: 7}}")
    for name, depth in (("nnUNetTrainerWindow", 7), ("nnUNetTrainerWindow2D", 1)):
        found = trainer_class(name)
        assert found.__name__ == name
        assert found.settings_now().window.depth == depth and found.settings_now().window.encoder == "swin"
    with pytest.raises(AttributeError):
        ext_trainers.nnUNetTrainerOther  # noqa: B018


@pytest.mark.parametrize("kind", ["dicefocal", "dicece", "ce"])
def test_losses_are_monai_s_and_torch_s_for_labels_and_regions(kind):
    from monai.losses import DiceLoss, FocalLoss

    logits, labels = torch.randn(2, 3, 2, 4, 4), torch.randint(0, 3, (2, 1, 2, 4, 4))
    hot = nn.functional.one_hot(labels[:, 0], 3).movedim(-1, 1).float()
    softmax, sigmoid = (DiceLoss(**{name: True}, batch=True)(logits, hot) for name in ("softmax", "sigmoid"))
    exclusive, overlapping = {
        "dicefocal": (softmax + FocalLoss()(logits, hot), sigmoid + FocalLoss()(logits, hot)),
        "dicece": (
            softmax + nn.CrossEntropyLoss()(logits, labels[:, 0]),
            sigmoid + nn.BCEWithLogitsLoss()(logits, hot),
        ),
        "ce": (nn.CrossEntropyLoss()(logits, labels[:, 0]), nn.BCEWithLogitsLoss()(logits, hot)),
    }[kind]
    assert_close(WindowLoss(kind, False)(logits, labels), exclusive)
    assert_close(WindowLoss(kind, True)(logits, hot.bool()), overlapping)


def test_training_accumulates_warms_up_and_clips_with_another_loss(balls):
    """Three batches of an epoch make two steps, the second of one batch; the rate rises over four steps."""
    trainer = window_trainer_class(WINDOW.model_copy(update={"loss": "dicece"}))
    trainer.given = trainer.given.model_copy(update={"accumulate": 2, "warmup_steps": 4, "gradient_clip": 1e-3})
    seen, made = [], []

    def look(trainer):
        made.append(trainer)
        inner = trainer.optimizer.step

        def step(*args, **kwargs):
            gradients = [p.grad for p in trainer.network.parameters() if p.grad is not None]
            seen.append(
                (trainer.optimizer.param_groups[0]["lr"], float(torch.stack([g.norm() for g in gradients]).norm()))
            )
            return inner(*args, **kwargs)

        trainer.optimizer.step = step

    train_short(998, "3d_fullres", 0, ShortTraining(3, 3, 1, 2, 1e-3), trainer_base=trainer, on_start=look)
    assert made[0].loss.dice is not None and made[0].loss.focal is None
    fall = [1e-3 * (1 - epoch / 3) ** 0.9 for epoch in (0, 0, 1, 1, 2, 2)]
    wanted = [rate * share for rate, share in zip(fall, (0.25, 0.5, 0.75, 1, 1, 1), strict=True)]
    assert [rate for rate, _ in seen] == pytest.approx(wanted)
    assert max(norm for _, norm in seen) <= 1e-3 * (1 + 1e-4)


# The table


def test_table_rows_are_made_once_and_drawn(prepared, balls):
    length = ShortTraining(1, 2, 1, 2, 1e-3)
    planned = prepared / "preprocessed" / "Dataset998_Ball"
    plans, dataset = (json.loads((planned / name).read_text()) for name in ("nnUNetPlans.json", "dataset.json"))
    flat = untrained_2d(balls / "flat", plans, dataset)
    vit = timm.create_model("vit_base_patch16_224", img_size=16, num_classes=0, **WINDOW.options)
    torch.save(vit.state_dict(), balls / "vit.pth")
    settings = WINDOW.model_copy(update={"weights": str(balls / "vit.pth")})
    study = Study(998, 0, flat, length, length, settings, 1, balls)
    rows = rows_of(["unet", "window"], ["center"], [0])
    assert [row.name for row in rows] == [
        "Inflation_unet_center_0_untuned",
        "Inflation_unet_scratch_0",
        "Inflation_unet_center_0",
        "Inflation_window_scratch_0",
        "Inflation_window_center_0",
    ]
    output = balls / "table.csv"
    measure_inflation(study, [row for row in rows if row.part == "unet"], output)
    before = read_table(output).to_dict("records")
    measure_inflation(study, rows, output)
    after = read_table(output).to_dict("records")
    assert after[:3] == before and [row["run"] for row in after] == [row.name for row in rows]
    assert [row["steps"] for row in after] == ["0", "2", "2", "2", "2"]
    assert all(0 <= float(row["dice"]) <= 1 for row in after)
    assert len(read_table(balls / "table_curve.csv")) == 4
    draw_curves(output, balls / "table.png")
    assert (balls / "table.png").stat().st_size > 1000
    with pytest.raises(ConfigError, match="name its folder"):
        measure_inflation(
            Study(998, 0, None, length, length, WINDOW, 1, balls / "w"), [InflationRun("unet", "average", 5)], output
        )
    with pytest.raises(ConfigError, match="name them"):
        measure_inflation(
            Study(998, 0, None, length, length, WINDOW, 1, balls), [InflationRun("window", "average", 5)], output
        )
