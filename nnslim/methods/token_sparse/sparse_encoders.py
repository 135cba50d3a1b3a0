"""Token-sparse stand-ins for trained encoders: nnU-Net's Primus (Eva), MONAI's ViT, and the one of our dense UNETR.

They hold the children of the dense encoder under the same names, so that a dense checkpoint fits except for what is new
(`reduction`, `completion`), and return what it returned, so that the network around needs no change.
"""

from __future__ import annotations

import copy
import math
import sys
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from nnslim.methods.token_sparse.completion import Completion, GentleCompletion
from nnslim.methods.token_sparse.reduction import TokenReduction
from nnslim.methods.token_sparse.scorers import image_content
from nnslim.methods.token_sparse.sequence import Sequence3d
from nnslim.methods.token_sparse.vit import TokenPruningViT

_QUERIES = 256  # tokens whose attention is looked at by the attention scorer, at most


class SparseEncoder(nn.Module):
    """What both stand-ins share: stages between blocks, and completion at the end."""

    def __init__(
        self, dense: nn.Module, reduction: TokenReduction, completion: Completion, completion_depth: int
    ) -> None:
        """Take over the children of a dense encoder, which is left as it is.

        Args:
            reduction: the stages. completion, completion_depth: see `GentleCompletion`.
        """
        super().__init__()
        for name, parameter in dense._parameters.items():
            self.register_parameter(name, parameter)
        for name, buffer in dense._buffers.items():
            self.register_buffer(name, buffer, name not in dense._non_persistent_buffers_set)
        for name, child in dense._modules.items():
            self.add_module(name, child)
        self.reduction = reduction
        self.completion: GentleCompletion | None = None
        if reduction.mode == "drop" and completion != "last":
            blocks = [silent_copy(self.blocks[-1]) for _ in range(completion_depth)]
            width = next(p for p in self.norm.parameters()).shape[0]
            groups = len(reduction.locations) + 1
            self.completion = GentleCompletion(width, groups, blocks, completion, self._call)
        self._token_count = token_count(dense)
        self._content: Tensor | None = None

    @staticmethod
    def _call(block: nn.Module, x: Tensor, rope: Tensor | None) -> Tensor:
        return block(x)

    def observe(self, _: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        """Hook for the network around: note the content of each token's part of the image."""
        self._content = image_content(inputs[0], self._token_count)

    def _encode(self, x: Tensor, prefix: int, rope: Tensor | None, attention: Any) -> tuple[Tensor, list[Tensor]]:
        """Run everything; return (B, N, D) before the last norm, and the output of every block."""
        length = self._token_count or int(x.shape[1]) - prefix
        now = Sequence3d(x, length, prefix=prefix, rope=rope, content=self._content)
        self._content = None
        hidden = []
        for number, block in enumerate(self.blocks):
            received = None if attention is None else lambda x, rope, block=block: attention(block, x, rope, prefix)
            now = self.reduction(now, number, received)
            if getattr(self, "grad_checkpointing", False):
                now.x = checkpoint(self._call, block, now.x, now.rope, use_reentrant=False)
            else:
                now.x = self._call(block, now.x, now.rope)
            hidden.append(now.last_values() if self.keeps_hidden else now.x)
        if now.positions is None or self.completion is None:
            return now.last_values(), hidden
        return self.completion(now, rope), hidden

    keeps_hidden = False


class SparseEva(SparseEncoder):
    """In place of `Primus.eva`; returns (all tokens, None), as Eva without patch dropout."""

    def __init__(self, dense: nn.Module, *settings: Any) -> None:
        super().__init__(dense, *settings)
        self.num_prefix_tokens = dense.num_prefix_tokens
        self.embed_dim = self.num_features = dense.embed_dim
        self.grad_checkpointing = dense.grad_checkpointing
        self.rope = dense.rope

    @staticmethod
    def _call(block: nn.Module, x: Tensor, rope: Tensor | None) -> Tensor:
        return block(x, rope=rope)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Name the parameters that an optimiser should not decay, as the dense encoder does."""
        return {"pos_embed", "cls_token"}

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute blocks in the backward pass."""
        self.grad_checkpointing = enable

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        """(B, P + L, D), prefix tokens first -> the same shape."""
        if self.pos_embed is not None:
            x = x + self.pos_embed
        x = self.pos_drop(x)
        rope = None if self.rope is None else self.rope.get_embed()
        full, _ = self._encode(x, self.num_prefix_tokens, rope, eva_attention)
        return self.norm(full), None


class _SparseViT(SparseEncoder):
    """What both ViTs share: the decoder reads the outputs of blocks, too."""

    def __init__(self, dense: nn.Module, *settings: Any, skips: Literal["completed", "blocks"]) -> None:
        """Take over the dense encoder's children; see `SparseEncoder`.

        Args:
            skips: the outputs of blocks that the decoder gets: the completed tokens (the published rule), or the
                outputs themselves, with dropped tokens at their last values.
        """
        super().__init__(dense, *settings)
        self.skips = skips

    @property
    def keeps_hidden(self) -> bool:  # type: ignore[override]
        """Whether the decoder is to see the outputs of blocks."""
        return self.skips == "blocks" or not self.reduction.active


class SparseViT(_SparseViT):
    """In place of MONAI's `UNETR.vit`; returns (tokens, outputs of the blocks)."""

    def forward(self, image: Tensor) -> tuple[Tensor, list[Tensor]]:
        """(B, C, *size) -> (B, N, D) and one such tensor per block."""
        x = self.patch_embedding(image)
        self._content = image_content(image, self._token_count)
        prefix = 0
        if "cls_token" in self._parameters:
            x, prefix = torch.cat((self.cls_token.expand(x.shape[0], -1, -1), x), dim=1), 1
        full, hidden = self._encode(x, prefix, None, vit_attention)
        full = self.norm(full)
        return full, hidden if self.keeps_hidden else [full] * len(self.blocks)


class SparseTrainedViT(_SparseViT):
    """In place of `TokenSparseUNETR.encoder` that was trained dense; returns complete tokens, so nothing completes them
    behind it."""

    grid_of, embedded, _positions = TokenPruningViT.grid_of, TokenPruningViT.embedded, TokenPruningViT._positions
    no_weight_decay = TokenPruningViT.no_weight_decay

    def __init__(self, dense: nn.Module, *settings: Any, **options: Any) -> None:
        """See `_SparseViT`; what an untrained reduction of the dense encoder had goes."""
        super().__init__(dense, *settings, **options)
        self.patch, self.grid = dense.patch, dense.grid
        self._token_count = None  # sizes differ from image to image
        for untrained in ("stage_norms", "policy"):
            if hasattr(self, untrained):
                delattr(self, untrained)

    def forward(self, image: Tensor, keep_hidden: Sequence[int] = ()) -> tuple[Sequence3d, list[Tensor]]:
        """See `TokenPruningViT.forward`."""
        length = math.prod(self.grid_of(image))
        self._content = image_content(image, length)
        full, hidden = self._encode(self.embedded(image), 1, None, vit_attention)
        now = Sequence3d(self.norm(full), length, prefix=1)
        return now, [(hidden[number] if self.keeps_hidden else now.x)[:, 1:] for number in keep_hidden]


def silent_copy(block: nn.Module) -> nn.Module:
    """Return a copy of a pre-norm transformer block whose two branches return 0, so that it returns its input."""
    made = copy.deepcopy(block)
    outputs = [getattr(made.attn, name) for name in ("proj", "out_proj") if hasattr(made.attn, name)]
    outputs += [getattr(made.mlp, name) for name in ("fc2", "linear2", "2") if hasattr(made.mlp, name)]
    for parameter in (each for linear in outputs for each in linear.parameters()):
        nn.init.zeros_(parameter)
    return made


def eva_attention(block: nn.Module, x: Tensor, rope: Tensor | None, prefix: int) -> Tensor:
    """Return (B, L): the attention that each patch token receives in an EvaBlock, mean over heads and queries.

    Args:
        block: timm's EvaBlock. x: (B, prefix + L, D), its input. rope: (L, E) or (B, 1, L, E).
    """
    attention, batch, rows = block.attn, x.shape[0], x.shape[1]
    normed = block.norm1(x)
    if attention.qkv is not None:
        bias = None
        if attention.q_bias is not None:
            bias = torch.cat((attention.q_bias, attention.k_bias, attention.v_bias))
        query, key, _ = functional.linear(normed, attention.qkv.weight, bias).chunk(3, dim=-1)
    else:
        query, key = attention.q_proj(normed), attention.k_proj(normed)
    query, key = (part.reshape(batch, rows, attention.num_heads, -1).transpose(1, 2) for part in (query, key))
    query, key = attention.q_norm(query), attention.k_norm(key)
    if rope is not None:
        query = torch.cat((query[:, :, :prefix], _rotated(query[:, :, prefix:], rope)), dim=2)
        key = torch.cat((key[:, :, :prefix], _rotated(key[:, :, prefix:], rope)), dim=2)
    return _received(query * attention.scale, key)[:, prefix:]


def vit_attention(block: nn.Module, x: Tensor, rope: Tensor | None, prefix: int) -> Tensor:
    """The same for a block of MONAI's ViT or ours."""
    linear = block.attn.qkv
    heads = getattr(block.attn, "num_heads", None) or block.attn.heads
    query, key, _ = linear(block.norm1(x)).unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
    return _received(query * query.shape[-1] ** -0.5, key)[:, prefix:]


def _received(query: Tensor, key: Tensor) -> Tensor:
    """(B, H, N, E) each -> (B, N), of some of the queries."""
    query = query[:, :, :: max(1, int(query.shape[2]) // _QUERIES)]
    return torch.softmax(query @ key.transpose(-2, -1), dim=-1).mean(dim=(1, 2))


def _rotated(x: Tensor, rope: Tensor) -> Tensor:
    """Apply timm's interleaved rotary embedding, sine half first, to (B, H, L, E)."""
    sine, cosine = rope.chunk(2, dim=-1)
    turned = torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)
    return x * cosine + turned * sine


def is_encoder(module: nn.Module) -> bool:
    """Whether a module can be made token-sparse: Primus' Eva, a MONAI ViT for dense prediction, ours trained dense."""
    if is_vit(module):
        return not module.classification
    if isinstance(module, TokenPruningViT):
        return module.reduction is None or not module.reduction.active
    names = ("blocks", "norm", "pos_embed", "rope", "num_prefix_tokens", "forward_features")
    return all(hasattr(module, name) for name in names) and not isinstance(module, SparseEva)


def token_count(encoder: nn.Module) -> int | None:
    """Return how many patch tokens an encoder works on, where its position embedding tells."""
    if isinstance(encoder, TokenPruningViT):
        return math.prod(encoder.grid)
    if is_vit(encoder):
        return int(encoder.patch_embedding.n_patches)  # MONAI computes it with numpy
    return None if encoder.pos_embed is None else encoder.pos_embed.shape[1] - encoder.num_prefix_tokens


def is_vit(module: nn.Module) -> bool:
    """Whether it is a MONAI ViT. Only a process that has imported MONAI, which takes seconds, can hold one."""
    monai = sys.modules.get("monai.networks.nets.vit")
    return monai is not None and isinstance(module, monai.ViT)
