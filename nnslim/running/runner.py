"""The module that hosts call in a network's place: it follows the weights that they load and keeps their engines."""

from __future__ import annotations

import os
import random
import threading
import time
import weakref
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from nnslim.running.engine import Settings, fastest, first_pass, settled
from nnslim.running.machine import machine_threads

_HOST_CAP = 8  # threads that nnU-Net itself stops at
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_preparing = threading.RLock()  # compilers and tracers of one network at a time


class Runner(nn.Module):
    """Behaves like the network it holds, and runs each patch on the backend of the settings.

    Hosts load weights into it before every case and fold. An engine is made at the first patch with new weights, and
    kept: a state dict that was loaded before finds its own again, unless one of its tensors was replaced or changed.
    Parameters that are changed in place get a new engine, too. On a backend that fails, the next one takes over, with a
    message. "auto" is settled once in a process, see `settled`; after a minute of passes the backends are measured for
    the processes that follow.

    Several threads may use it, each with the weights that it loaded last; one passes at a time.

    Attributes:
        backend: the one in use; "" before the first patch.
        engines: those that are kept, by weights (fold), shape and device; the latest used last.
        most_engines: that are kept at once.
        worth_measuring: seconds of passes after which "auto" measures.
    """

    most_engines = 8
    worth_measuring = 60.0

    def __init__(self, network: nn.Module, settings: Settings) -> None:
        """Hold a network that is in eval mode and on its device; nothing is prepared yet."""
        super().__init__()
        self._orig_mod = network  # torch.compile's name for it, so that whoever unwraps that finds the network here too
        self.settings = settings
        self.backend = ""
        self.engines: OrderedDict[tuple[Any, ...], nn.Module] = OrderedDict()
        self._known: list[_Weights] = []
        self._held = _Weights({})  # what the network holds: at first what it came with
        self._places = _places(network)
        self._present = _versions(self._places)
        self._mine = threading.local()  # what a thread has loaded last: "weights", and "state" to load it again
        self._lock = threading.RLock()
        self._spent = 0.0
        self._measured = False

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("_orig_mod"), name)  # e.g. network.decoder

    def __reduce__(self) -> tuple[Any, ...]:
        return Runner, (self._orig_mod, self.settings)  # engines, locks and threads do not travel

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        """Load weights into the network; the same tensors a second time only switch back to their engine."""
        with self._lock:
            result = self._orig_mod.load_state_dict(state_dict, *args, **kwargs)
            self._mine.state, held = state_dict, _Weights(state_dict)
            self._forget([weights for weights in self._known if not weights.alive])
            self._held = next((weights for weights in self._known if weights == held), held)
            if self._held is held:
                self._known.append(held)
            self._mine.weights = self._held
            self._present = _versions(self._places)
            measures = self.settings.backend == "auto" and not self.settings.deterministic
            if measures and not self._measured and self._spent > self.worth_measuring:
                self._measured = True  # between two cases
                for shape in dict.fromkeys(shape for _, shape, _ in self.engines):
                    fastest(self._orig_mod, shape, self.settings)
        return result

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Return the network's own."""
        return self._orig_mod.state_dict(*args, **kwargs)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for name in [name for name in state_dict if not name.startswith(f"{prefix}_orig_mod.")]:
            state_dict[f"{prefix}_orig_mod.{name.removeprefix(prefix)}"] = state_dict.pop(name)  # as `state_dict` gives
        super()._load_from_state_dict(state_dict, prefix, *args)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, *patch) -> (B, heads, *patch), in any memory layout."""
        before = torch.get_num_threads()
        capped = before == int(os.environ.get("nnUNet_def_n_proc", _HOST_CAP))  # else the program has chosen them
        threads = self.settings.threads or (machine_threads() if capped else min(before, machine_threads()))
        if x.device.type == "cpu" and before != threads:
            torch.set_num_threads(threads)
        started = time.perf_counter()
        try:
            with self._lock, self._algorithms(x):
                return self._answer(x)
        finally:
            self._spent += time.perf_counter() - started
            if torch.get_num_threads() != before:
                torch.set_num_threads(before)

    def _answer(self, x: Tensor) -> Tensor:
        if _versions(self._places) != self._present:  # somebody changed parameters
            self._forget([] if self._held in self._known else [self._held])
            self._places = _places(self._orig_mod)
            self._present, self._held = _versions(self._places), _Weights({})
            self._mine.weights = self._mine.state = None
        weights = getattr(self._mine, "weights", None) or self._held
        key = (weights, tuple(x.shape), x.device)
        engine = self._orig_mod if _wants_the_network(self._orig_mod, x) else self.engines.get(key)
        if weights is not self._held and (engine is None or engine is self._orig_mod):  # another thread loaded its own
            self._orig_mod.load_state_dict(self._mine.state)
            self._held, self._present = weights, _versions(self._places)
        if engine is not None:
            if key in self.engines:
                self.engines.move_to_end(key)
            return engine(x)
        self.engines[key], answer = self._made(x)
        while len(self.engines) > self.most_engines:
            self.engines.popitem(last=False)
        return answer

    def _algorithms(self, x: Tensor) -> AbstractContextManager[Any]:
        """Keep cuDNN, where results must not change, from choosing algorithms by their time."""
        if not (x.is_cuda and self.settings.deterministic):
            return nullcontext()
        return torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True)

    def _forget(self, gone: Sequence[_Weights]) -> None:
        """Drop weights whose state dict is gone, and their engines."""
        self._known = [weights for weights in self._known if weights not in gone]
        for key in [key for key in self.engines if key[0] in gone]:
            del self.engines[key]

    def _made(self, x: Tensor) -> tuple[nn.Module, Tensor]:
        """Return an engine and its answer: on small images a pass on nothing, to try it, would be felt."""
        chosen = self.settings
        with _preparing, kept_random_state():
            if chosen.backend == "auto":
                name = self.backend or settled(self._orig_mod, tuple(x.shape), chosen)
                chosen = replace(chosen, backend=name)  # type: ignore[arg-type]
            engine, self.backend, answer = first_pass(self._orig_mod, x, chosen, _waiting)
        return engine, answer


class _Weights:
    """What a state dict held when it was loaded; two are equal if the same tensors held the same.

    Versions count what is done to a tensor itself; the sums of its bits tell most of what is done behind its back, as
    `tensor.data.zero_()` does. A sum takes as long as loading the tensor.
    """

    def __init__(self, state: Mapping[str, Any]) -> None:
        tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
        self._tensors = [weakref.ref(value) for value in tensors.values()]
        storages = {value.data_ptr(): value for value in tensors.values()}  # nnU-Net lists them under several names
        sums = {place: _bits(value) for place, value in storages.items()}
        self._content = [(name, id(value), _version(value), sums[value.data_ptr()]) for name, value in tensors.items()]

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, _Weights) and bool(self._content) and self._same(other))

    def _same(self, other: _Weights) -> bool:
        return self.alive and other.alive and self._content == other._content

    __hash__ = object.__hash__

    @property
    def alive(self) -> bool:
        """Whether all tensors are still there: an id says nothing about those that are gone."""
        return all(ref() is not None for ref in self._tensors)


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def _bits(tensor: Tensor) -> int:
    raw = tensor.detach().contiguous().view(-1).view(torch.uint8)
    raw = raw.clone() if raw.storage_offset() % 8 else raw  # a part of another tensor
    whole = raw.numel() // 8 * 8
    return int(raw[:whole].view(torch.int64).sum()) + int(raw[whole:].sum())


def _places(network: nn.Module) -> list[Mapping[str, Any]]:
    """Return the dictionaries in which modules hold their layers, parameters and buffers."""
    held = ((module._modules, module._parameters, module._buffers) for module in network.modules())
    return [values for three in held for values in three if values]


def _versions(places: Sequence[Mapping[str, Any]]) -> list[tuple[int, int]]:
    """Return the identity of each layer, parameter and buffer, and the version where it is a tensor."""
    held = (value for values in places for value in values.values())
    return [(id(value), _version(value) if isinstance(value, Tensor) else 0) for value in held]


@contextmanager
def kept_random_state() -> Iterator[None]:
    """Leave the random states of torch, numpy and Python as they were."""
    numpys, pythons = np.random.get_state(), random.getstate()
    with torch.random.fork_rng(range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()):
        try:
            yield
        finally:
            np.random.set_state(numpys)
            random.setstate(pythons)


def _wants_the_network(network: nn.Module, x: Tensor) -> bool:
    """Return whether more is asked for than an engine gives: gradients, what a layer sees, dropout, a graph to save."""
    if torch.jit.is_tracing() or isinstance(x, FakeTensor):
        return True
    if torch.is_grad_enabled() and (x.requires_grad or any(one.requires_grad for one in network.parameters())):
        return True
    return any(module.training or any(getattr(module, name) for name in _HOOKS) for module in network.modules())


def _waiting(engine: nn.Module, x: Tensor) -> Tensor:
    y = engine(x)
    if x.is_cuda:
        torch.cuda.synchronize(x.device)  # or a failure would show in a later pass
    return y
