"""nnslim makes trained nnU-Net v2 and TotalSegmentator models smaller and faster, and shows what it cost.

with NNSlimContext("tucker-balanced") as slim:
    totalsegmentator(input="ct.nii.gz", output="seg")
print(slim.report)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from nnslim import former
from nnslim._version import __version__

if TYPE_CHECKING:
    from nnslim.any_network import compress, fast, load, save
    from nnslim.compression.config import SlimConfig, load_config
    from nnslim.context import NNSlimContext

__all__ = ["NNSlimContext", "SlimConfig", "__version__", "compress", "fast", "load", "load_config", "save"]
_HOMES = dict.fromkeys(("compress", "fast", "load", "save"), "nnslim.any_network") | {
    "NNSlimContext": "nnslim.context",
    "SlimConfig": "nnslim.compression.config",
    "load_config": "nnslim.compression.config",
}

former.install()


def __getattr__(name: str) -> Any:
    # Lazy, so that `import nnslim` imports neither torch nor nnU-Net.
    if name in _HOMES:
        from importlib import import_module

        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'nnslim' has no attribute '{name}'")
