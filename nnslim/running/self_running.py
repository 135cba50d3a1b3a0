"""A network that runs on an engine by itself, so that hosts which know nothing of nnslim get the time, too."""

from __future__ import annotations

import functools
import os
import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from nnslim.errors import ConfigError
from nnslim.running.engine import BACKENDS, Settings
from nnslim.running.machine import keep_heap_with
from nnslim.running.runner import Runner

VARIABLE = "NNSLIM_BACKEND"
_runners: weakref.WeakKeyDictionary[nn.Module, Runner] = weakref.WeakKeyDictionary()
_with_heap: weakref.WeakSet[nn.Module] = weakref.WeakSet()
_is_compiling = getattr(torch.compiler, "is_compiling", lambda: False)  # torch 2.1 lacks it


def self_running(network: nn.Module) -> nn.Module:
    """Let a network pass its patches to a `Runner` in eval mode, where no gradient, hook or list of outputs is wanted.

    It stays an instance of its class with the same layers, keys and weights. Copies and pickles are plain networks,
    and `unwrap` gives the plain network that shares everything with this one.

    Args:
        network: changed in place, and returned. The variable NNSLIM_BACKEND names a backend; stock changes nothing.
    Raises:
        ConfigError: there is no such backend.
    """
    backend = os.environ.get(VARIABLE) or "auto"
    if backend not in BACKENDS:
        raise ConfigError(f"{VARIABLE}: expected one of {', '.join(BACKENDS)}, found '{backend}'")
    if backend != "stock":
        plain = _plain(network, type(network))
        network.__class__ = _self_running_class(type(network))
        _runners[network] = Runner(plain, Settings(backend=backend))  # type: ignore[arg-type]
    return network


def _plain(network: nn.Module, cls: type[nn.Module]) -> nn.Module:
    """Return an instance of a class that shares its state with the network, whatever becomes of either."""
    made = cls.__new__(cls)
    object.__setattr__(made, "__dict__", vars(network))
    return made


@functools.cache
def _self_running_class(cls: type[nn.Module]) -> type[nn.Module]:
    class SelfRunning(cls):  # type: ignore[misc, valid-type]
        @property
        def _orig_mod(self) -> nn.Module:
            """The plain network, under torch.compile's name for it: whoever unwraps that finds it here too."""
            return _runners[self]._orig_mod

        def forward(self, x: Tensor) -> Any:
            if not _may_run(self, x):
                return super().forward(x)
            if x.device.type == "cpu" and not torch.is_grad_enabled() and self not in _with_heap:
                _with_heap.add(self)
                keep_heap_with(self)
            return _runners[self](x)

        def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
            return _runners[self].load_state_dict(state_dict, *args, **kwargs)

        def __reduce_ex__(self, protocol: Any) -> Any:
            return cls.__new__, (cls,), vars(self)  # engines and locks do not travel

    SelfRunning.__name__, SelfRunning.__qualname__ = cls.__name__, cls.__qualname__
    SelfRunning.__module__, SelfRunning.__doc__ = cls.__module__, cls.__doc__
    return SelfRunning


def _may_run(network: nn.Module, x: Any) -> bool:
    """Return whether an engine may answer; `Runner` itself turns to the network where it is asked for more."""
    deep = getattr(getattr(network, "decoder", None), "deep_supervision", False)  # then outputs are a list
    replaced = "forward" in vars(network)  # somebody has wrapped it, and the engine would leave the wrapper out
    return isinstance(x, Tensor) and not (network.training or deep or replaced or _is_compiling())
