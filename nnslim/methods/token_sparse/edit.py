"""The structural edit of the token-sparse method."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import nn

from nnslim.errors import ConfigError, SpecError
from nnslim.methods.token_sparse.reduction import TokenReduction
from nnslim.methods.token_sparse.sparse_encoders import SparseEva, SparseTrainedViT, SparseViT, is_encoder, is_vit
from nnslim.methods.token_sparse.vit import TokenPruningViT
from nnslim.network.spec import Edit, register_edit, replace_layer
from nnslim.network.walk import LayerIndex


@register_edit
@dataclass(frozen=True)
class TokenSparseEdit(Edit):
    """Make one transformer encoder token-sparse; the network around it stays as it is.

    Attributes:
        layer: name of the encoder.
        locations: blocks that run before each stage. ratios: share of the tokens removed there.
        scorers: kind of scorer of each stage. The other fields: see `TokenSparseConfig`.
        seed: of the weights that are new.
    """

    layer: str
    locations: list = field(default_factory=list)
    ratios: list = field(default_factory=list)
    scorers: list = field(default_factory=list)
    mode: str = "drop"
    shared: bool = False
    tau: float = 1.0
    noise: bool = True
    completion: str = "last"
    completion_depth: int = 1
    skips: str = "blocks"
    seed: int = 0
    kind: ClassVar[str] = "token_sparse"
    trained: ClassVar[bool] = True

    def apply(self, layers: LayerIndex, *, fill: bool) -> Callable[[], None]:
        """See Edit.apply. The encoder's modules keep their names; `reduction` and `completion` are added."""
        layer = layers[self.layer]
        dense = layer.module
        if not is_encoder(dense):
            raise SpecError(
                f"layer '{self.layer}' is {type(dense).__name__}, not Primus' Eva, MONAI's ViT or a dense ViT"
            )
        if getattr(dense, "patch_drop", None) is not None:
            raise SpecError(
                f"layer '{self.layer}' drops random patches in training (patch_drop_rate); build it without, and use "
                "the scorer 'random' at location 0 instead"
            )
        attention = dense.blocks[0].attn
        plain = is_vit(dense) or isinstance(dense, TokenPruningViT)
        known = isinstance(attention.qkv, nn.Linear) if plain else hasattr(attention, "q_norm")
        if "attention" in self.scorers and not known:
            raise SpecError(f"layer '{self.layer}': scorer 'attention' does not know this kind of attention")
        width = next(dense.norm.parameters()).shape[0]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            try:
                settings = {key: getattr(self, key) for key in ("mode", "shared", "tau", "noise")}
                reduction = TokenReduction(width, self.locations, self.ratios, scorer=self.scorers, **settings)
            except ConfigError as error:
                raise SpecError(f"layer '{self.layer}': {error}") from None
            if max(self.locations, default=0) > len(dense.blocks):
                raise SpecError(
                    f"layer '{self.layer}': location {max(self.locations)} is beyond its {len(dense.blocks)} blocks"
                )
            parts = (dense, reduction, self.completion, self.completion_depth)
            if isinstance(dense, TokenPruningViT):
                made = SparseTrainedViT(*parts, skips=self.skips)
            else:
                made = SparseViT(*parts, skips=self.skips) if is_vit(dense) else SparseEva(*parts)
        place = next(dense.parameters())
        made = made.to(place.device, place.dtype).train(dense.training)
        watched = layer.slots if isinstance(made, SparseEva) and "air" in self.scorers else ()
        hooks = [parent.register_forward_pre_hook(made.observe) for parent, _ in watched]
        put_back = replace_layer(layer, made)

        def undo() -> None:
            put_back()
            for hook in hooks:
                hook.remove()

        return undo
