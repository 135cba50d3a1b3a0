"""The levers inside nnU-Net: folders that stock nnU-Net loads, fine-tuning, DAEFormer's trainer, profile and table."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from helpers import make_predictor, write_ball_dataset

from nnslim.compression.config import from_dict
from nnslim.errors import ConfigError, InputError, SpecError
from nnslim.hosts.nnunet.compress.compress_model import compress_model
from nnslim.hosts.nnunet.export.export_model import ExportSettings, export_model
from nnslim.hosts.nnunet.model.planned import PlannedDAEFormer
from nnslim.hosts.nnunet.model.slim_network import NETWORK_CLASS_NAME
from nnslim.hosts.nnunet.model.trained_model import build_network, input_shape, read_trained_model
from nnslim.hosts.nnunet.train.daeformer_trainer import CEAndSquaredDice, daeformer_trainer_class
from nnslim.hosts.nnunet.train.finetune_model import finetune_model
from nnslim.hosts.nnunet.train.settings import TrainingSettings
from nnslim.methods.embedded import SparseEdit
from nnslim.network.daeformer import FORMS, DAEFormer, DAEFormerForm
from nnslim.network.spec import spec_of
from studies.board_profile import ProfileJob, profile
from studies.embedded_table import VARIANTS, TableSettings, Variant, compressed_bytes, measure_rows
from studies.short_training import ShortTraining, preprocess_once, train_short

TINY = ShortTraining(epochs=1, iterations=2, validation_iterations=1, batch_size=2, learning_rate=1e-3)


def levers(*more, **settings):
    methods = [{"method": "embedded", **settings}] if settings else []
    return from_dict({"methods": [*methods, *more], "run": {"guard": False}})


@pytest.fixture
def dataset(tmp_path, monkeypatch):
    """A made dataset in nnU-Net's folders."""
    for name in ("raw", "preprocessed", "results"):
        monkeypatch.setenv(f"nnUNet_{name}", str(tmp_path / name))
    monkeypatch.setenv("nnUNet_n_proc_DA", "1")  # nnU-Net's planning needs one
    write_ball_dataset(tmp_path / "raw" / "Dataset998_Ball")
    preprocess_once(998, "2d", 1)
    monkeypatch.setenv("nnUNet_n_proc_DA", "0")
    return tmp_path / "raw" / "Dataset998_Ball"


@pytest.mark.parametrize("kind", ["2d", "plain", "residual", "anisotropic", "old plans"])
def test_drop_stage_folder_is_plain_nnunet_and_its_patch_divides(kind, make_model, stock_logits, tmp_path):
    source = read_trained_model(make_model(kind))
    slimmed = compress_model(source, tmp_path / "slim", levers(drop_stages=1))
    plans = json.loads((tmp_path / "slim" / "plans.json").read_text())
    architecture = plans["configurations"][source.configuration]["architecture"]
    assert architecture["network_class_name"] != NETWORK_CLASS_NAME  # needs no nnslim
    assert architecture["arch_kwargs"]["n_stages"] == 2 and len(architecture["arch_kwargs"]["strides"]) == 2
    small = read_trained_model(tmp_path / "slim")
    strides = np.prod(np.array(architecture["arch_kwargs"]["strides"]), axis=0)
    assert not (np.array(input_shape(small)[2:]) % strides).any()
    network = build_network(small)
    assert network.state_dict().keys() == slimmed.weights[0].keys()
    image = torch.randn(input_shape(small))
    with torch.inference_mode():
        assert torch.equal(network(image), slimmed.network(image))
    assert torch.isfinite(stock_logits(tmp_path / "slim", (0,))).all()
    assert json.loads((tmp_path / "slim" / "nnslim.json").read_text())["spec"]["edits"][0]["kind"] == "drop_stage"


