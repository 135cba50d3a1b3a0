"""Every name that a plans.json may carry. Never rename, move or remove one: trained models name them.

nnU-Net finds the class or function of a network by its dotted name, so a model that nnslim has written can be loaded
for as long as `nnslim.architectures.<name>` exists. What stands behind a name may move.

Names:
    slim_network: the base architecture `nnslim_base` with the SlimSpec `nnslim_spec` applied.
    PlannedPrimus, PlannedPrimusV2, PlannedPrimusV3, PlannedUNETR, PlannedDAEFormer, PlannedWindowNet: architectures as
        nnU-Net calls them from plans.

Models written before these names existed carry others, see `nnslim.hosts.nnunet`.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_HOMES = {
    "slim_network": "nnslim.hosts.nnunet.model.slim_network",
    "PlannedPrimus": "nnslim.hosts.nnunet.model.planned",
    "PlannedPrimusV2": "nnslim.hosts.nnunet.model.planned",
    "PlannedPrimusV3": "nnslim.hosts.nnunet.model.planned",
    "PlannedUNETR": "nnslim.hosts.nnunet.model.planned",
    "PlannedDAEFormer": "nnslim.hosts.nnunet.model.planned",
    "PlannedWindowNet": "nnslim.hosts.nnunet.model.planned",
}
__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'nnslim.architectures' has no attribute '{name}'")
