"""OpenVINO: conversion of a network after its rewrites, and an engine that runs it on a CPU."""

from __future__ import annotations

import copy
import logging
import threading
import warnings
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from nnslim.errors import BackendError, OutputError, RewriteError, first_line
from nnslim.optional import name_and_home
from nnslim.running.kept_models import keep, network_fingerprint, network_key, openvino_module, read_model, recall_model
from nnslim.running.rewrites import rewritten

_LAST = ["nnslim", "channels_last"]  # where a model says how its logits lie
_NEEDS = {"bf16": "BF16", "f16": "FP16"}  # OpenVINO's names of what a CPU can do
_HINTS = {"f32": "f32", "bf16": "bf16", "f16": "f16", "int8": "f32"}  # int8 files say themselves what is int8
_compiled: weakref.WeakValueDictionary[tuple[Any, ...], _Compiled] = weakref.WeakValueDictionary()
_log = logging.getLogger("nnslim")


@contextmanager
def silent_loggers(*names: str) -> Iterator[None]:
    """Drop what these loggers say below a critical error."""
    levels = {logger: logger.level for logger in map(logging.getLogger, names)}
    for logger in levels:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in levels.items():
            logger.setLevel(level)


def convert(network: nn.Module, shape: Sequence[int], *, channels_last: bool) -> Any:
    """Return the network as an ov.Model of static shape, input "image" and output "logits", after the exact rewrites.

    A network whose path does not depend on its input is traced at a small size, which takes a few seconds where the
    full patch takes a minute. The model has its own copy of the weights.

    Args:
        network: in eval mode; of several outputs the first counts.
        shape: (B, C, *patch).
        channels_last: return (B, *patch, heads), which saves a pass over the logits, instead of (B, heads, *patch).
    Raises:
        BackendError: openvino is missing, or cannot convert this network.
    """
    openvino_module()
    shape = tuple(int(size) for size in shape)
    network = copy.deepcopy(network).cpu().float().eval().requires_grad_(False)
    whole = _OneOutput(network, channels_last)
    wanted = _output_shape(whole, shape)
    if wanted is None:
        raise BackendError(f"{type(network).__name__} does not run on {shape}")
    sizes = [shape]
    try:
        network = rewritten(network, shape)
        whole = _OneOutput(network, channels_last)
        sizes.insert(0, _small(whole, shape))
    except RewriteError as error:
        _log.info("converted without rewrites: %s", error)
    problem: Exception | None = None
    for size in dict.fromkeys(sizes):
        try:
            model = convert_at(whole, size, shape)
        except Exception as error:  # whatever torch's tracer and OpenVINO's frontend raise
            problem = problem or error
            continue
        if tuple(model.outputs[0].shape) == wanted:
            model.set_rt_info(str(channels_last), _LAST)
            return model
        problem = BackendError(f"returns {tuple(model.outputs[0].shape)} instead of {wanted}")
    raise BackendError(f"openvino cannot convert {type(network).__name__}: {first_line(problem)}") from problem


class _OneOutput(nn.Module):
    """The network with one output, in the layout that was asked for."""

    def __init__(self, network: nn.Module, channels_last: bool) -> None:
        super().__init__()
        self.network, self.channels_last = network, channels_last

    def forward(self, image: Tensor) -> Tensor:
        y = self.network(image)
        y = y[0] if isinstance(y, (tuple, list)) else y
        return y.movedim(1, -1) if self.channels_last else y


