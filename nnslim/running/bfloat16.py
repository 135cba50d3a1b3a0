"""Where bfloat16 may be computed on a CPU: on processors that have it, and without the convolutions that go wrong.

oneDNN's bfloat16 kernels for AMX give a wrong answer, larger than the right one, for a 3D convolution whose output is
one voxel wide and whose stride along that axis is above 1 (pytorch#169688). Which release and which processor have the
fault is unknown here, so no such convolution is computed in bfloat16 at all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from nnslim.patching import AttributePatch
from nnslim.running.machine import has_fast_bfloat16


def wants_bfloat16(precision: str, device: torch.device) -> bool:
    """Return whether a training of that precision (f32, bf16, auto) is to compute in bfloat16; on a CPU alone."""
    return device.type == "cpu" and (precision == "bf16" or (precision == "auto" and has_fast_bfloat16()))


def bfloat16_is_safe(network: nn.Module, input_shape: Sequence[int]) -> bool:
    """Return whether no 3D convolution of the network has an output one voxel wide and a stride above 1 along it.

    Nothing is computed, and the network is not changed. A network that cannot be followed without computing is taken
    to be unsafe.

    Args:
        network: in the mode and with the outputs (deep supervision) that it will have.
        input_shape: (B, C, *patch).
    """
    like = next(network.parameters(), torch.empty(0))
    seen = _Convolutions()
    try:
        with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True), seen:
            network(torch.empty(tuple(input_shape), dtype=like.dtype, device=like.device))
    except Exception:  # a network's own code may raise anything
        return False
    return not seen.at_fault


def in_bfloat16(forward: Callable[[Tensor], Any]) -> Callable[[Tensor], Any]:
    """Wrap a forward on the CPU in autocast; the outputs are float32 again, for the sake of a loss's sums."""

    def autocast_forward(data: Tensor) -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            outputs = forward(data)
        return outputs.float() if torch.is_tensor(outputs) else [output.float() for output in outputs]

    return autocast_forward


@contextmanager
def passes_in_bfloat16(network: nn.Module, wanted: bool = True) -> Iterator[None]:
    """Let the forward passes of a network on the CPU be in bfloat16 inside the block, where that is wanted.

    Outside of it the network is as it was: its copies, and what looks at it, never see the wrapper.
    """
    if not wanted:
        yield
        return
    forward = AttributePatch(network, "forward", in_bfloat16)
    forward.apply()
    try:
        yield
    finally:
        forward.undo()


class _Convolutions(TorchDispatchMode):
    """Notes the convolutions at fault, whichever way a network calls them."""

    at_fault = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if "convolution" in func._schema.name:
            names = [argument.name for argument in func._schema.arguments]
            given = {**dict(zip(names, args, strict=False)), **(kwargs or {})}
            if made.dim() == 5 and made.shape[-1] == 1 and given["stride"][-1] > 1:
                self.at_fault = self.at_fault or not given.get("transposed", False)
        return made
