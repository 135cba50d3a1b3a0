"""A network that runs on a chosen backend, in the place where its host expects the network."""

from __future__ import annotations

import logging
import time
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from nnslim.running.engine import Settings, first_pass
from nnslim.running.select import fastest, machine_threads, remembered

_KEPT = 8  # engines at once: one for each set of weights (fold) and batch size
_log = logging.getLogger("nnslim")


class Runner(nn.Module):
    """Behaves like the network it holds, and runs each patch on the backend of the settings.

    Hosts load weights into it before every case and fold. An engine is made at the first patch with new weights, and
    kept: a state dict that was loaded before finds its own again. On a backend that fails, the next one takes over,
    with a message. With "auto" the backend that was measured to be the fastest here is taken; where nothing was
    measured yet, eager, until it has run for a minute; then the next case begins with a measurement.

    Attributes:
        backend: the one in use; "" before the first patch.
        worth_measuring: seconds of passes after which "auto" measures.
    """

    worth_measuring = 60.0

    def __init__(self, network: nn.Module, settings: Settings) -> None:
        """Hold the network; nothing is prepared yet.

        Args:
            network: in eval mode, on its device.
            settings: backend ("auto" to measure), precision, threads.
        """
        super().__init__()
        self._orig_mod = network  # torch.compile's name for it, so that whoever unwraps that finds the network here too
        self.settings = settings
        self.backend = ""
        self._engines: OrderedDict[tuple[Any, ...], nn.Module] = OrderedDict()
        self._states: dict[int, Mapping[str, Tensor]] = {}  # holds them, so that no other gets the same id
        self._loaded = 0
        self._spent = 0.0
        self._measured = self._measuring = False

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("_orig_mod"), name)  # e.g. network.decoder

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        """Load weights into the network; the same object a second time only switches back to its engine."""
        result = self._orig_mod.load_state_dict(state_dict, *args, **kwargs)
        self._states[id(state_dict)] = state_dict
        self._loaded = id(state_dict)
        if self.settings.backend == "auto" and not self._measured and self._spent > self.worth_measuring:
            self._measuring = True  # between two cases, so that a case is predicted by one backend
            self._engines.clear()
        return result

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Return the network's own."""
        return self._orig_mod.state_dict(*args, **kwargs)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, *patch) -> (B, heads, *patch), in any memory layout."""
        threads = self.settings.threads or machine_threads()
        before = torch.get_num_threads()
        if x.device.type == "cpu" and before != threads:  # nnU-Net caps them at 8
            torch.set_num_threads(threads)
        started = time.perf_counter()
        try:
            return self._answer(x)
        finally:
            self._spent += time.perf_counter() - started
            if torch.get_num_threads() != before:
                torch.set_num_threads(before)

    def _answer(self, x: Tensor) -> Tensor:
        key = (self._loaded, tuple(x.shape), x.device)
        if key in self._engines:
            self._engines.move_to_end(key)
            return self._engines[key](x)
        self._engines[key], answer = self._made(x)
        while len(self._engines) > _KEPT:
            self._engines.popitem(last=False)
        return answer

    def _made(self, x: Tensor) -> tuple[nn.Module, Tensor]:
        """Return an engine and its answer: on small images a pass on nothing, to try it, would be felt."""
        chosen, shape = self.settings, tuple(x.shape)
        if chosen.backend == "auto":
            if self._measuring:
                engine, self.backend = fastest(self._orig_mod, shape, chosen)
                self._measuring, self._measured = False, True
                return engine, engine(x)
            name = self.backend or remembered(self._orig_mod, shape, chosen)
            self._measured = self._measured or name is not None
            on_gpu = next(self._orig_mod.parameters()).device.type == "cuda"
            standard = "eager" if chosen.precision == "f32" or on_gpu else "openvino"
            chosen = Settings(name or standard, chosen.precision, chosen.threads)  # type: ignore[arg-type]
        engine, self.backend, answer = first_pass(self._orig_mod, x, chosen, _called)
        return engine, answer


def _called(engine: nn.Module, x: Tensor) -> Tensor:
    y = engine(x)
    if x.is_cuda:
        torch.cuda.synchronize(x.device)  # or a failure would show in a later pass
    return y
