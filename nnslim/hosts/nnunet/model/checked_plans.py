"""What plans.json may name and how large it may be: checked before nnU-Net imports what they name, and calls it."""

from __future__ import annotations

import math
import os
import re
import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

import nnslim.methods  # noqa: F401  registers the edit kinds
from nnslim import former
from nnslim.errors import ModelError, kind_and_line
from nnslim.files import read_json_object
from nnslim.network.spec import SlimSpec

ARCHITECTURES = "nnslim.architectures"  # where plans say that a class or function of ours is
BASE_KEY, SPEC_KEY = "nnslim_base", "nnslim_spec"
_KINDS_OF_LAYERS = ("activation", "batchnorm", "conv", "dropout", "instancenorm", "linear", "normalization", "pooling")
_LAYERS = tuple(f"torch.nn.modules.{kind}" for kind in _KINDS_OF_LAYERS)
_NETWORKS = re.compile(r"dynamic_network_architectures\.(architectures|building_blocks)\.[A-Za-z]\w*")
_OURS = (ARCHITECTURES, *(name for name, homes in former.MODULES.items() if homes == (ARCHITECTURES,)))
_OPERATIONS = ("conv_op", "norm_op", "dropout_op", "nonlin")  # some trainers import these without being told to
# Beyond every published network: the largest, STU-Net-H, has 1.5e9 weights.
_MOST_WEIGHTS, _MOST_TENSORS, _MOST_EDITS = 2 * 10**9, 5_000, 5_000
_MOST_VALUES, _LARGEST, _MOST_VOXELS = 100_000, 10**6, 2**28  # of the arguments; of a patch
_FACTORIES = {torch.empty, torch.zeros, torch.ones, torch.full, torch.rand, torch.randn, torch.arange, torch.linspace}


def locate_trusted(dotted: Any, where: str) -> Callable[..., nn.Module] | None:
    """Return the class, or function of ours, that plans name; nothing is imported that they may not name.

    They may name torch's layers, the networks and blocks of dynamic_network_architectures, `nnslim.architectures`, and
    the nn.Module classes of the modules that the variable NNSLIM_NETWORKS lists, separated by commas.

    Returns:
        None where no object of that name exists.
    Raises:
        ModelError: names the place, the name and what may be named.
    """
    own = os.environ.get("NNSLIM_NETWORKS", "").replace(" ", "").split(",")
    module, _, name = dotted.rpartition(".") if isinstance(dotted, str) else ("", "", "")
    found: Any = ...
    if module in _OURS:
        ours = import_module(ARCHITECTURES)
        return getattr(ours, name) if name in ours.__all__ else None
    if module in ("torch.nn", "torch.nn.modules", *_LAYERS):
        found = vars(sys.modules[module]).get(name)
    elif module and (module in own or _NETWORKS.fullmatch(module)):
        try:
            found = getattr(import_module(module), name, None)
        except Exception as error:  # whatever a broken installation raises
            if not isinstance(error, ModuleNotFoundError) or not f"{module}.".startswith(f"{error.name}."):
                raise ModelError(f"{where} names {dotted}, which cannot be imported: {kind_and_line(error)}") from error
            found = None
    home = getattr(found, "__module__", "")
    known = module in own or home in _LAYERS or (isinstance(home, str) and _NETWORKS.fullmatch(home))
    if found is not None and not (known and isinstance(found, type) and issubclass(found, nn.Module)):
        raise ModelError(
            f"{where} names {str(dotted)[:200]!r}, which is not one of the classes that plans may name: layers of "
            "torch.nn, networks of dynamic_network_architectures and nnslim, and those of the modules that the "
            "environment variable NNSLIM_NETWORKS lists"
        )
    return found


def base_class(dotted: Any, where: str = "plans") -> Callable[..., nn.Module]:
    """Return the class of an architecture by its dotted name, as nnU-Net finds it (moved classes included).

    Raises:
        ModelError: not one that plans may name, or not found.
    """
    found = locate_trusted(dotted, where)
    if found is None and not dotted.startswith(_OURS):
        # As nnU-Net: a class may have moved inside the package (old plans name residual_unet.ResidualEncoderUNet).
        package = import_module("dynamic_network_architectures.architectures")
        names = (f"{package.__name__}.{one.name}.{dotted.rpartition('.')[2]}" for one in iter_modules(package.__path__))
        found = next((each for name in names if (each := locate_trusted(name, where)) is not None), None)
    if found is None:
        raise ModelError(f"{where} names the architecture '{dotted[:200]}', which is not installed")
    return found


