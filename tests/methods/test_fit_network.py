"""Weights of a whole network from data: front to back, in bounded memory, reproducible."""

from __future__ import annotations

import copy
import gc
import threading
import weakref

import pytest
import torch
from torch import nn

from nnslim.maths.moments import Moments
from nnslim.methods.tucker import TuckerConfig, fit_chains, plan_tucker
from nnslim.methods.tucker.edit import TuckerConv
from nnslim.methods.tucker.fit_chains import fit_tucker_network
from nnslim.network.cost import measure_cost
from nnslim.network.spec import SlimSpec, apply_spec
from nnslim.network.walk import LayerIndex
from nnslim.surgery.in_step import InStep
from nnslim.surgery.streaming import Request, stream_moments

KINDS = ["plain3d", "plain2d", "residual3d", "anisotropic"]
PATCH = {"plain3d": (8, 8, 8), "plain2d": (16, 16), "residual3d": (8, 8, 8), "anisotropic": (4, 8, 8)}


def smooth_tiles(kind, count, seed=0):
    """Smooth random images with a little noise, (1, 1, *patch) each."""
    generator = torch.Generator().manual_seed(seed)
    size = PATCH[kind]
    mode = "bilinear" if len(size) == 2 else "trilinear"
    made = []
    for _ in range(count):
        coarse = torch.randn(1, 1, *(max(2, length // 3) for length in size), generator=generator)
        fine = nn.functional.interpolate(coarse, size, mode=mode)
        made.append(fine + 0.1 * torch.randn(fine.shape, generator=generator))
    return made


class Setup:
    """A dense network, a plan, and the slim network from the weights alone."""

    def __init__(self, tiny_net, kind="plain3d", **settings):
        self.dense = tiny_net(kind, features=(8, 12, 16))
        self.config = TuckerConfig(**{"rank_factor": 0.5, "rank_min": 2, "only_if_cheaper": False, **settings})
        self.cost = measure_cost(self.dense, (1, 1, *PATCH[kind]))
        self.spec = SlimSpec(plan_tucker(self.dense, self.config, self.cost).edits)
        self.slim = apply_spec(self.spec, copy.deepcopy(self.dense), fill=True)

    def fitted(self, tiles, config=None, **options):
        slim = copy.deepcopy(self.slim)
        errors = fit_tucker_network(self.dense, slim, config or self.config, self.cost, tiles, **options)
        return slim, errors

    def with_fit(self, **settings):
        return self.config.model_copy(update={"fit": self.config.fit.model_copy(update=settings)})

    @torch.no_grad()
    def distance(self, slim, tiles):
        """Relative distance of the logits from the dense ones'."""
        lost = sum(float((slim(tile) - self.dense(tile)).square().sum()) for tile in tiles)
        return (lost / sum(float(self.dense(tile).square().sum()) for tile in tiles)) ** 0.5


@pytest.mark.parametrize("kind", KINDS)
def test_fit_network_logits_are_nearer_than_those_of_the_weights_alone(tiny_net, kind):
    setup = Setup(tiny_net, kind)
    slim, errors = setup.fitted(smooth_tiles(kind, 4))
    unseen = smooth_tiles(kind, 3, seed=9)
    assert setup.distance(slim, unseen) < 0.8 * setup.distance(setup.slim, unseen)
    assert set(errors) == {edit.layer for edit in setup.spec.edits}
    assert all(0 < error < 1 for error in errors.values())


def test_fit_network_keeps_the_structure_and_the_dense_network(tiny_net):
    setup = Setup(tiny_net)
    before = {key: value.clone() for key, value in setup.dense.state_dict().items()}
    empty = apply_spec(setup.spec, copy.deepcopy(setup.dense))
    slim, _ = setup.fitted(smooth_tiles("plain3d", 2))
    shapes = {key: value.shape for key, value in empty.state_dict().items()}
    assert {key: value.shape for key, value in slim.state_dict().items()} == shapes
    assert [layer.aliases for layer in LayerIndex(slim).values()] == [
        layer.aliases for layer in LayerIndex(empty).values()
    ]
    assert all(torch.equal(value, before[key]) for key, value in setup.dense.state_dict().items())
    for network in (setup.dense, slim):
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in network.modules())
    assert all(p.requires_grad and not p.is_inference() for p in slim.parameters())
    slim(torch.ones(1, 1, 8, 8, 8)).sum().backward()  # what was fitted can be trained further


@pytest.mark.parametrize("group", [1, 3])
def test_fit_network_same_seed_gives_the_same_bytes_and_another_seed_does_not(tiny_net, group):
    setup, tiles = Setup(tiny_net), smooth_tiles("plain3d", 2)
    config = setup.with_fit(samples=200, layers_per_pass=group)
    first, second, other = (setup.fitted(tiles, config, seed=seed)[0].state_dict() for seed in (4, 4, 5))
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert not all(torch.equal(first[key], other[key]) for key in first)


def test_fit_network_layers_in_groups_keep_the_structure_and_most_of_the_gain(tiny_net):
    setup, tiles = Setup(tiny_net), smooth_tiles("plain3d", 4)
    unseen = smooth_tiles("plain3d", 3, seed=9)
    progress = []
    one, _ = setup.fitted(tiles)
    grouped, errors = setup.fitted(
        tiles, setup.with_fit(layers_per_pass=3), on_layer=lambda done, total: progress.append((done, total))
    )
    chains = {layer.name for layer in LayerIndex(grouped).of_type(TuckerConv)}
    assert chains == {layer.name for layer in LayerIndex(one).of_type(TuckerConv)} == set(errors)
    assert setup.distance(grouped, unseen) < setup.distance(setup.slim, unseen)
    total = progress[-1][1]
    assert [done for done, _ in progress] == [*range(3, total, 3), total]


def test_fit_network_full_rank_is_the_dense_network(tiny_net):
    setup = Setup(tiny_net, rank_factor=1.0, one_sided=False)
    assert len(setup.spec.edits) >= 3
    slim, errors = setup.fitted(smooth_tiles("plain3d", 2))
    assert max(errors.values()) < 1e-2
    assert setup.distance(slim, smooth_tiles("plain3d", 2, seed=5)) < 1e-2


def test_fit_network_compensation_brings_the_logits_nearer(tiny_net, monkeypatch):
    monkeypatch.setitem(PATCH, "plain3d", (16, 16, 16))  # enough positions for what is refitted not to overfit
    setup, tiles = Setup(tiny_net, include=("encoder.*",)), smooth_tiles("plain3d", 12)
    untouched = "decoder.stages.1.convs.0.conv.weight"
    slim, _ = setup.fitted(tiles)
    plain, _ = setup.fitted(tiles, compensate=False)
    assert torch.equal(plain.state_dict()[untouched], setup.dense.state_dict()[untouched])
    assert not torch.equal(slim.state_dict()[untouched], setup.dense.state_dict()[untouched])
    unseen = smooth_tiles("plain3d", 3, seed=9)
    assert setup.distance(slim, unseen) < setup.distance(plain, unseen)


def test_fit_network_transposed_layers_and_heads_are_fitted(tiny_net):
    setup = Setup(tiny_net, transposed=True, heads=True, first_layer=True)
    names = {edit.layer for edit in setup.spec.edits}
    assert {"decoder.transpconvs.0", "decoder.seg_layers.1", "encoder.stages.0.0.convs.0.conv"} <= names
    slim, errors = setup.fitted(smooth_tiles("plain3d", 4))
    assert set(errors) == names
    unseen = smooth_tiles("plain3d", 3, seed=9)
    assert setup.distance(slim, unseen) < 0.8 * setup.distance(setup.slim, unseen)


@pytest.mark.parametrize("transposed", [False, True])
def test_fit_network_little_memory_is_nearly_as_good(tiny_net, monkeypatch, transposed):
    setup, tiles = Setup(tiny_net, transposed=transposed), smooth_tiles("plain3d", 4)
    unseen = smooth_tiles("plain3d", 3, seed=9)
    exact, _ = setup.fitted(tiles)
    kinds = []
    real = InStep.fill

    def watched(self, requests):
        kinds.extend((type(request.moments).__name__, request.project is not None) for request in requests)
        return real(self, requests)

    monkeypatch.setattr(InStep, "fill", watched)
    # In bytes, because a megabyte holds the moments of any tiny layer: room for rank space, not for whole layers; in
    # the second case only for that of transposed convolutions, so that theirs are wide, too.
    memory = 10_000 if transposed else 290_000
    narrow, errors = setup.fitted(tiles, setup.with_fit(memory_mb=memory / 2**20))
    assert ("ChannelMoments", False) in kinds and ("Moments", True) in kinds
    assert set(errors) == {edit.layer for edit in setup.spec.edits}
    lost = [setup.distance(network, unseen) for network in (exact, narrow, setup.slim)]
    assert lost[1] < lost[2]
    assert transposed or lost[1] < lost[0] + 0.6 * (lost[2] - lost[0])


def test_fit_network_channel_statistics_alone_are_finite_and_not_worse_than_the_weights(tiny_net):
    setup, tiles = Setup(tiny_net), smooth_tiles("plain3d", 4)
    narrow, _ = setup.fitted(tiles, setup.with_fit(memory_mb=0))
    unseen = smooth_tiles("plain3d", 3, seed=9)
    assert setup.distance(narrow, unseen) < 1.02 * setup.distance(setup.slim, unseen)


class CountedTiles:
    """Makes each tile when it is asked for and counts how many are alive."""

    def __init__(self, count):
        self.count, self.alive, self.most, self.made = count, 0, 0, 0

    def __len__(self):
        return self.count

    def _died(self):
        self.alive -= 1

    def __iter__(self):
        for number in range(self.count):
            tile = torch.randn(1, 1, 8, 8, 8, generator=torch.Generator().manual_seed(number))
            self.alive += 1
            self.made += 1
            self.most = max(self.most, self.alive)
            weakref.finalize(tile, self._died)
            yield tile
            del tile


def threads():
    return {thread.name for thread in threading.enumerate()}


def memory_is_short_after(count, monkeypatch):
    """Let a fit find no more than half of its memory from the measurement of that number on."""
    left = iter([100, *[90] * count])
    monkeypatch.setattr(fit_chains, "available_bytes", lambda: next(left, 50))


def untouched(network):
    return not any("forward" in module.__dict__ or module._forward_pre_hooks for module in network.modules())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("lost", [5, 13])  # memory is short at the second layer that is fitted, or later
def test_fit_network_from_passes_in_step_is_the_fit_from_passes_of_their_own(tiny_net, monkeypatch, kind, lost):
    setup, tiles, before = Setup(tiny_net, kind), smooth_tiles(kind, 3), threads()
    config = setup.with_fit(samples=200)
    memory_is_short_after(0, monkeypatch)
    wanted, errors = setup.fitted(tiles, config)
    for allowed in (1000, lost):
        memory_is_short_after(allowed, monkeypatch)
        found, same_errors = setup.fitted(tiles, config)
        assert same_errors == errors
        state = wanted.state_dict()
        assert all(torch.equal(value, state[key]) for key, value in found.state_dict().items())
        assert untouched(found) and untouched(setup.dense) and threads() == before


def test_fit_network_runs_each_network_once_for_each_tile(tiny_net):
    setup, tiles = Setup(tiny_net), CountedTiles(3)
    first = LayerIndex(setup.dense)["encoder.stages.0.0.convs.0.conv"].module
    runs = []
    first.register_forward_hook(lambda *_: runs.append(1))
    setup.slim = copy.deepcopy(setup.slim)
    LayerIndex(setup.slim)["encoder.stages.0.0.convs.0.norm"].module.register_forward_hook(lambda *_: runs.append(2))
    setup.fitted(tiles, setup.with_fit(samples=200))
    # One more tile and pass of the dense network find the norms that follow.
    assert tiles.made == 4 and runs.count(1) == 4 and runs.count(2) == 3


class Stop(Exception):  # noqa: N818  stands for Ctrl-C
    pass


def test_fit_network_that_is_stopped_leaves_no_pass_behind(tiny_net):
    setup, before = Setup(tiny_net), threads()

    def stop(done, total):
        if done == 2:
            raise Stop

    slim = copy.deepcopy(setup.slim)
    with pytest.raises(Stop):
        fit_tucker_network(setup.dense, slim, setup.config, setup.cost, smooth_tiles("plain3d", 3), on_layer=stop)
    assert threads() == before and untouched(slim)
    slim = copy.deepcopy(setup.slim)
    handle = LayerIndex(slim)["decoder.stages.0.convs.0.norm"].module.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        fit_tucker_network(setup.dense, slim, setup.config, setup.cost, smooth_tiles("plain3d", 3))
    handle.remove()
    assert threads() == before and untouched(slim)


@pytest.mark.parametrize("count", [3, 9])
def test_fit_network_keeps_no_tile_where_memory_is_short(tiny_net, monkeypatch, count):
    memory_is_short_after(0, monkeypatch)
    setup, tiles = Setup(tiny_net), CountedTiles(count)
    gc.disable()  # reference counts alone must do
    try:
        setup.fitted(tiles, setup.with_fit(samples=200, layers_per_pass=4))
    finally:
        gc.enable()
    assert tiles.alive == 0 and tiles.made > 2 * count


class WatchedTiles(CountedTiles):
    """Counts the living tensors each time when the next tile is asked for."""

    def __iter__(self):
        self.living = []
        for tile in super().__iter__():
            yield tile
            gc.collect()
            self.living.append(sum(1 for thing in gc.get_objects() if type(thing) is torch.Tensor))


def test_stream_moments_memory_does_not_grow_with_the_tiles(tiny_net):
    dense = tiny_net("plain3d")
    name = "encoder.stages.1.0.convs.0.conv"
    conv = LayerIndex(dense)[name].module
    from nnslim.maths.moments import LinearView

    sizes = []
    for count in (2, 8):
        request = Request(name, conv, Moments(LinearView.of(conv), per_tile=True))
        tiles = WatchedTiles(count)
        stream_moments(dense, dense, tiles, [request], samples=400, seed=0)
        assert request.moments.count == count * min(400 // count, 4**3)
        sizes.append(tiles.living)
    assert len(sizes[1]) == 8 and max(sizes[1]) - min(sizes[1]) <= 4


def test_stream_moments_grouping_of_layers_does_not_matter(tiny_net):
    from nnslim.maths.moments import LinearView

    dense, tiles = tiny_net("plain3d"), smooth_tiles("plain3d", 2)
    names = ["encoder.stages.1.0.convs.0.conv", "encoder.stages.1.0.convs.1.conv", "decoder.stages.0.convs.0.conv"]

    def requests():
        convs = [LayerIndex(dense)[name].module for name in names]
        return [Request(n, c, Moments(LinearView.of(c), per_tile=True)) for n, c in zip(names, convs, strict=True)]

    together, apart = requests(), requests()
    stream_moments(dense, dense, tiles, together, samples=100, seed=3)
    for request in apart:
        stream_moments(dense, dense, tiles, [request], samples=100, seed=3)
    for one, other in zip(together, apart, strict=True):
        assert torch.equal(one.moments.xx, other.moments.xx) and torch.equal(one.moments.yx, other.moments.yx)


def test_stream_moments_pair_inputs_of_the_slim_with_outputs_of_the_dense_network():
    def made(scale):
        network = nn.Sequential(nn.Conv2d(1, 1, 1), nn.Conv2d(1, 2, 1)).eval()
        for parameter in network.parameters():
            parameter.data.fill_(scale)
        return network

    from nnslim.maths.moments import LinearView

    dense, slim = made(1.0), made(3.0)
    tile = torch.arange(16.0).view(1, 1, 4, 4)
    request = Request("1", dense[1], Moments(LinearView.of(dense[1]), per_tile=False))
    stream_moments(dense, slim, [tile], [request], samples=16, seed=0)
    assert float(request.moments.mean_x) == pytest.approx(3 * 7.5 + 3)
    assert request.moments.mean_y.tolist() == pytest.approx([7.5 + 1 + 1] * 2)
    variance = float(tile.var(correction=0))
    assert float(request.moments.xx) == pytest.approx(9 * variance)
    assert request.moments.yx.flatten().tolist() == pytest.approx([3 * variance] * 2)
