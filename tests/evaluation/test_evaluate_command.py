"""`nnslim evaluate` beside nnU-Net's own evaluation and TotalSegmentator's layout, and as a command."""

from __future__ import annotations

import csv
import importlib.metadata
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from helpers import ROOT

from nnslim.errors import HostError, InputError
from nnslim.evaluation.classes import read_dataset_json
from nnslim.evaluation.directories import evaluate_directories
from nnslim.evaluation.scores import write_summary
from nnslim.hosts.totalseg.tasks import organ_groups, task_classes

SPACING = (0.8, 0.9, 2.5)
REGIONS = {"background": 0, "whole": [1, 2, 3], "core": [2, 3], "tip": 3}
PLAIN = {"background": 0, "one": 1, "two": 2, "three": 3}


def save(path: Path, values: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(values.astype(np.uint8), np.diag((*SPACING, 1))), path)
    return path


def write_cases(folder: Path, top: int = 4, count: int = 3) -> tuple[Path, Path]:
    """Write predictions and references; label 3 is in some of them only, and alone on either side."""
    generator = np.random.default_rng(5)
    for number in range(count):
        reference = np.kron(generator.integers(0, top, (4, 4, 4)), np.ones((3, 3, 3), int))
        prediction = np.where(generator.random(reference.shape) < 0.15, 1, reference)
        (prediction if number == 0 else reference)[(prediction if number == 0 else reference) == 3] = 0
        save(folder / "p" / f"case_{number}.nii.gz", prediction)
        save(folder / "g" / f"case_{number}.nii.gz", reference)
    return folder / "p", folder / "g"


def write_dataset(path: Path, labels: dict) -> Path:
    content = {"labels": labels, "file_ending": ".nii.gz", "channel_names": {"0": "CT"}, "numTraining": 3}
    if labels is REGIONS:
        content["regions_class_order"] = [1, 2, 3]
    path.write_text(json.dumps(content))
    return path


@pytest.fixture
def nnslim(command):
    """Run `nnslim evaluate` and return (stdout, stderr)."""
    return lambda *arguments, expect=0: command("evaluate", *arguments, "-q", expect=expect)[1:]


@pytest.mark.parametrize(
    ("labels", "ignore"),
    [(PLAIN, None), (REGIONS, None), (PLAIN | {"ignore": 4}, 4)],
    ids=["labels", "regions", "ignore"],
)
def test_summary_equals_what_nnunet_computes(tmp_path, labels, ignore):
    from nnunetv2.evaluation.evaluate_predictions import compute_metrics, load_summary_json
    from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO
    from nnunetv2.utilities.label_handling.label_handling import LabelManager

    predictions, references = write_cases(tmp_path)
    if ignore is not None:
        for path in references.iterdir():
            values = np.asarray(nib.load(path).dataobj).copy()
            values[:4] = ignore
            save(path, values)
    dataset = write_dataset(tmp_path / "dataset.json", labels)
    write_summary(tmp_path / "summary.json", evaluate_directories(predictions, references, read_dataset_json(dataset)))
    read = load_summary_json(str(tmp_path / "summary.json"))
    manager = LabelManager(labels, [1, 2, 3] if labels is REGIONS else None)
    assert manager.ignore_label == ignore
    expected_keys = manager.foreground_regions if manager.has_regions else manager.foreground_labels
    assert list(read["mean"]) == sorted(expected_keys, key=str)
    collected = {key: [] for key in expected_keys}
    for case in read["metric_per_case"]:
        stock = compute_metrics(
            case["reference_file"], case["prediction_file"], SimpleITKIO(), expected_keys, manager.ignore_label
        )
        for key in expected_keys:
            ours = {name: case["metrics"][key][name] for name in stock["metrics"][key]}
            assert ours == pytest.approx({k: float(v) for k, v in stock["metrics"][key].items()}, nan_ok=True)
            collected[key].append(ours)
    for key, rows in collected.items():
        for name in rows[0]:
            assert read["mean"][key][name] == pytest.approx(np.nanmean([row[name] for row in rows]))
    foreground = [read["mean"][key]["Dice"] for key in expected_keys]
    assert read["foreground_mean"]["Dice"] == pytest.approx(np.mean(foreground))


