"""The architecture that the plans of a compressed model name, so that stock nnU-Net builds it."""

from __future__ import annotations

import pydoc
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

import nnslim.methods  # noqa: F401  registers the edit kinds
from nnslim.errors import ModelError
from nnslim.network.spec import SlimSpec, apply_spec

ARCHITECTURES = "nnslim.architectures"  # where plans say that a class or function of ours is
NETWORK_CLASS_NAME = f"{ARCHITECTURES}.slim_network"
BASE_KEY, SPEC_KEY = "nnslim_base", "nnslim_spec"
# A plans file names Python objects to import; these are the packages that hold architectures and torch layers.
TRUSTED_PACKAGES = ("dynamic_network_architectures", "nnunetv2", "nnslim", "monai", "torch", "timm")


def locate_trusted(dotted: Any, where: str) -> type[nn.Module] | Callable[..., nn.Module] | None:
    """Import a class by its dotted name, if it is one of the known packages' own.

    The package that *defines* the object counts: "torch.os.system" begins with torch, too.

    Returns:
        The class, or None where no object of that name exists.
    Raises:
        ModelError: names the place, the name and the packages.
    """
    refused = ModelError(
        f"{where} names {dotted!r}, which is not a class of the packages that nnslim loads from "
        f"({', '.join(TRUSTED_PACKAGES)})"
    )
    if not isinstance(dotted, str) or dotted.split(".")[0] not in TRUSTED_PACKAGES:
        raise refused
    found = pydoc.locate(dotted)
    if found is None or found is slim_network:
        return found
    if not isinstance(found, type) or found.__module__.split(".")[0] not in TRUSTED_PACKAGES:
        raise refused
    return found


def base_class(dotted: str, where: str = "plans") -> type[nn.Module]:
    """Return the class of a dense architecture by its dotted name, as nnU-Net finds it (moved classes included).

    Raises:
        ModelError: outside the known packages, or not found.
    """
    found = locate_trusted(dotted, where)
    if found is None:
        # As nnU-Net: a class may have moved inside the package (old plans name residual_unet.ResidualEncoderUNet).
        import dynamic_network_architectures
        from nnunetv2.utilities.find_class_by_name import recursive_find_python_class

        package = "dynamic_network_architectures.architectures"
        folder = str(Path(dynamic_network_architectures.__path__[0]) / "architectures")
        found = recursive_find_python_class(folder, dotted.split(".")[-1], package)
    if found is None:
        raise ModelError(f"{where} names the architecture '{dotted}', which is not installed")
    return found


def slim_network(input_channels: int, num_classes: int, **kwargs: Any) -> nn.Module:
    """Build the base architecture and apply the spec; nnU-Net calls this with what the plans hold.

    `kwargs` are those of the base architecture, plus `nnslim_base` (its dotted name) and `nnslim_spec` (a SlimSpec's
    JSON form). The network is an instance of the base class with some layers replaced: trainers that reach into
    `decoder` or `encoder` work as before, and untouched layers keep their state-dict keys.
    """
    arguments = dict(kwargs)
    base = base_class(arguments.pop(BASE_KEY))
    spec = SlimSpec.from_dict(arguments.pop(SPEC_KEY))
    return apply_spec(spec, base(input_channels=input_channels, num_classes=num_classes, **arguments))
