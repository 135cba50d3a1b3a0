"""Backends: ways to run one network on one patch shape."""

from __future__ import annotations

import copy
import importlib.util
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, fx, nn

from nnslim.errors import BackendError, NNSlimError, RewriteError, first_line
from nnslim.running.bfloat16 import bfloat16_is_safe
from nnslim.running.cpu import channels_last
from nnslim.running.rewrites import rewritten
from nnslim.running.timing import run_pass

Backend = Literal["auto", "stock", "eager", "compile", "openvino"]
Precision = Literal["f32", "bf16", "f16", "int8"]
BACKENDS: tuple[str, ...] = get_args(Backend)
_CUDA_TYPES = {"f32": torch.half, "f16": torch.half, "bf16": torch.bfloat16}  # nnU-Net's autocast is float16
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
    """

    backend: Backend = "auto"
    precision: Precision = "f32"
    threads: int | None = None


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

        return OpenVINOEngine(network, shape, precision=settings.precision, threads=settings.threads)
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
        return fastest_variant(graph, shape, dtype) if isinstance(graph, fx.GraphModule) else Graphed(graph, dtype)
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
            engine = make_engine(network, tuple(x.shape), Settings(name, settings.precision, settings.threads))
            return engine, name, call(engine, x)
        except NNSlimError as error:
            problem = str(error)
        except Exception as error:  # whatever a compiler or a plugin raises
            problem = f"{type(error).__name__}: {first_line(error)}"
        if name != "stock":
            _log.warning("backend %s cannot be used: %s", name, problem)
    raise BackendError(f"backend {settings.backend}, precision {settings.precision}: {problem}")
