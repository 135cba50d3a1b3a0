"""The structural edit of the Tucker method."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from nnslim.errors import SpecError
from nnslim.maths.lowrank import partial_tucker
from nnslim.methods.tucker.layers import TuckerConv, kernel_of
from nnslim.network.replace import replace_layer
from nnslim.network.spec import Edit, register_edit
from nnslim.network.walk import LayerIndex


@register_edit
@dataclass(frozen=True)
class TuckerEdit(Edit):
    """Replace one convolution by a Tucker chain.

    Attributes:
        layer: any of the layer's names.
        rank_out: rank of the output side, None to leave it whole.
        rank_in: rank of the input side, None to leave it whole.
        decompose: False leaves the new weights random even where they would be computed.
    """

    layer: str
    rank_out: int | None
    rank_in: int | None
    decompose: bool = True
    kind: ClassVar[str] = "tucker"
    separable: ClassVar[bool] = True

    def apply(self, layers: LayerIndex, *, fill: bool) -> Callable[[], None]:
        """See Edit.apply. The chain sits under the old layer's names, as `<name>.first`, `.core`, `.last`."""
        layer = layers[self.layer]
        dense = layer.module
        try:
            chain = TuckerConv(dense, self.rank_out, self.rank_in)
        except SpecError as error:
            raise SpecError(f"layer '{self.layer}': {error}") from None
        chain.train(dense.training)
        if fill and self.decompose:
            kernel = kernel_of(dense)
            ranks = (self.rank_out or kernel.shape[0], self.rank_in or kernel.shape[1])
            chain.fill(partial_tucker(kernel, ranks), dense.bias)
        return replace_layer(layer, chain)
