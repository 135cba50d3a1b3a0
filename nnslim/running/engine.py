"""Backends: ways to run one network on one patch shape, the choice between them, and the module that hosts call."""

from __future__ import annotations

import copy
import hashlib
import importlib.util
import json
import logging
import os
import random
import threading
import time
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor

from nnslim.errors import BackendError, NNSlimError, OutputError, RewriteError, first_line
from nnslim.files import make_folder, user_cache, write_kept
from nnslim.running.bfloat16 import bfloat16_is_safe
from nnslim.running.cpu import channels_last
from nnslim.running.machine import MEASURED, cpu_name, cpus, machine_threads, measured_backends
from nnslim.running.rewrites import rewritten
from nnslim.running.timing import pass_seconds, run_pass

Backend = Literal["auto", "stock", "eager", "compile", "openvino"]
Precision = Literal["f32", "bf16", "f16", "int8"]
BACKENDS: tuple[str, ...] = get_args(Backend)
_CUDA_TYPES = {"f32": torch.half, "f16": torch.half, "bf16": torch.bfloat16}  # nnU-Net's autocast is float16
_preparing = threading.RLock()  # compilers and tracers of one network at a time
_settled: dict[str, str] = {}
_believed: Mapping[str, Any] | None = None
_HOST_CAP = 8  # threads that nnU-Net itself stops at
_log = logging.getLogger("nnslim")


@dataclass(frozen=True)
class Settings:
    """How to run a network.

    Attributes:
        backend: "stock": the network untouched. "eager": torch, after the exact rewrites. "compile": torch.compile.
            "openvino". "auto": whichever measures fastest here, see `Runner`.
        precision: of the arithmetic; on a CPU anything but f32 needs the openvino backend. On CUDA f32 is what nnU-Net
            does, autocast to float16; bf16 is autocast to bfloat16.
        threads: CPU threads; None for all that the process may use.
        deterministic: the same bytes for the same input, run after run on one machine: "auto" is eager (openvino for
            other precisions on a CPU) and no form of a network is chosen by measuring.
    """

    backend: Backend = "auto"
    precision: Precision = "f32"
    threads: int | None = None
    deterministic: bool = False


def make_engine(network: nn.Module, shape: Sequence[int], settings: Settings) -> nn.Module:
    """Return an inference-only module (B, C, *patch) -> (B, heads, *patch) with the network's present weights.

    It keeps these weights whatever is loaded into the network later; only "stock" is the network itself.

    Args:
        network: in eval mode, on the device it will run on. shape: (B, C, *patch). settings: not "auto".
    Raises:
        BackendError: the backend is missing, or cannot run this network.
    """
    device = next(network.parameters()).device
    if settings.precision != "f32":
        check_precision(network, shape, settings)
    if settings.backend == "stock":
        return network
    if settings.backend == "openvino":
        if device.type != "cpu":
            raise BackendError(f"the openvino backend runs on the CPU, found a network on {device}")
        from nnslim.running.openvino import OpenVINOEngine

        limit = machine_threads() if machine_threads() < cpus() else None  # OpenVINO itself goes by the CPUs
        return OpenVINOEngine(network, shape, precision=settings.precision, threads=settings.threads or limit)
    network = copy.deepcopy(network)
    try:
        graph: nn.Module = rewritten(network, shape)
    except RewriteError as error:
        _log.info("no rewrites: %s", error)
        graph = network
    if settings.backend == "compile":
        graph = torch.compile(graph)
    if device.type == "cuda":
        from nnslim.running.cuda import Graphed, fastest_variant

        dtype = _CUDA_TYPES[settings.precision]
        measured = isinstance(graph, fx.GraphModule) and not settings.deterministic
        return fastest_variant(graph, shape, dtype) if measured else Graphed(graph, dtype)
    if device.type == "cpu" and isinstance(graph, fx.GraphModule):
        graph = channels_last(graph)
    return graph


def check_precision(
    network: nn.Module, shape: Sequence[int], settings: Settings, device: torch.device | None = None
) -> None:
    """Refuse a precision that this machine does not have, or in which this network would go wrong.

    Args:
        network: any. shape: (B, C, *patch).
        settings: backend and precision; on a CPU "auto" is openvino where the precision is not f32.
        device: that it will run on; None: the network's.
    Raises:
        BackendError: the message says what would work.
    """
    precision = settings.precision
    if precision == "f32":
        return
    device = device or next(network.parameters()).device
    if device.type == "cuda" and precision in ("f16", "bf16"):
        if settings.backend in ("stock", "openvino"):
            raise BackendError(f"precision {precision} on CUDA needs eager, compile or auto, found {settings.backend}")
        if precision == "bf16" and not torch.cuda.is_bf16_supported(including_emulation=False):
            raise BackendError(f"precision bf16 is not available: {torch.cuda.get_device_name(device)} lacks it")
        return
    if settings.backend not in ("openvino", "auto"):
        raise BackendError(f"precision {precision} needs the openvino backend, found {settings.backend}")
    if device.type != "cpu":
        raise BackendError(f"precision {precision} needs the openvino backend, which runs on the CPU, found {device}")
    from nnslim.running.openvino import check_processor

    check_processor(precision)
    if precision == "bf16" and not bfloat16_is_safe(network, shape):
        raise BackendError(
            f"bf16 is refused for the patch {tuple(shape[2:])}: it leads to a 3D convolution one voxel wide with a "
            "stride above 1, which some processors compute wrongly in bf16; use --precision f32"
        )


