"""The runner: the weights that it follows, the threads that share it, and what it hands to the network itself."""

from __future__ import annotations

import copy
import gc
import pickle
import random
import threading
import weakref

import numpy as np
import pytest
import torch
from torch import nn

from nnslim.network.walk import unwrap
from nnslim.running import engine as backends
from nnslim.running import machine
from nnslim.running.engine import Settings
from nnslim.running.runner import Runner

SHAPE = (1, 1, 16, 16, 16)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("NNSLIM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(backends, "_settled", {})


def states(tiny_net, count: int = 3) -> list[dict]:
    return [tiny_net("plain3d", seed=seed).state_dict() for seed in range(count)]


@torch.no_grad()
def test_runner_follows_the_weights_that_a_host_loads(tiny_net):
    folds, x = states(tiny_net), torch.randn(SHAPE)
    held = Runner(tiny_net("plain3d").eval(), Settings("eager"))
    plain = tiny_net("plain3d").eval()
    for fold in (*folds, *folds[::-1], folds[1]):
        held.load_state_dict(fold)
        plain.load_state_dict(fold)
        torch.testing.assert_close(held(x), plain(x), rtol=1e-4, atol=1e-5)
    assert len(held.engines) == 3, "one engine for each set of weights, made once"
    assert held.state_dict().keys() == plain.state_dict().keys()
    assert held.decoder is held._orig_mod.decoder and unwrap(held) is held._orig_mod
    batch = torch.randn(2, *SHAPE[1:])
    torch.testing.assert_close(held(batch), plain(batch), rtol=1e-4, atol=1e-5)
    assert held.backend == "eager"


@torch.no_grad()
@pytest.mark.parametrize("backend", ["stock", "eager"])
def test_first_patch_takes_one_pass(tiny_net, backend, monkeypatch):
    """An image of few patches would feel one more, to try the engine."""
    seen, original = [], backends.make_engine

    def made(network, shape, settings):
        engine = original(network, shape, settings)
        engine.register_forward_hook(lambda module, given, answer: seen.append(given[0]))
        return engine

    monkeypatch.setattr(backends, "make_engine", made)
    held, x = Runner(tiny_net("plain3d").eval(), Settings(backend)), torch.randn(SHAPE)
    first, second = held(x), held(x + 1)
    assert len(seen) == 2 and seen[0] is x
    torch.testing.assert_close(first, tiny_net("plain3d").eval()(x), rtol=1e-4, atol=1e-5)
    assert not torch.equal(first, second)


def _replaced(state, network):
    state["decoder.seg_layers.1.weight"] = torch.randn_like(state["decoder.seg_layers.1.weight"])


def _scaled(state, network):
    for tensor in state.values():
        tensor.mul_(0.5)


def _zeroed_behind_its_back(state, network):
    for tensor in state.values():
        tensor.data.zero_()


def _by_numpy(state, network):
    for tensor in state.values():
        tensor.numpy()[...] = 0.01


@torch.no_grad()
@pytest.mark.parametrize("backend", ["stock", "eager", "openvino"])
@pytest.mark.parametrize("change", [_replaced, _scaled, _zeroed_behind_its_back, _by_numpy])
def test_weights_that_change_in_the_same_dictionary_are_followed(tiny_net, change, backend):
    (fold,), x = states(tiny_net, 1), torch.randn(SHAPE)
    held, plain = Runner(tiny_net("plain3d").eval(), Settings(backend)), tiny_net("plain3d").eval()
    held.load_state_dict(fold)
    before = held(x).clone()
    change(fold, held)
    held.load_state_dict(fold)
    plain.load_state_dict(fold)
    torch.testing.assert_close(held(x), plain(x), rtol=1e-3, atol=1e-4)
    assert not torch.allclose(before, plain(x), atol=1e-3)


def _added(network):
    for parameter in network.parameters():
        parameter.add_(0.1)


def _other_parameter(network):
    conv = network.encoder.stages[0][0].convs[0].conv
    conv.weight = nn.Parameter(torch.randn_like(conv.weight))


def _other_layer(network):
    head = network.decoder.seg_layers[-1]
    network.decoder.seg_layers[-1] = type(head)(head.in_channels, head.out_channels, 1)


def _loaded_past_the_runner(network):
    network.load_state_dict({name: value * 0.7 for name, value in network.state_dict().items()})


@torch.no_grad()
@pytest.mark.parametrize("loads", [False, True])
@pytest.mark.parametrize("change", [_added, _other_parameter, _other_layer, _loaded_past_the_runner])
def test_parameters_that_somebody_changes_are_followed(tiny_net, change, loads):
    (fold,), x = states(tiny_net, 1), torch.randn(SHAPE)
    network = tiny_net("plain3d").eval()
    held = Runner(network, Settings("eager"))
    if loads:
        held.load_state_dict(fold)
    before = held(x).clone()
    change(network)
    torch.testing.assert_close(held(x), network(x), rtol=1e-3, atol=1e-4)
    assert not torch.allclose(before, held(x), atol=1e-3)
    if loads:
        held.load_state_dict(fold)
        torch.testing.assert_close(held(x), network(x), rtol=1e-3, atol=1e-4)


@torch.no_grad()
def test_state_dicts_and_their_engines_are_released(tiny_net):
    held, x, seen = Runner(tiny_net("plain3d").eval(), Settings("eager")), torch.randn(SHAPE), []
    for seed in range(5):
        state = tiny_net("plain3d", seed=seed).state_dict()
        seen.append(weakref.ref(next(iter(state.values()))))
        held.load_state_dict(state)
        held(x)
        del state
        gc.collect()
    assert [ref() is not None for ref in seen] == [False] * 4 + [True], "the last one may be needed again"
    assert len(held.engines) == 1


@torch.no_grad()
@pytest.mark.parametrize("backend", ["stock", "eager", "openvino"])
def test_threads_that_share_a_runner_get_the_answer_of_the_weights_that_each_loaded(tiny_net, backend):
    folds, x = states(tiny_net), torch.randn(SHAPE)
    held, wanted, found = Runner(tiny_net("plain3d").eval(), Settings(backend)), {}, {}
    for number, fold in enumerate(folds):
        plain = tiny_net("plain3d").eval()
        plain.load_state_dict(fold)
        wanted[number] = plain(x)
    gate = threading.Barrier(len(folds))

    @torch.no_grad()
    def work(number: int) -> None:
        held.load_state_dict(folds[number])
        gate.wait()  # the network holds the weights of the last one now
        found[number] = [held(x).clone() for _ in range(5)]

    threads = [threading.Thread(target=work, args=(number,)) for number in range(len(folds))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number in range(len(folds)):
        for answer in found[number]:
            torch.testing.assert_close(answer, wanted[number], rtol=1e-3, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("backend", ["stock", "eager", "openvino"])
def test_first_prediction_leaves_random_states_alone(tiny_net, backend):
    held, x = Runner(tiny_net("plain3d").eval(), Settings(backend)), torch.randn(SHAPE)
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    held(x)
    assert torch.equal(before[0], torch.get_rng_state()) and (before[1] == np.random.get_state()[1]).all()
    assert before[2] == random.getstate()


def test_runner_can_be_copied_and_pickled(tiny_net):
    held, x = Runner(tiny_net("plain3d").eval(), Settings("eager")), torch.randn(SHAPE)
    with torch.no_grad():
        answer = held(x)
        for other in (copy.deepcopy(held), pickle.loads(pickle.dumps(held))):
            assert other._orig_mod is not held._orig_mod
            torch.testing.assert_close(other(x), answer)


@torch.no_grad()
def test_runner_keeps_few_engines_and_stock_is_never_stale(tiny_net):
    folds, x = states(tiny_net, Runner.most_engines + 3), torch.randn(SHAPE)
    for backend in ("eager", "stock"):
        held, plain = Runner(tiny_net("plain3d").eval(), Settings(backend)), tiny_net("plain3d").eval()
        for fold in (*folds, folds[0]):
            held.load_state_dict(fold)
            plain.load_state_dict(fold)
            torch.testing.assert_close(held(x), plain(x), rtol=1e-4, atol=1e-5)
        assert len(held.engines) <= Runner.most_engines


@torch.no_grad()
def test_runner_uses_the_threads_that_were_asked_for_and_puts_them_back(tiny_net):
    seen = []

    class Look(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(1, 1, 1)

        def forward(self, x):
            if not torch.jit.is_tracing() and isinstance(x, torch.Tensor) and type(x) is torch.Tensor:
                seen.append(torch.get_num_threads())
            return self.conv(x)

    before = torch.get_num_threads()
    Runner(Look().eval(), Settings("stock", threads=3))(torch.zeros(1, 1, 4, 4))
    assert seen[-1] == 3 and torch.get_num_threads() == before
    assert machine.machine_threads() >= 1


@torch.no_grad()
@pytest.mark.parametrize(
    ("chosen", "variable", "expected"), [(1, None, 1), (3, None, 3), (16, None, 10), (8, None, 10), (4, "4", 10)]
)
def test_runner_keeps_to_the_programs_threads_and_goes_beyond_nnunets_cap(chosen, variable, expected, monkeypatch):
    """A program that runs many predictions side by side gives each a thread; nnU-Net stops at 8 by itself."""
    monkeypatch.setattr("nnslim.running.runner.machine_threads", lambda: 10)
    if variable is not None:
        monkeypatch.setenv("nnUNet_def_n_proc", variable)
    seen, network = [], nn.Conv2d(1, 1, 1).eval()
    runner = Runner(network, Settings("stock"))
    runner(torch.zeros(1, 1, 4, 4))
    monkeypatch.setattr(network, "forward", lambda x: seen.append(torch.get_num_threads()) or x)
    torch.set_num_threads(chosen)
    runner(torch.zeros(1, 1, 4, 4))
    assert seen == [expected] and torch.get_num_threads() == chosen


def test_network_itself_answers_where_more_is_asked_than_an_engine_gives(tiny_net):
    """Hooks, gradients and dropout were ignored without a word once an engine was there, and traces held constants."""
    plain, x, other = tiny_net("plain3d").eval(), torch.randn(SHAPE), torch.randn(SHAPE)
    runner = Runner(tiny_net("plain3d").eval(), Settings("eager"))
    with torch.no_grad():
        runner(x)  # the engine is there
        seen = []
        hook = runner.encoder.stages[0].register_forward_hook(lambda layer, given, found: seen.append(found))
        torch.testing.assert_close(runner(x), plain(x))
        torch.testing.assert_close(seen[0], plain.encoder.stages[0](x))
        hook.remove()
        runner(x)
        assert len(seen) == 1
        traced = torch.jit.trace(runner, x, check_trace=False)
        torch.testing.assert_close(traced(other), plain(other))
    for network in (runner, plain):
        network(x)[0, 1].sum().backward()
    wanted, found = (dict(network.named_parameters()) for network in (plain, runner._orig_mod))
    torch.testing.assert_close(
        found["encoder.stages.0.0.convs.0.conv.weight"].grad, wanted["encoder.stages.0.0.convs.0.conv.weight"].grad
    )
    with torch.no_grad():
        assert torch.equal(runner(x), runner(x))
        runner._orig_mod.decoder.add_module("noise", nn.Dropout(0.5))
        runner._orig_mod.decoder.register_forward_hook(lambda layer, given, found: layer.noise(found))
        runner._orig_mod.decoder.noise.train()
        assert not torch.equal(runner(x), runner(x))


def test_runner_inside_another_module_loads_what_that_module_saved(tiny_net):
    """As MONAI's bundles hold nnU-Net's network in a module of their own."""
    held = nn.ModuleDict({"network_weights": Runner(tiny_net("plain3d").eval(), Settings("eager"))})
    saved = nn.ModuleDict({"network_weights": tiny_net("plain3d", seed=1)}).state_dict()
    assert held.state_dict().keys() == saved.keys()
    assert not any(held.load_state_dict(saved))
    torch.testing.assert_close(held.state_dict(), saved)
    with pytest.raises(RuntimeError, match="Missing key"):
        held.load_state_dict({key: value for key, value in saved.items() if "seg_layers" not in key})


@torch.no_grad()
def test_auto_starts_eager_and_measures_between_cases_once_it_is_worth_it(tiny_net, monkeypatch):
    monkeypatch.setattr(Runner, "worth_measuring", 0.0)
    measured = []

    def first_is_slow(engines, shape, rounds=3):
        measured.append(len(engines))
        return [2.0, 1.0][: len(engines)]

    monkeypatch.setattr(backends, "pass_seconds", first_is_slow)
    monkeypatch.setattr(backends, "candidates", lambda device: ["eager", "stock"])
    (fold, _, _), x = states(tiny_net), torch.randn(SHAPE)
    held = Runner(tiny_net("plain3d").eval(), Settings("auto"))
    held.load_state_dict(fold)
    held(x)
    assert held.backend == "eager" and not measured
    held(x)
    assert not measured, "never within a case"
    held.load_state_dict(fold)
    held(x)
    assert held.backend == "eager" and measured == [2], "what is measured is for later runs"
    held.load_state_dict(fold)
    held(x)
    assert measured == [2], "once"
    beside = Runner(tiny_net("plain3d").eval(), Settings("auto"))
    beside(x)
    assert beside.backend == "eager", "one choice in a process"
    monkeypatch.setattr(backends, "_settled", {})
    steady = Runner(tiny_net("plain3d").eval(), Settings("auto", deterministic=True))
    steady(x)
    assert steady.backend == "eager"
    with backends.believing({}):
        assert backends.settled(tiny_net("plain3d").eval(), SHAPE, Settings("auto", threads=77)) == "eager"
    again = Runner(tiny_net("plain3d").eval(), Settings("auto"))
    again(x)
    assert again.backend == "stock" and measured == [2], "remembered on disk"
    other = Runner(tiny_net("plain3d").eval(), Settings("auto"))
    other(torch.randn(2, *SHAPE[1:]))
    assert other.backend == "eager", "for this shape only"


@torch.no_grad()
@pytest.mark.parametrize("default", [torch.device("meta"), torch.float16, torch.float64])
def test_defaults_that_the_program_has_set_for_torch_do_not_reach_the_engine(tiny_net, default):
    """The kernels got tensors of the default type, and wrote beyond them, or of a device whose memory is elsewhere."""
    network, x = tiny_net("plain3d", features=(8, 16, 24)).eval(), torch.randn(SHAPE)
    expected, before = network(x), torch.get_default_dtype()
    try:
        if isinstance(default, torch.device):
            torch.set_default_device(default)
        else:
            torch.set_default_dtype(default)
        found = Runner(network, Settings("eager"))(x)
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(before)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_weights_that_are_parts_of_one_tensor_are_followed(tiny_net):
    """As of a flat file: their bytes begin anywhere."""
    (fold,), x = states(tiny_net, 1), torch.randn(SHAPE)
    flat = torch.cat([torch.zeros(1), *(value.flatten() for value in fold.values())])
    sizes, parts, begin = {name: value.shape for name, value in fold.items()}, {}, 1
    for name, shape in sizes.items():
        parts[name] = flat[begin : begin + shape.numel()].view(shape)
        begin += shape.numel()
    held, plain = Runner(tiny_net("plain3d").eval(), Settings("eager")), tiny_net("plain3d").eval()
    for factor in (1.0, 0.5):
        flat.mul_(factor)
        held.load_state_dict(parts)
        plain.load_state_dict(parts)
        torch.testing.assert_close(held(x), plain(x), rtol=1e-3, atol=1e-4)


@torch.no_grad()
def test_engines_of_parameters_that_were_changed_are_released(tiny_net):
    network, x = tiny_net("plain3d").eval(), torch.randn(SHAPE)
    held = Runner(network, Settings("eager"))
    for _ in range(3):
        next(network.parameters()).mul_(0.9)
        held(x)
    assert len(held.engines) == 1
