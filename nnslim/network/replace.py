"""Put another module in every place that holds a layer, with a way back."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from nnslim.network.walk import Layer


def replace_layer(layer: Layer, new: nn.Module) -> Callable[[], None]:
    """Put `new` into every slot of `layer` and return a function that puts the old object back."""
    for parent, key in layer.slots:
        parent._modules[key] = new

    def undo() -> None:
        for parent, key in layer.slots:
            parent._modules[key] = layer.module

    return undo
