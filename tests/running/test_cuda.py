"""The CUDA side, as far as a machine without a GPU can test it, and the rest where there is one.

The forms of a graph run on the CPU, in single precision and under autocast; recording and replaying is played there.
"""

from __future__ import annotations

import contextlib
import gc
import weakref
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from nnslim.compression.compress_network import compress
from nnslim.compression.config import tucker
from nnslim.errors import BackendError
from nnslim.running import engine as backends
from nnslim.running.cuda import Graphed, fastest_variant, variants
from nnslim.running.engine import Settings, check_precision, fastest, make_engine, with_fallback
from nnslim.running.norm_pass import NormPass
from nnslim.running.rewrites import rewritten
from nnslim.running.runner import Runner
from nnslim.running.timing import run_pass

SHAPES = {"plain3d": (1, 1, 16, 16, 16), "anisotropic": (1, 1, 4, 16, 16), "plain2d": (2, 1, 16, 16)}
CUDA = torch.device("cuda")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device here")


def slim_net(tiny_net, kind: str) -> nn.Module:
    dense = tiny_net(kind, features=(8, 16, 24))
    config = tucker(rank_factor=0.5, rank_min=4, transposed=True)
    return compress(dense, [dense.state_dict()], config, SHAPES[kind]).network.eval()


# --- forms of a graph ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", list(SHAPES))
@torch.no_grad()
def test_all_forms_of_a_graph_compute_the_same(tiny_net, kind):
    network, x = slim_net(tiny_net, kind), torch.randn(SHAPES[kind])
    forms = variants(rewritten(network, SHAPES[kind]))
    assert list(forms) == ["plain", "channels last", "folded"]
    assert any(isinstance(module, NormPass) for module in forms["folded"].modules())
    assert not any(isinstance(module, NormPass) for module in forms["plain"].modules())
    wanted = network(x)
    for name, form in forms.items():
        torch.testing.assert_close(form(x), wanted, rtol=1e-4, atol=1e-4 * float(wanted.std()), msg=name)
        with torch.autocast("cpu", torch.bfloat16):  # types that do not fit each other are an error here, too
            found = form(x)
        assert found.dtype == torch.bfloat16 and (found.float() - wanted).norm() < 0.05 * wanted.norm(), name


@torch.no_grad()
def test_statistics_in_sixteen_bits_are_summed_in_more(tiny_net):
    """65504 is the largest number of float16: sums over a volume are beyond it."""
    norm = nn.InstanceNorm2d(1)
    z = (torch.randn(1, 1, 300, 300) + 5).half()
    (found,) = NormPass(None, norm, 1.0, [], keep=True)(z)
    wanted = norm(z.float())
    assert (found.float() - wanted).abs().max() < 0.02


@torch.no_grad()
def test_autocast_does_not_reach_the_statistics():
    """Of many channels, which Triton's kernels leave to torch: a covariance in bfloat16 has two digits."""
    before, norm = nn.Conv3d(80, 96, 1, bias=False), nn.InstanceNorm3d(96)
    layer, z = NormPass(before, norm, 1.0, [], keep=True), torch.randn(1, 80, 6, 7, 8) + 2
    rows = z[0].movedim(0, -1).reshape(-1, 80)
    with torch.autocast("cpu", torch.bfloat16):
        scale, shift = layer.fold(rows)
    y = before(z)[0].double().flatten(1)
    torch.testing.assert_close(scale.double(), (y.var(1, correction=0) + norm.eps).rsqrt(), rtol=1e-5, atol=0)
    torch.testing.assert_close(shift.double(), -y.mean(1) * scale.double(), rtol=1e-4, atol=1e-5)


def test_a_failing_backend_in_sixteen_bits_is_followed_by_eager_on_cuda_alone(tiny_net, monkeypatch):
    tried = []

    def made(network, shape, settings):
        tried.append(settings.backend)
        if settings.backend == "compile":
            raise RuntimeError("no compiler")
        return network

    monkeypatch.setattr(backends, "make_engine", made)
    monkeypatch.setattr(backends, "run_pass", lambda network, x: x)
    network, shape = tiny_net("plain3d"), SHAPES["plain3d"]
    with pytest.raises(BackendError, match="backend compile, precision bf16: RuntimeError: no compiler"):
        with_fallback(network, shape, Settings("compile", "bf16"))
    assert tried == ["compile"]
    on_cuda = SimpleNamespace(parameters=lambda: iter([SimpleNamespace(device=CUDA)]))
    monkeypatch.setattr(torch, "zeros", lambda shape, device: torch.empty(shape, device="meta"))
    assert with_fallback(on_cuda, shape, Settings("compile", "bf16")) == (on_cuda, "eager")
    assert tried == ["compile", "compile", "eager"]