def check_architecture(settings: Mapping[str, Any], where: str) -> None:
    """Refuse a configuration, in nnU-Net's new format, that names what it may not name, or is absurdly large.

    Raises:
        ModelError, KeyError, TypeError: what is wrong with it. SpecError: its spec cannot be read.
    """
    architecture, patch = settings["architecture"], settings.get("patch_size", [1, 1])
    kwargs, imported = architecture["arch_kwargs"], architecture["_kw_requires_import"]
    if not isinstance(kwargs, dict) or not isinstance(imported, (list, tuple)):
        raise ModelError(f"{where} should have an object 'arch_kwargs' and a list '_kw_requires_import'")
    fits = isinstance(patch, (list, tuple)) and len(patch) in (2, 3) and all(type(e) is int and e > 0 for e in patch)
    if not fits or math.prod(patch) > _MOST_VOXELS:
        expected = f"2 or 3 whole numbers with a product up to {_MOST_VOXELS:,}"
        raise ModelError(f"{where} has patch_size {str(patch)[:80]}; expected {expected}")
    _check_size(kwargs, where)
    network = base_class(architecture["network_class_name"], where)
    if network.__name__ == "slim_network":
        if base_class(kwargs[BASE_KEY], f"{where} {BASE_KEY},") is network:
            raise ModelError(f"{where} names {architecture['network_class_name']} as the base of itself")
        if (edits := len(SlimSpec.from_dict(kwargs[SPEC_KEY]).edits)) > _MOST_EDITS:
            raise ModelError(f"{where} has a spec of {edits:,} edits; up to {_MOST_EDITS:,} are read")
    for key in (*imported, *(key for key in _OPERATIONS if isinstance(kwargs.get(key), str))):
        if kwargs[key] is not None and locate_trusted(kwargs[key], f"{where} {key},") is None:
            raise ModelError(f"{where} {key}, names {kwargs[key][:200]!r}, which is not installed")


def _check_size(kwargs: Mapping[str, Any], where: str) -> None:
    left, count = list(kwargs.items()), 0
    while left:
        key, value = left.pop()
        if isinstance(value, (dict, list, tuple)):
            left += value.items() if isinstance(value, dict) else [(key, each) for each in value]
        elif isinstance(value, (int, float)) and key != "seed" and not abs(value) <= _LARGEST:
            raise ModelError(f"{where} {key}, has {value!r:.40}; numbers up to {_LARGEST:,} are read")
        count += 1
        if count + len(left) > _MOST_VALUES:
            raise ModelError(f"{where} 'arch_kwargs' holds more than {_MOST_VALUES:,} values")


def check_directory(path: Path) -> None:
    """Check all architectures of a model that nnU-Net is about to read; its checkpoint says which one is meant.

    Raises:
        ModelError: plans.json is missing, or one of them is not what plans may name.
    """
    where = path / "plans.json"
    configurations = read_json_object(where).get("configurations")
    for name, settings in configurations.items() if isinstance(configurations, dict) else ():
        try:
            if "architecture" in settings:  # else it is inherited, or of the old format, which names none of its own
                check_architecture(settings, f"{where}, configuration {name},")
        except (KeyError, TypeError, AttributeError) as error:
            raise ModelError(f"{where}, configuration {name}, cannot be understood: {kind_and_line(error)}") from error


def check_named(manager: Any, settings: Any) -> None:
    """Refuse what nnU-Net finds under a name in its modules, and calls, although those have only imported it.

    Args:
        manager, settings: nnU-Net's PlansManager and ConfigurationManager.
    Raises:
        ModelError: such a name. RuntimeError and others of nnU-Net: nothing has that name.
    """
    found = [(key, manager, f"{key}_class") for key in ("image_reader_writer", "label_manager")]
    found += [("preprocessor_name", settings, "preprocessor_class")]
    found += [(key, settings, key) for key in (f"resampling_fn_{what}" for what in ("data", "seg", "probabilities"))]
    for key, owner, attribute in found:
        content = manager.plans if owner is manager else settings.configuration
        made = getattr(owner, attribute) if key in content else check_named
        if not getattr(made, "func", made).__module__.startswith(("nnunetv2.", "nnslim.")):
            raise ModelError(f"plans.json: {key} is {str(content[key])[:200]!r}; expected a name that nnU-Net defines")


class LimitedBuild(TorchFunctionMode):
    """Inside the block, more or larger tensors than any network has are refused before they take memory."""

    def __init__(self, where: object) -> None:
        """`where`: of the model, for the message."""
        super().__init__()
        self.where, self.tensors, self.weights = where, 0, 0

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        """Count what is made; ModelError: too much."""
        kwargs = kwargs or {}
        if func in _FACTORIES and "out" not in kwargs and "generator" not in kwargs:
            self.weights += func(*args, **{**kwargs, "device": "meta", "pin_memory": False}).numel()
            self.tensors += 1
            if self.weights > _MOST_WEIGHTS or self.tensors > _MOST_TENSORS:
                limit = f"{_MOST_WEIGHTS:,} weights or {_MOST_TENSORS:,} tensors"
                raise ModelError(f"{self.where}: the plans ask for a network of more than {limit}; it is not built")
        return func(*args, **kwargs)
