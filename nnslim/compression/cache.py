"""Compressed weights on disk, by the hash of what they were made from."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import logging
import pickle
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from nnslim.caches import read_kept, user_cache, write_kept
from nnslim.compression.compress_network import Slimmed, StateDict, rebuild
from nnslim.compression.config import SlimConfig
from nnslim.compression.guard import Guard
from nnslim.errors import ConfigError, NNSlimError, one_line
from nnslim.files import checkpoint_bytes, make_folder
from nnslim.methods.base import Decision
from nnslim.network.cost import Counts
from nnslim.network.spec import SPEC_VERSION, SlimSpec
from nnslim.running.speed import Speed

# Raise this when a method computes other weights from the same input, so that old files are not used.
CACHE_VERSION = 3
_UNUSABLE = (OSError, RuntimeError, LookupError, AttributeError, ValueError, TypeError, EOFError, MemoryError)
_log = logging.getLogger("nnslim")


def cache_folder(config: SlimConfig) -> Path:
    """Return the cache folder: the config's, else NNSLIM_CACHE, else nnslim in the user's cache folder."""
    if config.cache.folder is None:
        return user_cache()
    try:
        return config.cache.folder.expanduser()
    except RuntimeError as error:
        raise ConfigError(f"cache.folder {config.cache.folder}: {one_line(error)} Name a full path") from error


def cache_key(
    network: nn.Module, weights: Sequence[StateDict], config: SlimConfig, shape: Sequence[int], images: str = ""
) -> str:
    """Return 40 hexadecimal digits that change with the weights, the architecture, the settings, the patch or images.

    `images` is the fingerprint of the calibration images.
    Cost: one pass over the bytes of the weights (about a second per GB).
    """
    digest = hashlib.blake2b(digest_size=20)
    switches = [  # the printed form leaves them out: deep supervision, for one
        f"{name}.{key}={value}"
        for name, module in network.named_modules()
        for key, value in sorted(vars(module).items())
        if isinstance(value, bool) and key != "training"
    ]
    head = [CACHE_VERSION, SPEC_VERSION, config.identity(), list(shape), str(network), switches, images]
    digest.update(json.dumps(head, sort_keys=True).encode())
    for fold in weights:
        seen: set[int] = set()
        for name, tensor in fold.items():
            digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
            if tensor.data_ptr() not in seen:  # nnU-Net lists the same tensor under several names
                seen.add(tensor.data_ptr())
                flat = tensor.detach().cpu().contiguous().flatten()
                digest.update(flat.view(torch.uint8).numpy() if flat.numel() else b"")
    return digest.hexdigest()


def store_weights(slimmed: Slimmed, key: str, folder: Path) -> Path:
    """Write a compressed network, whole or not at all; OutputError where the folder cannot be written."""
    make_folder(folder)
    path = folder / f"{key}.pt"
    speed = slimmed.speed.to_dict() if slimmed.speed else None
    texts = {"spec": slimmed.spec.to_dict(), "summary": slimmed.summary(), "speed": speed}
    content = {name: json.dumps(text) for name, text in texts.items()} | {"weights": list(slimmed.weights)}
    write_kept(path, checkpoint_bytes(content))
    return path


def recall_weights(network: nn.Module, key: str, folder: Path, guard: Guard | None = None) -> Slimmed | None:
    """Return what `store_weights` kept under the key, or None. A damaged file is reported, ignored and later replaced.

    A network in which a guard left layers dense is only used with a guard of the same machine and backend. Any other
    is used, and is measured first if a guard is given that has not measured it.
    """
    found = _read(network, folder / f"{key}.pt")
    if found is None or (guard is not None and not found.spec.edits and not found.refused):
        return found
    speed = found.speed
    if guard is not None and speed is not None and speed.where == guard.where:
        return found
    if found.refused or (speed is not None and speed.put_back):
        return None
    if guard is None:
        return found
    speed = guard.measure(network, found.network, found.input_shape)
    return dataclasses.replace(found, speed=speed) if speed.gains or not guard.puts_back else None


def _read(network: nn.Module, path: Path) -> Slimmed | None:
    try:
        if (kept := read_kept(path)) is None:
            return None
        content = torch.load(io.BytesIO(kept), map_location="cpu", weights_only=True)
        spec = SlimSpec.from_dict(json.loads(content["spec"]))
        summary, speed = json.loads(content["summary"]), json.loads(content.get("speed", "null"))
        weights = tuple(content["weights"])
        return Slimmed(
            rebuild(network, spec, weights[0]),
            weights,
            spec,
            tuple(Decision.from_dict(layer) for layer in summary["layers"]),
            Counts(**summary["dense"]),
            Counts(**summary["slim"]),
            tuple(summary["input_shape"]),
            tuple(summary["recovery"]),
            speed=Speed.from_dict(speed) if speed else None,
            half_agreement=summary.get("half_agreement"),
        )
    except (NNSlimError, pickle.PickleError, *_UNUSABLE) as error:
        text = "" if isinstance(error, pickle.PickleError) else str(error)  # that one is a page for programmers
        _log.warning("%s cannot be read (%s); compressing again", path, " ".join(text.split()) or type(error).__name__)
    return None
