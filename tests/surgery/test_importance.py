"""Importance of filters by gradients against gates on their maps."""

from __future__ import annotations

import pytest
import torch

from nnslim.methods.sauron import Pruner, SauronConfig
from nnslim.network.walk import LayerIndex
from nnslim.surgery.channels import channel_map
from nnslim.surgery.importance import gradient_importance


@pytest.mark.parametrize("kind", ["plain3d", "residual3d"])
def test_gradient_importance_is_the_squared_gradient_of_gates_on_the_maps(kind, tiny_net, tiny_shape):
    network, shape = tiny_net(kind).train(), tiny_shape(kind)
    layers, channels = LayerIndex(network), channel_map(network, shape)
    gates = {}
    for name, group in channels.groups.items():  # one gate for all readers
        gates[name] = torch.ones(group.channels, requires_grad=True)
        tap = layers[group.taps[-1]].module
        gate = gates[name].reshape(1, -1, *[1] * (len(shape) - 2))
        tap.register_forward_hook(lambda _module, _given, maps, gate=gate: maps * gate)
    outputs = network(torch.randn(*shape))
    sum(one.square().mean() for one in (outputs if isinstance(outputs, (list, tuple)) else [outputs])).backward()
    found = gradient_importance(layers, channels)
    assert set(found) == set(gates) and any(len(channels.groups[name].taps) == 1 for name in gates)
    for name, gate in gates.items():
        if len(channels.groups[name].taps) == 1:  # the last map of a residual stage is not its only one
            assert torch.allclose(found[name].float(), gate.grad.square(), rtol=1e-3, atol=1e-12)


@pytest.mark.parametrize("importance", ["l1", "fpgm", "random", "taylor"])
def test_pruner_takes_filters_by_importance_down_to_the_target(importance, tiny_net, tiny_shape):
    network, shape = tiny_net("plain3d").train(), tiny_shape("plain3d")
    config = SauronConfig(importance=importance, macs=0.5, reach=0.5, settle=0.0, strength=0.0)
    pruner = Pruner(network, shape, config, epochs=4)
    before = {name: group.channels for name, group in pruner.channels.groups.items()}
    for epoch in range(3):
        pruner.begin_epoch(epoch)
        outputs = network(torch.randn(*shape))
        sum(one.square().mean() for one in outputs).backward()
        pruner.watch.observe()
        pruner.observe_gradients()
        scores, medoids, _ = pruner.take()
        assert all(max(values) == 1 and min(values) >= 0 for values in scores.values()) and set(scores) == set(before)
        decision = pruner.decide(epoch, scores, medoids, [1.0], [1.0])
        for name, kept in decision.keep.items():
            gone = set(range(len(scores[name]))) - set(kept)
            assert max(scores[name][index] for index in gone) <= min(scores[name][index] for index in kept)
        pruner.act(decision)
        network.zero_grad()
        pruner.watch.clear()
    assert pruner.share({}) <= 0.5 and any(
        group.channels < before[name] for name, group in pruner.channels.groups.items()
    )
    network(torch.randn(*shape))
