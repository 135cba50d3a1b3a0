"""The structural edit of the Tucker method."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from nnslim.maths.lowrank import partial_tucker
from nnslim.methods.tucker.layers import TuckerConv, kernel_of
from nnslim.network.spec import ReplacingEdit, register_edit


@register_edit
@dataclass(frozen=True)
class TuckerEdit(ReplacingEdit):
    """Replace one convolution by a Tucker chain, `<name>.first`, `.core` and `.last`.

    Attributes:
        layer: any of the layer's names.
        rank_out, rank_in: ranks of the output and the input side, None to leave that side whole.
        decompose: False leaves the new weights random even where they would be computed.
    """

    layer: str
    rank_out: int | None
    rank_in: int | None
    decompose: bool = True
    kind: ClassVar[str] = "tucker"

    def made(self, dense: nn.Module, fill: bool) -> nn.Module:
        """Return the chain."""
        chain = TuckerConv(dense, self.rank_out, self.rank_in)
        if fill and self.decompose:
            kernel = kernel_of(dense)
            ranks = (self.rank_out or kernel.shape[0], self.rank_in or kernel.shape[1])
            chain.fill(partial_tucker(kernel, ranks), dense.bias)
        return chain
