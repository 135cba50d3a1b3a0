"""Removing channels for real: groups from the graph, layers, optimiser state and specs."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

from nnslim.errors import SpecError
from nnslim.network.cost import measure_cost
from nnslim.network.spec import SlimSpec, apply_spec
from nnslim.network.walk import LayerIndex, deep_supervision
from nnslim.surgery.channels import ChannelMap, channel_map
from nnslim.surgery.narrow import ElasticEdit, NarrowEdit, narrow_edits, narrow_layers, narrow_optimizer, widths_of

KINDS = ["plain3d", "plain2d", "residual3d", "anisotropic"]


def output_of(network: nn.Module, shape) -> list[torch.Tensor]:
    with torch.no_grad(), deep_supervision(network, True):
        return network.eval()(torch.randn(*shape, generator=torch.Generator().manual_seed(1)))


def silence(network: nn.Module, channels: ChannelMap, group: str, index: int) -> None:
    """Make one channel of a group 0 behind every norm and activation, whoever produces it."""
    layers, number = LayerIndex(network), channels.numbers[group][index]
    for name, numbers in channels.writes.items():
        for position in np.flatnonzero(numbers == number):
            module = layers[name].module
            if isinstance(module, nn.modules.instancenorm._InstanceNorm):
                module.weight.data[position] = module.bias.data[position] = 0
            elif isinstance(module, (nn.ConvTranspose2d, nn.ConvTranspose3d)):
                module.weight.data[:, position] = 0
                module.bias.data[position] = 0


def all_but(channels: ChannelMap, group: str, *gone: int) -> dict[str, list[int]]:
    return {group: [index for index in range(channels.groups[group].channels) if index not in gone]}


@pytest.mark.parametrize("kind", KINDS)
def test_silent_channel_of_every_group_can_go_without_a_trace(kind, tiny_net, tiny_shape):
    network, shape = tiny_net(kind), tiny_shape(kind)
    channels = channel_map(network, shape)
    assert channels.groups
    for group in channels.groups:
        pruned = copy.deepcopy(network)
        silence(pruned, channels, group, 1)
        silence(pruned, channels, group, 4)
        before = output_of(pruned, shape)
        narrow_layers(LayerIndex(pruned), channels.narrowing(all_but(channels, group, 1, 4)))
        after = output_of(pruned, shape)
        for one, other in zip(before, after, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-5)
        assert measure_cost(pruned, shape).macs() < measure_cost(network, shape).macs()


def test_all_groups_together_and_a_training_step(tiny_net, tiny_shape):
    network, shape = tiny_net("residual3d"), tiny_shape("residual3d")
    channels = channel_map(network, shape)
    keep = {name: list(range(0, group.channels, 2)) for name, group in channels.groups.items()}
    narrow_layers(LayerIndex(network), channels.narrowing(keep))
    assert {name: group.channels for name, group in channel_map(network, shape).groups.items()} == {
        name: len(kept) for name, kept in keep.items()
    }
    network.train()
    with deep_supervision(network, True):
        sum(out.square().mean() for out in network(torch.randn(*shape))).backward()
    assert all(torch.isfinite(p.grad).all() for p in network.parameters())


def test_concatenation_skip_channels_lie_behind_the_upsampled_ones(tiny_net, tiny_shape):
    network = tiny_net("plain3d")
    channels = channel_map(network, tiny_shape("plain3d"))
    up, skip = "decoder.transpconvs.1", "encoder.stages.0.0.convs.0.conv"  # 6 channels each
    reader = "decoder.stages.1.convs.0.conv"
    assert channels.groups[skip].channels == channels.groups[up].channels == 6
    kept = channels.narrowing(all_but(channels, skip, 2))
    assert kept[reader].inputs == (0, 1, 2, 3, 4, 5, 6, 7, 9, 10, 11)
    assert kept["encoder.stages.1.0.convs.0.conv"].inputs == (0, 1, 3, 4, 5)  # the next stage reads it, too
    assert channels.narrowing(all_but(channels, up, 2))[reader].inputs == (0, 1, 3, 4, 5, 6, 7, 8, 9, 10, 11)


def test_residual_stage_shares_one_group_and_heads_and_image_are_in_none(tiny_net, tiny_shape):
    network = tiny_net("residual3d")
    channels = channel_map(network, tiny_shape("residual3d"))
    (stage,) = [g for g in channels.groups.values() if "encoder.stages.1.blocks.0.conv2.conv" in g.producers]
    assert set(stage.producers) == {
        "encoder.stages.1.blocks.0.conv2.conv",
        "encoder.stages.1.blocks.0.skip.1.conv",
        "encoder.stages.1.blocks.1.conv2.conv",
    }
    assert set(stage.taps) == {"encoder.stages.1.blocks.0.nonlin2", "encoder.stages.1.blocks.1.nonlin2"}
    producers = {name for group in channels.groups.values() for name in group.producers}
    assert not any("seg_layers" in name for name in producers)
    first = next(iter(channels.reads))
    assert first.startswith("encoder.stem") and all(
        kept.inputs is None
        for group in channels.groups
        for name, kept in channels.narrowing(all_but(channels, group, 0)).items()
        if name == first
    )


def test_plain_taps_are_the_maps_after_norm_and_activation(tiny_net, tiny_shape):
    channels = channel_map(tiny_net("plain3d"), tiny_shape("plain3d"))
    taps = {name: group.taps for name, group in channels.groups.items()}
    assert taps["encoder.stages.0.0.convs.0.conv"] == ("encoder.stages.0.0.convs.0.nonlin",)
    assert taps["decoder.transpconvs.0"] == ("decoder.transpconvs.0",)


class Odd(nn.Module):
    """Depth-wise and grouped convolutions, a linear way out, a layer that is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(1, 4, 3, padding=1)
        self.depth = nn.Conv2d(4, 4, 3, padding=1, groups=4)
        self.b = nn.Conv2d(4, 6, 1)
        self.twice = nn.Conv2d(6, 6, 3, padding=1)
        self.grouped = nn.Conv2d(6, 6, 3, padding=1, groups=2)
        self.head = nn.Conv2d(6, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.b(self.depth(self.a(x)))
        x = self.twice(torch.relu(self.twice(x)))
        return self.head(self.grouped(x))


def test_depthwise_goes_along_and_what_feeds_groups_stays(tiny_shape):
    network = Odd().eval()
    shape = (1, 1, 8, 8)
    channels = channel_map(network, shape)
    assert set(channels.groups) == {"a"}  # b and twice are one, and feed the grouped convolution
    network.depth.weight.data[2] = network.depth.bias.data[2] = 0
    before = output_of(network, shape)
    narrow_layers(LayerIndex(network), channels.narrowing(all_but(channels, "a", 2)))
    assert (network.depth.groups, network.depth.in_channels, network.depth.out_channels) == (3, 3, 3)
    torch.testing.assert_close(output_of(network, shape), before, rtol=0, atol=1e-6)


def test_batch_norm_statistics_and_numbers_are_cut(tiny_shape):
    network = nn.Sequential(nn.Conv2d(1, 5, 3, padding=1), nn.BatchNorm2d(5), nn.ReLU(), nn.Conv2d(5, 2, 1)).eval()
    network[1].running_mean.data = torch.arange(5.0)
    channels = channel_map(network, (1, 1, 8, 8))
    narrow_layers(LayerIndex(network), channels.narrowing({"0": [0, 3]}))
    assert network[1].running_mean.tolist() == [0, 3] and network[1].num_features == 2
    assert (network[0].out_channels, network[3].in_channels) == (2, 2)


def test_unusable_choice_is_refused_and_changes_nothing(tiny_net, tiny_shape):
    channels = channel_map(tiny_net("plain2d"), tiny_shape("plain2d"))
    name = next(iter(channels.groups))
    with pytest.raises(SpecError, match=r"no channel group 'encoder.stages.0.0.convs.0.con'; nearest: encoder"):
        channels.narrowing({"encoder.stages.0.0.convs.0.con": [0]})
    for wrong in ([], [1, 0], [0, 0], [0, 6], [-1]):
        with pytest.raises(SpecError, match=r"expected some of 0\.\.5"):
            channels.narrowing({name: wrong})
    network = nn.Sequential(nn.Linear(2, 2))
    from nnslim.surgery.channels import Kept

    with pytest.raises(SpecError, match=r"only convolutions and norms.*found Linear"):
        narrow_layers(LayerIndex(network), {"0": Kept((0,), None)})


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, nesterov=True),
        lambda p: torch.optim.Adam(p, 1e-3, amsgrad=True),
        lambda p: torch.optim.AdamW(p, 1e-3),
    ],
)
def test_optimiser_state_is_cut_as_the_weights_were(make, tiny_net, tiny_shape):
    """The original's SGD preset raised KeyError: 'step'."""
    network, shape = tiny_net("plain3d"), tiny_shape("plain3d")
    optimizer = make([{"params": [p]} for p in network.parameters()])
    for _ in range(2):
        optimizer.zero_grad()
        network(torch.randn(*shape)).square().mean().backward()
        optimizer.step()
    names = {id(p): name for name, p in network.named_parameters()}
    order = [names[id(group["params"][0])] for group in optimizer.param_groups]
    channels = channel_map(network, shape)
    keep = {name: list(range(1, group.channels)) for name, group in channels.groups.items()}
    old = {name: copy.deepcopy(optimizer.state[p]) for name, p in network.named_parameters() if p in optimizer.state}
    cuts = narrow_layers(LayerIndex(network), channels.narrowing(keep))
    narrow_optimizer(optimizer, cuts)
    names = {id(p): name for name, p in network.named_parameters()}
    assert [names[id(group["params"][0])] for group in optimizer.param_groups] == order
    weight = network.get_parameter("encoder.stages.1.0.convs.0.conv.weight")  # 6 -> 8 channels, now 5 -> 7
    for key, value in optimizer.state[weight].items():
        before = old["encoder.stages.1.0.convs.0.conv.weight"][key]
        expected = before[1:, 1:] if torch.is_tensor(before) and before.dim() > 1 else before
        torch.testing.assert_close(value, expected)
    up = network.get_parameter("decoder.transpconvs.0.weight")  # stored as (inputs, outputs)
    for key, value in optimizer.state[up].items():
        if torch.is_tensor(value) and value.dim() > 1:
            torch.testing.assert_close(value, old["decoder.transpconvs.0.weight"][key][1:, 1:])
    assert len(optimizer.state) == len(old)
    optimizer.zero_grad()
    network(torch.randn(*shape)).square().mean().backward()
    kept = weight.detach().clone()
    optimizer.step()
    assert not torch.equal(weight, kept)


