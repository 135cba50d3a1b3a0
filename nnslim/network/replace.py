"""Put another module in every place that holds a layer, with a way back."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

from torch import nn

from nnslim.errors import SpecError
from nnslim.network.spec import Edit
from nnslim.network.walk import Layer, LayerIndex


def replace_layer(layer: Layer, new: nn.Module) -> Callable[[], None]:
    """Put `new` into every slot of `layer` and return a function that puts the old object back."""

    def put(module: nn.Module) -> None:
        for parent, key in layer.slots:
            parent._modules[key] = module

    put(new)
    return lambda: put(layer.module)


class ReplacingEdit(Edit):
    """An edit that puts a module in the place of one layer, under the old layer's names.

    Attributes:
        layer: any of the layer's names.
    """

    layer: str
    separable: ClassVar[bool] = True

    def apply(self, layers: LayerIndex, *, fill: bool) -> Callable[[], None]:
        """See Edit.apply."""
        layer = layers[self.layer]
        try:
            new = self.made(layer.module, fill)
        except SpecError as error:
            raise SpecError(f"layer '{self.layer}': {error}") from None
        return replace_layer(layer, new.train(layer.module.training))

    def made(self, dense: nn.Module, fill: bool) -> nn.Module:
        """Return the new module, its weights computed from the old layer's where `fill` is set.

        Raises:
            SpecError: it cannot stand for that layer.
        """
        raise NotImplementedError
