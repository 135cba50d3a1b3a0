"""Channels folded into others before they are removed: exact where they are linear functions of these."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from nnslim.network.walk import LayerIndex
from nnslim.surgery.channels import channel_map
from nnslim.surgery.folding import MapMoments, fold_channels
from nnslim.surgery.narrow import narrow_layers


class Skip(nn.Module):
    """A layer that is read by a strided convolution and, beside an upsampled map, by the last one."""

    def __init__(self, dims=3):
        super().__init__()
        conv, up = (nn.Conv3d, nn.ConvTranspose3d) if dims == 3 else (nn.Conv2d, nn.ConvTranspose2d)
        self.first, self.down = conv(1, 6, 3, padding=1), conv(6, 5, 3, stride=2, padding=1)
        self.up, self.last = up(5, 4, 2, 2), conv(10, 2, 1)
        self.act, self.low = nn.ReLU(), nn.ReLU()

    def forward(self, x):
        first = self.act(self.first(x))
        return self.last(torch.cat([self.up(self.low(self.down(first))), first], 1))


def removed(net, x, group, kept, fold):
    """Return the output after the removal, and the layers that were changed before it."""
    slim, seen = copy.deepcopy(net), {}
    channels = channel_map(slim, x.shape)
    tap = LayerIndex(slim)[channels.groups[group].taps[-1]].module

    def note(module, inputs, output):
        seen[group] = MapMoments.of(output)

    handle = tap.register_forward_hook(note)
    slim(x)
    handle.remove()
    changed = fold_channels(LayerIndex(slim), channels, {group: kept}, seen) if fold else []
    narrow_layers(LayerIndex(slim), channels.narrowing({group: kept}))
    return slim(x), changed


@pytest.mark.parametrize("dims", [2, 3])
def test_duplicates_and_multiples_are_folded_without_a_trace(dims):
    torch.manual_seed(0)
    net, x = Skip(dims), torch.randn(2, 1, *(8,) * dims)
    with torch.no_grad():  # ReLU keeps positive multiples what they are
        for target, source, factor in ((4, 0, 2.0), (5, 1, 0.5)):
            net.first.weight[target] = factor * net.first.weight[source]
            net.first.bias[target] = factor * net.first.bias[source]
        dense = net(x)
        folded, changed = removed(net, x, "first", [0, 1, 2, 3], True)
        cut, _ = removed(net, x, "first", [0, 1, 2, 3], False)
    assert changed == ["down", "last"]
    assert torch.allclose(folded, dense, atol=0.02 * float(dense.std()))  # what the ridge takes
    assert (cut - dense).abs().max() > 0.5 * dense.std()


def test_constant_map_goes_to_the_bias_and_transposed_kernels_are_read_too():
    torch.manual_seed(1)
    net, x = Skip(), torch.randn(1, 1, 8, 8, 8)
    with torch.no_grad():
        net.up.weight[:, 3] = 0
        net.up.bias[3] = 3.0  # one constant map among those of `up`, which `last` reads without padding
        dense = net(x)
        folded, changed = removed(net, x, "up", [0, 1, 2], True)
        assert changed == ["last"] and torch.allclose(folded, dense, atol=1e-4)
        net.down.weight[2], net.down.bias[2] = 2 * net.down.weight[0], 2 * net.down.bias[0]
        dense = net(x)
        folded, changed = removed(net, x, "down", [0, 1, 3, 4], True)
    assert changed == ["up"] and torch.allclose(folded, dense, atol=0.02 * float(dense.std()))


def test_any_map_is_folded_with_least_squares_and_moments_add_up():
    torch.manual_seed(2)
    x = nn.functional.interpolate(torch.randn(4, 1, 3, 3, 3), (8, 8, 8), mode="trilinear")  # neighbours are alike
    net = Skip()
    with torch.no_grad():
        dense = net(x)
        errors = [float((removed(net, x, "first", [0, 2, 3, 5], fold)[0] - dense).square().mean()) for fold in (0, 1)]
        maps = net.act(net.first(x))
    assert errors[1] < 0.6 * errors[0]
    whole = MapMoments.of(maps)
    parts = MapMoments.of(maps[:2]) + MapMoments.of(maps[2:])
    assert whole.count == parts.count == 4 * 512 and torch.allclose(whole.products, parts.products)
    weights, constants = whole.regression([0, 2, 3, 5], [1, 4])
    rows = maps.movedim(1, 0).flatten(1).double()
    rest = rows[[1, 4]] - (constants[:, None] + weights.T @ rows[[0, 2, 3, 5]])
    assert rest.mean(1).abs().max() < 1e-6 and (rest.var(1) < rows[[1, 4]].var(1)).all()


def test_unexplained_variance_is_what_the_regression_leaves():
    torch.manual_seed(3)
    rows = torch.randn(5, 4000)
    rows[3] = rows[0] + rows[1] + 0.5 * torch.randn(4000)
    moments = MapMoments.of(rows[None].unflatten(2, (10, 20, 20)))
    weights, constants = moments.regression([0, 1, 2], [3, 4])
    every = rows.double()[:, :: max(1, 4000 // 8192) | 1]
    rest = every[[3, 4]] - constants[:, None] - weights.T @ every[[0, 1, 2]]
    wanted = float(rest.var(1, correction=0).sum() / every.var(1, correction=0).sum()) ** 0.5
    assert moments.unexplained([0, 1, 2], [3, 4]) == pytest.approx(wanted, rel=1e-4)
    assert moments.unexplained([0, 1, 2, 3, 4], []) == 0.0
