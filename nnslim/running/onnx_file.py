"""ONNX: a network's graph as a file that needs neither torch nor nnslim, in 32, 16 or 8 bits."""

from __future__ import annotations

import copy
import io
import warnings
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from nnslim.errors import BackendError, RewriteError, first_line
from nnslim.files import temporary_folder
from nnslim.optional import needed
from nnslim.running.openvino import silent_loggers
from nnslim.running.rewrites import rewritten

OPSET = 18  # the newest that the exporter writes without converting its own output
_QUANTISED = ["Conv", "ConvTranspose", "LeakyRelu", "Relu", "Concat", "Add"]
_SMALL = 256  # numbers; smaller constants are norms and biases, which 16 bits would cost more than they save


def onnx_modules() -> tuple[Any, Any]:
    """Return the packages onnx and onnxruntime, or raise a BackendError."""
    return needed("onnx", "nnslim[onnx]"), needed("onnxruntime", "nnslim[onnx]")


def to_onnx(network: nn.Module, shape: Sequence[int]) -> Any:
    """Return an onnx.ModelProto of static shape, input "image" and output "logits", after the exact rewrites.

    Args:
        network: in eval mode, one output. shape: (B, C, *patch).
    Raises:
        BackendError: onnx is missing, or this network cannot be exported.
    """
    onnx, _ = onnx_modules()
    network = copy.deepcopy(network).cpu().float().eval().requires_grad_(False)
    with suppress(RewriteError):
        network = rewritten(network, shape)
    names = {"input_names": ["image"], "output_names": ["logits"], "opset_version": OPSET}
    image, file, problem = torch.zeros(tuple(shape)), io.BytesIO(), None
    with torch.no_grad(), warnings.catch_warnings(), silent_loggers("torch.onnx", "onnxscript", "onnx_ir"):
        warnings.simplefilter("ignore")
        try:
            return torch.onnx.export(
                network, (image,), dynamo=True, external_data=False, verbose=False, **names
            ).model_proto
        except Exception as error:  # an older torch, or an operator that the new exporter does not know
            problem = error
        try:
            old = {"dynamo": False} if "dynamo" in torch.onnx.export.__kwdefaults__ else {}
            torch.onnx.export(network, (image,), file, **(names | {"opset_version": 17}), **old)
        except Exception as error:
            raise BackendError(f"{type(network).__name__} cannot be exported: {first_line(problem)}") from error
    return onnx.load_from_string(file.getvalue())


def with_half_weights(model: Any) -> Any:
    """Return a copy that stores its weights in 16 bits and computes in 32, as OpenVINO's files do.

    Every runtime turns the weights back once, when it loads the file. A weight beyond the range of 16 bits stays.
    """
    onnx, _ = onnx_modules()
    made = onnx.ModelProto()
    made.CopyFrom(model)
    casts = []
    for weight in made.graph.initializer:
        values = onnx.numpy_helper.to_array(weight)
        if values.dtype != np.float32 or values.size < _SMALL or np.abs(values).max() > np.finfo(np.float16).max:
            continue
        name = weight.name
        weight.CopyFrom(onnx.numpy_helper.from_array(values.astype(np.float16), f"{name}_half"))
        casts.append(onnx.helper.make_node("Cast", [f"{name}_half"], [name], f"{name}_cast", to=onnx.TensorProto.FLOAT))
    nodes = [*casts, *made.graph.node]
    del made.graph.node[:]
    made.graph.node.extend(nodes)
    del made.graph.value_info[:]
    return made


def in_int8(model: Any, tiles: Iterable[Tensor]) -> Any:
    """Return a copy whose convolutions run in eight bits, calibrated on (1, C, *patch) tiles.

    onnxruntime's own quantisation, because it runs no faster what others have quantised. Weights use half their range.

    Raises:
        BackendError: onnxruntime is missing, or there are no tiles.
    """
    onnx, _ = onnx_modules()
    from onnxruntime import quantization

    images = [{"image": tile.contiguous().numpy()} for tile in tiles]

    class Reader(quantization.CalibrationDataReader):
        def get_next(self) -> dict[str, np.ndarray] | None:
            return images.pop(0) if images else None

    if not images:
        raise BackendError("int8 needs calibration tiles, found none")
    head = [node.name for node in model.graph.node if node.name and model.graph.output[0].name in node.output]
    with temporary_folder() as folder, silent_loggers("root"):
        source, target = folder / "float.onnx", folder / "int8.onnx"
        onnx.save(model, str(source))
        quantization.quantize_static(
            str(source),
            str(target),
            Reader(),
            quant_format=quantization.QuantFormat.QDQ,
            per_channel=True,
            reduce_range=True,  # as in `nnslim.running.int8`: sums overflow on processors without VNNI
            activation_type=quantization.QuantType.QUInt8,
            weight_type=quantization.QuantType.QInt8,
            op_types_to_quantize=_QUANTISED,
            nodes_to_exclude=head,
        )
        return onnx.load(str(target))


def run_onnx(file: Path, image: Tensor) -> Tensor:
    """Return what a file makes of (B, C, *patch), by onnxruntime on the CPU, or raise a BackendError."""
    _, onnxruntime = onnx_modules()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    try:
        session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
        (logits,) = session.run(None, {"image": image.contiguous().numpy()})
    except Exception as error:  # onnxruntime has a class for each kind, below RuntimeError or not
        raise BackendError(f"{file} does not run: {first_line(error)}") from error
    return torch.from_numpy(logits)