@pytest.mark.slow
def test_find_best_configuration_reads_our_summary(tmp_path, monkeypatch):
    """nnU-Net compares its models by the summary.json of the folder; it takes ours and does not evaluate again."""
    from conftest import make_plans
    from nnunetv2.evaluation.find_best_configuration import find_best_configuration

    for name in ("raw", "preprocessed", "results"):
        monkeypatch.setenv(f"nnUNet_{name}", str(tmp_path / name))
        (tmp_path / name / "Dataset777_Test").mkdir(parents=True)
    predictions, references = write_cases(tmp_path, top=2)
    model = tmp_path / "results" / "Dataset777_Test" / "nnUNetTrainer__nnUNetPlans__3d_fullres"
    merged = model / "crossval_results_folds_0"
    shutil.copytree(predictions, model / "fold_0" / "validation")
    shutil.copytree(predictions, merged)
    gt = tmp_path / "preprocessed" / "Dataset777_Test" / "gt_segmentations"
    shutil.copytree(references, gt)
    plans, _ = make_plans("plain")
    plans |= {"dataset_name": "Dataset777_Test", "plans_name": "nnUNetPlans"}
    for folder, name in ((model, "plans"), (merged, "plans"), (gt.parent, "nnUNetPlans")):
        (folder / f"{name}.json").write_text(json.dumps(plans))
    for folder in (model, merged):
        dataset = write_dataset(folder / "dataset.json", {"background": 0, "one": 1})
    evaluation = evaluate_directories(merged, gt, read_dataset_json(dataset))
    write_summary(merged / "summary.json", evaluation)
    before = (merged / "summary.json").read_bytes()
    models = ({"plans": "nnUNetPlans", "configuration": "3d_fullres", "trainer": "nnUNetTrainer"},)
    found = find_best_configuration(777, models, False, num_processes=1, overwrite=False, folds=(0,))
    assert found["best_model_or_ensemble"]["result_on_crossval_pre_pp"] == pytest.approx(evaluation.mean("dice"))
    assert (merged / "summary.json").read_bytes() == before


def test_command_writes_table_summary_and_pictures(tmp_path, nnslim):
    predictions, references = write_cases(tmp_path)
    write_dataset(predictions / "dataset.json", PLAIN)  # as nnU-Net leaves it there
    groups = tmp_path / "groups.json"
    groups.write_text('{"low": ["one", "two"], "high": ["three"]}')
    out, err = nnslim(
        "-p", predictions, "-g", references, "-o", tmp_path / "o" / "m.csv", "--groups", groups, "--worst", 1
    )
    assert err == ""
    assert sorted(path.name for path in (tmp_path / "o").iterdir()) == [
        "m.csv",
        "m_classes.png",
        "m_groups.png",
        "m_worst1.png",
        "summary.json",
    ]
    rows = list(csv.DictReader((tmp_path / "o" / "m.csv").open()))
    assert [row["name"] for row in rows[:3]] == ["one", "two", "three"]
    assert {row["empty"] for row in rows if row["name"] == "three"} == {"prediction", "reference"}
    summary = json.loads((tmp_path / "o" / "summary.json").read_text())
    assert f"{summary['foreground_mean']['Dice']:.4f}" in out.splitlines()[4]


def test_command_adds_hd_and_compactness_where_asked_for(tmp_path, nnslim):
    predictions, references = write_cases(tmp_path)
    plain, more = tmp_path / "plain" / "m.csv", tmp_path / "more" / "m.csv"
    nnslim("-p", predictions, "-g", references, "-o", plain, "--no-figures")
    nnslim("-p", predictions, "-g", references, "-o", more, "--no-figures", "--shapes", "--baseline", references)
    without, rows = (list(csv.DictReader(path.open())) for path in (plain, more))
    added = ("hd", "compactness", "compactness_ref")
    assert [{key: value for key, value in row.items() if key not in added} for row in rows] == without
    for row in rows:
        values = [float(row[name]) for name in added]
        lacks = {"": (), "both": (0, 1, 2), "prediction": (0, 1), "reference": (0, 2)}[row["empty"]]
        assert [np.isnan(value) for value in values] == [place in lacks for place in range(3)]
        assert row["empty"] or values[0] >= float(row["hd95"])
    summary = json.loads(more.with_name("summary.json").read_text())
    found = [float(row["hd"]) for row in rows if row["label"] == "1"]
    assert summary["mean"]["1"]["HD"] == pytest.approx(np.mean(found), rel=1e-5)
    assert {"HD", *added[1:]} <= set(summary["foreground_mean"])
    assert "HD" not in json.loads(plain.with_name("summary.json").read_text())["mean"]["1"]


