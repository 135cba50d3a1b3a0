"""OpenVINO models on disk: by the hash of the network that they were made from, and beside checkpoints."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nnslim.caches import user_cache
from nnslim.errors import BackendError, OutputError, first_line
from nnslim.files import make_folder, output_error, remove, unwritable, whole_folder
from nnslim.optional import needed

# Raise this when the rewrites or the conversion change what they make, so that old files are not used.
CONVERSION_VERSION = 1
_SUM = b"\n<!-- nnslim sha256 %s -->\n"  # ends an .xml: of what precedes it and of the .bin
_MODEL = "model.xml"
_log = logging.getLogger("nnslim")


def openvino_module() -> Any:
    """Return the package, or raise a BackendError."""
    return needed("openvino", "nnslim[openvino]")


def network_fingerprint(network: nn.Module) -> str:
    """Return 40 hexadecimal digits that change with the network's structure and its weights.

    Cost: one pass over the bytes of the weights (a tenth of a second for 30 million parameters).
    """
    digest = hashlib.blake2b(digest_size=20)
    for name, module in network.named_modules():
        kind = type(module)
        switches = {key: value for key, value in sorted(vars(module).items()) if type(value) is bool}
        switches.pop("training")
        digest.update(f"{name} {kind.__module__}.{kind.__qualname__}({module.extra_repr()}) {switches}\n".encode())
    for name, tensor in (*network.named_parameters(), *network.named_buffers()):
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        flat = tensor.detach().cpu().contiguous().flatten()
        digest.update(flat.view(torch.uint8).numpy() if flat.numel() else b"")
    return digest.hexdigest()


def network_key(network: str, shape: Sequence[int], precision: str) -> str:
    """Return the name under which a converted model is kept, from the network's fingerprint.

    Only int8 changes the file: the other precisions are chosen when it is compiled.
    """
    kind = "int8" if precision == "int8" else "float"
    parts = [CONVERSION_VERSION, network, [1, *map(int, shape[1:])], kind]
    # A calibrated file is worth more than a new version's conversion; the format is read by later versions.
    parts += [] if kind == "int8" else [openvino_module().__version__]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:40]


def _place(key: str, cache: Path | None) -> Path:
    return (user_cache() / "openvino" if cache is None else Path(cache)) / key


def keep(model: Any, key: str, cache: Path | None) -> None:
    """Write a model, whole or not at all, or raise an OutputError; one that is there stays."""
    target = _place(key, cache)
    if target.exists():
        return
    try:
        with whole_folder(target) as side:
            write_openvino_model(model, side / _MODEL)
    except OutputError:
        if not (target / _MODEL).exists():  # else another worker of this run was first
            raise


def recall_model(key: str, cache: Path | None) -> Any | None:
    """Return the model, None where there is none; one that is damaged is removed, with a warning."""
    folder = _place(key, cache)
    if not os.path.lexists(folder):
        return None
    try:
        return read_model(folder / _MODEL, summed=True)
    except BackendError as error:
        _log.warning("the kept model cannot be used: %s", error)
    remove(folder)
    return None


def write_openvino_model(model: Any, path: Path, *, half: bool = False) -> None:
    """Write an ov.Model as `path` (.xml) and the .bin beside it, or raise an OutputError; half: weights in 16 bits.

    A comment at the end of the .xml holds a checksum of both.
    """
    make_folder(path.parent)
    try:
        openvino_module().save_model(model, str(path), compress_to_fp16=half)
        with path.open("ab") as stream:
            stream.write(_SUM % _checksum(path.read_bytes(), path.with_suffix(".bin").read_bytes()))
    except OSError as error:
        raise output_error(path, error) from error
    except RuntimeError as error:  # OpenVINO says nothing of a full disk
        size = sum(op.data.nbytes for op in model.get_ops() if op.get_type_name() == "Constant")
        raise output_error(path, unwritable(path.parent, size) or OSError(first_line(error))) from error


def read_model(path: Path, *, summed: bool = False) -> Any:
    """Return the ov.Model of an .xml file with a .bin beside it; summed: only one with a checksum.

    Raises:
        BackendError: it cannot be read, or is not what was written.
    """
    try:
        # What is read is what was checked; and mapped weights would follow a file that is written again.
        text, weights = (file.read_bytes() if file.is_file() else b"" for file in (path, path.with_suffix(".bin")))
        head, mark, _ = text.rpartition(_SUM[: _SUM.index(b"%")])
        if (mark or summed) and text != head + _SUM % _checksum(head, weights):
            raise BackendError(f"{path} and its .bin are not what was written; make them again")
        return openvino_module().Core().read_model(text, weights)
    except OSError as error:
        raise BackendError(f"{path} is not a readable OpenVINO model: {error.filename}: {error.strerror}") from error
    except RuntimeError as error:
        raise BackendError(f"{path} is not a readable OpenVINO model: {str(error).strip().splitlines()[-1]}") from error


def _checksum(text: bytes, weights: bytes) -> bytes:
    return hashlib.sha256(b"%d " % len(text) + text + weights).hexdigest().encode()


def replace_model(model: Any, path: Path) -> None:
    """Write `path` (.xml) and the .bin beside it, or leave what is there and raise an OutputError."""
    beside = path.with_name(f".{path.stem}.new.xml")
    made = [beside.with_suffix(".bin"), beside]
    try:
        write_openvino_model(model, beside)
        for file in made:  # the weights first: an .xml without its .bin would be read
            file.replace(path.with_suffix(file.suffix))
    except OSError as error:
        raise output_error(path, error) from error
    finally:
        for file in made:
            file.unlink(missing_ok=True)
