"""Find each real layer of a network once, under all the names it goes by.

nnU-Net registers one convolution in several places: `convs.j.conv` is `convs.j.all_modules.0`, and `decoder.encoder`
repeats the whole encoder. The forward pass uses one of the places, the state dict lists all. Code that replaces a layer
must therefore go by object identity and fill every slot.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import nn

from nnslim.errors import SpecError, nearest


@dataclass(frozen=True)
class Layer:
    """One module object and every place that holds it.

    Attributes:
        name: the first name that `named_modules` gives; used in specs, tables and messages.
        aliases: all dotted names, `name` among them.
        module: the object itself.
        slots: (parent module, key in the parent) for each place.
    """

    name: str
    aliases: tuple[str, ...]
    module: nn.Module
    slots: tuple[tuple[nn.Module, str], ...]

    def matches(self, *patterns: str) -> bool:
        """Return whether any name of the layer fits one of the shell patterns."""
        return any(fnmatchcase(alias, pattern) for alias in self.aliases for pattern in patterns)


def unwrap(network: nn.Module) -> nn.Module:
    """Return the plain network inside torch.compile's and DistributedDataParallel's wrappers."""
    while True:
        if hasattr(network, "_orig_mod"):
            network = network._orig_mod
        elif isinstance(network, nn.parallel.DistributedDataParallel):
            network = network.module
        else:
            return network


def is_compiled(network: nn.Module) -> bool:
    """Return whether torch.compile wraps a network. Its class is found by name: importing it takes a second."""
    return any(cls.__name__ == "OptimizedModule" for cls in type(network).__mro__)


class LayerIndex(Mapping[str, Layer]):
    """All modules of `root` by any of their names; iteration gives each object once, in registration order."""

    def __init__(self, network: nn.Module) -> None:
        self.root = network
        slots: defaultdict[nn.Module, list[tuple[nn.Module, str]]] = defaultdict(list)
        for parent in network.modules():
            for key, child in parent._modules.items():
                if child is not None:
                    slots[child].append((parent, key))
        names: defaultdict[nn.Module, list[str]] = defaultdict(list)
        for name, module in network.named_modules(remove_duplicate=False):
            if name:
                names[module].append(name)
        self._layers = {
            aliases[0]: Layer(aliases[0], tuple(aliases), module, tuple(slots[module]))
            for module, aliases in names.items()
        }
        self._by_alias = {alias: layer for layer in self._layers.values() for alias in layer.aliases}

    def __getitem__(self, name: str) -> Layer:
        if name not in self._by_alias:
            raise SpecError(f"no layer named '{name}' in the network; {nearest(name, self._layers)}")
        return self._by_alias[name]

    def get(self, name: str, default: Layer | None = None) -> Layer | None:  # type: ignore[override]
        """Return the layer of that name, or the default."""
        return self._by_alias.get(name, default)

    def __contains__(self, name: object) -> bool:
        return name in self._by_alias

    def __iter__(self) -> Iterator[str]:
        return iter(self._layers)

    def __len__(self) -> int:
        return len(self._layers)

    def of_type(self, *types: type[nn.Module]) -> list[Layer]:
        """Return the layers that are instances of `types`, each once."""
        return [layer for layer in self._layers.values() if isinstance(layer.module, types)]


def replace_layer(layer: Layer, new: nn.Module) -> Callable[[], None]:
    """Put `new` into every slot of `layer` and return a function that puts the old object back."""

    def put(module: nn.Module) -> None:
        for parent, key in layer.slots:
            parent._modules[key] = module

    put(new)
    return lambda: put(layer.module)


@contextmanager
def deep_supervision(network: nn.Module, enabled: bool) -> Iterator[None]:
    """Switch nnU-Net's deep supervision on or off: heads that do not run cannot be traced."""
    before = {module: module.deep_supervision for module in network.modules() if hasattr(module, "deep_supervision")}
    for module in before:
        module.deep_supervision = enabled
    try:
        yield
    finally:
        for module, value in before.items():
            module.deep_supervision = value