def test_stages_dropped_after_other_methods_are_refused(make_model, tmp_path):
    model = read_trained_model(make_model("2d"))
    both = from_dict(
        {
            "methods": [{"method": "filters", "macs": 0.7}, {"method": "embedded", "drop_stages": 1}],
            "run": {"guard": False},
        }
    )
    with pytest.raises(SpecError, match="put its method before the others"):
        compress_model(model, tmp_path / "slim", both)
    assert not (tmp_path / "slim").exists()


def test_composed_folder_loads_in_stock_nnunet_in_half_the_bytes(make_model, stock_logits, tmp_path):
    model = read_trained_model(make_model("2d"))
    config = levers({"method": "filters", "macs": 0.6, "min_filters": 2}, drop_stages=1, depthwise="none", sparsity=0.4)
    whole = compress_model(model, tmp_path / "whole", config)
    half = compress_model(model, tmp_path / "half", config.model_copy(update={"store": "half"}))
    a, b = (stock_logits(tmp_path / name, (0,)) for name in ("whole", "half"))
    assert torch.isfinite(b).all() and (a - b).abs().max() < 0.02 * a.abs().max()
    sizes = [
        json.loads((tmp_path / name / "nnslim.json").read_text())["stored"]["weight_bytes"]
        for name in ("whole", "half")
    ]
    assert sizes[0] == 2 * sizes[1]
    assert [e.kind for e in whole.spec.edits][:2] == ["drop_stage", "sparse"] and whole.spec == half.spec


def test_coarser_folder_answers_on_the_images_own_grid(make_model, case_folder, tmp_path):
    """The resolution sweep keeps width and depth; stock nnU-Net resamples there and back."""
    model = read_trained_model(make_model("plain"))
    slimmed = compress_model(model, tmp_path / "coarse", levers(coarser=1.5))
    made = json.loads((tmp_path / "coarse" / "nnslim.json").read_text())
    assert made["resolution"] == {"spacing": [[1.0] * 3, [1.5] * 3], "patch": [[16] * 3, [12] * 3]}
    assert slimmed.dense.parameters == slimmed.slim.parameters
    assert slimmed.slim.macs * 16**3 == slimmed.dense.macs * 12**3
    assert not slimmed.spec.edits
    for name, value in slimmed.weights[0].items():
        assert torch.equal(value, model.weights[0][name])
    code = (
        "import sys, torch\n"
        "from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor\n"
        "if __name__ == '__main__':\n"
        "    p = nnUNetPredictor(device=torch.device('cpu'), allow_tqdm=False, use_mirroring=False)\n"
        "    p.initialize_from_trained_model_folder(sys.argv[1], (0,))\n"
        "    assert p.configuration_manager.spacing == [1.5] * 3, p.configuration_manager.spacing\n"
        "    p.predict_from_files_sequential([[sys.argv[2]]], [sys.argv[3]])\n"
        "    assert 'nnslim' not in sys.modules\n"
    )
    (tmp_path / "out").mkdir()
    given, target = case_folder / "a_0000.nii.gz", tmp_path / "out" / "a.nii.gz"
    paths = {f"nnUNet_{name}": str(tmp_path) for name in ("raw", "preprocessed", "results")}
    command = [sys.executable, "-c", code, str(tmp_path / "coarse"), str(given), str(target)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **paths}, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    image, found = nib.load(given), nib.load(target)
    assert image.shape == found.shape and np.allclose(image.affine, found.affine)


def test_coarser_patch_fits_the_network_before_stages_are_dropped(make_model, tmp_path):
    """16 / 1.6 is 10, which two stages could take and three cannot: the dense network is measured on it, too."""
    model = read_trained_model(make_model("plain"))
    slimmed = compress_model(model, tmp_path / "composed", levers(drop_stages=1, coarser=1.6))
    made = json.loads((tmp_path / "composed" / "nnslim.json").read_text())
    assert made["resolution"]["patch"] == [[16] * 3, [12] * 3]
    assert [edit.kind for edit in slimmed.spec.edits] == ["drop_stage"]


