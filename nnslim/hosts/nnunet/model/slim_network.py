"""The architecture that the plans of a compressed model name, so that stock nnU-Net builds it."""

from __future__ import annotations

from typing import Any

from torch import nn

from nnslim.hosts.nnunet.model.checked_plans import ARCHITECTURES, BASE_KEY, SPEC_KEY, base_class
from nnslim.network.spec import SlimSpec, apply_spec
from nnslim.running.self_running import self_running

NETWORK_CLASS_NAME = f"{ARCHITECTURES}.slim_network"


def slim_network(input_channels: int, num_classes: int, **kwargs: Any) -> nn.Module:
    """Build the base architecture and apply the spec; nnU-Net calls this with what the plans hold.

    `kwargs` are those of the base architecture, plus `nnslim_base` (its dotted name) and `nnslim_spec` (a SlimSpec's
    JSON form). The network is an instance of the base class with some layers replaced: trainers that reach into
    `decoder` or `encoder` work as before, and untouched layers keep their state-dict keys. It predicts by nnslim's
    engine, see `self_running`, so stock nnU-Net gets the time, too.
    """
    arguments = dict(kwargs)
    base = base_class(arguments.pop(BASE_KEY))
    spec = SlimSpec.from_dict(arguments.pop(SPEC_KEY))
    return self_running(apply_spec(spec, base(input_channels=input_channels, num_classes=num_classes, **arguments)))
