"""Architectures that nnU-Net builds in its trainers (Primus) or not at all, described in plans for any trainer.

A slim model must be built from plans.json, by stock nnU-Net: so the architecture is read off the network.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from nnslim.hosts.nnunet.model.checked_plans import ARCHITECTURES
from nnslim.hosts.nnunet.model.slim_plans import plans_with_architecture
from nnslim.hosts.nnunet.model.trained_model import TrainedModel, build_untrained, builds_from_plans, trainer_class
from nnslim.inflation.window_net import WindowNet
from nnslim.methods.token_sparse.unetr import TokenSparseUNETR
from nnslim.network.daeformer import DAEFormer, form_named

try:
    from dynamic_network_architectures.architectures import primus
except ImportError:  # what nnU-Net before 2.6 installs
    primus = None
_Primus = getattr(primus, "Primus", nn.Module)
PLAIN_TRAINER = "nnUNetTrainer"  # builds from plans; what a checkpoint names so that stock nnU-Net predicts with it


class _WithoutDeepSupervision:
    """Takes the argument that nnU-Net passes to every architecture from plans; there is nothing to switch."""

    def __init__(self, *args: Any, deep_supervision: bool | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)


class PlannedPrimus(_WithoutDeepSupervision, _Primus):
    """Primus as nnU-Net calls an architecture from plans."""


class PlannedPrimusV2(_WithoutDeepSupervision, getattr(primus, "PrimusV2", _Primus)):
    """PrimusV2, likewise."""


class PlannedPrimusV3(_WithoutDeepSupervision, getattr(primus, "PrimusV3", _Primus)):
    """PrimusV3, likewise."""


class PlannedWindowNet(_WithoutDeepSupervision, WindowNet):
    """The window network, likewise."""

    def __init__(self, input_channels: int, num_classes: int, **kwargs: Any) -> None:
        super().__init__(input_channels, num_classes, **kwargs)


class PlannedUNETR(_WithoutDeepSupervision, TokenSparseUNETR):
    """The published token-sparse UNETR, likewise.

    Attributes:
        planned: keyword arguments that build it again.
    """

    def __init__(self, input_channels: int, num_classes: int, **kwargs: Any) -> None:
        super().__init__(input_channels, num_classes, **kwargs)
        self.planned = {key: value for key, value in kwargs.items() if key != "deep_supervision"}


class PlannedDAEFormer(DAEFormer):
    """DAEFormer, likewise.

    nnU-Net's trainers read strides in the plans: [1, 4, 2] make two scales of deep supervision, which is what the
    network puts out then.
    """

    def __init__(
        self,
        input_channels: int,
        num_classes: int,
        deep_supervision: bool | None = None,
        strides: Sequence[Any] = (),
        **kwargs: Any,
    ) -> None:
        super().__init__(input_channels, num_classes, **kwargs)
        self.decoder.deep_supervision = bool(deep_supervision)


def daeformer_architecture(form: str) -> dict[str, Any]:
    """Return the `architecture` entry of a 2D configuration for a form of DAEFormer, see `form_named`.

    Raises:
        ConfigError: no form of that name.
    """
    return architecture_entry(PlannedDAEFormer, {**form_named(form).to_dict(), "strides": [[1, 1], [4, 4], [2, 2]]})


def planned_architecture(network: nn.Module, patch: Sequence[int]) -> dict[str, Any] | None:
    """Return the `architecture` entry for a network as its trainer builds it, or None for one that we cannot read."""
    if isinstance(network, PlannedUNETR):
        return architecture_entry(PlannedUNETR, network.planned)
    kinds = {"Primus": PlannedPrimus, "PrimusV2": PlannedPrimusV2, "PrimusV3": PlannedPrimusV3}
    known = [cls.__name__ for cls in type(network).__mro__ if cls.__module__ == _Primus.__module__]
    cls = next((kinds[name] for name in known if name in kinds), None)
    if cls is None:
        return None
    eva = network.eva
    block = eva.blocks[0]
    proj = getattr(network.down_projection, "proj", None)
    edge = proj.kernel_size if isinstance(proj, nn.Conv3d) and cls is PlannedPrimus else (8, 8, 8)
    drop = getattr(eva.blocks[-1].drop_path1, "drop_prob", 0.0)
    stem = _stem_of(network.down_projection) if cls is PlannedPrimusV3 else {}
    return architecture_entry(
        cls,
        {
            "embed_dim": int(network.embed_dim),
            "patch_embed_size": [int(size) for size in edge],
            "eva_depth": len(eva.blocks),
            "eva_numheads": int(block.attn.num_heads),
            "input_shape": [int(size) for size in patch],
            "num_register_tokens": int(eva.num_prefix_tokens),
            "use_rot_pos_emb": eva.rope is not None,
            "use_abs_pos_embed": eva.pos_embed is not None,
            "drop_path_rate": round(float(drop or 0.0), 6),
            "init_values": None if block.gamma_1 is None else 0.1,
            "scale_attn_inner": not isinstance(block.attn.norm, nn.Identity),
            **stem,
        },
    )


def _stem_of(stem: nn.Module) -> dict[str, Any]:
    stages = [stem.stem, *stem.stages]
    return {
        "depth_per_level": [len(stage.blocks) for stage in stem.stages],
        "ch_per_level": [int(stage.blocks[-1].output_channels) for stage in stages],
        "add_skips": stem.add_skips,
    }


def architecture_entry(cls: type, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the `architecture` entry of a configuration for one of the classes above."""
    name = f"{ARCHITECTURES}.{cls.__name__}"
    return {"network_class_name": name, "arch_kwargs": kwargs, "_kw_requires_import": []}


def built_from_plans(model: TrainedModel) -> TrainedModel:
    """Return the same model as one whose plans describe its network, where its trainer builds it itself.

    Models that need no change, and those that we cannot describe, are returned as they are.
    """
    if model.is_slim or builds_from_plans(trainer_class(model.trainer_name)):
        return model
    architecture = planned_architecture(build_untrained(model), model.configuration_manager.patch_size)
    if architecture is None:
        return model
    plans = plans_with_architecture(model.plans, model.configuration, architecture)
    checkpoints = {fold: {**content, "trainer_name": PLAIN_TRAINER} for fold, content in model.checkpoints.items()}
    return model.with_plans(plans, checkpoints=checkpoints, trainer_name=PLAIN_TRAINER)