def test_coarser_with_other_axes_or_asked_twice_is_refused(make_model, tmp_path):
    model = read_trained_model(make_model("2d"))
    with pytest.raises(ConfigError, match="coarser has 3 factors, the patch 2 axes"):
        compress_model(model, tmp_path / "slim", levers(coarser=(1.0, 2.0, 2.0)))
    with pytest.raises(ConfigError, match="two methods change spacing or patch"):
        compress_model(model, tmp_path / "slim", levers({"method": "embedded", "coarser": 2.0}, coarser=1.5))


def test_coarser_in_memory_is_refused_and_the_other_levers_work_there(make_model):
    from nnslim import NNSlimContext

    folder = make_model("2d")
    with NNSlimContext(levers(coarser=2.0)), pytest.raises(ConfigError, match="use nnslim compress"):
        make_predictor().initialize_from_trained_model_folder(str(folder), (0,))
    with NNSlimContext(levers(drop_stages=1, depthwise="separable")) as slim:
        predictor = make_predictor()
        predictor.initialize_from_trained_model_folder(str(folder), (0,))
        logits = predictor.predict_logits_from_preprocessed_data(torch.randn(1, 2, 20, 20))
    assert torch.isfinite(logits).all() and slim.report.models[0].slimmed.slim.macs < 0.7 * _dense_macs(slim)


def _dense_macs(slim):
    return slim.report.models[0].slimmed.dense.macs


@pytest.mark.slow
def test_pruned_coarser_model_is_fine_tuned_with_zeros_that_stay_and_grow(dataset, tmp_path):
    """Cubic schedule inside `nnslim finetune`: 5 % before, 50 % after, and no zero ever comes back."""
    dense = train_short(998, "2d", 0, TINY).parent
    start = levers(drop_stages=1, coarser=1.5, sparsity=0.5, start_sparsity=0.05)
    compress_model(read_trained_model(dense), tmp_path / "start", start)
    before = read_trained_model(tmp_path / "start")
    settings = TrainingSettings(
        epochs=3, iterations=4, validation_iterations=1, optimizer="sgd", learning_rate=1e-3, batch_size=2, processes=1
    )
    tuned = finetune_model(tmp_path / "start", tmp_path / "tuned", 998, settings)
    after = read_trained_model(tuned, None, "checkpoint_final.pth")
    network = build_network(after)
    (edit,) = (edit for edit in spec_of(network).edits if isinstance(edit, SparseEdit))
    zeros = total = moved = 0
    for name in edit.layers:
        old, new = (model.weights[0][f"{name}.weight"] for model in (before, after))
        assert not new[old == 0].any()
        zeros, total = zeros + int((new == 0).sum()), total + new.numel()
        moved += int((old != new)[new != 0].sum())
    assert abs(zeros - total / 2) <= 1 and moved > total / 4
    assert after.configuration_manager.spacing == [1.5, 1.5]
    predictor = make_predictor()
    predictor.initialize_from_trained_model_folder(str(tuned), (0,), "checkpoint_final.pth")
    logits = predictor.predict_logits_from_preprocessed_data(torch.randn(1, 3, 24, 24))
    assert torch.isfinite(logits).all()
    # zeros in a file count once it is compressed, and only then
    files = [folder / "fold_0" / "checkpoint_final.pth" for folder in (tmp_path / "start", tmp_path / "pruned")]
    compress_model(after, tmp_path / "pruned", levers())
    assert abs(files[0].stat().st_size - files[1].stat().st_size) < 0.1 * files[0].stat().st_size
    assert compressed_bytes(files[1]) < 0.75 * compressed_bytes(files[0])

    # the profile and the table, on this model
    rows = [Variant("dense", tuned=False), Variant("pruned", ({"method": "embedded", "sparsity": 0.5},)), VARIANTS[1]]
    assert rows[2].name == "half"
    raw = os.environ["nnUNet_raw"]
    images, labels = (Path(raw) / "Dataset998_Ball" / name for name in ("imagesTr", "labelsTr"))
    table = TableSettings(dense, images, labels, tmp_path / "work", 998, 2, 2, cases=2, repeats=2, rows=rows[:1])
    measure_rows(table, tmp_path / "table.csv")
    first = (tmp_path / "table.csv").read_text()
    measure_rows(TableSettings(**{**vars(table), "rows": rows[:2]}), tmp_path / "table.csv")
    assert (tmp_path / "table.csv").read_text().startswith(first)  # a row that is there stays as it is
    with (tmp_path / "table.csv").open() as stream:
        made = list(csv.DictReader(stream))
    assert [row["row"] for row in made] == ["dense", "pruned"] and [row["cases"] for row in made] == ["2", "2"]
    assert made[0]["parameters"] == made[1]["parameters"] and made[0]["mmacs"] == made[1]["mmacs"]
    assert float(made[1]["compressed_mb"]) < 0.75 * float(made[1]["file_mb"])
    assert int(made[1]["non_zero"]) < 0.52 * int(made[0]["non_zero"])
    assert all(0 <= float(row["dice_ball"]) <= 1 and float(row["torch_ms"]) > 0 for row in made)
    too_small = profile(ProfileJob(str(dense), str(images), cases=1, repeats=1, memory_mb=50))
    assert too_small["fits"] is False and "before any model is read" in too_small["error"]