def test_command_missing_and_broken_cases_give_1_and_are_named(tmp_path, nnslim):
    predictions, references = write_cases(tmp_path)
    (predictions / "case_0.nii.gz").unlink()
    path = predictions / "case_2.nii.gz"
    path.write_bytes(path.read_bytes()[:100])
    _, err = nnslim("-p", predictions, "-g", references, "-o", tmp_path / "m.csv", "--no-figures", expect=1)
    assert "no prediction for 1 case(s): case_0" in err
    assert "failed: case_2: " in err
    assert "case_2.nii.gz cannot be read" in err
    assert {row["case"] for row in csv.DictReader((tmp_path / "m.csv").open())} == {"case_1"}
    summary = json.loads((tmp_path / "summary.json").read_text())["nnslim"]
    assert summary["missing"] == ["case_0"]
    assert list(summary["failed"]) == ["case_2"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("-p", "p", "-g", "nowhere", "-o", "m.csv"), "nowhere does not exist"),
        (("-p", "p", "-g", "g", "-o", "m.txt"), "m.txt: the table is a CSV"),
        (("-p", "p", "-g", "g", "-o", "m.csv", "-d", "gone.json"), "gone.json cannot be read"),
        (("-p", "p", "-g", "g", "-o", "m.csv", "-d", "totl"), "'totl' is neither a dataset.json nor a task"),
        (("-p", "p", "-g", "g", "-o", "m.csv", "--tolerance", "-1"), "tolerance is a distance in mm"),
        (("-p", "p", "-g", "g", "-o", "m.csv", "-l", "9"), "no class '9'"),
        (("-p", "p", "-g", "g", "-o", "m.csv", "--shapes", "--dice-only"), "--shapes needs the surfaces"),
        (("-p", "p", "-g", "g", "-o", "m.csv", "--groups", "gone.yml"), "gone.yml cannot be read"),
    ],
)
def test_command_wrong_arguments_give_2_and_write_nothing(tmp_path, nnslim, monkeypatch, arguments, message):
    write_cases(tmp_path, count=2)
    monkeypatch.chdir(tmp_path)
    _, err = nnslim(*arguments, expect=2)
    assert message in err
    assert not list(tmp_path.glob("m*"))


def test_command_baseline_tells_the_paired_difference(tmp_path, nnslim):
    predictions, references = write_cases(tmp_path)
    out, _ = nnslim(
        "-p", predictions, "-g", references, "-o", tmp_path / "m.csv", "--baseline", references, "--no-figures"
    )
    rows = {(row["metric"], row["name"]): row for row in csv.DictReader((tmp_path / "m_difference.csv").open())}
    dices = evaluate_directories(predictions, references).values("dice")[:, 1] - 1
    assert float(rows["dice", "2"]["mean"]) == pytest.approx(dices.mean(), rel=1e-4)
    assert float(rows["dice", "2"]["sd"]) == pytest.approx(dices.std(ddof=1), rel=1e-4)
    assert f"dice minus baseline, 2: {dices.mean():+.4f} (SD {dices.std(ddof=1):.4f}, 3 case(s))" in out
    assert {row["dice"] for row in csv.DictReader((tmp_path / "m_baseline.csv").open())} == {"1", "nan"}


