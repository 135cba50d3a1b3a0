"""Running on CUDA: which form of a graph is the fastest there, and passes that are recorded once and replayed."""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence

import torch
from torch import Tensor, fx, nn

from nnslim.errors import RewriteError
from nnslim.running.graph import layer_of
from nnslim.running.rewrites import fold_norms

_WARM = 3  # passes before recording, in which libraries choose their algorithms and kernels are compiled
_log = logging.getLogger("nnslim")


class Graphed(nn.Module):
    """A network under autocast whose pass is recorded as a CUDA graph and replayed: no time between two kernels.

    A slim network has many short kernels; without this, launching them takes longer than they do. What is put out
    belongs to the caller. Input that is not like the first, or not on CUDA, and networks that cannot be recorded, run
    as without.
    """

    def __init__(self, network: nn.Module, dtype: torch.dtype = torch.half) -> None:
        """Take the network; nothing is recorded yet.

        Args:
            network: in eval mode, on its device. dtype: of autocast.
        """
        super().__init__()
        self.network, self.dtype = network, dtype
        self._graph: torch.cuda.CUDAGraph | None = None
        self._input: Tensor | None = None
        self._output: Tensor | None = None
        self._tried = False

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, *patch) -> (B, heads, *patch)."""
        if not x.is_cuda:
            return self.network(x)
        if not self._tried:
            self._tried = True
            self._record(x)
        held = self._input
        if self._graph is None or held is None or x.shape != held.shape or x.dtype != held.dtype:
            return self._run(x)
        held.copy_(x)
        self._graph.replay()
        return self._output.clone()

    def _run(self, x: Tensor) -> Tensor:
        # Autocast keeps the weights that it has cast until the outermost block ends: a recorded pass must not use them.
        with torch.autocast("cuda", self.dtype, cache_enabled=False):
            return self.network(x)

    def _record(self, x: Tensor) -> None:
        # Not in inference mode: the tensors live on, and are written to outside of it.
        with torch.inference_mode(False), torch.no_grad():
            held = torch.empty_like(x, memory_format=torch.contiguous_format)
            held.copy_(x)
            stream = torch.cuda.Stream(x.device)
            stream.wait_stream(torch.cuda.current_stream(x.device))
            try:
                with torch.cuda.stream(stream):
                    for _ in range(_WARM):
                        self._run(held)
                torch.cuda.current_stream(x.device).wait_stream(stream)
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph):
                    made = self._run(held)
            except RuntimeError as error:  # an operation that waits for the host, or no memory for a second set
                _log.info("the pass is not recorded as a CUDA graph: %s", str(error).splitlines()[0])
                torch.cuda.synchronize(x.device)
                return
        self._graph, self._input, self._output = graph, held, made


def variants(graph: fx.GraphModule) -> dict[str, nn.Module]:
    """Return forms of a rewritten graph that may be the fastest on a GPU; all compute the same.

    "plain": as it is. "channels last": in that layout, which tensor cores like and instance norm does not. "folded":
    channels last, each 1x1 -> norm -> activation -> 1x1 one pass, see `NormPass`.
    """
    made: dict[str, nn.Module] = {"plain": graph}
    layout = torch.channels_last if any(_is_flat(layer_of(node)) for node in graph.graph.nodes) else None
    made["channels last"] = _Laid(graph, layout or torch.channels_last_3d)
    try:
        folded = fold_norms(graph)
    except RewriteError as error:
        _log.info("norms are not folded: %s", error)
    else:
        made["folded"] = _Laid(folded, layout or torch.channels_last_3d)
    return made


def fastest_variant(graph: fx.GraphModule, shape: Sequence[int]) -> nn.Module:
    """Measure the forms of a graph on its device, each recorded as it will run, and return the fastest.

    Args:
        graph: on CUDA. shape: (B, C, *patch).
    """
    from nnslim.running.select import measure

    kept: dict[str, nn.Module] = {}
    for name, variant in variants(graph).items():
        try:
            measure([recorded := Graphed(variant)], shape, rounds=1)
            kept[name] = recorded
        except Exception as error:  # whatever a compiler raises
            _log.info("%s cannot be used: %s", name, (str(error).splitlines() or [type(error).__name__])[0])
    if not kept:
        return graph
    seconds = dict(zip(kept, measure(list(kept.values()), shape), strict=True))
    best = min(seconds, key=seconds.__getitem__)
    _log.info("on CUDA: %s", ", ".join(f"{name} {value * 1e3:.1f} ms" for name, value in seconds.items()))
    return kept[best].network


class _Laid(nn.Module):
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


def _is_flat(layer: nn.Module | None) -> bool:
    return isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d))