@pytest.mark.parametrize("faulty", [{"cases": 0}, {"backends": ()}])
def test_profile_without_anything_to_measure_is_refused(faulty):
    with pytest.raises(ConfigError, match="expected 1 or more"):
        profile(ProfileJob("x", "y", **faulty))


def test_profile_of_a_folder_that_is_not_there_says_so(tmp_path):
    with pytest.raises(InputError, match="missing"):
        profile(ProfileJob(str(tmp_path / "missing"), str(tmp_path)))


def test_daeformer_is_trained_predicted_by_stock_nnunet_fine_tuned_and_exported(dataset, tmp_path, monkeypatch):
    form = DAEFormer(1, 2, (16, 32), (1, 1))
    monkeypatch.setitem(FORMS, "tiny", DAEFormerForm((16, 32), (1, 1), edge=16))
    monkeypatch.setenv("NNSLIM_TRAINING", "daeformer: {form: tiny}")
    folder = train_short(998, "2d", 0, TINY, trainer_base=daeformer_trainer_class()).parent
    assert folder.name == "nnUNetTrainerDAEFormer__nnUNetPlans__2d"
    predictor = make_predictor()
    predictor.initialize_from_trained_model_folder(str(folder), (0,))
    assert predictor.trainer_name == "nnUNetTrainer" and isinstance(predictor.network, PlannedDAEFormer)
    assert sum(p.numel() for p in predictor.network.parameters()) == sum(p.numel() for p in form.parameters())
    assert torch.isfinite(predictor.predict_logits_from_preprocessed_data(torch.randn(1, 3, 16, 16))).all()
    model = read_trained_model(folder)
    for name, kind in (("net.onnx", "onnx"), ("net.xml", "openvino")):
        exported = export_model(model, tmp_path / name, ExportSettings(kind))
        assert exported.parity.passed and exported.files[0].is_file(), exported.parity
    began = time.perf_counter()  # each of the 30 residual sums doubled the ways that were gone: it never ended
    exported = export_model(model, tmp_path / "int8.xml", ExportSettings("openvino", "int8", dataset / "imagesTr"))
    assert exported.files and time.perf_counter() - began < 180, exported.lines()
    assert exported.notes[0].startswith("int8: 28 of 29 convolutions")  # all but the head
    compress_model(model, tmp_path / "pruned", levers(sparsity=0.3))
    settings = TrainingSettings(epochs=1, iterations=2, validation_iterations=1, batch_size=2, processes=1)
    tuned = read_trained_model(finetune_model(tmp_path / "pruned", tmp_path / "tuned", 998, settings))
    assert tuned.is_slim and tuned.checkpoints["0"]["current_epoch"] == 1


