"""SlimSpec: a versioned, JSON-serialisable list of structural edits that turns a base network into a slim one.

A slim model = a base architecture + a SlimSpec + weights. A method decides on the edits; everything else (saving,
loading, counting, benchmarks, fine-tuning) only needs the spec.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from torch import nn

from nnslim.errors import SpecError, nearest
from nnslim.network.walk import LayerIndex, replace_layer, unwrap

SPEC_VERSION = 1
_SPEC_ATTRIBUTE = "_nnslim_spec"
_KINDS: dict[str, type[Edit]] = {}


class Held(Protocol):
    """What must stay true of the weights of a network while it learns."""

    def hold(self) -> None:
        """Restore it after a step of an optimiser."""

    def advance(self, share: float) -> None:
        """Move on to what is due after a share of the training, 0..1."""


class Edit:
    """One structural change. Subclasses are frozen dataclasses of JSON values, registered under their `kind`.

    Attributes:
        separable: it concerns one layer, named by its field `layer`, and its method's other edits stand without it.
        trained: training made the network what the edit says, so the trained network may be compressed further.
    """

    kind: ClassVar[str]
    separable: ClassVar[bool] = False
    trained: ClassVar[bool] = False

    def apply(self, layers: LayerIndex, *, fill: bool) -> Callable[[], None]:
        """Change the network in place and return an undo.

        Args:
            layers: index of the network as the edits before this one left it.
            fill: compute the new layers' weights from the old ones; False leaves them uninitialised, for a
                `load_state_dict` that follows.
        Raises:
            SpecError: the edit does not fit the network; nothing was changed.
        """
        raise SpecError(f"edit kind '{self.kind}' cannot be applied")

    def held(self, layers: LayerIndex) -> Held | None:
        """Return what must stay true while the network learns, taken from its weights as they are now."""
        return None

    def arguments(self, arguments: Mapping[str, Any]) -> dict[str, Any] | None:
        """Return the architecture's keyword arguments that build the network with the edit already made.

        Such an edit goes into the architecture that plans.json names, not into the spec. None: only the spec says it.
        """
        return None

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-serialisable dictionary with the edit's kind and fields."""
        return {"kind": self.kind, **dataclasses.asdict(self)}


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


def register_edit(cls: type[Edit]) -> type[Edit]:
    """Class decorator: make an edit known by its `kind`, so that specs on disk can name it."""
    if not dataclasses.is_dataclass(cls):
        raise SpecError(f"edit kind '{cls.kind}' must be a dataclass")
    known = _KINDS.setdefault(cls.kind, cls)
    if known is not cls:
        raise SpecError(f"edit kind '{cls.kind}' is already registered by {known.__module__}.{known.__qualname__}")
    return cls


def _edit_from_dict(raw: Any, position: int) -> Edit:
    where = f"spec edit {position}"
    if not isinstance(raw, dict) or not isinstance(raw.get("kind"), str):
        raise SpecError(f"{where}: expected an object with a 'kind', found {raw!r}")
    cls = _KINDS.get(raw["kind"])
    if cls is None:
        raise SpecError(f"{where}: unknown kind '{raw['kind']}'; {nearest(raw['kind'], _KINDS)}")
    where = f"{where} ({cls.kind})"
    values = {key: value for key, value in raw.items() if key != "kind"}
    fields = {field.name for field in dataclasses.fields(cls)}
    if unknown := sorted(set(values) - fields):
        raise SpecError(f"{where}: unknown field '{unknown[0]}'; {nearest(unknown[0], fields)}")
    hints = typing.get_type_hints(cls)
    for name, value in values.items():
        allowed = typing.get_args(hints[name]) if isinstance(hints[name], types.UnionType) else (hints[name],)
        if not any(isinstance(value, kind) and not (kind is int and isinstance(value, bool)) for kind in allowed):
            raise SpecError(f"{where}, field '{name}': expected {hints[name]}, found {value!r}")
    try:
        return cls(**values)
    except TypeError as error:
        raise SpecError(f"{where}: {error}") from None


@dataclass(frozen=True)
class SlimSpec:
    """An ordered tuple of edits. Equal specs give equal structures."""

    edits: tuple[Edit, ...] = ()
    version: int = SPEC_VERSION

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form: {"version": 1, "edits": [{"kind": ..., ...}, ...]}."""
        return {"version": self.version, "edits": [edit.to_dict() for edit in self.edits]}

    @classmethod
    def from_dict(cls, raw: Any) -> SlimSpec:
        """Read the JSON form.

        Raises:
            SpecError: another version, an unknown kind or field, a value of the wrong type.
        """
        if not isinstance(raw, dict) or not isinstance(raw.get("edits"), (list, tuple)):
            raise SpecError(f"a spec is an object with 'version' and 'edits', found {str(raw)[:80]!r}")
        if raw.get("version") != SPEC_VERSION:
            raise SpecError(
                f"spec version {raw.get('version')!r} found, this nnslim reads version {SPEC_VERSION}; update nnslim"
            )
        return cls(tuple(_edit_from_dict(edit, position) for position, edit in enumerate(raw["edits"])))


def spec_of(network: nn.Module) -> SlimSpec | None:
    """Return the spec that was applied to this network, or None for a network that nnslim has not changed."""
    return getattr(network, _SPEC_ATTRIBUTE, None)


def held_by(network: nn.Module) -> list[Held]:
    """Return what must stay true while a network learns, one entry for each of its edits that asks for something."""
    network = unwrap(network)
    spec = spec_of(network)
    found = [edit.held(LayerIndex(network)) for edit in spec.edits] if spec else []
    return [held for held in found if held is not None]


def forget_spec(network: nn.Module) -> None:
    """Remove the spec from a network, which becomes a base of its own."""
    if spec_of(network) is not None:
        object.__delattr__(network, _SPEC_ATTRIBUTE)


def apply_spec(spec: SlimSpec, network: nn.Module, *, fill: bool = False) -> nn.Module:
    """Apply all edits to `network`, in place, and return it.

    Args:
        spec: the edits, in order.
        network: a plain network (not wrapped by torch.compile or DDP) that has no spec yet.
        fill: compute weights from the dense layers (True), or structure only (False).
    Raises:
        SpecError: the network already has a spec, or an edit does not fit; the network is then as it was before.
    """
    if spec_of(network) is not None:
        raise SpecError("the network already carries a SlimSpec; apply edits to its base network instead")
    return extend_spec(spec.edits, network, fill=fill)


def extend_spec(edits: tuple[Edit, ...], network: nn.Module, *, fill: bool = False) -> nn.Module:
    """Apply more edits to a network, in place, after those that it already carries; else as `apply_spec`."""
    before = spec_of(network)
    with ExitStack() as undo:
        for edit in edits:
            # A new index for each edit: a later edit may name a layer that an earlier one made.
            undo.callback(edit.apply(LayerIndex(network), fill=fill))
        undo.pop_all()
    done = () if before is None else before.edits
    object.__setattr__(network, _SPEC_ATTRIBUTE, SlimSpec((*done, *edits)))
    return network