def candidates(device: torch.device) -> list[Backend]:
    """Return the backends that `auto` compares on a device.

    torch.compile takes minutes on a CPU before the first patch is through, so it is compared on CUDA only.
    """
    if device.type == "cuda":
        return ["stock", "eager", "compile"]
    if device.type == "cpu":
        return ["eager", "openvino"] if importlib.util.find_spec("openvino") else ["eager", "stock"]
    return ["stock", "eager"]


def with_fallback(network: nn.Module, shape: Sequence[int], settings: Settings) -> tuple[nn.Module, str]:
    """Return an engine that has run once, and its backend: the one asked for, else eager, else the network itself.

    Raises:
        BackendError: a precision was asked for that only the failing backends have.
    """
    x = torch.zeros(tuple(shape), device=next(network.parameters()).device)
    return first_pass(network, x, settings, run_pass)[:2]


def first_pass(
    network: nn.Module, x: Tensor, settings: Settings, call: Callable[[nn.Module, Tensor], Tensor]
) -> tuple[nn.Module, str, Tensor]:
    """Return the first engine that can run a patch, its backend, and its answer; see `with_fallback`.

    Args:
        x: (B, C, *patch). call: runs an engine on it.
    """
    device = next(network.parameters()).device
    for name in dict.fromkeys((settings.backend, "eager", "stock")):
        has_it = settings.precision == "f32" or (name == "eager" and device.type == "cuda")
        if name != settings.backend and not has_it:
            break
        try:
            engine = make_engine(network, tuple(x.shape), replace(settings, backend=name))
            return engine, name, call(engine, x)
        except NNSlimError as error:
            problem = str(error)
        except Exception as error:  # whatever a compiler or a plugin raises
            problem = f"{type(error).__name__}: {first_line(error)}"
        if name != "stock":
            _log.warning("backend %s cannot be used: %s", name, problem)
    raise BackendError(f"backend {settings.backend}, precision {settings.precision}: {problem}")


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
        self._held = self._first = _Weights({})  # what the network holds; what it came with
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


_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


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


def settled(network: nn.Module, shape: Sequence[int], settings: Settings) -> str:
    """Return the backend that "auto" stands for in this process.

    It is the one that was measured to be the fastest before, where `remembered` knows one, and eager otherwise (on a
    CPU openvino for other precisions than f32). What is measured later counts in later processes only, so that a run
    predicts all its cases by one backend.
    """
    key = _key(network, shape, settings)
    if key not in _settled:
        on_gpu = next(network.parameters()).device.type == "cuda"
        standard = "eager" if settings.precision == "f32" or on_gpu else "openvino"
        _settled[key] = (None if settings.deterministic else remembered(network, shape, settings)) or standard
    return _settled[key]


@contextmanager
def believing(measured: Mapping[str, Any]) -> Iterator[None]:
    """Settle "auto" by the content that `measured_backends` had when a run began, in all its workers."""
    global _believed
    before, _believed = _believed, measured
    try:
        yield
    finally:
        _believed = before


def remembered(network: nn.Module, shape: Sequence[int], settings: Settings) -> Backend | None:
    """Return the backend that `fastest` found for this architecture, patch, device, threads and torch; None if none."""
    measured = measured_backends() if _believed is None else _believed
    known = measured.get(_key(network, shape, settings))
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
        return with_fallback(network, shape, replace(settings, backend="openvino"))
    made: dict[str, nn.Module] = {}
    for name in candidates(device):
        if single or name != "stock":
            engine, found = with_fallback(network, shape, replace(settings, backend=name))
            made.setdefault(found, engine)
    seconds = dict(zip(made, pass_seconds(list(made.values()), shape), strict=True))
    best = min(seconds, key=seconds.__getitem__)
    _log.info("backend %s: %s", best, ", ".join(f"{name} {value * 1e3:.0f} ms" for name, value in seconds.items()))
    remember(network, shape, settings, best)
    return made[best], best


def _key(network: nn.Module, shape: Sequence[int], settings: Settings) -> str:
    device = next(network.parameters()).device
    named = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()
    threads = settings.threads or machine_threads()  # those of a pass, see `Runner.forward`
    parts = [str(network), list(shape), device.type, named, threads, settings.precision, torch.__version__]
    parts += ["deterministic"] if settings.deterministic else []
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:24]


def remember(network: nn.Module, shape: Sequence[int], settings: Settings, backend: str) -> None:
    """Keep the backend that was the fastest; a cache that cannot be written is no reason to stop."""
    file = user_cache() / MEASURED
    try:
        make_folder(file.parent)
        write_kept(
            file, json.dumps({**measured_backends(), _key(network, shape, settings): backend}, indent=4).encode()
        )
    except (OutputError, OSError) as error:
        _log.debug("the choice is not kept: %s", error)
