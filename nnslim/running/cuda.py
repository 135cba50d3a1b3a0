"""Running on CUDA: which form of a graph is the fastest there, and passes that are recorded once and replayed."""

from __future__ import annotations

import copy
import logging
import threading
import weakref
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, fx, nn

from nnslim.errors import RewriteError, first_line
from nnslim.network.graph import layer_of
from nnslim.running.rewrites import fold_norms
from nnslim.running.timing import pass_seconds

_WARM = 3  # passes before recording, in which libraries choose their algorithms and kernels are compiled
_log = logging.getLogger("nnslim")


class Graphed(nn.Module):
    """A network under autocast whose pass is recorded as a CUDA graph and replayed: no time between two kernels.

    A slim network has many short kernels; without this, launching them takes longer than they do. What is put out
    belongs to the caller. The first input is the one to record for: input of another shape or type, on another stream
    or not on CUDA, and networks that cannot be recorded, run as without.

    All recordings of a stream share their memory, so that the folds of an ensemble need it once: one is replayed at a
    time, from its input to the copy of its output.
    """

    recordings: ClassVar[weakref.WeakSet[Graphed]] = weakref.WeakSet()
    _one_at_a_time = threading.RLock()

    def __init__(self, network: nn.Module, dtype: torch.dtype = torch.half) -> None:
        """Take a network in eval mode, on its device; nothing is recorded yet."""
        super().__init__()
        self.network, self.dtype = network, dtype
        self.graph: torch.cuda.CUDAGraph | None = None
        self.stream: torch.cuda.Stream | None = None
        self.input: Tensor | None = None
        self.output: Tensor | None = None
        self._tried = False

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, *patch) -> (B, heads, *patch)."""
        if not x.is_cuda:
            return self.network(x)
        with torch.cuda.device(x.device), Graphed._one_at_a_time:
            if not self._tried:
                self._tried = True
                self._record(x)
            if not self._fits(x):
                return self.run(x)
            self.input.copy_(x)
            self.graph.replay()
            return self.output.clone()

    def _fits(self, x: Tensor) -> bool:
        """Return whether the recording is of such a pass."""
        if (held := self.input) is None or torch.cuda.current_stream(x.device) != self.stream:
            return False
        return (x.shape, x.dtype, x.device) == (held.shape, held.dtype, held.device)

    def run(self, x: Tensor) -> Tensor:
        # Autocast keeps the weights that it has cast until the outermost block ends: a recorded pass must not use them.
        with torch.autocast(x.device.type, self.dtype, cache_enabled=False):
            return self.network(x)

    def _record(self, x: Tensor) -> None:
        # Not in inference mode: the tensors live on, and are written to outside of it.
        with torch.inference_mode(False), torch.no_grad():
            current = torch.cuda.current_stream(x.device)
            try:
                held = torch.empty_like(x, memory_format=torch.contiguous_format)
                held.copy_(x)
                side = torch.cuda.Stream(x.device)
                side.wait_stream(current)
                with torch.cuda.stream(side):
                    for _ in range(_WARM):
                        self.run(held)
                current.wait_stream(side)
                graph = torch.cuda.CUDAGraph()
                # On a stream of this device: torch's own may be of another. Other threads may go on, e.g. one that
                # pins memory: only what this one does must be recordable.
                pool = next((one.graph.pool() for one in Graphed.recordings if one.stream == current), None)
                with torch.cuda.graph(graph, pool=pool, stream=side, capture_error_mode="thread_local"):
                    made = self.run(held)
            except Exception as error:  # an operation that waits for the host, memory; a real fault comes back in run
                _log.warning("the pass is not recorded as a CUDA graph, and runs without: %s", first_line(error))
                torch.cuda.synchronize(x.device)
                return
        self.graph, self.stream, self.input, self.output = graph, current, held, made
        Graphed.recordings.add(self)


def variants(graph: fx.GraphModule) -> dict[str, nn.Module]:
    """Return forms of a rewritten graph that may be the fastest on a GPU; all compute the same.

    "plain": as it is. "channels last": in that layout, which tensor cores like and instance norm does not. "folded":
    channels last, each 1x1 -> norm -> activation -> 1x1 one pass, see `NormPass`.
    """
    flat = any(isinstance(layer_of(node), (nn.Conv2d, nn.ConvTranspose2d)) for node in graph.graph.nodes)
    layout = torch.channels_last if flat else torch.channels_last_3d
    made = {"plain": graph, "channels last": _ChannelsLast(graph, layout)}
    try:
        made["folded"] = _ChannelsLast(fold_norms(graph), layout)
    except RewriteError as error:
        _log.info("norms are not folded: %s", error)
    return made


def fastest_variant(graph: fx.GraphModule, shape: Sequence[int], dtype: torch.dtype = torch.half) -> nn.Module:
    """Measure the forms of a graph on its device, each recorded as it will run; return the fastest, recorded.

    A form that fails, e.g. without a compiler for Triton, is left out with a message.

    Args:
        graph: on CUDA. shape: (B, C, *patch). dtype: of autocast.
    """
    kept: dict[str, Graphed] = {}
    for name, variant in variants(graph).items():
        recorded = Graphed(variant, dtype)
        try:
            pass_seconds([recorded], shape, rounds=1)
            kept[name] = recorded
        except Exception as error:  # whatever a compiler raises
            _log.warning("%s cannot be used on this GPU: %s", name, first_line(error))
    if not kept:
        return Graphed(graph, dtype)
    seconds = dict(zip(kept, pass_seconds(list(kept.values()), shape), strict=True))
    best = min(seconds, key=seconds.__getitem__)
    _log.info("on CUDA: %s", ", ".join(f"{name} {value * 1e3:.1f} ms" for name, value in seconds.items()))
    return kept[best]


class _ChannelsLast(nn.Module):
    """A graph whose input and weights lie channels last."""

    def __init__(self, graph: nn.Module, layout: torch.memory_format) -> None:
        super().__init__()
        self.graph, self.layout = copy.deepcopy(graph), layout
        sides = 4 if layout == torch.channels_last else 5
        for parameter in self.graph.parameters():
            if parameter.dim() == sides:
                parameter.data = parameter.data.contiguous(memory_format=layout)

    def forward(self, x: Tensor) -> Tensor:
        return self.graph(x.contiguous(memory_format=self.layout))
