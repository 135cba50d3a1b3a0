"""Eight-bit models: post-training quantisation by NNCF on calibration tiles, and where they are kept."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn

from nnslim.errors import BackendError
from nnslim.files import temporary_folder
from nnslim.optional import name_and_home, needed
from nnslim.running.kept_models import (
    keep,
    network_fingerprint,
    network_key,
    openvino_module,
    read_model,
    write_openvino_model,
)
from nnslim.running.openvino import convert, silent_loggers

INT8_NAME = "nnslim_int8.xml"  # beside a checkpoint
_NETWORK = ["nnslim", "network"]  # where a model says of which network it was made
_CONVOLUTIONS = ("Convolution", "GroupConvolution", "ConvolutionBackpropData", "GroupConvolutionBackpropData")
_MOVING = ("Reshape", "Transpose", "Tile", "Squeeze", "Unsqueeze")


@dataclass(frozen=True)
class Quantised:
    """A model in eight bits.

    Attributes:
        model: the ov.Model.
        layers, in_int8: convolutions in all, and those that are computed in eight bits.
        bytes_before, bytes_after: size of the weights in a file. tiles: number that was calibrated on.
    """

    model: Any
    layers: int
    in_int8: int
    bytes_before: int
    bytes_after: int
    tiles: int

    def line(self) -> str:
        """Return one line for the user."""
        return (
            f"int8: {self.in_int8} of {self.layers} convolutions, {self.tiles} tiles, "
            f"{self.bytes_before / 1e6:.1f} -> {self.bytes_after / 1e6:.1f} MB"
        )


def quantize(network: Any, shape: Sequence[int], tiles: Iterable[Tensor], *, channels_last: bool = True) -> Quantised:
    """Return the network with convolutions in eight bits, calibrated on tiles.

    Weights are quantised per channel and symmetrically, activations per tensor with their own zero point, which suits
    leaky ReLU. Norms and the layers that make the logits stay in float. Weights use half of their range, so that sums
    do not overflow on processors without VNNI.

    Args:
        network: in eval mode, or an ov.Model from `convert`.
        shape: (B, C, *patch) that the tiles have; the model has batch 1.
        tiles: (1, C, *patch) float32 each; all are used, some ten are enough.
        channels_last: layout of the logits of a network that is converted here, see `convert`.
    Raises:
        BackendError: openvino or nncf is missing, there are no tiles, one has another shape, or no layer was quantised.
    """
    openvino_module()
    nncf = needed("nncf", "nnslim[openvino]")
    shape = (1, *(int(size) for size in shape[1:]))
    name = network_fingerprint(network) if isinstance(network, nn.Module) else ""
    model = convert(network, shape, channels_last=channels_last) if name else network
    data = [_checked(tile, shape) for tile in tiles]
    if not data:
        raise BackendError("int8 needs calibration tiles, found none")
    kept = _last_names(model)
    loud = silent_loggers("nncf", "torch.utils.cpp_extension")
    with name_and_home(), loud, redirect_stdout(io.StringIO()):  # progress bars
        made = nncf.quantize(
            model,
            nncf.Dataset(data),
            preset=nncf.QuantizationPreset.MIXED,
            subset_size=len(data),
            fast_bias_correction=True,
            ignored_scope=nncf.IgnoredScope(names=kept, validate=False),
            # Processors without VNNI add pairs of products in 16 bits, which overflow unless weights use half of their
            # range; a file may come to such a machine later.
            advanced_parameters=nncf.AdvancedQuantizationParameters(overflow_fix=nncf.OverflowFix.ENABLE),
        )
    made.set_rt_info(str(channels_last), ["nnslim", "channels_last"])
    if name:
        made.set_rt_info(name, _NETWORK)
    layers = [op for op in made.get_ops() if op.get_type_name() in _CONVOLUTIONS]
    in_int8 = [op for op in layers if _source(op).get_type_name() == "FakeQuantize"]
    if len(layers) > len(kept) and not in_int8:
        raise BackendError(f"nothing changed: none of {len(layers)} convolutions was quantised to eight bits")
    return Quantised(made, len(layers), len(in_int8), _size(model), _size(made), len(data))


def offer(network: nn.Module, shape: Sequence[int], path: Path, cache: Path | None = None) -> bool:
    """Put a model file into the cache, where `OpenVINOEngine(network, precision="int8")` finds it.

    Args:
        network: with the weights that the engine will have. shape: (B, C, *patch). path: the .xml file.
        cache: folder of converted models; None for nnslim's.
    Returns:
        False where the file was made from other weights: it is then not used.
    Raises:
        BackendError: it cannot be read, or openvino is missing. OutputError: the cache cannot be written.
    """
    openvino_module()
    model, name = read_model(path), network_fingerprint(network)
    if not model.has_rt_info(_NETWORK) or str(model.get_rt_info(_NETWORK).value) != name:
        return False
    keep(model, network_key(name, shape, "int8"), cache)
    return True


def _checked(tile: Tensor, shape: tuple[int, ...]) -> np.ndarray:
    if tuple(tile.shape) != shape:
        raise BackendError(f"a calibration tile has shape {tuple(tile.shape)}, expected {shape}")
    return tile.detach().cpu().float().contiguous().numpy()


def _last_names(model: Any) -> list[str]:
    """Return the convolutions after which only reordering comes and, before them, the factors of a factored layer."""
    # Narrow tensors there carry the whole answer; in eight bits they cost half of all voxels that change their label.
    heads = _convolutions_above(model.get_results())
    before, found = _convolutions_above(heads), [*heads]
    while before and all(set(node.input_value(1).get_shape()[2:]) == {1} for node in before):
        inner = _convolutions_above(before, only=("Add",))
        found += before + inner
        before = _convolutions_above(inner, only=("Add",))
    return sorted({node.get_friendly_name() for node in found})


def _source(node: Any) -> Any:
    """Return the node that makes a layer's input; NNCF quantises before what only moves values."""
    source = node.input_value(0).get_node()
    return _source(source) if source.get_type_name() in _MOVING else source


def _convolutions_above(nodes: list[Any], only: tuple[str, ...] = ()) -> list[Any]:
    """Return the convolutions nearest to the nodes' inputs on all ways up, through any kind of node or `only` some."""
    found, seen, waiting = [], set(), [node.input_value(0).get_node() for node in nodes]
    while waiting:
        node = waiting.pop()
        if node.get_name() in seen:  # each residual sum doubles the ways up
            continue
        seen.add(node.get_name())
        kind = node.get_type_name()
        if kind in _CONVOLUTIONS:
            found.append(node)
        elif kind not in ("Parameter", "Constant") and (not only or kind in only):
            waiting += [value.get_node() for value in node.input_values()]
    return found


def _size(model: Any) -> int:
    """Return the bytes of a model's weights in a file."""
    with temporary_folder() as folder:
        write_openvino_model(model, folder / "model.xml")
        return (folder / "model.bin").stat().st_size
