"""Any torch network of one tensor argument, nnU-Net's or not: compress it, save and load it, or only run it faster."""

from __future__ import annotations

import copy
import hashlib
import json
import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from nnslim.compression import compress_network
from nnslim.compression.calibration import Calibration
from nnslim.compression.compress_network import Slimmed, rebuild
from nnslim.compression.config import SlimConfig, default_config, load_config
from nnslim.errors import InputError, SpecError, one_line
from nnslim.files import make_folder, save_checkpoint, unreadable
from nnslim.methods.base import MethodConfig
from nnslim.network.spec import SlimSpec, spec_of
from nnslim.network.walk import unwrap
from nnslim.running.engine import Backend, Settings
from nnslim.running.machine import keep_heap_with
from nnslim.running.runner import Runner

_FEW = 4  # tiles: with fewer, those that are learned from also judge
_UNREADABLE = (OSError, RuntimeError, ValueError, KeyError, TypeError, EOFError, MemoryError, pickle.UnpicklingError)


def compress(
    network: nn.Module,
    config: SlimConfig | MethodConfig | Mapping[str, Any] | str | Path | None = None,
    example: Tensor | None = None,
    *,
    tiles: Sequence[Tensor] | None = None,
    class_names: Sequence[str] = (),
    regions: bool = False,
) -> Slimmed:
    """Return a slim form of a network, the decision for each layer, and the counts before and after.

    Args:
        network: takes (1, C, *spatial), 2D or 3D; not modified.
        config: what NNSlimContext takes; None: `default_config`, by whether there are tiles.
        example: input of the shape that counts and plans hold for; default: the first tile.
        tiles: inputs (1, C, *spatial) of one shape, prepared as the network wants them; no labels. The weights are
            fitted to them; where the configuration has recovery, the slim network learns from them, and every fourth
            is kept apart to judge it (with fewer than four, all judge).
        class_names: of the outputs without background; default: their numbers.
        regions: outputs are independent (sigmoid), not exclusive; so is a single output.
    Raises:
        ConfigError, SpecError, RankError: the configuration does not fit. InputError: neither example nor tiles.
    """
    settings = load_config(default_config("tiles" if tiles else None) if config is None else config)
    if example is None and not tiles:
        raise InputError("compress: give an example input, or tiles")
    kept = [tile.detach().cpu().float() for tile in tiles or ()]
    shape = tuple((kept[0] if example is None else example).shape)
    if odd := next((tuple(tile.shape) for tile in kept if tuple(tile.shape) != tuple(kept[0].shape)), None):
        raise InputError(f"compress: tiles are of one shape, found {tuple(kept[0].shape)} and {odd}")
    plain = copy.deepcopy(unwrap(network)).cpu().eval()
    data = None
    if kept:
        with torch.inference_mode():
            outputs = plain.float()(kept[0]).shape[1]
        regions = regions or outputs == 1
        names = class_names or [str(number) for number in range(1, outputs + regions)]
        data = _calibration(kept, settings.calibration.seed, names, regions)
    return compress_network.compress(plain, [plain.state_dict()], settings, shape, data=data)


def _calibration(tiles: list[Tensor], seed: int, class_names: Sequence[str], regions: bool) -> Calibration:
    held_out = tiles[::_FEW] if len(tiles) >= _FEW else tiles
    learned = [tile for number, tile in enumerate(tiles) if number % _FEW] if len(tiles) >= _FEW else tiles
    content = hashlib.sha256(b"".join(tile.numpy().tobytes() for tile in tiles)).hexdigest()
    named = {"class_names": tuple(class_names), "regions": regions, "seed": seed}
    named |= {"fingerprint": content, "images": len(tiles)}
    return Calibration(learned, held_out, lambda count: _Drawn(learned, count, seed), **named)


class _Drawn(Dataset):
    """Tiles (C, *spatial) in an order that is drawn anew for each round through them."""

    def __init__(self, tiles: Sequence[Tensor], count: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        rounds = -(-count // len(tiles))
        self._tiles = tiles
        drawn = [torch.randperm(len(tiles), generator=generator) for _ in range(rounds)]
        self._order = torch.cat(drawn)[:count].tolist()

    def __len__(self) -> int:
        return len(self._order)

    def __getitem__(self, index: int) -> Tensor:
        return self._tiles[self._order[index]][0]


def save(network: nn.Module, path: str | Path) -> None:
    """Write the structure and the weights of a network that `compress` returned (`slim.network`) to one file.

    Raises:
        InputError: the network carries no SlimSpec. OutputError: the file cannot be written.
    """
    spec = spec_of(unwrap(network))
    if spec is None:
        raise InputError("save: the network carries no SlimSpec; save what nnslim.compress returned, its network")
    make_folder(Path(path).parent)
    content = {"spec": json.dumps(spec.to_dict()), "weights": unwrap(network).state_dict()}
    save_checkpoint(content, Path(path))


def load(path: str | Path, network: nn.Module) -> nn.Module:
    """Return the slim network of a file from `save`, in eval mode on the CPU; no code in the file is run.

    Args:
        network: built as the dense one was, with any weights; not modified.
    Raises:
        InputError: not such a file. SpecError: it does not fit the network.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        spec, weights = json.loads(content["spec"]), content["weights"]
    except _UNREADABLE as error:
        raise InputError(unreadable(Path(path), error, "is no file of nnslim.save")) from error
    try:
        return rebuild(network, SlimSpec.from_dict(spec), weights)
    except RuntimeError as error:  # what torch says of keys and shapes
        raise SpecError(f"{path} does not fit this {type(unwrap(network)).__name__}: {one_line(error)}") from error


def fast(network: nn.Module, example: Tensor, *, backend: Backend = "auto") -> nn.Module:
    """Return a module that gives the network's answers by an engine, in eval mode and without gradients.

    It follows weights that are loaded into it, and takes any shape; the first pass of a shape prepares it. In training,
    or where gradients or hooks are asked for, the network itself answers.

    Args:
        network: dense or slim; used, not copied. example: an input of the usual shape, which is tried at once.
    Raises:
        BackendError: no backend can run it.
    """
    runner = Runner(unwrap(network).eval(), Settings(backend=backend))
    if example.device.type == "cpu":
        keep_heap_with(runner)
    with torch.inference_mode():
        runner(example)
    return runner
