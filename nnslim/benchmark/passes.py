"""One forward pass of a network, on any backend, as a job for `measure_rounds`."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nnslim.benchmark.alternated import Candidate, TimedJob
from nnslim.errors import BackendError, ConfigError, nearest
from nnslim.files import save_checkpoint
from nnslim.network.cost import measure_cost
from nnslim.optional import needed
from nnslim.running.engine import BACKENDS, Settings, fastest, make_engine
from nnslim.running.machine import cpu_name

# What people would do without nnslim; here to be compared with.
REFERENCES = ("stock-compile", "openvino-plain")
WAYS = (*BACKENDS, *REFERENCES)


@dataclass(frozen=True)
class Way:
    """How a network is run.

    Attributes:
        backend: one of `WAYS`: a backend of `nnslim.running.engine`; "stock-compile": torch.compile of the untouched
            network; "openvino-plain": OpenVINO's own conversion of the untouched network.
        precision: f32, bf16, f16 or int8. threads: CPU threads, None for torch's own choice.
        device: cpu or cuda. autocast: as torch's, in half precision.
    """

    backend: str = "stock"
    precision: str = "f32"
    threads: int | None = None
    device: str = "cpu"
    autocast: bool = False

    def __post_init__(self) -> None:
        """Check what a user may have typed.

        Raises:
            ConfigError: an unknown backend, or threads below 1.
        """
        if self.backend not in WAYS:
            raise ConfigError(f"unknown backend '{self.backend}'; {nearest(self.backend, WAYS)}")
        if self.threads is not None and self.threads < 1:
            raise ConfigError(f"threads is at least 1, found {self.threads}")


def job_of(name: str, network: Path, shape: Sequence[int], way: Way) -> TimedJob:
    """Return the job of timing a network that `keep_network` wrote on an input of that shape."""
    return TimedJob(name, partial(prepare, network, tuple(shape), way))


def keep_network(network: nn.Module, path: Path) -> None:
    """Write a whole network for other processes of this run; such a file is not for exchange.

    Raises:
        OutputError: it cannot be written.
    """
    save_checkpoint(network.eval(), path)  # type: ignore[arg-type]


def prepare(path: Path, shape: Sequence[int], way: Way) -> Candidate:
    """Load the network and make its engine.

    Args:
        path: written by `keep_network` in this run, since unpickling executes code.
        shape: (B, C, *patch).
    Raises:
        BackendError, RewriteError: the backend is missing or cannot run this network.
    """
    way = replace(way, threads=way.threads or torch.get_num_threads())  # OpenVINO would take all processors
    torch.set_num_threads(way.threads)
    network = torch.load(path, map_location="cpu", weights_only=False).eval()
    facts = {**network_facts(network, shape), "threads": way.threads}
    if way.device == "cuda" and not torch.cuda.is_available():
        raise BackendError("device cuda was asked for, but torch finds no CUDA device")
    network.to(way.device)
    engine, backend = _engine(network, shape, way)
    facts |= {"backend": backend, "device_name": device_name(way.device)}
    x = torch.randn(tuple(shape), generator=torch.Generator().manual_seed(0)).to(way.device)
    heap = way.device == "cpu" and backend not in ("stock", *REFERENCES)
    return Candidate(partial(_one_pass, engine, x, way), facts, heap)


def _one_pass(engine: Callable[[Tensor], Any], x: Tensor, way: Way) -> None:
    with torch.inference_mode(), torch.autocast(way.device, enabled=way.autocast):
        engine(x)
    if way.device == "cuda":
        torch.cuda.synchronize()


def _engine(network: nn.Module, shape: Sequence[int], way: Way) -> tuple[Callable[[Tensor], Any], str]:
    """Return what runs, and the backend; for "auto" with the one that it came to."""
    if way.backend == "stock-compile":
        return torch.compile(network), way.backend
    if way.backend == "openvino" and way.precision == "int8" and way.device == "cpu":
        from nnslim.running.int8 import quantize
        from nnslim.running.openvino import OpenVINOEngine

        # Noise is enough: the time of a pass does not depend on the scales.
        tile = torch.randn(1, *shape[1:], generator=torch.Generator().manual_seed(1))
        model = quantize(network, shape, [tile]).model
        return OpenVINOEngine(model, shape, precision="int8", threads=way.threads), way.backend
    if way.backend == "openvino-plain":
        return PlainOpenVINO(convert_plain(network, shape), way.threads), way.backend
    settings = Settings(way.backend, way.precision, way.threads)  # type: ignore[arg-type]
    if way.backend == "auto":
        engine, found = fastest(network, shape, settings)
        return engine, f"auto: {found}"
    return make_engine(network, shape, settings), way.backend


class PlainOpenVINO:
    """An OpenVINO model of one input and one output, such as `convert_plain` makes, for one stream in float32."""

    def __init__(self, model: Any, threads: int | None = None) -> None:
        """Compile it."""
        import openvino

        options: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}
        if threads is not None:
            options["INFERENCE_NUM_THREADS"] = threads
        self._request = openvino.Core().compile_model(model, "CPU", options).create_infer_request()

    def __call__(self, x: Tensor) -> Tensor:
        """(B, C, *patch) -> (B, heads, *patch), valid until the next call."""
        self._request.infer([x.numpy()], share_inputs=True)
        return torch.from_numpy(self._request.get_output_tensor().data)


def convert_plain(network: nn.Module, shape: Sequence[int]) -> Any:
    """Return the network as an OpenVINO model of that static input shape; traced at half the patch where that fits.

    Raises:
        BackendError: OpenVINO is not installed.
    """
    openvino = needed("openvino", "nnslim[openvino]")
    small = [size // 2 if size % 64 == 0 and size > 64 else size for size in shape[2:]]
    with torch.inference_mode(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the converter's tracing is deprecated in torch
        model = openvino.convert_model(network, example_input=torch.zeros(*shape[:2], *small))
    model.reshape(list(shape))
    return model


def network_facts(network: nn.Module, shape: Sequence[int]) -> dict[str, int]:
    """Return exact parameters, MACs in both conventions for the whole batch, and bytes that layers must move.

    traffic_bytes: each convolution reads its input and writes its output once, in float32.
    """
    cost = measure_cost(network, shape)
    moved = [size for layer in cost.layers.values() if layer.macs for size in (layer.input_shape, layer.output_shape)]
    return {
        "parameters": cost.parameters,
        "macs": cost.macs(),
        "macs_fvcore": cost.macs("fvcore"),
        "traffic_bytes": 4 * shape[0] * sum(map(math.prod, moved)),
    }


def device_name(device: str = "cpu") -> str:
    """Return the name of the processor or the GPU."""
    return torch.cuda.get_device_name() if device == "cuda" else cpu_name()


def way_columns(way: Way) -> dict[str, Any]:
    """Return the way as columns of a table; `compile` as tucker-cnn's table has it."""
    return {**asdict(way), "threads": way.threads or "", "compile": way.backend in ("compile", "stock-compile")}
