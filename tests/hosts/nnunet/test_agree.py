"""`nnslim agree`: both models through nnU-Net's own parts, on model folders of every kind."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from helpers import make_plans, slim_model

from nnslim.errors import InputError, ModelError
from nnslim.evaluation.agreement import Agreement
from nnslim.evaluation.overlap import dice_per_label
from nnslim.hosts.nnunet.judge.agree_models import agreement_of_models, write_agreement
from nnslim.hosts.nnunet.predict.directory import predict_folder
from nnslim.hosts.nnunet.predict.predict_settings import PredictSettings


def label_map(path: Path) -> np.ndarray:
    return np.asarray(nib.load(path).dataobj).astype(int)


@pytest.fixture
def labels(case_labels):
    return case_labels


@pytest.mark.parametrize("kind", ["plain", "2d", "regions", "anisotropic"])
def test_identical_models_agree_fully(make_model, case_folder, kind):
    source = make_model(kind)
    agreement = agreement_of_models(source, source, case_folder)
    assert [case.name for case in agreement.cases] == ["a", "b", "c"] and not agreement.failed
    found = agreement.values("dice")
    assert (found[~np.isnan(found)] == 1).all() and np.isfinite(found).any()
    assert np.nan_to_num(agreement.values("expected_drop")).max() == 0 == agreement.expected_drop
    assert np.nan_to_num(agreement.values("volume_difference")).max() == 0
    assert agreement.class_names == (("whole", "core") if kind == "regions" else ("one", "two"))
    assert agreement.values("volume_dense").sum() > 0


def test_figures_are_those_of_predicted_segmentations(make_model, case_folder, labels, tmp_path):
    source = make_model(folds=(0, 1))
    slim = slim_model(source, tmp_path / "slim", 0.3)
    seen = []
    agreement = agreement_of_models(source, slim, case_folder, labels, progress=lambda *counts: seen.append(counts))
    assert seen == [(1, 3), (2, 3), (3, 3)]
    assert [case.labelled for case in agreement.cases] == [True, True, False]
    assert 0 < agreement.mean_dice < 1
    for model, key in ((source, "dice_dense"), (slim, "dice_slim")):
        predict_folder(case_folder, tmp_path / key, model)
        for number, name in enumerate("ab"):
            predicted = label_map(tmp_path / key / f"{name}.nii.gz")
            expected = dice_per_label(predicted, label_map(labels / f"{name}.nii.gz"), (1, 2))
            assert agreement.values(key)[number] == pytest.approx(list(expected.values()), nan_ok=True)
            volumes = [(predicted == label).sum() * 1.0 * 1.2 * 0.9 for label in (1, 2)]  # mm^3 per voxel
            volume_key = key.replace("dice", "volume")
            assert agreement.values(volume_key)[number] == pytest.approx(volumes, rel=1e-5)


def test_regions_are_compared_with_labels_as_unions(make_model, case_folder, labels, tmp_path):
    source = make_model("regions")
    agreement = agreement_of_models(source, slim_model(source, tmp_path / "slim", 0.3), case_folder, labels)
    predict_folder(case_folder, tmp_path / "out", source)
    predicted, truth = label_map(tmp_path / "out" / "a.nii.gz"), label_map(labels / "a.nii.gz")
    unions = dice_per_label((predicted > 0).astype(int), (truth > 0).astype(int), (1,))
    assert agreement.cases[0].classes["whole"].dice_dense == pytest.approx(unions[1])
    core = dice_per_label(predicted, truth, (2,))
    assert agreement.cases[0].classes["core"].dice_dense == pytest.approx(core[2], nan_ok=True)


def test_volumes_are_in_mm_of_the_preprocessed_grid(make_model, case_folder):
    source = make_model()
    found = agreement_of_models(source, source, case_folder / "a_0000.nii.gz")
    plans, name = make_plans("plain")
    assert plans["configurations"][name]["spacing"] == [1, 1, 1]  # the image has 1.2 x 1 x 0.9 mm
    volumes = found.values("volume_dense")
    assert volumes == pytest.approx(np.rint(volumes)) and 0 < volumes.sum() <= 22 * 20 * 16


def test_slim_model_of_one_fold_is_compared_with_that_fold(make_model, case_folder, tmp_path):
    source = make_model(folds=(0, 1))
    one = tmp_path / "one"
    shutil.copytree(source, one)
    shutil.rmtree(one / "fold_0")
    agreement = agreement_of_models(source, one, case_folder)
    assert agreement.mean_dice == 1 and agreement.expected_drop == 0
    with pytest.raises(ModelError, match="fold_0"):
        agreement_of_models(source, one, case_folder, settings=PredictSettings(folds=["0"]))


def test_cascade_needs_and_takes_the_stage_before(make_model, case_folder, labels, tmp_path):
    source = make_model("cascade")
    with pytest.raises(ModelError, match="3d_lowres"):
        agreement_of_models(source, source, case_folder)
    (case_folder / "c_0000.nii.gz").unlink()
    agreement = agreement_of_models(source, source, case_folder, settings=PredictSettings(previous_stage=labels))
    assert agreement.mean_dice == 1


# --- the file and the picture ----------------------------------------------------------------------------------------


def test_write_agreement_keeps_everything_else(make_model, case_folder, tmp_path):
    from matplotlib.image import imread

    source = make_model()
    slim = slim_model(source, tmp_path / "slim", 0.3)
    before = json.loads((slim / "nnslim.json").read_text())
    agreement = agreement_of_models(source, slim, case_folder)
    write_agreement(slim, agreement)
    after = json.loads((slim / "nnslim.json").read_text())
    stored = after.pop("agreement")
    assert after == before and {"spec", "config", "source"} <= set(before)
    assert repr(Agreement.from_dict(stored)) == repr(agreement)
    picture = imread(slim / "agreement.png")
    assert picture.shape[1] == 1210 and len(np.unique(picture.reshape(-1, picture.shape[2]), axis=0)) > 10
    (slim / "agreement.png").unlink()
    write_agreement(slim, agreement, figure=False)
    left = ["dataset.json", "fold_0", "nnslim.json", "plan.csv", "plans.json"]
    assert sorted(path.name for path in slim.iterdir()) == left


def test_write_agreement_damaged_record_is_not_overwritten(make_model, tmp_path):
    slim = slim_model(make_model(), tmp_path / "slim", 0.3)
    (slim / "nnslim.json").write_text('{"spec": ')
    with pytest.raises(ModelError, match="cannot be read as JSON"):
        write_agreement(slim, Agreement(("x",)), figure=False)
    assert (slim / "nnslim.json").read_text() == '{"spec": '


# --- faults ----------------------------------------------------------------------------------------------------------


def test_bad_case_is_listed_and_the_rest_goes_on(make_model, case_folder, labels):
    source = make_model()
    path = case_folder / "a_0000.nii.gz"
    path.write_bytes(path.read_bytes()[:3000])
    nib.save(nib.Nifti1Image(np.zeros((5, 5, 5), np.uint8), np.eye(4)), labels / "b.nii.gz")
    agreement = agreement_of_models(source, source, case_folder, labels)
    assert [case.name for case in agreement.cases] == ["c"]
    assert "a_0000.nii.gz cannot be read" in agreement.failed["a"]
    assert "b.nii.gz has shape (5, 5, 5), its image (17, 20, 18)" in agreement.failed["b"]
    (case_folder / "c_0000.nii.gz").unlink()
    with pytest.raises(InputError, match=r"none of 2 case\(s\).*; a: a_0000.nii.gz cannot be read"):
        agreement_of_models(source, source, case_folder, labels)


def test_input_faults_are_named(make_model, case_folder, tmp_path):
    source = make_model()
    for name in "abc":
        (case_folder / f"{name}_0000.nii.gz").rename(case_folder / f"{name}.nii.gz")
    with pytest.raises(InputError, match=r"no image named <case>_0000\.nii\.gz"):
        agreement_of_models(source, source, case_folder)
    (case_folder / "a.nii.gz").rename(case_folder / "a_0000.nii.gz")
    with pytest.raises(InputError, match=r"holds no label map of any case; expected, for example, a\.nii\.gz"):
        agreement_of_models(source, source, case_folder, make_empty(tmp_path / "empty"))
    with pytest.raises(InputError, match="is not a folder; expected a folder of label maps"):
        agreement_of_models(source, source, case_folder, tmp_path / "none")


def make_empty(path: Path) -> Path:
    path.mkdir()
    return path


def test_models_that_do_not_belong_together_are_refused(make_model, case_folder):
    plain, regions = make_model(parent="one"), make_model("regions", parent="two")
    with pytest.raises(ModelError, match=r"not made from this dense one: classes .*whole.* and .*one"):
        agreement_of_models(plain, regions, case_folder)
    plans = json.loads((plain / "plans.json").read_text())
    other = make_model(parent="three")
    plans["configurations"]["3d_fullres"]["spacing"] = [2.0, 1.0, 1.0]
    (other / "plans.json").write_text(json.dumps(plans))
    with pytest.raises(ModelError, match=r"spacing \[2.0, 1.0, 1.0\] and \[1.0, 1.0, 1.0\]"):
        agreement_of_models(plain, other, case_folder)


# --- command ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def agree(command):
    """Run `nnslim agree`; return exit code, stdout and the last line of stderr."""

    def run(*arguments):
        code, out, err = command("agree", *arguments)
        return code, out, (err.strip().splitlines() or [""])[-1]

    return run


def test_command_prints_and_writes(make_model, case_folder, labels, tmp_path, agree):
    source = make_model()
    slim = slim_model(source, tmp_path / "slim", 0.3)
    code, out, err = agree("-q", "-m", slim, "--dense", source, "-i", case_folder, "-l", labels)
    assert code == 0 and err == ""
    stored = Agreement.from_dict(json.loads((slim / "nnslim.json").read_text())["agreement"])
    assert out.splitlines()[:-1] == stored.lines()
    worst = stored.worst()
    assert f"worst: case {worst.case}, class {worst.class_name}" in out and "against labels of 2 case(s)" in out
    assert (slim / "agreement.png").is_file()
    (case_folder / "broken_0000.nii.gz").write_bytes(b"no image")
    code, out, _ = agree("-q", "-m", slim, "--dense", source, "-i", case_folder)
    assert code == 1 and "failed: broken: broken_0000.nii.gz cannot be read" in out and "3 case(s)" in out


def test_command_faults_exit_2_before_anything_is_predicted(make_model, case_folder, tmp_path, agree):
    source = make_model()
    code, _, err = agree("-q", "-m", source, "--dense", source, "-i", case_folder)
    assert code == 2 and "has no nnslim.json" in err
    slim = slim_model(source, tmp_path / "slim", 0.3)
    code, _, err = agree("-q", "-m", slim, "--dense", tmp_path / "none", "-i", case_folder)
    assert code == 2 and "none is not a folder" in err
    assert not (slim / "agreement.png").exists()
