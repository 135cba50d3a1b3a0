"""Weights on disk in half precision: what is rounded, what is not, and what is reported of it."""

from __future__ import annotations

import logging
from functools import partial

import pytest
import torch
from torch import nn

from nnslim.compression.calibration import Calibration
from nnslim.compression.compress_network import compress
from nnslim.compression.config import from_dict, tucker
from nnslim.compression.storage import bytes_of, half_precision, in_half, stored, tile_agreement, too_large

SHAPE = (1, 1, 16, 16, 16)
HALF = tucker(rank_factor=0.5, rank_min=2).model_copy(update={"store": "half"})


class Normed(nn.Module):
    """A layer under two names, and a counter, which is no weight."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 3)
        self.also = self.conv
        self.norm = nn.BatchNorm2d(2)
        self.norm.num_batches_tracked.fill_(123457)

    def forward(self, x):
        return self.norm(self.conv(x))


def test_half_precision_shares_tensors_and_leaves_counters():
    halves = half_precision(Normed().state_dict())
    assert halves["conv.weight"] is halves["also.weight"] and halves["conv.weight"].dtype == torch.half
    assert halves["norm.num_batches_tracked"] == 123457 and halves["norm.num_batches_tracked"].dtype == torch.int64
    assert in_half(halves) and not in_half(Normed().state_dict())
    mixed = {**halves, "norm.bias": halves["norm.bias"].float()}
    assert not in_half(mixed)
    assert bytes_of(halves) == 2 * (18 + 2 + 4 * 2) + 8
    assert bytes_of(Normed().state_dict()) == 4 * (18 + 2 + 4 * 2) + 8


def test_stored_network_has_the_weights_that_are_read_back():
    network = Normed().eval()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    kept, state = stored(network, half=True)
    again = Normed().eval()
    again.load_state_dict(state)
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in kept.state_dict().items())
    assert all(torch.equal(value, network.state_dict()[name]) for name, value in before.items()), "not modified"
    assert kept.conv.weight.dtype == torch.float32 and kept.conv is kept.also
    assert not torch.equal(kept.conv.weight, network.conv.weight)
    same, state = stored(network, half=False)
    assert same is network and state["conv.weight"].data_ptr() != network.conv.weight.data_ptr()


@pytest.mark.parametrize("value", [65520.0, -1e5, float("inf"), float("nan")])
def test_values_that_do_not_fit_keep_single_precision(value, caplog):
    network = Normed()
    with torch.no_grad():
        network.norm.weight[1] = value
    assert too_large(network.state_dict()) == ["norm.weight"]
    with caplog.at_level(logging.WARNING, logger="nnslim"):
        _, state = stored(network, half=True)
    assert state["conv.weight"].dtype == torch.float32
    assert "stored in float32: float16 does not hold those of norm.weight" in caplog.text
    with torch.no_grad():
        network.norm.weight[1] = 65504.0
    assert too_large(network.state_dict()) == []


def test_compress_stores_half_and_hands_out_the_network_that_is_stored(tiny_net):
    network = tiny_net("plain3d")
    single = compress(network, [network.state_dict()], HALF.model_copy(update={"store": "as-is"}), SHAPE)
    half = compress(network, [network.state_dict()], HALF, SHAPE)
    assert in_half(half.weights[0]) and not in_half(single.weights[0]) and half.spec == single.spec
    assert all(torch.equal(half.weights[0][name], value.half()) for name, value in single.weights[0].items())
    assert all(torch.equal(value.half(), half.weights[0][name]) for name, value in half.network.state_dict().items())
    assert half.half_agreement is None, "no images"
    assert HALF.identity() != HALF.model_copy(update={"store": "as-is"}).identity()


def test_without_a_method_the_dense_network_is_stored_in_half(tiny_net):
    network = tiny_net("plain3d")
    copy = from_dict({"methods": [], "store": "half"})
    made = compress(network, [network.state_dict()], copy, SHAPE)
    assert in_half(made.weights[0]) and made.spec.edits == () and made.slim == made.dense and not made.refused
    slim = compress(network, [network.state_dict()], tucker(rank_factor=0.5, rank_min=2), SHAPE)
    again = compress(slim.network, slim.weights, copy, SHAPE)
    assert again.spec == slim.spec and in_half(again.weights[0]), "a slim network, too"


def test_agreement_with_single_precision_is_reported_per_class(tiny_net):
    generator = torch.Generator().manual_seed(0)
    tiles = [torch.randn(SHAPE, generator=generator) for _ in range(3)]
    data = Calibration(tiles, tiles, partial(list), class_names=("left", "right"))
    network = tiny_net("plain3d")
    half = compress(network, [network.state_dict()], from_dict({"methods": [], "store": "half"}), SHAPE, data=data)
    record = half.half_agreement
    assert record["tiles"] == 3 and set(record["classes"]) == {"left", "right"}
    assert all(0.99 < one["worst_dice"] <= one["dice"] <= 1 for one in record["classes"].values())
    assert record["mean_dice"] == pytest.approx(sum(one["dice"] for one in record["classes"].values()) / 2)
    assert half.summary()["half_agreement"] == record


def test_tile_agreement_is_exact_for_labels_known_in_advance():
    class Shift(nn.Module):
        def __init__(self, first: float) -> None:
            super().__init__()
            self.first = nn.Parameter(torch.tensor(first))

        def forward(self, x):
            return torch.cat([self.first - x, x - self.first], 1)

    tile = torch.arange(8.0).reshape(1, 1, 2, 4)
    agreement = tile_agreement(Shift(3.5), Shift(5.5), [tile], ["big"])
    assert agreement.class_means("dice").tolist() == [pytest.approx(2 * 2 / (4 + 2))]
    regions = tile_agreement(Shift(3.5), Shift(5.5), [tile], ["small", "big"], regions=True)
    assert regions.class_means("dice").tolist() == [pytest.approx(2 * 4 / (4 + 6)), pytest.approx(2 * 2 / (4 + 2))]