def test_command_totalsegmentator_output_of_one_case(tmp_path, nnslim):
    """One file per class against a label map; the names come from TotalSegmentator, and so do the groups."""
    names = {1: "spleen", 5: "liver", 26: "vertebrae_S1", 51: "heart"}
    labels = np.kron(np.random.default_rng(1).choice([0, *names], (4, 4, 4)), np.ones((3, 3, 3), int))
    reference = save(tmp_path / "labels.nii.gz", labels)
    for label, name in names.items():
        save(tmp_path / "seg" / f"{name}.nii.gz", labels == label)
    given = ("-p", tmp_path / "seg", "-g", reference, "-o", tmp_path / "m.csv", "-d", "total")
    options = [part for name in names.values() for part in ("-l", name)]
    out, _ = nnslim(*given, *options)
    assert "mean" in out
    assert json.loads((tmp_path / "summary.json").read_text())["foreground_mean"]["Dice"] == 1
    assert (tmp_path / "m_groups.png").is_file()
    _, err = nnslim(*given, "--no-figures", expect=1)
    assert "labels: no prediction file of 113 class(es): kidney_right" in err


def test_totalsegmentator_tables():
    groups = organ_groups()
    assert list(groups)[:5] == ["organs", "vertebrae", "cardiac", "muscles", "ribs"]
    assert "liver" in groups["organs"]
    assert "rib_left_1" in groups["ribs"]
    names = list(task_classes("total").values())
    assert len(names) == 117
    for name in names:
        assert sum(name in members for members in groups.values()) == 1
    with pytest.raises(InputError, match=r"nearest: total"):
        task_classes("totel")


def test_totalsegmentator_absent_is_told(monkeypatch):
    def version(package):
        raise importlib.metadata.PackageNotFoundError(package)

    monkeypatch.setattr(importlib.metadata, "version", version)
    with pytest.raises(HostError, match=r"TotalSegmentator is not installed; run pip install 'nnslim\[ts\]'"):
        task_classes("total")


def run_script(*arguments: Path, expect: int = 0) -> str:
    script = ROOT / "scripts" / "04_eval.py"
    ran = subprocess.run(
        [sys.executable, str(script), *map(str, arguments)], capture_output=True, text=True, env=os.environ, check=False
    )
    assert ran.returncode == expect, ran.stderr
    return ran.stdout + ran.stderr


def test_script_takes_tucker_cnns_configuration(tmp_path):
    """Fault of tucker-cnn: 1.5 mm for all files, -1 where the reference lacks a class, invented classes free."""
    labels = np.zeros((12, 12, 12))
    labels[2:8, 2:8, 2:8] = 1
    moved = np.roll(labels, 1, axis=2)  # by 2.5 mm, or 1.5 mm as tucker-cnn saw it
    save(tmp_path / "g" / "s1" / "segmentations" / "liver.nii.gz", labels)
    save(tmp_path / "g" / "s1" / "segmentations" / "spleen.nii.gz", labels * 0)
    save(tmp_path / "out" / "run" / "s1" / "liver.nii.gz", np.roll(moved, 1, axis=2))
    save(tmp_path / "out" / "run" / "s1" / "spleen.nii.gz", labels)
    config = {"out_root": str(tmp_path / "out"), "out_id": "run", "label_root": str(tmp_path / "g")}
    config |= {"metric_csv_path": str(tmp_path / "m.csv"), "eval_workers": 32}
    (tmp_path / "predict.yml").write_text(json.dumps(config))
    run_script(tmp_path / "predict.yml")
    rows = {row["name"]: row for row in csv.DictReader((tmp_path / "m.csv").open())}
    assert float(rows["liver"]["hd95"]) == pytest.approx(5.0)
    assert float(rows["liver"]["nsd"]) < 1  # 5 mm apart; two voxels of 1.5 mm would be within the 3 mm
    assert (float(rows["spleen"]["dice"]), rows["spleen"]["empty"]) == (0, "reference")
    assert not any(math.isclose(float(row[key]), -1) for row in rows.values() for key in ("dice", "nsd"))
    del config["label_root"]
    (tmp_path / "predict.yml").write_text(json.dumps(config))
    assert "this script needs label_root" in run_script(tmp_path / "predict.yml", expect=2)


def test_command_maps_without_any_label_have_nothing_to_compare(tmp_path, nnslim):
    empty = save(tmp_path / "a.nii.gz", np.zeros((6, 6, 6)))
    out, _ = nnslim("-p", empty, "-g", empty, "-o", tmp_path / "m.csv")
    assert "mean" in out
    assert len((tmp_path / "m.csv").read_text().splitlines()) == 1
    assert json.loads((tmp_path / "summary.json").read_text())["foreground_mean"] == {}
