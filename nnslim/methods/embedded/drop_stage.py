"""Drop the deepest stages of nnU-Net's encoder-decoder networks, with their decoder levels."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from nnslim.errors import SpecError
from nnslim.network.spec import Edit, register_edit
from nnslim.network.walk import LayerIndex

_LISTS = ("features_per_stage", "kernel_sizes", "strides", "n_conv_per_stage", "n_blocks_per_stage")
_LEVELS = ("stages", "transpconvs", "seg_layers")  # of the decoder, deepest first
_ATTRIBUTES = ("output_channels", "strides", "kernel_sizes")


@register_edit
@dataclass(frozen=True)
class DropStageEdit(Edit):
    """Take out the deepest encoder stages and as many decoder levels.

    The transposed convolution that follows then reads the deepest stage that is left, which has as many channels as
    the decoder level it read before: every other weight keeps its shape. Names are those of a network that is built
    with fewer stages, so that its plans describe it (`arguments`).

    Attributes:
        stages: how many.
    """

    stages: int
    kind: ClassVar[str] = "drop_stage"

    def apply(self, layers: LayerIndex, *, fill: bool) -> Callable[[], None]:
        """See Edit.apply."""
        encoder, decoder = stages_of(layers.root)
        left = len(encoder.stages) - self.stages
        if self.stages < 1 or left < 2:
            raise SpecError(
                f"{self.stages} of {len(encoder.stages)} stages cannot be dropped: at least one goes and two stay"
            )
        before = [(module, dict(module._modules), dict(vars(module))) for module in (encoder, decoder)]
        encoder.stages = nn.Sequential(*list(encoder.stages)[:left])
        for name in _LEVELS:
            setattr(decoder, name, nn.ModuleList(list(getattr(decoder, name))[self.stages :]))
        for name in _ATTRIBUTES:
            value = getattr(encoder, name, None)
            if isinstance(value, (list, tuple)) and len(value) == left + self.stages:
                setattr(encoder, name, value[:left])

        def undo() -> None:
            for module, children, attributes in before:
                vars(module).update(attributes)
                module._modules.update(children)

        return undo

    def renamed(self, name: str, dense: nn.Module) -> str | None:
        """Return what a layer of the dense network is called afterwards, None for one that went with the stages."""
        parts = name.split(".")
        if parts[:2] == ["encoder", "stages"] and int(parts[2]) >= len(dense.encoder.stages) - self.stages:
            return None
        if parts[0] == "decoder" and parts[1] in _LEVELS:
            place = int(parts[2]) - self.stages
            return None if place < 0 else ".".join((*parts[:2], str(place), *parts[3:]))
        return name

    def arguments(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """Return the keyword arguments of nnU-Net's U-Nets (plans: arch_kwargs) with the deepest stages left out.

        nnU-Net's trainer reads the strides in the plans (deep supervision), so plans tell the stages that are there.

        Raises:
            SpecError: they are of another architecture.
        """
        count, stages = arguments.get("n_stages"), self.stages
        if not isinstance(count, int) or count - stages < 2 or "n_conv_per_stage_decoder" not in arguments:
            found = sorted(arguments)
            raise SpecError(f"{stages} of {count!r} stages cannot be dropped from an architecture of {found}")
        made = {**arguments, "n_stages": count - stages}
        for name in _LISTS:
            if isinstance(value := arguments.get(name), (list, tuple)) and len(value) == count:
                made[name] = list(value[: count - stages])
        decoder = arguments["n_conv_per_stage_decoder"]
        if isinstance(decoder, (list, tuple)):  # from the deepest level up
            made["n_conv_per_stage_decoder"] = list(decoder[stages:])
        return made


def stages_of(network: nn.Module) -> tuple[nn.Module, nn.Module]:
    """Return encoder and decoder of a network whose stages can be dropped.

    Raises:
        SpecError: it is built otherwise.
    """
    encoder, decoder = getattr(network, "encoder", None), getattr(network, "decoder", None)
    count = len(getattr(encoder, "stages", ()))
    parts = [getattr(decoder, name, None) for name in _LEVELS]
    if not count or not all(isinstance(part, nn.ModuleList) and len(part) == count - 1 for part in parts):
        raise SpecError(
            f"{type(network).__name__} has no encoder.stages and a decoder with one level fewer: stages can be dropped "
            "from nnU-Net's PlainConvUNet and ResidualEncoderUNet"
        )
    return encoder, decoder
