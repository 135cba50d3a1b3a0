"""Rewrites and engines: the same function, by the issue's bounds, with the counts that they promise."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from nnslim.compression.compress_network import compress
from nnslim.compression.config import tucker
from nnslim.errors import BackendError, RewriteError
from nnslim.network.cost import measure_cost
from nnslim.network.graph import layer_of, trace
from nnslim.running.cpu import DirectConv, TiledTransposed, channels_last, direct
from nnslim.running.engine import Settings, candidates, make_engine, with_fallback
from nnslim.running.norm_pass import NormPass
from nnslim.running.rewrites import fold_norms, merge_products, rewritten, split_concatenations
from nnslim.running.timing import run_pass

KINDS = ("plain3d", "plain2d", "residual3d", "anisotropic")
SHAPES = {"plain3d": (1, 1, 16, 16, 16), "plain2d": (1, 1, 16, 16), "anisotropic": (1, 1, 4, 16, 16)}


def shape_for(kind: str, batch: int = 1) -> tuple[int, ...]:
    return (batch, *SHAPES.get(kind, SHAPES["plain3d"])[1:])


@pytest.fixture(params=[(kind, slim) for kind in KINDS for slim in (False, True)], ids=lambda p: f"{p[0]}-{p[1]}")
def network_and_shape(request, tiny_net):
    """A network with norms that matter, dense or with every convolution factored, in float64."""
    kind, slim = request.param
    network = tiny_net(kind, features=(8, 16, 24)).eval()
    with torch.no_grad():
        for number, parameter in enumerate(network.parameters()):
            generator = torch.Generator().manual_seed(number)
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    if slim:
        config = tucker(rank_factor=0.5, rank_min=1, transposed=True)
        network = compress(network, [network.state_dict()], config, shape_for(kind)).network.eval()
    return network.double(), shape_for(kind, 2)


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


def data(shape, dtype=torch.float64) -> torch.Tensor:
    # A mean far from zero: the statistics must not lose digits to it.
    return torch.randn(shape, generator=torch.Generator().manual_seed(5), dtype=dtype) + 3


@torch.no_grad()
@pytest.mark.parametrize("rewrite", [split_concatenations, merge_products, fold_norms])
def test_each_rewrite_is_exact(network_and_shape, rewrite):
    network, shape = network_and_shape
    before = copy.deepcopy(network.state_dict())
    graph = trace(network, shape)
    made = rewrite(graph)
    x = data(shape)
    assert made is not graph
    assert relative(made(x), network(x)) < 1e-10
    assert relative(graph(x), network(x)) < 1e-12, "the graph that was rewritten still works"
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())


@torch.no_grad()
def test_shapes_noted_after_each_rewrite_are_those_that_run(network_and_shape, monkeypatch):
    """Only new nodes are looked at; the low-rank pass is not computed block by block to learn its shape."""
    network, shape = network_and_shape
    monkeypatch.setattr(NormPass, "by_torch", None)
    graphs = [trace(network, shape)]
    for rewrite in (split_concatenations, merge_products, fold_norms):
        graphs.append(rewrite(graphs[-1]))
    monkeypatch.undo()

    class Compare(torch.fx.Interpreter):
        def run_node(self, node):
            found = super().run_node(node)
            noted, real = tree_leaves(node.meta["val"]), tree_leaves(found)
            assert [(value.shape, value.dtype) for value in noted] == [(value.shape, value.dtype) for value in real]
            return found

    for graph in graphs:
        Compare(graph).run(data(shape))
    kept = [node for node in graphs[-1].graph.nodes if node.op == "placeholder"]
    assert kept[0].meta["val"] is next(iter(graphs[0].graph.nodes)).meta["val"]


@torch.no_grad()
def test_all_rewrites_are_exact_in_double_and_close_in_single_precision(network_and_shape):
    network, shape = network_and_shape
    x = data(shape)
    wanted = network(x)
    assert relative(fold_norms(rewritten(network, shape))(x), wanted) < 1e-10
    single = network.float()
    engine = channels_last(rewritten(single, shape))
    assert relative(engine(x.float()).double(), wanted) < 1e-5
    for item in range(2):  # the norm's statistics are each item's own
        assert relative(engine(x[item : item + 1].float()).double(), wanted[item : item + 1]) < 1e-5


@torch.no_grad()
def test_without_native_kernels_the_same(network_and_shape, monkeypatch):
    network, shape = network_and_shape
    x = data(shape)
    wanted = network(x)
    for module in ("norm_pass", "cpu"):
        monkeypatch.setattr(f"nnslim.running.{module}.kernels", lambda: None)
    engine = channels_last(rewritten(network.float(), shape))
    assert relative(engine(x.float()).double(), wanted) < 1e-5


def test_slim_graph_never_holds_a_wide_tensor(tiny_net):
    """Every 1x1 lies inside a pass, every concatenation is gone, transposed convolutions end in rank channels."""
    dense = tiny_net("plain3d", features=(8, 16, 32)).eval()
    config = tucker(rank_factor=0.5, rank_min=1, transposed=True)
    slim = compress(dense, [dense.state_dict()], config, shape_for("plain3d")).network.eval()
    graph = fold_norms(rewritten(slim, shape_for("plain3d")))
    nodes = list(graph.graph.nodes)
    assert not [node for node in nodes if node.target is torch.cat]
    kinds = [type(layer_of(node)) for node in nodes if node.op == "call_module"]
    assert not {nn.InstanceNorm3d, nn.LeakyReLU} & set(kinds)
    assert kinds.count(NormPass) == 6
    factored = [layer_of(node) for node in nodes if isinstance(layer_of(node), NormPass)][1:]
    assert all(layer.w is not None and not layer.keep for layer in factored)
    plain, rewrote = measure_cost(slim, shape_for("plain3d")).macs(), 0
    rewrote = measure_cost(rewritten(slim, shape_for("plain3d")), shape_for("plain3d")).macs()
    assert rewrote < plain


@torch.no_grad()
def test_tensor_with_two_readers_is_kept_and_not_overwritten():
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm, self.act = nn.Conv2d(8, 8, 3, padding=1), nn.InstanceNorm2d(8), nn.LeakyReLU(0.1)

        def forward(self, x):
            y = self.conv(x)
            return y + self.act(self.norm(y)), y

    network, x = Two().eval(), torch.randn(1, 8, 6, 6)
    for made, wanted in zip(channels_last(rewritten(network, x.shape))(x), network(x), strict=True):
        torch.testing.assert_close(made, wanted, rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("gain", [True, False])
def test_constant_channels_and_norms_without_weights(gain):
    network = nn.Sequential(nn.Conv3d(1, 8, 1), nn.InstanceNorm3d(8, affine=gain), nn.LeakyReLU(), nn.Conv3d(8, 8, 1))
    x = torch.full((1, 1, 4, 4, 4), 7.0)
    graph = fold_norms(trace(network.eval(), x.shape))
    # The norm of a constant channel multiplies the rounding of its mean by 1 / sqrt(eps) = 316: 2e-4 in fp32.
    torch.testing.assert_close(graph(x), network(x), rtol=2e-3, atol=2e-3)
    graph = fold_norms(trace(network.double(), x.shape))
    torch.testing.assert_close(graph(x.double()), network(x.double()), rtol=1e-10, atol=1e-10)


def test_path_that_depends_on_the_input_is_refused_and_run_as_it_is():
    class Depends(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(1, 1, 1)

        def forward(self, x):
            return self.conv(x) if x.sum() > 0 else x

    with pytest.raises(RewriteError, match="Depends cannot be traced"):
        trace(Depends(), (1, 1, 4, 4))
    engine, backend = with_fallback(Depends().eval(), (1, 1, 4, 4), Settings("eager"))
    assert backend == "eager" and run_pass(engine, torch.ones(1, 1, 4, 4)).shape == (1, 1, 4, 4)
    with pytest.raises(RewriteError, match=r"does not run on \(1, 2, 8, 8\)"):
        trace(nn.Sequential(nn.Conv2d(1, 1, 1)), (1, 2, 8, 8))


@torch.no_grad()
def test_engine_keeps_its_weights_and_stock_is_the_network(tiny_net):
    network, x = tiny_net("plain3d").eval(), torch.randn(shape_for("plain3d"))
    engine = make_engine(network, x.shape, Settings("eager"))
    before = engine(x)
    for parameter in network.parameters():
        parameter.zero_()
    assert torch.equal(engine(x), before)
    assert make_engine(network, x.shape, Settings("stock")) is network


def test_precision_needs_openvino_and_a_backend_that_fails_falls_back(tiny_net, monkeypatch, caplog):
    network, shape = tiny_net("plain3d").eval(), shape_for("plain3d")
    with pytest.raises(BackendError, match="precision f16 needs the openvino backend, found eager"):
        make_engine(network, shape, Settings("eager", "f16"))
    monkeypatch.setattr(torch, "compile", lambda module: (_ for _ in ()).throw(RuntimeError("no compiler")))
    with caplog.at_level("WARNING", logger="nnslim"):
        _, backend = with_fallback(network, shape, Settings("compile"))
    assert backend == "eager" and "backend compile cannot be used: RuntimeError: no compiler" in caplog.text
    assert candidates(torch.device("cuda")) == ["stock", "eager", "compile"]


# --- layers --------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("inputs, outputs", [(1, 8), (8, 8), (5, 8), (16, 24), (3, 7)])
@pytest.mark.parametrize("kernel, stride, padding", [(3, 1, 1), (3, 2, 1), (1, 1, 0), (5, 1, 2), (2, 2, 0)])
def test_direct_convolution_equals_torchs(dims, inputs, outputs, kernel, stride, padding):
    torch.manual_seed(0)
    kind = nn.Conv2d if dims == 2 else nn.Conv3d
    conv = kind(inputs, outputs, kernel, stride, padding)
    x = torch.randn(2, inputs, *(9, 13, 30)[3 - dims :])
    made = direct(conv)
    assert isinstance(made, DirectConv)
    assert relative(made(x), conv(x)) < 2e-6
    layout = torch.channels_last if dims == 2 else torch.channels_last_3d
    assert made(x).is_contiguous(memory_format=layout) and made(x).stride(1) == 1
    assert relative(direct(kind(inputs, outputs, kernel, stride, padding, bias=False))(x), conv(x)) > 0.01


@torch.no_grad()
@pytest.mark.parametrize("kernel", [(2, 2, 2), (1, 2, 2), (3, 2, 1)])
@pytest.mark.parametrize("width", [5, 8, 16])
@pytest.mark.parametrize("add", [False, True])
def test_tiled_transposed_convolution_equals_torchs(kernel, width, add):
    torch.manual_seed(0)
    conv = nn.ConvTranspose3d(12, width, kernel, kernel)
    x = torch.randn(2, 12, 3, 5, 7)
    more = torch.randn(conv(x).shape) if add else None
    made = direct(conv)
    assert isinstance(made, TiledTransposed)
    wanted = conv(x) if more is None else conv(x) + more
    kept = None if more is None else more.clone()
    assert relative(made(x, more), wanted) < 2e-6
    assert more is None or torch.equal(more, kept)
    assert direct(nn.ConvTranspose3d(4, 4, 3, 2, 1)) is None and direct(nn.Conv3d(4, 4, 3, padding="same")) is None
    assert direct(nn.Conv3d(4, 4, 3, padding=1, padding_mode="reflect")) is None