def test_daeformer_trainer_is_found_by_name_and_refuses_volumes(dataset, monkeypatch, make_model):
    from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name

    import nnslim.hosts.nnunet.train.ext as trainers

    monkeypatch.setenv("nnUNet_extTrainer", trainers.__path__[0])
    trainer = recursive_find_trainer_class_by_name("nnUNetTrainerDAEFormer")
    assert trainer.__name__ == "nnUNetTrainerDAEFormer"
    model = read_trained_model(make_model("plain"))
    with pytest.raises(ConfigError, match=r"works on slices whose edges are multiples of 8; configuration 3d_fullres"):
        trainer({**model.plans, "continue_training": False}, "3d_fullres", 0, model.dataset)
    monkeypatch.setenv("NNSLIM_TRAINING", "daeformer: {form: 65}")
    with pytest.raises(ConfigError, match="no DAEFormer form '65'; nearest: 64"):
        trainer({**model.plans, "continue_training": False}, "3d_fullres", 0, model.dataset)


def test_form_sets_the_slices_unless_the_plans_or_the_user_do(dataset, monkeypatch):
    """Form 224 was trained on the plans' patch, whatever that was, without a word."""
    prepared = Path(os.environ["nnUNet_preprocessed"]) / "Dataset998_Ball"
    plans, described = (json.loads((prepared / name).read_text()) for name in ("nnUNetPlans.json", "dataset.json"))
    own = plans["configurations"]["2d"]["patch_size"]

    def patch_of(settings):
        monkeypatch.setenv("NNSLIM_TRAINING", f"daeformer: {settings}")
        given = {**json.loads(json.dumps(plans)), "continue_training": False}
        trainer = daeformer_trainer_class()(given, "2d", 0, described)
        said = Path(trainer.log_file).read_text()
        patch = trainer.configuration_manager.patch_size
        assert f"sees patches of {list(patch)}, the plans say {own}; slices have [16.0, 16.0] pixels" in said
        return list(patch)

    published = {"full": 224, "224": 224, "224-dense": 224, "128": 128, "64": 64, "64-dense": 64}
    for form, edge in published.items():
        assert patch_of(f"{{form: {form}}}") == [edge, edge]
    assert patch_of("{form: 64, patch_size: plans}") == own
    assert patch_of("{form: 64, patch_size: [48, 32]}") == [48, 32]
    with pytest.raises(ConfigError, match=r"multiples of 8; configuration 2d has patches of \[48, 30\]"):
        patch_of("{form: 64, patch_size: [48, 30]}")


def test_loss_of_the_recipe():
    """0.4 CE + 0.6 (1 - mean over classes of (2 sum p t + s) / (sum p^2 + sum t^2 + s)), by hand."""
    torch.manual_seed(0)
    logits, target = torch.randn(2, 3, 4, 4), torch.randint(0, 3, (2, 1, 4, 4))
    p = logits.softmax(1).permute(1, 0, 2, 3).reshape(3, -1)
    t = torch.stack([(target[:, 0] == c).float().reshape(-1) for c in range(3)])
    dice = (2 * (p * t).sum(1) + 1e-5) / ((p**2).sum(1) + (t**2).sum(1) + 1e-5)
    entropy = -(p.log() * t).sum() / t.sum()
    assert CEAndSquaredDice()(logits, target) == pytest.approx(float(0.4 * entropy + 0.6 * (1 - dice.mean())), rel=1e-5)
    perfect = 50.0 * (torch.nn.functional.one_hot(target[:, 0], 3).movedim(-1, 1) * 2 - 1)
    assert CEAndSquaredDice()(perfect, target) < 1e-5
    ignored = target.clone()
    ignored[:, :, 0] = 3
    worse = perfect.clone()
    worse[:, :, 0] *= -1
    assert CEAndSquaredDice(3)(worse, ignored) < 1e-5
