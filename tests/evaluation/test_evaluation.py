"""Scores of cases and folders: exact values, empty classes, regions, faults, tables and pictures."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from evaluation_jobs import square_or_die
from scipy import stats

from nnslim.errors import InputError
from nnslim.evaluation.classes import group_classes, named_classes, read_dataset_json, read_groups
from nnslim.evaluation.compare import CompareSettings, compare_case
from nnslim.evaluation.directories import evaluate_directories, run_jobs
from nnslim.evaluation.overlap import dice_per_label, joint_counts
from nnslim.evaluation.pictures import class_figure, group_figure, worst_figures
from nnslim.evaluation.scores import paired_differences, score_lines, write_csv, write_differences, write_summary
from nnslim.evaluation.surfaces import surface_distances

SPACING = (0.8, 0.9, 3.0)


def save(path: Path, values, spacing=SPACING):
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(np.asarray(values, np.uint8), np.diag((*spacing, 1))), path)
    return path


def box(shape, *corners):
    """Return a map with label n in the n-th box ((start, stop) of each axis)."""
    labels = np.zeros(shape, np.uint8)
    for label, corner in enumerate(corners, start=1):
        labels[tuple(slice(*side) for side in corner)] = label
    return labels


@pytest.fixture
def pair(tmp_path):
    """Two boxes each: label 1 moved by a voxel along x, label 2 halved; voxels 4x4x4 and 2x4x4."""
    reference = box((12, 8, 8), ((1, 5), (2, 6), (2, 6)), ((7, 11), (2, 6), (2, 6)))
    prediction = box((12, 8, 8), ((2, 6), (2, 6), (2, 6)), ((7, 9), (2, 6), (2, 6)))
    return save(tmp_path / "p" / "a.nii.gz", prediction), save(tmp_path / "g" / "a.nii.gz", reference)


def dataset_json(folder: Path, labels: dict, **more) -> Path:
    path = folder / "dataset.json"
    path.write_text(json.dumps({"labels": labels, "file_ending": ".nii.gz", **more}))
    return path


def by_name(evaluation, case=0):
    return {one.name: evaluation.cases[case].score(one.key) for one in evaluation.classes}


def test_compare_boxes_hand_computed(pair):
    found = compare_case("a", *pair, CompareSettings(tolerance=0.801))  # a header rounds 0.8 to 0.80000001
    one, two = found.scores["1"], found.scores["2"]
    assert (one.predicted, one.reference, one.both, one.voxels) == (64, 64, 48, 768)
    assert one.dice == 0.75
    assert one.nsd == 1  # moved by one voxel of 0.8 mm
    assert one.hd95 == pytest.approx(0.8)
    assert (two.predicted, two.reference, two.both) == (32, 64, 32)
    assert two.dice == pytest.approx(2 / 3)
    assert two.hd95 == pytest.approx(1.6)
    assert 0.5 < two.nsd < 1
    assert compare_case("a", *pair, CompareSettings(tolerance=0.79)).scores["1"].nsd < 1


def test_compare_takes_the_spacing_of_the_file(pair, tmp_path):
    """tucker-cnn used 1.5 mm whatever the header said."""
    coarse = []
    for side, path in zip("pg", pair, strict=True):
        coarse.append(save(tmp_path / "coarse" / side / "a.nii.gz", np.asarray(nib.load(path).dataobj), (4, 0.9, 3)))
    assert compare_case("a", *coarse, CompareSettings(tolerance=3)).scores["1"].hd95 == pytest.approx(4.0)
    assert compare_case("a", *coarse, CompareSettings(tolerance=3)).scores["1"].nsd < 1
    assert compare_case("a", *coarse, CompareSettings(tolerance=4)).scores["1"].nsd == 1


def test_compare_empty_classes_follow_the_rules(tmp_path):
    """No -1 anywhere; what is predicted but not there costs as much as what is there but not predicted."""
    shape = (9, 6, 6)
    prediction = save(tmp_path / "p.nii.gz", box(shape, ((1, 3), (1, 3), (1, 3)), ((5, 8), (1, 5), (1, 5))))
    reference = box(shape, ((1, 3), (1, 3), (1, 3)))
    reference[5:8, 1:4, 1:4] = 3
    classes = named_classes({1: "equal", 2: "invented", 3: "missed", 4: "nowhere"})
    evaluation = evaluate_directories(prediction, save(tmp_path / "g.nii.gz", reference), classes)
    scores = by_name(evaluation)
    assert (scores["equal"].dice, scores["equal"].nsd, scores["equal"].hd95) == (1, 1, 0)
    for name, empty, counts in (("invented", "reference", (48, 0, 0)), ("missed", "prediction", (0, 27, 0))):
        score = scores[name]
        assert (score.predicted, score.reference, score.both) == counts
        assert (score.dice, score.nsd, score.empty) == (0, 0, empty)
        assert np.isnan(score.hd95)
    nowhere = scores["nowhere"]
    assert np.isnan([nowhere.dice, nowhere.nsd, nowhere.hd95]).all()
    assert nowhere.empty == "both"
    assert evaluation.mean("dice") == pytest.approx(1 / 3)
    assert evaluation.mean("nsd") == pytest.approx(1 / 3)
    assert evaluation.mean("hd95") == 0
    counts = evaluation.class_table.set_index("name")[["cases", "missed", "false_positive"]]
    assert counts.T.to_dict("list") == {
        "equal": [1, 0, 0],
        "invented": [1, 0, 1],
        "missed": [1, 1, 0],
        "nowhere": [0, 0, 0],
    }


def test_compare_class_means_leave_out_cases_without_the_class(tmp_path):
    one, two = box((6, 6, 6), ((1, 5), (1, 5), (1, 5))), np.zeros((6, 6, 6))
    half = box((6, 6, 6), ((1, 3), (1, 5), (1, 5)))
    for name, prediction, reference in (("a", one, one), ("b", half, one), ("c", two, two)):
        save(tmp_path / "p" / f"{name}.nii.gz", prediction)
        save(tmp_path / "g" / f"{name}.nii.gz", reference)
    evaluation = evaluate_directories(tmp_path / "p", tmp_path / "g")
    assert evaluation.class_means("dice") == pytest.approx([(1 + 2 / 3) / 2])
    assert evaluation.class_table["cases"].tolist() == [2]


def test_compare_regions_are_unions_of_labels(tmp_path):
    generator = np.random.default_rng(0)
    maps = [np.kron(generator.integers(0, 4, (5, 5, 5)), np.ones((2, 2, 2), int)) for _ in range(2)]
    files = [save(tmp_path / side / "a.nii.gz", values) for side, values in zip("pg", maps, strict=True)]
    labels = {"background": 0, "whole": [1, 2, 3], "core": [2, 3], "enhancing": 3}
    classes = read_dataset_json(dataset_json(tmp_path, labels, regions_class_order=[1, 2, 3]))
    assert [one.key for one in classes.classes] == ["(1, 2, 3)", "(2, 3)", "3"]
    scores = compare_case("a", *files, CompareSettings(classes, tolerance=2.0)).scores
    for key, members in (("(1, 2, 3)", (1, 2, 3)), ("(2, 3)", (2, 3)), ("3", (3,))):
        masks = [np.isin(values, members) for values in maps]
        assert scores[key].both == (masks[0] & masks[1]).sum()
        assert scores[key].predicted == masks[0].sum()
        assert scores[key].nsd == pytest.approx(surface_distances(*masks, SPACING).surface_dice(2.0))


def test_compare_ignored_voxels_count_nowhere(tmp_path):
    reference = box((12, 6, 6), ((2, 8), (1, 5), (1, 5)))
    reference[6:] = 2  # not annotated from here on
    prediction = box((12, 6, 6), ((2, 11), (1, 5), (1, 5)))
    files = [save(tmp_path / side / "a.nii.gz", values) for side, values in (("p", prediction), ("g", reference))]
    classes = read_dataset_json(dataset_json(tmp_path, {"background": 0, "organ": 1, "ignore": 2}))
    score = compare_case("a", *files, CompareSettings(classes, tolerance=0.0)).scores["1"]
    assert (score.predicted, score.reference, score.both, score.voxels) == (64, 64, 64, 216)
    assert (score.dice, score.nsd) == (1, 1)


def test_compare_unknown_label_is_named(tmp_path, pair):
    classes = read_dataset_json(dataset_json(tmp_path, {"background": 0, "organ": 1}))
    with pytest.raises(InputError, match=r"p.a\.nii\.gz has label\(s\) 2, which are none of the classes; known: 1"):
        compare_case("a", *pair, CompareSettings(classes))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", r"is not nnU-Net's dataset\.json"),
        ("[]", r"is not nnU-Net's dataset\.json"),
        ('{"labels": ["a"]}', r"is not nnU-Net's dataset\.json"),
        ('{"labels": {"background": 0}}', r"names no label besides the background"),
        ('{"labels": {"background": 0, "a": 1, "ignore": [2, 3]}}', r"ignore label is one number"),
    ],
)
def test_read_dataset_json_wrong_content_is_refused(tmp_path, content, message):
    (tmp_path / "dataset.json").write_text(content)
    with pytest.raises(InputError, match=message):
        read_dataset_json(tmp_path / "dataset.json")


def test_joint_counts_large_and_small_labels_agree_with_a_mask_per_label():
    generator = np.random.default_rng(1)
    for top, orders in ((7, "CC"), (7, "CF"), (60000, "FF")):
        values = np.unique(generator.integers(0, top, 12))
        maps = [np.array(generator.choice(values, (40, 30, 20)), np.uint16, order=order) for order in orders]
        counted = joint_counts(*maps)
        assert counted.counts.sum() == 24000
        occurring = (*counted.first[counted.counts.any(1)], *counted.second[counted.counts.any(0)])
        assert set(occurring) == set(values.tolist())
        for label in values:
            masks = [one == label for one in maps]
            assert counted.overlap([label]) == (masks[0].sum(), masks[1].sum(), (masks[0] & masks[1]).sum())
        dice = dice_per_label(*maps, [int(values[-1]), top + 5])
        assert np.isnan(dice[top + 5])
        assert dice[int(values[-1])] == pytest.approx(
            2 * (masks[0] & masks[1]).sum() / (masks[0].sum() + masks[1].sum())
        )


def write_masks(folder: Path, labels: np.ndarray, names: dict[int, str]):
    for label, name in names.items():
        save(folder / f"{name}.nii.gz", labels == label)


def test_compare_one_file_per_class_equals_label_maps(tmp_path, pair):
    names = {1: "left", 2: "right"}
    maps = [np.asarray(nib.load(path).dataobj) for path in pair]
    for side, labels in zip(("pm", "gm"), maps, strict=True):
        write_masks(tmp_path / side / "a" / "segmentations", labels, names)
    expected = by_name(evaluate_directories(tmp_path / "p", tmp_path / "g", named_classes(names)))
    for places, classes in (
        (("pm", "gm"), None),
        (("pm", "gm"), named_classes(names)),
        (("p", "gm"), named_classes(names)),
        (("pm", "g"), named_classes(names)),
    ):
        found = evaluate_directories(tmp_path / places[0], tmp_path / places[1], classes)
        assert by_name(found) == expected
    with pytest.raises(InputError, match=r"names of the labels are needed"):
        evaluate_directories(tmp_path / "p", tmp_path / "gm")


def test_compare_class_without_a_file_is_told_and_counts_nowhere(tmp_path, pair):
    labels = np.asarray(nib.load(pair[1]).dataobj)
    write_masks(tmp_path / "gm" / "a", labels, {1: "left", 2: "right"})
    write_masks(tmp_path / "pm" / "a", labels, {1: "left", 3: "other"})
    found = evaluate_directories(tmp_path / "pm", tmp_path / "gm")
    assert found.cases[0].lacking == {"other": "reference", "right": "prediction"}
    assert not found.complete
    assert found.mean("dice") == 1
    write_csv(tmp_path / "m.csv", found)
    assert [row["name"] for row in csv.DictReader((tmp_path / "m.csv").open())] == ["left"]
    assert evaluate_directories(tmp_path / "pm", tmp_path / "gm", wanted=("left",)).complete


def test_compare_mask_of_another_grid_is_named(tmp_path, pair):
    labels = np.asarray(nib.load(pair[1]).dataobj)
    write_masks(tmp_path / "gm" / "a", labels, {1: "left", 2: "right"})
    write_masks(tmp_path / "pm" / "a", labels, {1: "left"})
    save(tmp_path / "pm" / "a" / "right.nii.gz", labels == 2, (1, 1, 1))
    with pytest.raises(InputError, match=r"left\.nii\.gz and .*right\.nii\.gz differ in spacing"):
        evaluate_directories(tmp_path / "pm", tmp_path / "gm")


def three_cases(folder: Path, names=("a", "b ü", "c")):
    generator = np.random.default_rng(2)
    for name in names:
        reference = np.kron(generator.integers(0, 3, (4, 4, 4)), np.ones((3, 3, 3), int))
        prediction = np.where(generator.random(reference.shape) < 0.1, 0, reference)
        save(folder / "p" / f"{name}.nii.gz", prediction)
        save(folder / "g" / f"{name}.nii.gz", reference)
    return folder / "p", folder / "g"


def test_evaluate_folders_bad_cases_are_listed_and_the_rest_is_done(tmp_path):
    predictions, references = three_cases(tmp_path, ("a", "b", "c", "d", "e", "f"))
    content = (predictions / "b.nii.gz").read_bytes()
    (predictions / "b.nii.gz").write_bytes(content[: len(content) // 2])
    (predictions / "c.nii.gz").unlink()
    save(predictions / "d.nii.gz", np.zeros((3, 3, 3)))
    nib.save(
        nib.Nifti1Image(np.full((12, 12, 12), np.nan, np.float32), np.diag((*SPACING, 1))), references / "e.nii.gz"
    )
    save(predictions / "x.nii.gz", np.zeros((3, 3, 3)))
    steps = []
    found = evaluate_directories(predictions, references, progress=lambda done, total: steps.append((done, total)))
    assert [case.name for case in found.cases] == ["a", "f"]
    assert set(found.failed) == {"b", "d", "e"}
    assert "b.nii.gz cannot be read" in found.failed["b"]
    assert "differ in shape: (3, 3, 3) and (12, 12, 12)" in found.failed["d"]
    assert "e.nii.gz has NaN" in found.failed["e"]
    assert (found.missing, found.extra, found.complete) == (("c",), ("x",), False)
    assert steps == [(number, 5) for number in range(1, 6)]


def test_evaluate_folders_nothing_usable_is_an_error(tmp_path):
    predictions, references = three_cases(tmp_path, ("a",))
    save(predictions / "a.nii.gz", np.zeros((3, 3, 3)))
    with pytest.raises(InputError, match=r"none of 1 case\(s\) .* could be compared; a: .*differ in shape"):
        evaluate_directories(predictions, references)
    with pytest.raises(InputError, match=r"tolerance is a distance in mm, found -1"):
        evaluate_directories(predictions, references, tolerance=-1)


def test_evaluate_folders_workers_and_threads_change_nothing(tmp_path):
    predictions, references = three_cases(tmp_path)
    alone, both = (evaluate_directories(predictions, references, workers=workers) for workers in (1, 2))
    assert repr([case.scores for case in alone.cases]) == repr([case.scores for case in both.cases])  # NaN is not NaN
    threaded = compare_case("a", predictions / "a.nii.gz", references / "a.nii.gz", CompareSettings(threads=4))
    assert repr(threaded.scores) == repr(alone.cases[0].scores)


def test_evaluate_folders_wanted_classes_only(tmp_path):
    predictions, references = three_cases(tmp_path)
    everything = evaluate_directories(predictions, references)
    for classes in (None, named_classes({1: "one", 2: "two"})):
        found = evaluate_directories(predictions, references, classes, wanted=("2",))
        assert [one.key for one in found.classes] == ["2"]
        assert found.mean("nsd") == everything.class_means("nsd")[1]
    with pytest.raises(InputError, match=r"no class 'tow'; nearest: two"):
        evaluate_directories(predictions, references, classes, wanted=("tow",))


def test_evaluate_folders_dice_only_has_no_surfaces(tmp_path):
    predictions, references = three_cases(tmp_path)
    found = evaluate_directories(predictions, references, surfaces=False)
    assert np.isnan(found.values("nsd")).all()
    np.testing.assert_array_equal(found.values("dice"), evaluate_directories(predictions, references).values("dice"))


def test_run_jobs_killed_process_loses_its_own_job_only():
    jobs = {str(number): (number, 2) for number in range(6)}
    outcome = dict(run_jobs(square_or_die, jobs, 2))
    assert "process died" in str(outcome.pop("2"))
    assert outcome == {str(number): number * number for number in (0, 1, 3, 4, 5)}


@pytest.fixture
def evaluation(tmp_path):
    return evaluate_directories(*three_cases(tmp_path), named_classes({1: "organ, left", 2: "organ ü"}), tolerance=2.0)


def test_write_csv_a_row_per_case_and_class(evaluation, tmp_path):
    write_csv(tmp_path / "m.csv", evaluation)
    rows = list(csv.DictReader((tmp_path / "m.csv").open(encoding="utf-8")))
    assert [(row["case"], row["label"], row["name"]) for row in rows[:2]] == [
        ("a", "1", "organ, left"),
        ("a", "2", "organ ü"),
    ]
    assert len(rows) == 6
    for row, score in zip(rows, (case.score(key) for case in evaluation.cases for key in "12"), strict=True):
        assert float(row["dice"]) == pytest.approx(score.dice, rel=1e-5)
        assert float(row["nsd"]) == pytest.approx(score.nsd, rel=1e-5)
        counts = {key: int(row[key]) for key in ("tp", "fp", "fn", "n_ref", "n_pred")}
        assert counts["tp"] + counts["fn"] == counts["n_ref"] == score.reference
        assert counts["tp"] + counts["fp"] == counts["n_pred"] == score.predicted


def test_write_summary_counts_cases_misses_and_failures(tmp_path):
    predictions, references = three_cases(tmp_path)
    values = np.asarray(nib.load(predictions / "a.nii.gz").dataobj)
    save(predictions / "a.nii.gz", np.where(values == 1, 0, values))
    (predictions / "c.nii.gz").unlink()
    write_summary(tmp_path / "summary.json", evaluate_directories(predictions, references, tolerance=2.5))
    content = json.loads((tmp_path / "summary.json").read_text())
    own = content["nnslim"]
    assert own["tolerance_mm"] == 2.5
    assert own["missing"] == ["c"]
    assert {key: own["classes"]["1"][key] for key in ("cases", "missed", "false_positive")} == {
        "cases": 2,
        "missed": 1,
        "false_positive": 0,
    }
    dices = [case["metrics"]["1"]["Dice"] for case in content["metric_per_case"]]
    assert dices[0] == 0
    assert content["mean"]["1"]["Dice"] == pytest.approx(np.mean(dices))
    expected = np.mean([content["mean"][key]["Dice"] for key in "12"])
    assert content["foreground_mean"]["Dice"] == pytest.approx(expected)


def test_paired_differences_mean_and_spread(tmp_path):
    predictions, references = three_cases(tmp_path)
    better = evaluate_directories(references, references)
    worse = evaluate_directories(predictions, references)
    (predictions / "c.nii.gz").unlink()
    fewer = evaluate_directories(predictions, references)
    dices = worse.values("dice")
    differences = paired_differences(worse, better, "dice")
    one, two, overall = differences.itertuples()
    assert (one.name, two.name, overall.name) == ("1", "2", "mean over classes")
    assert (one.cases, one.mean) == (3, pytest.approx((dices[:, 0] - 1).mean()))
    assert one.sd == pytest.approx(dices[:, 0].std(ddof=1))
    assert one.lowest_case == ["a", "b ü", "c"][dices[:, 0].argmin()]
    assert overall.sd == pytest.approx(dices.mean(axis=1).std(ddof=1))
    assert paired_differences(better, fewer, "dice")["cases"][0] == 2
    write_differences(tmp_path / "d.csv", {"dice": differences})
    rows = list(csv.DictReader((tmp_path / "d.csv").open()))
    assert float(rows[2]["mean"]) == pytest.approx(overall.mean, rel=1e-5)


def test_paired_differences_are_tested_per_class_and_corrected_by_holm(tmp_path):
    """12 cases, three classes: the first loses in each case, the second in none, the third in half of them."""
    truth = np.zeros((12, 12, 12), np.uint8)
    for label in (1, 2, 3):
        truth[4 * label - 4 : 4 * label - 1] = label
    generator = np.random.default_rng(0)
    for number in range(12):
        worse = truth.copy()
        worse[0, : 1 + number] = 0
        worse[8, : generator.integers(0, 8) * (number % 2)] = 0
        for side, labels in (("slim", worse), ("reference", truth)):
            save(tmp_path / side / f"{number}.nii.gz", labels)
    reference = evaluate_directories(tmp_path / "reference", tmp_path / "reference")
    slim = evaluate_directories(tmp_path / "slim", tmp_path / "reference")
    table = paired_differences(slim, reference, "dice")
    loss = slim.values("dice") - 1
    raw = [stats.wilcoxon(loss[:, 0]).pvalue, 1.0, stats.wilcoxon(loss[:, 2]).pvalue]
    assert table["p"].tolist()[:3] == pytest.approx(raw)
    assert raw[0] < raw[2] < 1
    assert table["p_holm"].tolist()[:3] == pytest.approx([3 * raw[0], 1.0, min(1, 2 * raw[2])])
    assert math.isnan(table["p_holm"].iloc[3]) and table["p"].iloc[3] < 0.01
    write_differences(tmp_path / "d.csv", {"dice": table})
    assert float(next(csv.DictReader((tmp_path / "d.csv").open()))["p_holm"]) == pytest.approx(3 * raw[0], rel=1e-5)


def test_class_lines_hide_what_is_in_no_case(tmp_path):
    found = evaluate_directories(*three_cases(tmp_path), named_classes({1: "one", 2: "two", 3: "three"}))
    lines = score_lines(found)
    assert [line.split()[0] for line in lines] == ["class", "one", "two", "mean", "1"]
    assert f"{found.mean('dice'):.4f}" in lines[3]


def test_worst_prefers_other_cases_then_other_classes(evaluation):
    worst = evaluation.worst(5)
    assert len({case.name for case, _ in worst[:3]}) == 3
    dices = [case.score(one.key).dice for case, one in worst]
    assert dices[:3] == sorted(dices[:3])
    assert dices[3:] == sorted(dices[3:])
    assert dices[0] == np.nanmin(evaluation.values("dice"))


def test_groups_named_or_other(tmp_path):
    names = ("rib_1", "rib_2", "liver", "aorta")
    path = tmp_path / "groups.yml"
    path.write_text("ribs: [rib_1, rib_2]\nsoft: [liver]\nempty: []\n")
    assert read_groups(path, names, names) == {"ribs": ["rib_1", "rib_2"], "soft": ["liver"], "other": ["aorta"]}
    assert read_groups(path, names, ("rib_2",)) == {"ribs": ["rib_2"]}
    assert group_classes({"a": ["liver"]}, ("liver",)) == {"a": ["liver"]}
    for content, message in (
        ("ribs: [rib_3]", r"no class 'rib_3'; nearest: rib_"),
        ("- a", r"expected 'group"),
        ("ribs: liver", r"expected 'group"),
        ("a: [", r"neither YAML nor JSON"),
    ):
        path.write_text(content)
        with pytest.raises(InputError, match=message):
            read_groups(path, names, names)


def picture(path: Path) -> np.ndarray:
    from matplotlib.image import imread

    return (imread(path)[..., :3] * 255).round().astype(int)


def has_colour(pixels: np.ndarray, colour: str) -> bool:
    wanted = [int(colour[start : start + 2], 16) for start in (1, 3, 5)]
    return bool((np.abs(pixels - wanted).max(axis=-1) < 40).sum() > 20)


def test_figures_grow_with_the_classes_and_show_both_outlines(evaluation, tmp_path):
    class_figure(evaluation, tmp_path / "few.png")
    names = {label: f"class_{label}" for label in range(1, 120)}
    many = np.tile(np.repeat(np.arange(1, 120), 9).reshape(119, 3, 3), (1, 2, 2))
    large = evaluate_directories(
        save(tmp_path / "many.nii.gz", np.roll(many, 1, 1)), save(tmp_path / "g.nii.gz", many), named_classes(names)
    )
    groups = group_classes({"low": [f"class_{label}" for label in range(1, 60)]}, list(names.values()))
    class_figure(large, tmp_path / "many.png", groups)
    group_figure(large, tmp_path / "groups.png", groups)
    heights = [picture(tmp_path / f"{name}.png").shape[0] for name in ("few", "groups", "many")]
    assert heights[0] <= heights[1] < heights[2] / 5
    assert heights[2] / 119 > 20  # pixels for each name
    drawn = worst_figures(evaluation, tmp_path / "m", 2)
    assert [path.name for path in drawn] == ["m_worst1.png", "m_worst2.png"]
    for path in drawn:
        assert has_colour(picture(path), "#00b7eb")
        assert has_colour(picture(path), "#ff9f1c")


def test_worst_figures_goes_through_the_error(tmp_path, monkeypatch):
    """The error is one voxel away from the middle of the organ; the planes go through it, on the image, in RAS."""
    from nnslim.evaluation import pictures

    reference = box((30, 20, 10), ((3, 27), (5, 15), (2, 8)))
    prediction = reference.copy()
    prediction[24:27, 12:15, 6:8] = 0
    files = []
    for side, values in (("p", prediction), ("g", reference), ("i", np.full(reference.shape, 7))):
        path = save(tmp_path / side / "a.nii.gz", values)
        image = nib.Nifti1Image(values.astype(np.uint8), np.diag((-0.8, 0.9, 3.0, 1)))  # stored from right to left
        nib.save(image, path)
        files.append(path)
    found = evaluate_directories(files[0], files[1])
    calls = []
    monkeypatch.setattr(pictures, "overlay", lambda *arguments, **more: calls.append((arguments, more)))
    worst_figures(found, tmp_path / "m", 1, images=tmp_path / "i")
    (image, maps, _), more = calls[0]
    wrong = (maps[0][1] != maps[1][1]).nonzero()
    assert [len(set(axis)) for axis in wrong] == [3, 3, 2]
    for axis, centre in enumerate(more["centre"]):
        assert centre in wrong[axis]
    assert more["centre"][0] < image.shape[0] // 2  # mirrored
    assert tuple(more["spacing"]) == pytest.approx(SPACING)
    assert (image == 7).all()
    save(tmp_path / "i" / "a.nii.gz", np.zeros((3, 3, 3)))
    with pytest.raises(InputError, match=r"a\.nii\.gz has shape \(3, 3, 3\), its labels \(30, 20, 10\)"):
        worst_figures(found, tmp_path / "m", 1, images=tmp_path / "i")


def test_evaluate_two_dimensions(tmp_path):
    import SimpleITK as sitk  # noqa: N813

    reference = box((20, 16), ((3, 9), (3, 9)))
    for side, values in (("p", np.roll(reference, 2, 0)), ("g", reference)):
        (tmp_path / side).mkdir()
        sitk.WriteImage(sitk.GetImageFromArray(values.T), str(tmp_path / side / "a.png"))
    found = evaluate_directories(tmp_path / "p", tmp_path / "g", tolerance=2)
    assert (found.mean("dice"), found.mean("nsd"), found.mean("hd95")) == (pytest.approx(2 / 3), 1, 2)
    assert worst_figures(found, tmp_path / "m", 1)[0].is_file()


@pytest.mark.data
def test_evaluate_totalsegmentator_sample_has_the_known_mean(data_root):
    folder = data_root / "data" / "totalsegmentator_samples"
    found = evaluate_directories(folder / "example_seg_fast.nii.gz", folder / "example_seg.nii.gz", tolerance=3.0)
    assert len(found.classes) == 41
    assert found.mean("dice") == pytest.approx(0.902, abs=5e-4)
    assert found.class_table["missed"].sum() == 1
    assert found.class_table["false_positive"].sum() == 0