@pytest.mark.parametrize("kind", KINDS)
def test_spec_rebuilds_the_widths_and_the_weights_fill_them(kind, tiny_net, tiny_shape):
    network, shape = tiny_net(kind), tiny_shape(kind)
    before, channels = widths_of(network), channel_map(network, shape)
    keep = {name: [0, *range(2, group.channels)] for name, group in channels.groups.items()}
    narrow_layers(LayerIndex(network), channels.narrowing(keep))
    spec = SlimSpec.from_dict(SlimSpec(narrow_edits(before, network)).to_dict())
    again = apply_spec(spec, tiny_net(kind, seed=3))
    again.load_state_dict(network.state_dict())
    for one, other in zip(output_of(network, shape), output_of(again, shape), strict=True):
        assert torch.equal(one, other)
    assert widths_of(again) == widths_of(network)


def test_elastic_network_takes_the_widths_of_each_fold_also_wider_ones_and_as_a_copy(tiny_net, tiny_shape):
    shape = tiny_shape("plain3d")
    folds = []
    for gone in (3, 1):
        network = tiny_net("plain3d", seed=gone)
        channels = channel_map(network, shape)
        keep = {name: list(range(gone, group.channels)) for name, group in channels.groups.items()}
        narrow_layers(LayerIndex(network), channels.narrowing(keep))
        folds.append(network)
    elastic = apply_spec(SlimSpec((ElasticEdit(),)), tiny_net("plain3d"))
    for network in (elastic, copy.deepcopy(elastic)):
        for fold in (folds[0], folds[1], folds[0]):
            network.load_state_dict(fold.state_dict())
            assert torch.equal(output_of(network, shape)[0], output_of(fold, shape)[0])
    elastic.load_state_dict(folds[0].state_dict())
    wrong = folds[1].state_dict() | {"encoder.stages.0.0.convs.0.conv.bias": torch.zeros(99)}
    with pytest.raises(RuntimeError, match="size mismatch"):
        elastic.load_state_dict(wrong)


def test_narrow_edit_refuses_what_does_not_fit_and_undoes(tiny_net):
    network = tiny_net("plain3d")
    before = {k: v.clone() for k, v in network.state_dict().items()}
    good = NarrowEdit("encoder.stages.0.0.convs.0.conv", 4, 1)
    for wrong in (NarrowEdit("decoder.transpconvs.0", 99, 3), NarrowEdit("decoder.transpconvs.0", 3, None)):
        with pytest.raises(SpecError, match=r"decoder\.transpconvs\.0.*asked for, it has"):
            apply_spec(SlimSpec((good, wrong)), network)
    assert all(torch.equal(v, before[k]) for k, v in network.state_dict().items())
    assert network.encoder.stages[0][0].convs[0].conv.out_channels == 6
