"""The table of what compression costs: its scores are those of nnU-Net's own predictions, plain and mirrored."""

from __future__ import annotations

import math

import nibabel as nib
import numpy as np
import pandas
import pytest
from helpers import load_stock
from scipy.stats import wilcoxon

from studies import fidelity


def test_scores_are_those_of_nnunet_and_differences_are_paired(make_model, case_folder, case_labels, tmp_path):
    model, output = make_model(), tmp_path / "table.csv"
    (case_folder / "c_0000.nii.gz").rename(tmp_path / "c_0000.nii.gz")  # c has no labels
    given = ["-m", model, "-i", case_folder, "--test-images", case_folder, "--test-labels", case_labels, "-o", output]
    given += ["--rank-factors", "0.3", "--rank-min", "2", "--image-counts", "1", "--stages", "weights", "data"]
    fidelity.main([str(each) for each in (*given, "--mirrored", "--calibration-images", "2")])
    rows = pandas.read_csv(output).set_index(["setting", "stage"])
    made = ["rank_factor=0.3", "rank_factor=0.3, 1 image(s)"]
    assert list(rows.index) == [("dense", "dense"), *((one, stage) for one in made for stage in ("weights", "data"))]
    cases = pandas.read_csv(tmp_path / "table_cases.csv").set_index(["setting", "stage", "answer", "case"]).sort_index()

    for mirrored, answer in ((False, "plain"), (True, "mirrored")):
        stock = load_stock(model, use_mirroring=mirrored)
        stock.predict_from_files(str(case_folder), str(tmp_path / answer), num_processes_preprocessing=1)
        dices = []
        for case in "ab":
            found = np.asarray(nib.load(tmp_path / answer / f"{case}.nii.gz").dataobj)
            wanted = np.asarray(nib.load(case_labels / f"{case}.nii.gz").dataobj)
            for label, name in ((1, "one"), (2, "two")):
                both = np.count_nonzero((found == label) & (wanted == label))
                dices.append(2 * both / (np.count_nonzero(found == label) + np.count_nonzero(wanted == label)))
                assert cases.loc[("dense", "dense", answer, case), name] == pytest.approx(dices[-1], abs=2e-3)
        assert rows.loc[("dense", "dense"), f"dice_{answer}"] == pytest.approx(np.mean(dices), abs=2e-3)

    lost = cases.loc[("dense", "dense", "mirrored")] - cases.loc[("rank_factor=0.3", "weights", "mirrored")]
    row, means = rows.loc[("rank_factor=0.3", "weights")], lost.mean(axis=1)
    assert row["drop"] == pytest.approx(means.mean(), abs=1e-4) and row["drop"] != 0
    assert row["drop_ci95"] == pytest.approx(1.96 * means.std() / math.sqrt(2), abs=1e-4)
    assert row["most_lost"] == lost.mean().idxmax()
    assert row["most_lost_drop"] == pytest.approx(lost.mean().max(), abs=1e-4)
    p = min(1.0, 2 * min(wilcoxon(lost[name]).pvalue for name in lost))  # Holm, two classes
    assert row["least_p_holm"] == pytest.approx(p, abs=1e-4)


def test_few_images_are_spread_over_the_folder(case_folder, tmp_path):
    for count, expected in ((1, "a"), (2, "ab"), (9, "abc")):
        folder = fidelity.some_images(case_folder, ".nii.gz", count, tmp_path / str(count))
        assert sorted(file.name[0] for file in folder.iterdir()) == list(expected)
