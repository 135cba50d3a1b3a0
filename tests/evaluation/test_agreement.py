"""Agreement of a slim model with the dense one: cases small enough to be counted by hand."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

from nnslim.errors import InputError, OutputError
from nnslim.evaluation.agreement import (
    Agreement,
    CaseAgreement,
    ClassAgreement,
    LabelMaps,
    compare_answers,
)
from nnslim.evaluation.expected import expected_dice
from nnslim.evaluation.overlap import dice_per_label
from nnslim.evaluation.pictures import agreement_figure

NAN = math.nan
# Four voxels in a row; background and one class.
FOUR = np.array([[0.1, 0.2, 0.6, 1.0], [0.9, 0.8, 0.4, 0.0]], dtype=np.float32)


def random_probabilities(channels: int, shape: tuple[int, ...], seed: int = 0, sharp: float = 2.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.softmax(sharp * torch.randn(channels, *shape, generator=generator), 0)


def case(name: str, **dice: float) -> CaseAgreement:
    return CaseAgreement(name, {key: ClassAgreement(value, 10, 11, 0.1) for key, value in dice.items()})


# --- expected Dice ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("segmentation", "expected"),
    [
        ([1, 1, 0, 0], 2 * 1.7 / (2.1 + 2)),
        ([1, 1, 1, 0], 2 * 2.1 / (2.1 + 3)),
        ([0, 0, 0, 1], 0.0),
        ([0, 0, 0, 0], 0.0),  # 2.1 voxels are expected, none is found
    ],
)
def test_expected_dice_four_voxels_by_hand(segmentation, expected):
    as_map = np.array(segmentation)
    assert expected_dice(FOUR, as_map) == pytest.approx([expected], abs=1e-6)
    one_hot = np.stack([as_map == 0, as_map == 1])
    assert expected_dice(FOUR, one_hot) == pytest.approx([expected], abs=1e-6)
    assert expected_dice(FOUR[1:], one_hot[1:], background=False) == pytest.approx([expected], abs=1e-6)


def test_expected_dice_is_the_mean_over_labels_drawn_from_the_probabilities():
    probabilities = random_probabilities(3, (12, 13, 14))
    found = expected_dice(probabilities, probabilities.argmax(0))
    drawn = torch.multinomial(probabilities.flatten(1).T, 50, True, generator=torch.Generator().manual_seed(1)).T
    decided = probabilities.argmax(0).flatten().numpy()
    dice = [list(dice_per_label(decided, truth.numpy(), (1, 2)).values()) for truth in drawn]
    assert found == pytest.approx(np.mean(dice, axis=0), abs=3e-3)


def test_expected_dice_class_that_nobody_expects_is_nan():
    probabilities = np.array([[0.7, 0.7, 1.0], [0.3, 0.3, 0.0]])
    assert np.isnan(expected_dice(probabilities, np.zeros(3, int))).all()
    assert expected_dice(probabilities, np.array([0, 0, 1])) == pytest.approx([0])


def test_expected_dice_of_a_large_image_is_that_of_all_voxels_at_once():
    probabilities = random_probabilities(3, (9, 400, 400))  # more voxels than are softened at a time
    segmentation = probabilities.argmax(0)
    soft = torch.softmax(probabilities.double().log() / 1.5, 0)
    masks = torch.stack([segmentation == label for label in range(3)])
    wanted = 2 * (soft * masks).sum((1, 2, 3)) / (soft.sum((1, 2, 3)) + masks.sum((1, 2, 3)))
    assert expected_dice(probabilities, segmentation, temperature=1.5) == pytest.approx(wanted[1:].numpy(), abs=1e-6)


def test_temperature_divides_the_logits():
    generator = torch.Generator().manual_seed(3)
    logits = 3 * torch.randn(3, 6, 7, generator=generator)
    segmentation = logits.argmax(0)
    found = expected_dice(torch.softmax(logits, 0), segmentation, temperature=2)
    assert found == pytest.approx(expected_dice(torch.softmax(logits / 2, 0), segmentation), abs=1e-5)
    masks = logits > 0
    found = expected_dice(torch.sigmoid(logits), masks, background=False, temperature=2)
    assert found == pytest.approx(expected_dice(torch.sigmoid(logits / 2), masks, background=False), abs=1e-5)


def test_class_that_neither_model_finds_has_no_drop():
    logits = torch.zeros(3, 10, 10, 10)
    logits[0, :5], logits[1, 5:] = 4, 4  # the second class is expected in 1.8 % of the voxels, and found in none
    slim = logits.argmax(0)
    slim[5] = 0
    found = compare_answers("a", logits.softmax(0), slim, (1, 1, 1), ("one", "two")).classes
    assert found["one"].expected_drop > 0.05 and math.isnan(found["two"].expected_drop)
    slim[0, 0, 0] = 2
    assert (
        abs(compare_answers("a", logits.softmax(0), slim, (1, 1, 1), ("one", "two")).classes["two"].expected_drop)
        < 0.01
    )


def test_expected_dice_bad_input_is_named():
    with pytest.raises(InputError, match=r"shape \(5,\) does not fit 2 channels of \(4,\)"):
        expected_dice(FOUR, np.zeros(5, int))
    with pytest.raises(InputError, match=r"outside 0\.\.1"):
        expected_dice(FOUR, np.array([0, 1, 2, 0]))
    with pytest.raises(InputError, match="floating-point"):
        expected_dice(FOUR, np.zeros(4))
    with pytest.raises(InputError, match="does not fit"):  # a map cannot say which overlapping regions a voxel has
        expected_dice(FOUR, np.zeros(4, int), background=False)


# --- one case --------------------------------------------------------------------------------------------------------


def test_identical_models_agree_fully():
    probabilities = random_probabilities(4, (8, 9, 10))
    found = compare_answers("a", probabilities, probabilities.clone(), (1, 2, 3), ("x", "y", "z"))
    for one in found.classes.values():
        assert (one.dice, one.expected_drop, one.volume_difference) == (1, 0, 0)
        assert one.volume_dense == one.volume_slim > 0
        assert math.isnan(one.dice_dense) and math.isnan(one.drop)
    assert list(found.classes) == ["x", "y", "z"] and not found.labelled


def test_compare_case_by_hand():
    found = compare_answers("a", FOUR, np.array([0, 1, 1, 1]), (2.0,), ("x",), temperature=1).classes["x"]
    assert found.dice == pytest.approx(2 * 1 / (2 + 3))
    assert (found.volume_dense, found.volume_slim) == (4, 6) and found.volume_difference == pytest.approx(50)
    assert found.expected_drop == pytest.approx(2 * 1.7 / 4.1 - 2 * 1.2 / 5.1, abs=1e-6)


def test_undecided_voxels_cost_little_and_sure_ones_much():
    dense = np.tile(np.array([[0.02], [0.98]], np.float32), (1, 100))
    dense[:, :10] = [[0.49], [0.51]]  # ten voxels that the dense model might as well leave out
    undecided, sure = np.ones(100, int), np.ones(100, int)
    undecided[:10], sure[-10:] = 0, 0
    drops = [compare_answers("a", dense, slim, (1,), ("x",)).classes["x"].expected_drop for slim in (undecided, sure)]
    assert abs(drops[0]) < 0.01 < 0.03 < drops[1]


def test_slim_may_be_probabilities_map_or_booleans():
    dense, slim = random_probabilities(3, (6, 7, 8)), random_probabilities(3, (6, 7, 8), seed=1)
    decided = slim.argmax(0)
    one_hot = torch.stack([decided == label for label in range(3)])
    found = [
        compare_answers("a", dense, given, (1, 1, 1), ("x", "y"))
        for given in (slim, decided, decided.numpy().astype(np.uint16), one_hot)
    ]
    assert len({repr(one) for one in found}) == 1  # repr, because NaN is unequal to itself
    expected = dice_per_label(dense.argmax(0).numpy(), decided.numpy(), (1, 2))
    assert [one.dice for one in found[0].classes.values()] == pytest.approx(list(expected.values()))


def test_classes_that_one_or_both_models_lack():
    dense = torch.zeros(4, 10)  # class x by both, y by dense only, z by slim only, in a sure dense model
    dense[0, 6:], dense[1, :3], dense[2, 3:6] = 1, 1, 1
    slim = torch.tensor([1, 1, 1, 0, 0, 0, 0, 0, 3, 3])
    found = compare_answers("a", dense, slim, (1.0,), ("x", "y", "z"), temperature=1).classes
    assert (found["x"].dice, found["y"].dice, found["z"].dice) == (1, 0, 0)
    assert found["y"].expected_drop == pytest.approx(1) and found["z"].expected_drop == pytest.approx(1)
    assert found["y"].volume_difference == -100 and math.isnan(found["z"].volume_difference)
    nobody = compare_answers("a", dense, slim.clamp(max=1), (1.0,), ("x", "y", "z"), temperature=1).classes["z"]
    assert math.isnan(nobody.dice) and math.isnan(nobody.expected_drop)


def test_regions_are_independent_channels_at_one_half():
    dense = np.array([[0.9, 0.8, 0.6, 0.1], [0.1, 0.7, 0.6, 0.2]], np.float32)  # overlapping: whole, core
    slim = np.array([[0.9, 0.9, 0.4, 0.1], [0.6, 0.7, 0.6, 0.2]], np.float32)
    found = compare_answers("a", dense, slim, (1.0,), ("whole", "core"), temperature=1).classes
    assert found["whole"].dice == pytest.approx(2 * 2 / 5) and found["core"].dice == pytest.approx(2 * 2 / 5)
    assert found["core"].expected_drop == pytest.approx(2 * 1.3 / 3.6 - 2 * 1.4 / 4.6, abs=1e-6)
    assert found["whole"].volume_slim == 2


def test_volumes_are_in_cubic_mm_of_an_anisotropic_grid():
    dense = torch.zeros(2, 3, 4, 5)
    dense[1, 0, :2, :3] = 1
    dense[0] = 1 - dense[1]
    found = compare_answers("a", dense, dense.argmax(0), (5.0, 0.5, 0.8), ("x",)).classes["x"]
    assert found.volume_dense == pytest.approx(6 * 2.0)


def test_labels_are_compared_in_their_own_grid_by_region_and_without_ignored_voxels():
    dense, slim = random_probabilities(2, (4, 4)), random_probabilities(2, (4, 4), seed=1)
    maps = {
        "dense": np.array([[1, 1, 2, 2], [0, 0, 1, 1]]),
        "slim": np.array([[1, 2, 2, 0], [0, 0, 1, 0]]),
        "truth": np.array([[1, 1, 1, 2], [0, 0, 0, 9]]),  # 9: the ignored voxel
    }
    labels = LabelMaps(**maps, spacing=(2.0, 3.0), members=((1, 2), (2,)), ignore=9)
    found = compare_answers("a", dense, slim, (1, 1), ("whole", "core"), labels)
    whole, core = found.classes["whole"], found.classes["core"]
    assert found.labelled
    assert whole.dice_dense == pytest.approx(2 * 4 / (5 + 4)) and whole.dice_slim == pytest.approx(2 * 3 / (4 + 4))
    assert core.dice_dense == pytest.approx(2 * 1 / (2 + 1)) and core.dice_slim == 0
    assert core.drop == pytest.approx(2 / 3)
    assert (whole.volume_dense, whole.volume_slim) == (36, 24)


def test_label_that_is_rightly_empty_counts_as_one_against_a_false_find():
    one = ClassAgreement(0, 0, 5, 1, dice_dense=NAN, dice_slim=0.0)
    assert one.drop == 1
    assert ClassAgreement(0, 5, 0, 0, dice_dense=0.0, dice_slim=NAN).drop == -1
    assert math.isnan(ClassAgreement(NAN, 0, 0, NAN).drop)


def test_compare_case_bad_input_is_named():
    dense = random_probabilities(3, (4, 5))
    with pytest.raises(InputError, match="3 channels do not fit 1 classes"):
        compare_answers("a", dense, dense, (1, 1), ("x",))
    with pytest.raises(InputError, match="spacing"):
        compare_answers("a", dense, dense, (1, 1, 1), ("x", "y"))
    with pytest.raises(InputError, match=r"slim \(3, 4, 4\)"):
        compare_answers("a", dense, dense[..., 1:], (1, 1), ("x", "y"))
    maps = LabelMaps(*[np.zeros((4, 5), int)] * 2, np.zeros((5, 5), int), (1, 1), ((1,), (2,)))
    with pytest.raises(InputError, match=r"different shapes .*\(4, 5\) and \(5, 5\)"):
        compare_answers("a", dense, dense, (1, 1), ("x", "y"), maps)
    with pytest.raises(InputError, match="negative"):
        compare_answers("a", dense, dense, (1, 1), ("x", "y"), maps._replace(truth=np.full((4, 5), -1)))


# --- all cases -------------------------------------------------------------------------------------------------------


def test_aggregation_skips_nan_and_names_the_worst_case():
    agreement = Agreement(
        ("x", "y", "never"),
        [case("a", x=0.9, y=NAN, never=NAN), case("b", x=0.7, y=0.6, never=NAN), case("c", x=0.8, y=1.0, never=NAN)],
    )
    assert agreement.mean_dice == pytest.approx((0.8 + 0.8) / 2)
    assert agreement.class_means("dice") == pytest.approx([0.8, 0.8, NAN], nan_ok=True)
    assert agreement.worst() == ("b", "y", 0.6) and agreement.worst("x") == ("b", "x", 0.7)
    assert agreement.worst("never") is None and math.isnan(agreement.drop)
    assert agreement.expected_drop == pytest.approx(0.1)
    lines = agreement.lines()
    assert "worst: case b, class y, Dice 0.6000" in "\n".join(lines)
    assert "mean Dice 0.8000, estimated drop in Dice against labels 0.1000" in lines[1]
    assert lines[-1].split() == ["never", "-", "10.00", "0.1000", "in", "no", "case"]


def test_lines_and_json_show_labels_and_failures():
    one = ClassAgreement(0.9, 10, 8, 0.02, dice_dense=0.85, dice_slim=0.81)
    agreement = Agreement(("x",), [CaseAgreement("a", {"x": one}, labelled=True)], {"b": "b.nii.gz is cut short"})
    text = "\n".join(agreement.lines())
    assert "against labels of 1 case(s): Dice dense 0.8500, slim 0.8100, drop 0.0400" in text
    assert "failed: b: b.nii.gz is cut short" in text
    content = agreement.to_dict()
    assert content["drop"] == pytest.approx(0.04) and content["failed"] == {"b": "b.nii.gz is cut short"}
    assert content["worst"] == {"case": "a", "class_name": "x", "dice": 0.9}
    assert content["cases"]["a"]["classes"]["x"]["volume_difference"] == pytest.approx(-20)


def test_json_round_trip_keeps_every_figure_and_writes_nan_as_null():
    one = ClassAgreement(0.9, 10.0, 8.0, 0.02, dice_dense=0.85, dice_slim=0.81)
    agreement = Agreement(
        ("x", "y"), [CaseAgreement("a", {"x": one, "y": ClassAgreement(NAN, 0.0, 0.0, NAN)}, True)], {"b": "no"}, 1.5
    )
    text = json.dumps(agreement.to_dict(), allow_nan=False)
    assert json.loads(text)["classes"]["y"]["dice"] is None
    again = Agreement.from_dict(json.loads(text))
    assert again.to_dict() == agreement.to_dict() and repr(again) == repr(agreement)
    with pytest.raises(InputError, match="not an agreement"):
        Agreement.from_dict({"cases": {}})


# --- picture ---------------------------------------------------------------------------------------------------------


def many(classes: int, cases: int = 6) -> Agreement:
    rng = np.random.default_rng(0)
    names = tuple(f"structure_{number}" for number in range(classes))
    made = []
    for number in range(cases):
        dice = 1 - rng.exponential(0.03, classes).clip(0, 1)
        pairs = zip(names, dice, strict=True)
        made.append(
            CaseAgreement(f"case_{number}", {key: ClassAgreement(one, 100, 100 * one, 0.01) for key, one in pairs})
        )
    return Agreement(names, made)


@pytest.mark.parametrize("classes", [2, 118])
def test_figure_is_a_picture_with_a_readable_row_per_class(tmp_path, classes):
    import matplotlib
    from matplotlib.image import imread

    path = tmp_path / "agreement.png"
    with matplotlib.rc_context({"font.size": 30, "xtick.labelsize": 27}):  # as nnU-Net's trainer leaves it
        agreement_figure(many(classes), path)
    picture = imread(path)[..., :3]
    height, width = picture.shape[:2]
    assert width == 1210 and height >= 18 * classes and height >= 250
    red = (picture[..., 0] > 0.9) & (picture[..., 1:] < 0.15).all(-1)
    assert red.sum() > 50  # the worst case is marked
    # The blue boxes on the left and the orange bars on the right are there from top to bottom.
    for colour, columns in (((0.65, 0.9, 0.97), slice(0, 800)), ((1.0, 0.62, 0.11), slice(700, None))):
        rows = np.flatnonzero((np.abs(picture[:, columns] - colour) < 0.06).all(-1).any(1))
        assert rows.min() < 0.4 * height and rows.max() > 0.6 * height


def test_figure_with_empty_and_extreme_classes_is_drawn(tmp_path):
    empty, doubled = ClassAgreement(NAN, 0, 0, NAN), ClassAgreement(0.0, 1, 100, 0.5)
    agreement = Agreement(("x", "y"), [CaseAgreement("a", {"x": empty, "y": doubled})])
    agreement_figure(agreement, tmp_path / "a.pdf")
    assert (tmp_path / "a.pdf").read_bytes().startswith(b"%PDF")
    agreement_figure(Agreement(("x",), [CaseAgreement("a", {"x": empty})]), tmp_path / "b.png")


def test_figure_faults(tmp_path):
    with pytest.raises(InputError, match="its ending should be one of"):
        agreement_figure(many(2), tmp_path / "a.xyz")
    with pytest.raises(OutputError, match="cannot write"):
        agreement_figure(many(2), tmp_path / "no" / "a.png")
    assert list(tmp_path.iterdir()) == []
