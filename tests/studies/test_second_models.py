"""What studies train: short training with other plans, trainer and precision; the deformed dataset."""

from __future__ import annotations

import json

import nibabel as nib
import numpy as np
import pytest
import torch
from helpers import make_predictor, write_ball_dataset

from nnslim.hosts.nnunet.model.trained_model import read_trained_model, trainer_class
from studies.deformed_dataset import BRAIN, write_brain_dataset, write_deformed_dataset
from studies.short_training import ShortTraining, copy_weights, derive_plans, is_preprocessed, train_short


def _halve_widths(settings):
    settings["patch_size"] = [16, 16, 16]
    settings["architecture"]["arch_kwargs"] |= {
        "n_stages": 3,
        "features_per_stage": [6, 8, 10],
        "kernel_sizes": [[3, 3, 3]] * 3,
        "strides": [[1, 1, 1], [2, 2, 2], [2, 2, 2]],
        "n_conv_per_stage": [1, 1, 1],
        "n_conv_per_stage_decoder": [1, 1],
    }


def test_train_short_with_other_plans_trainer_and_precision(tmp_path, monkeypatch):
    for name in ("raw", "preprocessed", "results"):
        monkeypatch.setenv(f"nnUNet_{name}", str(tmp_path / name))
    monkeypatch.setenv("nnUNet_n_proc_DA", "1")
    write_ball_dataset(tmp_path / "raw" / "Dataset997_Ball")
    base = trainer_class("nnUNetTrainerNoMirroring")
    length = ShortTraining(epochs=1, iterations=2, validation_iterations=1, batch_size=2, bfloat16=True)
    kinds = []
    fold = train_short(
        997,
        "3d_fullres",
        0,
        length,
        plans_name="nnUNetSmallPlans",
        edit_plans=_halve_widths,
        trainer_base=base,
        on_start=lambda trainer: kinds.append(
            {output.dtype for output in trainer.network(torch.zeros(1, 1, 16, 16, 16))}
        ),
    )
    assert fold.parent.name == "nnUNetTrainerNoMirroring__nnUNetSmallPlans__3d_fullres"
    assert kinds == [{torch.float32}]
    model = read_trained_model(copy_weights(fold, tmp_path / "copy"))
    assert model.trainer_name == "nnUNetTrainerNoMirroring" and model.checkpoints["0"]["optimizer_state"] is None
    assert model.configuration_manager.patch_size == [16, 16, 16]
    predictor = make_predictor()
    predictor.initialize_from_trained_model_folder(str(tmp_path / "copy"), (0,))
    assert not predictor.allowed_mirroring_axes
    for key, weight in predictor.list_of_parameters[0].items():
        torch.testing.assert_close(weight, model.weights[0][key])
    with pytest.raises(ValueError, match="own name"):
        derive_plans(tmp_path / "preprocessed" / "Dataset997_Ball", "nnUNetPlans", "3d_fullres", _halve_widths)


def test_deformed_dataset_is_the_seeds_alone(tmp_path):
    rng = np.random.default_rng(0)
    labels = np.zeros((24, 20, 12), np.uint8)
    labels[4:12, 4:16, 2:10], labels[14:20, 4:16, 2:10] = 5, 117
    affine = np.diag([3, 3, 3, 1.0])
    nib.save(
        nib.Nifti1Image((100 * labels + rng.integers(-50, 50, labels.shape)).astype(np.int16), affine),
        tmp_path / "ct.nii.gz",
    )
    nib.save(nib.Nifti1Image(labels, affine), tmp_path / "seg.nii.gz")
    first, second = (
        write_deformed_dataset(tmp_path / "ct.nii.gz", tmp_path / "seg.nii.gz", tmp_path / name, 7, 1, seed=3)
        for name in ("a", "b")
    )
    names = sorted(path.relative_to(first) for path in first.rglob("*.nii.gz"))
    assert len(names) == 16 and names == sorted(path.relative_to(second) for path in second.rglob("*.nii.gz"))
    read = [np.asarray(nib.load(first / name).dataobj) for name in names]
    for name, array in zip(names, read, strict=True):
        np.testing.assert_array_equal(array, np.asarray(nib.load(second / name).dataobj))
    maps = [array for name, array in zip(names, read, strict=True) if name.parts[0].startswith("labels")]
    assert all(set(np.unique(array)) <= {0, 1, 2} for array in maps)
    assert len({array.tobytes() for array in maps}) == 8
    assert json.loads((first / "dataset.json").read_text())["labels"] == {"background": 0, "class_5": 1, "class_117": 2}
    (split,) = json.loads((first / "splits_final.json").read_text())
    assert split["val"] == ["deformed_000", "deformed_006"] and len(split["train"]) == 5