class OnGPU(torch.Tensor):
    """A tensor of the CPU that says it is on a GPU."""

    is_cuda = property(lambda self: True)  # type: ignore[assignment]


class Stream(str):
    """A stream by its name."""

    def wait_stream(self, other: str) -> None:
        assert other != self


@pytest.fixture
def played(monkeypatch):
    """What `Graphed` asks of torch.cuda, played on a CPU: a recorded network is run again by each replay."""
    state = SimpleNamespace(stream="main", pools=[], fails="", replayed=[])

    class Recording:
        def __init__(self) -> None:
            self.replay = lambda: state.replayed.append(self)

        def pool(self) -> tuple[int, int]:
            return (0, 7)

    @contextlib.contextmanager
    def record(graph, pool, stream, capture_error_mode):
        assert capture_error_mode == "thread_local" and stream == "side"
        state.pools.append(pool)
        if state.fails:
            raise RuntimeError(state.fails)
        yield

    names = {
        "device": lambda device: contextlib.nullcontext(),
        "stream": lambda stream: contextlib.nullcontext(),
        "current_stream": lambda device: Stream(state.stream),
        "Stream": lambda device: Stream("side"),
        "synchronize": lambda device: None,
        "CUDAGraph": Recording,
        "graph": record,
    }
    for name, value in names.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(Graphed, "recordings", weakref.WeakSet())
    monkeypatch.setattr(Graphed, "run", lambda self, x: self.network(x))  # without autocast: equal to the bit
    return state


class Counted(nn.Module):
    """2 x, and how often."""

    passes = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.passes += 1
        return 2 * x


def test_what_a_recorded_pass_reads_and_hands_out(played):
    network, x = Counted(), torch.randn(1, 1, 4, 4).as_subclass(OnGPU)
    engine = Graphed(network)
    with torch.inference_mode():  # as in nnU-Net: what is held must not be of it
        first = engine(x)
    assert network.passes == 4 and len(played.replayed) == 1, "three to warm up, one recorded, then it is replayed"
    assert not engine.input.is_inference() and not engine.input.requires_grad
    assert torch.equal(first, 2 * x) and first.data_ptr() != engine.output.data_ptr(), "the caller's own"
    engine(x + 1)
    assert torch.equal(engine.input, x + 1) and len(played.replayed) == 2 and network.passes == 4
    assert torch.equal(first, 2 * x)
    for other in (torch.randn(2, 1, 4, 4).as_subclass(OnGPU), x.half()):
        assert torch.equal(engine(other), 2 * other) and len(played.replayed) == 2, "not recorded for these"
    played.stream = "another"
    assert torch.equal(engine(x), 2 * x) and len(played.replayed) == 2, "a stream that does not wait for the first"


def test_recordings_of_a_stream_share_their_memory(played):
    x = torch.randn(1, 1, 4, 4).as_subclass(OnGPU)
    engines = [Graphed(Counted()) for _ in range(3)]
    for one, stream in zip(engines, ("main", "main", "another"), strict=True):
        played.stream = stream
        one(x)
    assert played.pools == [None, (0, 7), None]
    del one
    engines.clear(), gc.collect()
    played.stream = "main"
    Graphed(Counted())(x)
    assert played.pools[-1] is None, "those that are gone lend nothing"


def test_a_pass_that_cannot_be_recorded_runs_without_and_says_so(played, caplog):
    x, played.fails = torch.randn(1, 1, 4, 4).as_subclass(OnGPU), "operation not permitted when stream is capturing\n."
    engine = Graphed(Counted())
    assert torch.equal(engine(x), 2 * x) and torch.equal(engine(x + 1), 2 * x + 2)
    said = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert said == [
        "the pass is not recorded as a CUDA graph, and runs without: operation not permitted when stream is capturing"
    ]
    assert len(played.pools) == 1 and not played.replayed, "tried once"

    def broken(x: torch.Tensor) -> torch.Tensor:
        raise ValueError("a real fault")

    engine = Graphed(Counted())
    engine.network.forward = broken
    with pytest.raises(ValueError, match="a real fault"):
        engine(x)


def test_forms_that_fail_are_left_out_and_the_fastest_stays_recorded(tiny_net, monkeypatch, caplog):
    graph = rewritten(slim_net(tiny_net, "plain2d"), SHAPES["plain2d"])
    seconds = {"plain": 0.3, "channels last": 0.2, "folded": 0.1}

    def timed(engines, shape, rounds=3):
        if rounds == 1 and any(isinstance(module, NormPass) for module in engines[0].modules()):
            raise RuntimeError("no C compiler\nfor Triton")
        return [seconds["channels last" if hasattr(engine.network, "layout") else "plain"] for engine in engines]

    monkeypatch.setattr("nnslim.running.cuda.pass_seconds", timed)
    found = fastest_variant(graph, SHAPES["plain2d"], torch.bfloat16)
    assert isinstance(found, Graphed) and found.dtype == torch.bfloat16 and found.network.layout == torch.channels_last
    assert "folded cannot be used on this GPU: no C compiler" in caplog.text
    monkeypatch.setattr("nnslim.running.cuda.pass_seconds", lambda *args, **others: 1 / 0)
    assert fastest_variant(graph, SHAPES["plain2d"]).network is graph


