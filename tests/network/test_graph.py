"""Tracing a network into a graph, beside other threads."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import nn

from nnslim.errors import RewriteError
from nnslim.network.graph import trace

SHAPE = (1, 1, 16, 16, 16)


class Shared(nn.Module):
    """Uses a parameter, a buffer, a constant and one layer twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv3d(2, 2, 3, padding=1)
        self.first = nn.Conv3d(1, 2, 1)
        self.scale = nn.Parameter(torch.randn(2, 1, 1, 1))
        self.register_buffer("shift", torch.randn(2, 1, 1, 1))
        self.drop = nn.Dropout3d(0.5)

    def forward(self, x):
        y = self.drop(self.conv(self.conv(self.first(x))))
        return y * self.scale.abs() + self.shift + torch.ones(1) * 2


@torch.no_grad()
def test_graph_holds_the_layers_of_the_network_and_gives_its_answer():
    network = Shared().eval()
    graph, x = trace(network, SHAPE), torch.randn(SHAPE)
    torch.testing.assert_close(graph(x), network(x))
    assert graph.get_submodule("conv") is network.conv and graph.scale is network.scale
    assert [str(node.target) for node in graph.graph.nodes if node.op == "call_module"] == ["first", "conv", "conv"]
    assert vars(network).keys() == vars(Shared()).keys(), "no constant is left in the network"


def test_training_network_stays_one():
    network = Shared().train()
    network.conv.eval()
    modes = [module.training for module in network.modules()]
    trace(network, SHAPE)
    assert [module.training for module in network.modules()] == modes


def test_tracing_changes_nothing_that_other_threads_call(tiny_net):
    """torch.fx replaces nn.Module.__call__ for the process while it traces; a stranger's network then fails."""
    other, faults = nn.Sequential(nn.Conv2d(2, 2, 3), nn.ReLU()), []
    plain = nn.Module.__call__, nn.Module.__getattr__

    class Watching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = tiny_net("plain3d").eval()

        def forward(self, x):
            def work() -> None:
                try:
                    assert isinstance(other(torch.zeros(1, 2, 8, 8)), torch.Tensor)
                    assert (
                        isinstance(self.inner.__class__, type) and (nn.Module.__call__, nn.Module.__getattr__) == plain
                    )
                except BaseException as error:
                    faults.append(error)

            thread = threading.Thread(target=work)
            thread.start()
            thread.join()
            return self.inner(x)

    graph = trace(Watching().eval(), SHAPE)
    assert not faults and len(graph.graph.nodes) > 10


def test_network_in_use_by_another_thread_can_be_traced(tiny_net):
    network, x, stop, faults = tiny_net("plain3d").eval(), torch.randn(SHAPE), threading.Event(), []
    with torch.no_grad():
        wanted = network(x)

    @torch.no_grad()
    def work() -> None:
        while not stop.is_set():
            try:
                torch.testing.assert_close(network(x), wanted)
            except BaseException as error:
                faults.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    for _ in range(3):
        trace(network, SHAPE)
    stop.set()
    thread.join()
    assert not faults


def test_network_that_fails_while_it_is_traced_leaves_nothing_behind():
    class Fails(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    plain = nn.Module.__call__
    with pytest.raises(RewriteError, match="Fails cannot be traced"):
        trace(Fails().eval(), SHAPE)
    assert nn.Module.__call__ is plain