def test_brain_dataset_paints_both_sides_alike_and_keeps_the_last_maps_for_testing(tmp_path):
    labels = np.zeros((60, 64, 48), np.int16)
    labels[6:54, 6:58, 6:42] = 507  # the head, which is no class
    labels[10:28, 10:50, 10:38], labels[32:50, 10:50, 10:38] = BRAIN["left_thalamus"], BRAIN["right_thalamus"]
    labels[26:34, 20:40, 16:30] = BRAIN["brain_stem"]
    maps = [tmp_path / f"map_{number}.nii.gz" for number in range(6)]
    for path in maps:
        nib.save(nib.Nifti1Image(labels, np.eye(4)), path)
    first, second = (write_brain_dataset(maps, tmp_path / name, 2, 1, seed=3) for name in ("a", "b"))
    names = sorted(path.relative_to(first) for path in first.rglob("*.nii.gz"))
    assert [str(path) for path in names if path.parts[0] == "labelsTs"] == [
        f"labelsTs/brain_{place:02d}_0.nii.gz" for place in (2, 3, 4, 5)
    ]
    assert len(names) == 2 * (2 * 2 + 4)
    for name in names:
        np.testing.assert_array_equal(*(np.asarray(nib.load(root / name).dataobj) for root in (first, second)))
    dataset = json.loads((first / "dataset.json").read_text())
    assert len(dataset["labels"]) == 33 and dataset["numTraining"] == 4
    (split,) = json.loads((first / "splits_final.json").read_text())
    assert split == {"train": ["brain_01_0", "brain_01_1"], "val": ["brain_00_0", "brain_00_1"]}
    image, found = (nib.load(first / f"{name}.nii.gz") for name in ("imagesTr/brain_01_0_0000", "labelsTr/brain_01_0"))
    values, found = np.asarray(image.dataobj), np.asarray(found.dataobj)
    assert image.header.get_zooms() == (2, 2, 2) and values.shape == found.shape
    classes = {name: dataset["labels"][name] for name in ("left_thalamus", "right_thalamus", "brain_stem")}
    assert set(np.unique(found)) == {0, *classes.values()}
    left, right, stem = (np.median(values[found == number]) for number in classes.values())
    assert abs(left - right) < 0.2 * abs(left - stem), "sides differ by the scanner alone"


def test_a_preprocessing_that_was_stopped_is_not_taken_for_a_finished_one(tmp_path):
    """The folder alone was the sign; nnU-Net then failed in the training, or trained without some cases."""
    (tmp_path / "gt_segmentations").mkdir()
    (tmp_path / "dataset.json").write_text('{"file_ending": ".nii.gz"}')
    assert not is_preprocessed(tmp_path, "made")
    for name in ("a", "b.1"):
        (tmp_path / "gt_segmentations" / f"{name}.nii.gz").touch()
    (tmp_path / "made").mkdir()
    assert not is_preprocessed(tmp_path, "made")
    (tmp_path / "made" / "a.pkl").touch()
    assert not is_preprocessed(tmp_path, "made")
    (tmp_path / "made" / "b.1.pkl").touch()
    assert is_preprocessed(tmp_path, "made")
