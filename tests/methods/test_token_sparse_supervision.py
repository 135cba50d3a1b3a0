"""Scorers that labels teach which tokens hold foreground."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from dynamic_network_architectures.architectures.primus import Primus
from torch import nn

from nnslim.hosts.nnunet.train.token_sparse_trainer import TokenSparseTraining, reductions
from nnslim.methods.token_sparse import TokenSparseConfig, token_sparse_edits
from nnslim.methods.token_sparse.scorers import Scored, SupervisedLoss, scorer_loss
from nnslim.network.spec import SlimSpec, apply_spec
from nnslim.running.bfloat16 import bfloat16_is_safe

SIZE = (32, 32, 24)  # 4 x 4 x 3 tokens of 8 voxels


def sparse_primus(**settings):
    torch.manual_seed(0)
    dense = Primus(1, 48, (8, 8, 8), 3, 2, 4, SIZE, init_values=0.1)
    settings = {"scorer": "mlp", "locations": (1,), "perturbation": "none", **settings}
    return apply_spec(SlimSpec(token_sparse_edits(dense, TokenSparseConfig(**settings))), dense, fill=True)


def images_with_a_bright_cube(count):
    """Noise with one bright cube of the size of a token somewhere; the cube is the foreground."""
    images, held = torch.randn(count, 1, *SIZE), torch.zeros(count, 1, *SIZE)
    for number in range(count):
        at = [int(torch.randint(0, size - 7, ())) for size in SIZE]
        inside = (number, 0, *(slice(start, start + 8) for start in at))
        images[inside] += 3
        held[inside] = 1
    return images, held


def test_loss_is_the_cross_entropy_at_the_place_of_each_token():
    foreground = torch.zeros(1, 1, 16, 8, 8)  # two tokens; one voxel of the second is labelled
    foreground[0, 0, 15, 0, 7] = 1
    scores = torch.tensor([[math.log(0.9), math.log(0.2)]])
    in_order = scorer_loss([Scored(scores, torch.tensor([[0, 1]]), 2)], foreground)
    turned = scorer_loss([Scored(scores, torch.tensor([[1, 0]]), 2)], foreground)
    second_only = scorer_loss([Scored(scores[:, 1:], torch.tensor([[1]]), 2)], foreground)
    assert float(in_order) == pytest.approx(-(math.log(0.1) + math.log(0.2)) / 2, rel=1e-5)
    assert float(turned) == pytest.approx(-(math.log(0.9) + math.log(0.8)) / 2, rel=1e-5)
    assert float(second_only) == pytest.approx(-math.log(0.2), rel=1e-5)


def test_certain_scores_give_finite_gradients():
    scores = torch.tensor([[0.0, -200.0]], requires_grad=True)
    scorer_loss([Scored(scores, torch.tensor([[0, 1]]), 2)], torch.zeros(1, 1, 16, 8, 8)).backward()
    assert torch.isfinite(scores.grad).all()


def test_taught_scorer_keeps_the_tokens_that_hold_foreground():
    network = sparse_primus(ratio=0.75)
    loss = SupervisedLoss(_Zero(), reductions(network), 1.0, lambda target: target)
    optimiser = torch.optim.Adam(network.parameters(), 2e-3)
    for _ in range(60):
        images, held = images_with_a_bright_cube(8)
        optimiser.zero_grad()
        loss(network(images), held).backward()
        optimiser.step()

    network.eval()
    splits = []
    network.eva.reduction.topk.register_forward_hook(lambda module, inputs, split: splits.append(split))
    images, held = images_with_a_bright_cube(32)
    with torch.no_grad():
        network(images)
    inside = nn.functional.avg_pool3d(held, 8).flatten(1)  # share of each token that is foreground
    kept = inside.gather(1, splits[0].kept).sum() / inside.sum()
    assert splits[0].kept.shape == (32, 12)
    assert float(kept) > 0.97  # a quarter of the tokens; 0.25 by chance


def test_scorers_are_heard_in_training_only_and_only_where_they_learn():
    images, held = images_with_a_bright_cube(2)
    network = sparse_primus(scorer=("energy", "mlp"), locations=(0, 1), ratio=(0.25, 0.5))
    loss = SupervisedLoss(_Zero(), reductions(network), 2.0, lambda target: target)
    heard = network.eva.reduction.heard

    assert bfloat16_is_safe(network, images.shape)  # a pass that computes nothing, before the one that counts
    output = network(images)
    (said,) = heard.values()
    assert tuple(said.scores.shape) == (2, 36)  # of 48, a quarter went before
    assert said.total == 48 and int(said.positions.max()) < 48
    assert torch.equal(said.positions.sort(dim=1).values, said.positions)
    expected = 2 * scorer_loss([said], held)
    assert torch.equal(loss(output, held), expected) and expected > 0
    assert not heard  # each forward pass counts once

    network.eval()
    assert float(loss(network(images), held).detach()) == 0

    network.train()
    network.eva.reduction.set_ratio(0)
    assert float(loss(network(images), held).detach()) == 0


@pytest.mark.parametrize("settings", [{"scorer": "attention"}, {"scorer": "mlp", "mode": "merge"}])
def test_supervision_that_nobody_would_hear_is_refused(settings):
    with pytest.raises(ValueError, match="supervision teaches learned scorers"):
        TokenSparseConfig(supervision=1, **settings)
    assert TokenSparseConfig(supervision=1, scorer=("air", "att"), locations=(0, 0.5)).supervision == 1


def test_foreground_is_read_as_nnunet_stores_targets():
    def read(target, **labels):
        return TokenSparseTraining.foreground(SimpleNamespace(label_manager=SimpleNamespace(**labels)), target)

    labels = torch.tensor([0.0, 1, 2, 3, -1]).reshape(1, 1, 5, 1, 1)
    plain = {"has_regions": False, "has_ignore_label": False, "ignore_label": None}
    assert read(labels, **plain).flatten().tolist() == [0, 1, 1, 1, 0]
    ignored = {**plain, "has_ignore_label": True, "ignore_label": 3}
    assert read(labels, **ignored).flatten().tolist() == [0, 1, 1, 0, 0]

    regions = torch.zeros(1, 3, 4, 1, 1, dtype=torch.bool)  # two regions, and what is to be ignored
    regions[0, 0, 1] = regions[0, 1, 2] = regions[0, 2, 3] = True
    found = read(regions, has_regions=True, foreground_regions=[(1, 2), (2,)])
    assert found.shape == (1, 1, 4, 1, 1) and found.flatten().tolist() == [0, 1, 1, 0]


class _Zero(nn.Module):
    def forward(self, output, target):
        return output.sum() * 0
