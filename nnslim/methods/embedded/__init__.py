"""Levers for embedded boards (Embedded-ViT, Ostrowski and Shafique, ISVC 2024): one file each, composed in `plan`."""

from nnslim.methods.base import Method, register_method
from nnslim.methods.embedded.config import EmbeddedConfig
from nnslim.methods.embedded.depthwise import DepthwiseEdit
from nnslim.methods.embedded.drop_stage import DropStageEdit
from nnslim.methods.embedded.plan import coarser_settings, plan_embedded
from nnslim.methods.embedded.unstructured import HeldZeros, SparseEdit, cubic_sparsity

register_method(Method("embedded", EmbeddedConfig, plan_embedded, plans=coarser_settings))

__all__ = [
    "DepthwiseEdit",
    "DropStageEdit",
    "EmbeddedConfig",
    "HeldZeros",
    "SparseEdit",
    "cubic_sparsity",
    "plan_embedded",
]
