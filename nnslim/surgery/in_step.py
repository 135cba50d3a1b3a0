"""Passes of all tiles that wait together at one layer after the other, while that layer's weights are found."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from nnslim.maths.moments import sample_inputs
from nnslim.network.walk import LayerIndex
from nnslim.surgery.streaming import EndOfPass, Request, Sampled, Tiles, sample_dense

_thread = threading.local()


class InStep:
    """Samples layers of a slim network front to back, each after those before it were set, in one pass of each network.

    `stream_moments` runs both networks anew for each layer. Here the slim network's passes of all tiles wait at the
    layer that is sampled, and go on from there, at the price of memory for the activations that all tiles have at one
    layer. What is sampled is the same.
    """

    def __init__(
        self,
        dense: nn.Module,
        slim: nn.Module,
        tiles: Tiles,
        convs: Mapping[str, nn.Module],
        *,
        samples: int,
        seed: int,
        enough: Callable[[], bool],
    ) -> None:
        """Run the dense network.

        Args:
            dense, slim: in eval mode, on one device. convs: the dense network's layers to sample, in order of
                execution; the slim network has them too, under the same names.
            samples, seed: see `stream_moments`.
            enough: whether memory is left for the passes to go on.
        """
        layers = LayerIndex(slim)
        self._gates = {name: layers[name].module for name in convs}
        self._now: dict[str, nn.Module] = {}
        self._enough = enough
        self._passes: list[tuple[_Pass, dict[str, Sampled]]] = []
        for tile, found in sample_dense(dense, tiles, convs, samples=samples, seed=seed):
            # In float32, as the network computes: the outputs of all layers are kept at once.
            outputs = {name: (places, rows.float()) for name, (places, rows) in found.items()}
            self._passes.append((_Pass(slim, tile), outputs))
        for name, module in self._gates.items():
            module.forward = partial(self._forward, name)

    def __enter__(self) -> InStep:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _forward(self, name: str, x: Tensor) -> Tensor:
        if (mine := getattr(_thread, "mine", None)) is not None:
            mine.wait(name, x)
        module = self._gates[name]
        return self._now[name](x) if name in self._now else type(module).forward(module, x)

    def replace(self, name: str, module: nn.Module) -> None:
        """Let the passes go on through this module in the layer's place."""
        self._now[name] = module

    @torch.inference_mode()
    def fill(self, requests: Sequence[Request]) -> Sequence[Request]:
        """Fill the moments of layers, in order of execution; return those for which memory does not suffice."""
        for done, request in enumerate(requests):
            for one, _ in self._passes:
                one.bring_to(request.layer)
                if not self._enough():
                    self.close()
                    break
            if not self._passes:
                return requests[done:]
            for one, found in self._passes:
                places, outputs = found[request.layer]
                request.add(sample_inputs(request.conv, one.x, places), outputs.double())
        return []

    def close(self) -> None:
        """End the passes and let the layers be as they were."""
        for one, _ in self._passes:
            one.end()
        self._passes = []
        for module in self._gates.values():
            module.__dict__.pop("forward", None)


class _Pass:
    """One tile's pass through a network, in a thread that runs only while somebody waits for it to come to a layer.

    Attributes:
        x: what the layer is given at which the pass waits.
    """

    def __init__(self, network: nn.Module, tile: Tensor) -> None:
        self.x: Tensor | None = None
        self._at: str | None = None
        self._ending = self._over = False
        self._failed: BaseException | None = None
        self._turn, self._back = threading.Semaphore(0), threading.Semaphore(0)
        self._thread = threading.Thread(target=self._run, args=(network, tile), daemon=True)

    def _run(self, network: nn.Module, tile: Tensor) -> None:
        _thread.mine = self
        try:
            with torch.inference_mode():
                network(tile)
        except EndOfPass:
            pass
        except BaseException as error:  # raised where the pass is waited for
            self._failed = error
        self._over, self._at, self.x = True, None, None
        self._back.release()

    def wait(self, name: str, x: Tensor) -> None:
        """Wait at a layer, in the pass's own thread."""
        self._at, self.x = name, x
        self._back.release()
        self._turn.acquire()
        self.x = None
        if self._ending:
            raise EndOfPass

    def bring_to(self, name: str) -> None:
        """Run to a layer; a pass that does not come there runs to its end."""
        while self._at != name and not self._over:
            if self._thread.ident is None:
                self._thread.start()
            else:
                self._turn.release()
            self._back.acquire()
            if self._failed is not None:
                raise self._failed

    def end(self) -> None:
        """Let the pass end at the next layer where it would wait."""
        self._ending = True
        if self._thread.ident is not None:
            self._turn.release()
            self._thread.join()
        del self._thread  # which holds this pass