def convert_at(network: nn.Module, size: Sequence[int], shape: Sequence[int]) -> Any:
    openvino = openvino_module()
    with torch.no_grad(), warnings.catch_warnings(), name_and_home():
        warnings.simplefilter("ignore")  # torch's tracer is deprecated, and OpenVINO has no other way yet
        free = openvino.PartialShape([*shape[:2], *([-1] * (len(shape) - 2))])
        known = {} if tuple(size) == tuple(shape) else {"input": [free]}
        # Told a whole shape at this point, OpenVINO 2026.4 divides by zero (SIGFPE) in token-sparse encoders.
        model = openvino.convert_model(network, example_input=torch.zeros(tuple(size), device="cpu"), **known)
    for op in model.get_ops():
        if op.get_type_name() == "ScatterElementsUpdate" and op.get_attributes().get("reduction", "none") != "none":
            # With whole shapes it ends the process (2026.4); merged tokens are added up so.
            raise BackendError("it adds up by index, which OpenVINO does not survive")
    model.reshape(list(shape))
    model.inputs[0].get_tensor().set_names({"image"})
    model.outputs[0].get_tensor().set_names({"logits"})
    return model


def _output_shape(network: nn.Module, shape: Sequence[int]) -> tuple[int, ...] | None:
    """Return the shape of the output without computing it; None where the network does not run on that shape."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    try:
        with torch.no_grad(), mode, silent_loggers("torch._subclasses.fake_tensor"):
            return tuple(network(torch.empty(tuple(shape), device="cpu")).shape)
    except Exception:  # a network's own code may raise anything
        return None


def _small(network: nn.Module, shape: Sequence[int]) -> tuple[int, ...]:
    """Halve the patch as often as the network still runs."""
    size = tuple(shape)
    while all(axis % 2 == 0 and axis > 16 for axis in size[2:]):
        half = (*size[:2], *(axis // 2 for axis in size[2:]))
        if _output_shape(network, half) is None:
            break
        size = half
    return size


class OpenVINOEngine(nn.Module):
    """Runs a network's present weights with OpenVINO; (B, C, *patch) -> (B, heads, *patch), channels last in memory.

    Outputs belong to the caller: their memory is reused only when nothing refers to them any more.
    """

    def __init__(
        self,
        network: Any,
        shape: Sequence[int],
        *,
        precision: str = "f32",
        threads: int | None = None,
        throughput: bool = False,
        cache: Path | None = None,
    ) -> None:
        """Convert, or read what is kept of an earlier conversion, and compile.

        Args:
            network: a network in eval mode, an ov.Model from `convert` or `nnslim.running.int8.quantize`, or the path
                of such a model's .xml file.
            shape: (B, C, *patch); the engine takes any batch.
            precision: f32; bf16 or f16 where the CPU has it; int8 for a network that was calibrated before, see
                `nnslim.running.int8`.
            threads: None for all CPUs of the process.
            throughput: run the items of a batch beside each other, not one after the other.
            cache: folder of converted models; None for nnslim's.
        Raises:
            BackendError: openvino is missing or cannot run this network, or the CPU lacks the precision.
        """
        super().__init__()
        openvino = openvino_module()
        if precision not in _HINTS:
            raise BackendError(f"precision {precision!r} is not known; expected one of {', '.join(_HINTS)}")
        check_processor(precision)
        core = openvino.Core()
        self.shape = tuple(int(size) for size in shape)
        settings = {
            "INFERENCE_PRECISION_HINT": _HINTS[precision],  # otherwise OpenVINO takes bf16 without asking
            "PERFORMANCE_HINT": "THROUGHPUT" if throughput else "LATENCY",
            **({} if threads is None else {"INFERENCE_NUM_THREADS": int(threads)}),
        }
        self.compiled = _prepared(core, network, (1, *self.shape[1:]), precision, settings, cache)
        model = self.compiled.model
        count = int(model.get_property("OPTIMAL_NUMBER_OF_INFER_REQUESTS")) if throughput else 1
        self._requests = [model.create_infer_request() for _ in range(count)]
        self.outputs = _Buffers()
        self._lock = threading.Lock()  # a request that is running cannot be given another image

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, *patch) float on the CPU -> (B, heads, *patch) float32; several threads take turns."""
        if tuple(x.shape[1:]) != self.shape[1:]:
            raise BackendError(f"the engine was made for tiles of {self.shape[1:]}, found {tuple(x.shape[1:])}")
        if x.device.type != "cpu":
            raise BackendError(f"the openvino backend runs on the CPU, found a tensor on {x.device}")
        images = x.detach().float().contiguous().numpy()
        tensor = openvino_module().Tensor
        with self._lock:
            made = self.outputs.take((len(images), *self.compiled.model.outputs[0].shape[1:]))
            for number, image in enumerate(images):
                request = self._requests[number % len(self._requests)]
                request.wait()
                request.set_input_tensor(tensor(image[None], shared_memory=True))
                request.set_output_tensor(tensor(made[number : number + 1], shared_memory=True))
                request.start_async()
            for request in self._requests:
                request.wait()
        logits = torch.from_numpy(made)
        return logits.movedim(-1, 1) if self.compiled.channels_last else logits