@torch.no_grad()
def test_recorded_pass_on_a_cpu_is_the_network(tiny_net):
    network, x = tiny_net("plain3d"), torch.randn(SHAPES["plain3d"])
    engine = Graphed(network)
    assert torch.equal(engine(x), network(x)) and engine.graph is None


@pytest.mark.slow
@torch.no_grad()
def test_compiled_graph_equals_the_network(tiny_net):
    """torch.compile with the CPU's inductor, of the same graph that is compiled on CUDA."""
    network, x = slim_net(tiny_net, "plain3d"), torch.randn(SHAPES["plain3d"])
    compiled = make_engine(network, tuple(x.shape), Settings("compile"))
    torch.testing.assert_close(compiled(x), network(x), rtol=1e-4, atol=1e-5)


# --- precision ----------------------------------------------------------------------------------------------------


def test_precisions_on_cuda(tiny_net, monkeypatch):
    network, shape = tiny_net("plain3d"), SHAPES["plain3d"]
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "Some GPU")
    for able in (True, False):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True, able=able: able)
        check_precision(network, shape, Settings("eager", "f16"), CUDA)
        if able:
            check_precision(network, (1, 1, 16, 16, 4), Settings("auto", "bf16"), CUDA)  # a fault of CPUs alone
        else:
            with pytest.raises(BackendError, match="bf16 is not available: Some GPU lacks it"):
                check_precision(network, shape, Settings("auto", "bf16"), CUDA)
    with pytest.raises(BackendError, match="f16 on CUDA needs eager, compile or auto, found stock"):
        check_precision(network, shape, Settings("stock", "f16"), CUDA)
    with pytest.raises(BackendError, match="int8 needs the openvino backend, which runs on the CPU, found cuda"):
        check_precision(network, shape, Settings("auto", "int8"), CUDA)


# --- with a GPU ---------------------------------------------------------------------------------------------------


@needs_gpu
@pytest.mark.parametrize("kind", list(SHAPES))
@pytest.mark.parametrize("precision", ["f32", "bf16"])
@torch.inference_mode()
def test_eager_engine_on_cuda_equals_the_network(tiny_net, kind, precision):
    network, x = slim_net(tiny_net, kind).to(CUDA), torch.randn(SHAPES[kind], device=CUDA)
    engine = make_engine(network, tuple(x.shape), Settings("eager", precision))
    wanted, found = network(x), engine(x)
    assert engine.graph is not None, "recorded"
    assert (found.float() - wanted).norm() < 0.05 * wanted.norm()
    again = engine(2 * x)
    assert not torch.equal(again, found) and (engine(x) - found).abs().max() == 0, "outputs are the caller's own"
    wider = torch.randn(3, *x.shape[1:], device=CUDA)
    assert (engine(wider).float() - network(wider)).norm() < 0.05 * network(wider).norm()


@needs_gpu
@torch.inference_mode()
def test_triton_pass_on_cuda_equals_torch():
    before, norm, after = nn.Conv3d(16, 64, 1), nn.InstanceNorm3d(64, affine=True), nn.Conv3d(64, 24, 1)
    layer = NormPass(before, norm, 0.01, [after], keep=True).to(CUDA)
    z = torch.randn(2, 16, 24, 24, 24, device=CUDA)
    wide = nn.functional.leaky_relu(norm.to(CUDA)(before.to(CUDA)(z)), 0.01)
    assert layer.fits_gpu(z)
    for kind, close in ((torch.float32, 1e-3), (torch.half, 2e-2)):
        for found, wanted in zip(layer(z.to(kind)), (after.to(CUDA)(wide), wide), strict=True):
            assert (found.float() - wanted).norm() < close * wanted.norm()


@needs_gpu
@torch.inference_mode()
def test_auto_on_cuda_measures_and_gives_the_same(tiny_net, tmp_path, monkeypatch):
    monkeypatch.setenv("NNSLIM_CACHE", str(tmp_path))
    network, x = slim_net(tiny_net, "plain3d").to(CUDA), torch.randn(SHAPES["plain3d"], device=CUDA)
    engine, name = fastest(network, tuple(x.shape), Settings())
    assert name in ("stock", "eager", "compile")
    wanted = network(x)
    assert (run_pass(engine, x).float() - wanted).norm() < 0.05 * wanted.norm()
    held = Runner(network, Settings("eager"))
    with torch.autocast("cuda"):
        assert (held(x).float() - wanted).norm() < 0.05 * wanted.norm()
