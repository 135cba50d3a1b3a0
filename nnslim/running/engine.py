"""Backends: ways to run one network on one patch shape, and the choice between them."""

from __future__ import annotations

import copy
import hashlib
import importlib.util
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor, fx, nn

from nnslim.caches import user_cache, write_kept
from nnslim.errors import BackendError, NNSlimError, OutputError, RewriteError, first_line
from nnslim.files import make_folder
from nnslim.running.bfloat16 import bfloat16_is_safe
from nnslim.running.cpu import channels_last
from nnslim.running.machine import MEASURED, cpu_name, cpus, machine_threads, measured_backends
from nnslim.running.rewrites import rewritten
from nnslim.running.timing import pass_seconds, run_pass

Backend = Literal["auto", "stock", "eager", "compile", "openvino"]
Precision = Literal["f32", "bf16", "f16", "int8"]
BACKENDS: tuple[str, ...] = get_args(Backend)
_CUDA_TYPES = {"f32": torch.half, "f16": torch.half, "bf16": torch.bfloat16}  # nnU-Net's autocast is float16
_settled: dict[str, str] = {}
_believed: Mapping[str, Any] | None = None
_log = logging.getLogger("nnslim")


@dataclass(frozen=True)
class Settings:
    """How to run a network.

    Attributes:
        backend: "stock": the network untouched. "eager": torch, after the exact rewrites. "compile": torch.compile.
            "openvino". "auto": whichever measures fastest here, see `settled`.
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
    threads = settings.threads or machine_threads()  # those of a pass, see `nnslim.running.runner`
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
