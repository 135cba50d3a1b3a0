"""A network that runs on an engine by itself: what it stays, what its layers do, and how it is switched off."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref

import pytest
import torch
from torch import fx

from nnslim.errors import ConfigError
from nnslim.network.walk import unwrap
from nnslim.running import engine as backends
from nnslim.running import machine
from nnslim.running import self_running as module
from nnslim.running.self_running import self_running

SHAPE = (1, 1, 16, 16, 16)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("NNSLIM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(backends, "_settled", {})
    monkeypatch.delenv("NNSLIM_BACKEND")


@pytest.fixture
def engines(monkeypatch) -> list:
    """The engines that are made in a test, by backend."""
    made, original = [], backends.make_engine

    def make(network, shape, settings):
        made.append(settings.backend)
        return original(network, shape, settings)

    monkeypatch.setattr(backends, "make_engine", make)
    return made


@torch.no_grad()
def test_it_stays_the_network_and_follows_loaded_and_changed_weights(tiny_net, engines):
    plain, network = tiny_net("plain3d").eval(), self_running(tiny_net("plain3d")).eval()
    assert isinstance(network, type(plain)) and str(network) == str(plain)
    assert list(network.state_dict()) == list(plain.state_dict())
    assert type(unwrap(network)) is type(plain) and unwrap(network).decoder is network.decoder
    x = torch.randn(SHAPE)
    folds = [tiny_net("plain3d", seed=seed).state_dict() for seed in range(2)]
    for fold in (*folds, *folds):
        network.load_state_dict(fold)
        plain.load_state_dict(fold)
        torch.testing.assert_close(network(x), plain(x), rtol=1e-4, atol=1e-5)
    assert engines == ["eager", "eager"], "one engine for each set of weights"
    for one in (network, plain):
        one.decoder.seg_layers[-1].weight.mul_(2)
    torch.testing.assert_close(network(x), plain(x), rtol=1e-4, atol=1e-5)
    assert len(engines) == 3
    gone = weakref.ref(network)
    assert machine._holders == int(machine.heap_can_be_kept())
    del network, one
    gc.collect()
    assert gone() is None and not module._runners, "a network that nobody holds is kept by nothing"
    assert machine._holders == 0, "and keeps nothing"


def test_training_gradients_graphs_and_lists_of_outputs_are_the_layers_own(tiny_net, engines):
    network, x = self_running(tiny_net("plain3d")), torch.randn(SHAPE)
    network(x).sum().backward()
    assert all(parameter.grad is not None for parameter in network.encoder.parameters())
    network.eval()
    network(x.requires_grad_()).sum().backward()
    with torch.no_grad():
        fx.symbolic_trace(network)
        traced = torch.jit.trace(network, x.detach(), check_trace=False)
        network.decoder.deep_supervision = True
        assert isinstance(network(x), list)
        network.decoder.deep_supervision = False
        seen = []
        network.decoder.register_forward_hook(lambda *given: seen.append(given)).remove()
        handle = network.encoder.register_forward_hook(lambda *given: seen.append(given))
        expected = network(x)
        handle.remove()
        assert len(seen) == 1 and not engines
        torch.testing.assert_close(traced(x), expected)
        torch.testing.assert_close(network(x), expected, rtol=1e-4, atol=1e-5)
    assert engines == ["eager"]


@torch.no_grad()
def test_a_forward_that_somebody_wrapped_is_called(tiny_net, engines):
    network, x = self_running(tiny_net("plain3d")).eval(), torch.randn(SHAPE)
    plain, expected = network.forward, network(x)
    network.forward = lambda given: plain(given) + 1
    torch.testing.assert_close(network(x), expected + 1, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(unwrap(network)(x), expected + 1, rtol=1e-4, atol=1e-5)
    assert engines == ["eager"]


@torch.no_grad()
def test_copies_and_pickles_are_plain_networks(tiny_net, engines):
    network, x = self_running(tiny_net("plain3d")).eval(), torch.randn(SHAPE)
    expected, whole = network(x), io.BytesIO()
    torch.save(network, whole)
    whole.seek(0)
    copies = (copy.deepcopy(network), pickle.loads(pickle.dumps(network)), torch.load(whole, weights_only=False))
    for made in copies:
        assert type(made) is type(tiny_net("plain3d"))
        torch.testing.assert_close(made(x), expected, rtol=1e-4, atol=1e-5)
    assert engines == ["eager"]


@torch.no_grad()
def test_a_variable_names_the_backend_or_switches_it_off(tiny_net, engines, monkeypatch):
    monkeypatch.setenv("NNSLIM_BACKEND", "stock")
    network = self_running(tiny_net("plain3d"))
    assert type(network) is type(tiny_net("plain3d"))
    monkeypatch.setenv("NNSLIM_BACKEND", "openvino")
    pytest.importorskip("openvino")
    network, x = self_running(tiny_net("plain3d")).eval(), torch.randn(SHAPE)
    torch.testing.assert_close(network(x), tiny_net("plain3d").eval()(x), rtol=1e-3, atol=1e-4)
    assert engines == ["openvino"]
    monkeypatch.setenv("NNSLIM_BACKEND", "fast")
    with pytest.raises(ConfigError, match=r"NNSLIM_BACKEND: expected one of auto, stock, .* found 'fast'"):
        self_running(tiny_net("plain3d"))
