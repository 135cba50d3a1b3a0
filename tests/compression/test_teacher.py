"""The dense network as a teacher: mirror images, precision, and what the referee takes for the truth."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import Dataset

from nnslim.compression.calibration import Calibration
from nnslim.compression.config import RecoveryConfig
from nnslim.compression.distillation import Teacher, flip, mirrors
from nnslim.compression.recover import learns_in_bfloat16, recover
from nnslim.compression.referee import Judgement, Referee
from nnslim.network.walk import LayerIndex

SHAPE = (2, 1, 16, 16)


def images(seed, shape=SHAPE):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Patches(Dataset):
    def __init__(self, length):
        self.length = length

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        return images(index)[0]


def data_of(axes, regions=False):
    return Calibration([images(1)[:1]], [images(2)[:1], images(3)[:1]], Patches, regions, "images", 3, axes, False, 5)


@pytest.fixture
def dense(tiny_net):
    network = tiny_net("plain2d", features=(8, 12, 16))
    LayerIndex(network)["decoder.seg_layers.1"].module.weight.data *= 6  # sure of its answers
    return network


@pytest.mark.parametrize("axes", [(), (0,), (0, 1), (0, 1, 2), (2,)])
def test_mirrors_are_all_subsets_of_the_axes_each_once(axes):
    ways = mirrors(axes)
    assert ways[0] == () and len(ways) == len(set(ways)) == 2 ** len(axes)
    assert {axis for way in ways for axis in way} == set(axes)


def test_mirrors_of_few_turn_each_axis_in_half_of_them():
    ways = mirrors((0, 1, 2), 4)
    assert ways[0] == () and len(set(ways)) == 4
    assert [sum(axis in way for way in ways) for axis in range(3)] == [2, 2, 2]
    assert mirrors(None, 4) == [()]


def test_teacher_without_axes_gives_the_dense_answer(dense):
    x = images(0)
    with torch.no_grad():
        torch.testing.assert_close(Teacher(dense).answer(x, 3), dense(x), rtol=1e-4, atol=1e-5)


def test_teacher_answers_over_many_steps_have_the_mean_of_all_mirror_images(dense):
    x, teacher = images(0), Teacher(dense, axes=(0, 1), seed=4)
    with torch.no_grad():
        of_all = {way: flip(dense(flip(x, way)), way) for way in mirrors((0, 1))}
    seen = set()
    for step in range(60):
        answer = teacher.answer(x, step)
        torch.testing.assert_close(answer, teacher.answer(x, step), rtol=0, atol=0)  # a resumed run draws the same
        seen |= {way for way, one in of_all.items() if torch.allclose(answer, one, rtol=1e-4, atol=1e-5)}
    assert seen == set(of_all)
    assert not torch.allclose(of_all[()], of_all[(0,)], atol=1e-3)  # else the test shows nothing


def test_teacher_in_bfloat16_is_near_and_gives_float32(dense):
    x = images(0)
    with torch.no_grad():
        wanted, found = dense(x), Teacher(dense, half=True).answer(x, 0)
    assert found.dtype == torch.float32 and not torch.equal(found, wanted)
    assert (found - wanted).norm() < 0.03 * wanted.norm()


@pytest.mark.parametrize("regions", [False, True])
def test_referee_truth_is_the_mean_over_mirror_images_and_the_answer_the_plain_one(dense, regions):
    referee, x = Referee(dense, [], regions=regions, axes=(0, 1)), images(7)[:1]
    with torch.no_grad():
        logits = [flip(dense(flip(x, way)), way)[0] for way in mirrors((0, 1), 4)]
    likely = [one.sigmoid() if regions else one.softmax(0) for one in logits]
    for _ in range(2):  # computed, then kept
        truth, answer, mirrored = referee.reference(0, x)
        torch.testing.assert_close(truth, torch.stack(likely).mean(0), rtol=0, atol=2e-3)
        mean = torch.stack(logits).mean(0)  # nnU-Net means logits
        for one, found in ((logits[0], answer), (mean, mirrored)):
            assert torch.equal(found, one > 0 if regions else one.argmax(0))


def test_referee_slim_network_that_answers_as_the_mean_is_better_than_the_dense_one(dense):
    class Mirrored(nn.Module):
        def forward(self, x):
            return torch.stack([flip(dense(flip(x, w)), w).softmax(1) for w in mirrors((0, 1))]).mean(0).log()

    drop = Referee(dense, [images(seed)[:1] for seed in range(4)], axes=(0, 1)).drop
    assert drop(dense) == pytest.approx(0, abs=1e-9)
    assert drop(Mirrored().eval()) < 0


@pytest.mark.parametrize(
    ("precision", "fast", "half"), [("f32", True, False), ("bf16", False, True), ("auto", True, True)]
)
def test_precision_of_learning_is_the_one_asked_for(dense, monkeypatch, precision, fast, half):
    monkeypatch.setattr("nnslim.compression.recover.has_fast_bfloat16", lambda: fast)
    assert learns_in_bfloat16((dense, copy.deepcopy(dense)), images(0), precision) is half


def test_precision_falls_back_where_torch_is_wrong(dense, monkeypatch, caplog):
    monkeypatch.setattr("nnslim.compression.recover.bfloat16_is_safe", lambda network, shape: False)
    assert not learns_in_bfloat16((dense, copy.deepcopy(dense)), images(0), "bf16")
    assert "float32" in caplog.text


def test_learning_from_mirror_images_moves_the_answer_towards_their_mean(dense, monkeypatch):
    x = torch.cat([images(seed) for seed in (500, 501)])
    with torch.no_grad():
        mean = torch.stack([flip(dense(flip(x, way)), way).softmax(1) for way in mirrors((0, 1))]).mean(0)

    def distance(mirrored):
        slim, data = copy.deepcopy(dense), data_of((0, 1))
        drops = [1.0, 0.0]  # so that the last state is kept
        monkeypatch.setattr(Referee, "judge", lambda self, slim: Judgement(drops.pop(0), np.zeros(1)))
        settings = RecoveryConfig(steps=60, every=60, learning_rate=5e-3, mirrored_teacher=mirrored, precision="f32")
        recover(dense, slim, data, settings)
        with torch.no_grad():
            return (slim(x).softmax(1) - mean).norm().item()

    assert distance(True) < 0.9 * distance(False)


def test_referee_judges_the_answer_that_will_be_taken(dense):
    """A network that is right as it is and wrong on one mirror image only loses where predictions are mirrored."""

    class OneSided(nn.Module):
        def forward(self, x):
            turned = (x[..., :8].sum() > x[..., 8:].sum()).item()  # never for the tiles, always for their images
            return dense(x) * (-4.0 if turned else 1.0)

    tiles = [torch.cat([one[..., :8] - 3, one[..., 8:] + 3], -1) for one in (images(4)[:1], images(5)[:1])]

    def drop(network, *judged):
        return Referee(dense, tiles, axes=(1,), judged=judged).drop(network)

    one_sided = OneSided().eval()
    assert drop(one_sided, "plain") == pytest.approx(0, abs=1e-9)
    assert drop(one_sided, "mirrored") > 0.05
    assert drop(one_sided, "plain", "mirrored") == drop(one_sided, "mirrored")  # the larger one
    assert drop(dense, "mirrored") == pytest.approx(0, abs=1e-6)

    class Once(nn.Module):
        """Gives the mirrored answer in one pass."""

        def forward(self, x):
            return torch.stack([flip(dense(flip(x, way)), way) for way in mirrors((1,))]).mean(0)

    once, plain = drop(Once().eval(), "one pass"), drop(dense, "one pass")
    assert once == pytest.approx(0, abs=1e-9)
    assert plain > once  # what mirroring gains


@pytest.mark.parametrize("steps", ["steps", "block_steps"])
def test_batch_norms_and_dropout_learn_as_they_predict(steps):
    """Running statistics of two patches would replace those of the data."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout2d(0.5), nn.Conv2d(8, 3, 1)]
    dense = nn.Sequential(*layers).eval()
    layers[1].running_mean += 0.3
    slim, seen = copy.deepcopy(dense), []
    for number in (1, 3):
        slim[number].register_forward_hook(lambda module, given, found: seen.append(module.training))
    settings = RecoveryConfig(**{steps: 4}, every=4, learning_rate=1e-2, mirrored_teacher=False, precision="f32")
    recover(dense, slim, data_of(()), settings)
    assert len(seen) >= 8 and not any(seen)
    assert torch.equal(slim[1].running_var, dense[1].running_var)
