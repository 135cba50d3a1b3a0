"""A network that runs on a chosen backend where its host expects the network; the fastest backend is remembered."""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from nnslim.errors import OutputError
from nnslim.files import make_folder, read_json, user_cache, write_json
from nnslim.running.engine import Backend, Settings, candidates, first_pass, with_fallback
from nnslim.running.machine import cpu_name, machine_threads
from nnslim.running.timing import pass_seconds

_log = logging.getLogger("nnslim")


class Runner(nn.Module):
    """Behaves like the network it holds, and runs each patch on the backend of the settings.

    Hosts load weights into it before every case and fold. An engine is made at the first patch with new weights, and
    kept: a state dict that was loaded before finds its own again. On a backend that fails, the next one takes over,
    with a message. With "auto" the backend that was measured to be the fastest here is taken; where nothing was
    measured yet, eager, until it has run for a minute; then the next case begins with a measurement.

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
            self.engines.clear()
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
        if key in self.engines:
            self.engines.move_to_end(key)
            return self.engines[key](x)
        self.engines[key], answer = self._made(x)
        while len(self.engines) > self.most_engines:
            self.engines.popitem(last=False)
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
        engine, self.backend, answer = first_pass(self._orig_mod, x, chosen, _waiting)
        return engine, answer


def _waiting(engine: nn.Module, x: Tensor) -> Tensor:
    y = engine(x)
    if x.is_cuda:
        torch.cuda.synchronize(x.device)  # or a failure would show in a later pass
    return y


def remembered(network: nn.Module, shape: Sequence[int], settings: Settings) -> Backend | None:
    """Return the backend that `fastest` found for this architecture, patch, device, threads and torch; None if none."""
    known = read_json(user_cache() / "backends.json").get(_key(network, shape, settings))
    return known if known in candidates(next(network.parameters()).device) else None


def fastest(network: nn.Module, shape: Sequence[int], settings: Settings) -> tuple[nn.Module, str]:
    """Measure the candidates at this patch; return the fastest engine and its backend, which is kept on disk.

    Args:
        network: in eval mode. shape: (B, C, *patch). settings: precision and threads; the backend is not looked at.
    Raises:
        BackendError: no backend runs with that precision.
    """
    device, single = next(network.parameters()).device, settings.precision == "f32"
    if not single and device.type != "cuda":
        return with_fallback(network, shape, Settings("openvino", settings.precision, settings.threads))
    made: dict[str, nn.Module] = {}
    for name in candidates(device):
        if single or name != "stock":
            engine, found = with_fallback(network, shape, Settings(name, settings.precision, settings.threads))
            made.setdefault(found, engine)
    seconds = dict(zip(made, pass_seconds(list(made.values()), shape), strict=True))
    best = min(seconds, key=seconds.__getitem__)
    _log.info("backend %s: %s", best, ", ".join(f"{name} {value * 1e3:.0f} ms" for name, value in seconds.items()))
    remember(network, shape, settings, best)
    return made[best], best


def _key(network: nn.Module, shape: Sequence[int], settings: Settings) -> str:
    device = next(network.parameters()).device
    named = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()
    threads = settings.threads or torch.get_num_threads()
    parts = [str(network), list(shape), device.type, named, threads, settings.precision, torch.__version__]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:24]


def remember(network: nn.Module, shape: Sequence[int], settings: Settings, backend: str) -> None:
    """Keep the backend that was the fastest; a cache that cannot be written is no reason to stop."""
    file = user_cache() / "backends.json"
    try:
        make_folder(file.parent)
        write_json(file, {**read_json(file), _key(network, shape, settings): backend})
    except (OutputError, OSError) as error:
        _log.debug("the choice is not kept: %s", error)