@dataclass(eq=False)
class _Compiled:
    """A model of batch 1, ready to run, and whether its channels come last."""

    model: Any
    channels_last: bool


class _Buffers:
    """Arrays for outputs. A fresh one costs the kernel as much time as the reordering of its content would."""

    def __init__(self) -> None:
        self._known: list[tuple[np.ndarray, weakref.ref[np.ndarray]]] = []

    def __len__(self) -> int:
        return len(self._known)

    def take(self, shape: tuple[int, ...]) -> np.ndarray:
        """Return an array of its own kind; its memory is reused once it and the tensors over it are deleted."""
        busy = [(array, ref) for array, ref in self._known if ref() is not None]
        free = [array for array, ref in self._known if ref() is None and array.shape == shape]
        array = free[0] if free else np.empty(shape, dtype=np.float32)
        view = array.view()
        self._known = [*busy, (array, weakref.ref(view))]
        return view


def _prepared(
    core: Any, network: Any, shape: tuple[int, ...], precision: str, settings: dict[str, Any], cache: Path | None
) -> _Compiled:
    """Return a compiled model of batch 1; two engines of one network share it."""
    if not isinstance(network, nn.Module):
        model = read_model(Path(network)) if isinstance(network, (str, Path)) else network
        return _compile(core, model, shape, settings)
    key = network_key(network_fingerprint(network), shape, precision)
    name = (key, *sorted(settings.items()))
    if (known := _compiled.get(name)) is not None:
        return known
    model = recall_model(key, cache)
    if model is None:
        if precision == "int8":
            raise BackendError(
                f"there is no int8 model of these weights and the patch {shape[2:]}; calibrate one on images first: "
                "nnslim export --format openvino --precision int8 -i IMAGES"
            )
        model = convert(network, shape, channels_last=True)
        try:
            keep(model, key, cache)
        except OutputError as error:  # a full or read-only cache must not stop a prediction
            _log.warning("the converted model is not kept: %s", error)
    _compiled[name] = made = _compile(core, model, shape, settings)
    return made


def _compile(core: Any, model: Any, shape: tuple[int, ...], settings: dict[str, Any]) -> _Compiled:
    found = tuple(model.inputs[0].shape) if not model.inputs[0].partial_shape.is_dynamic else None
    if found is not None and found[1:] != shape[1:]:
        raise BackendError(f"the model takes tiles of {found[1:]}, asked for {shape[1:]}")
    try:
        if found != shape:
            model = model.clone()
            model.reshape(list(shape))
        last = model.has_rt_info(_LAST) and str(model.get_rt_info(_LAST).value) == "True"
        return _Compiled(core.compile_model(model, "CPU", settings), last)
    except RuntimeError as error:
        raise BackendError(f"openvino cannot compile the network: {str(error).strip().splitlines()[-1]}") from error


def check_processor(precision: str) -> None:
    """Raise a BackendError where openvino is missing, or the processor does not compute in the precision."""
    able = openvino_module().Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    if precision in _NEEDS and _NEEDS[precision] not in able:
        raise BackendError(
            f"precision {precision} is not available: this processor computes in {', '.join(sorted(able))}; use "
            "--precision f32"
        )
