"""The data-aware fit of one layer: rows of a convolution, streamed moments, factors with the nearest output."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

from nnslim.maths.fitting import (
    as_rows,
    fit_by_channels,
    fit_tucker,
    make_problem,
    project_kernel,
    separable_metric,
    solve_dense,
)
from nnslim.maths.lowrank import partial_tucker
from nnslim.maths.moments import ChannelMoments, LinearView, Moments, choose_places, sample_inputs, sample_outputs
from nnslim.methods.tucker.edit import kernel_of
from nnslim.methods.tucker.survey import output_metric

SIZES = {2: (9, 8), 3: (7, 6, 8)}
STRIDES = {2: (1, 2, (1, 2)), 3: (1, 2, (1, 2, 2))}
OUTPUTS, INPUTS, TAPS = 6, 5, 9
VIEW = LinearView(INPUTS, OUTPUTS, TAPS, transposed=False)
UP = LinearView(INPUTS, OUTPUTS, 4, transposed=True)


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def seeded(conv):
    """Give the layer fixed random weights, float64."""
    conv = conv.double()
    for seed, parameter in enumerate(conv.parameters()):
        parameter.data.copy_(random(*parameter.shape, seed=seed))
    return conv


def check_rows(conv, dims):
    """The rows that are sampled, times the kernel as a matrix, are the rows that the layer makes."""
    conv = seeded(conv)
    view = LinearView.of(conv)
    inputs = random(2, conv.in_channels, *SIZES[dims], seed=9)
    outputs = conv(inputs)
    places = choose_places(conv, inputs, outputs, 20, torch.Generator().manual_seed(1))
    x, y = sample_inputs(conv, inputs, places), sample_outputs(conv, outputs, places)
    assert x.shape == (20, view.columns) and y.shape == (20, view.rows)
    bias = 0 if conv.bias is None else conv.bias.repeat_interleave(view.rows // view.outputs)
    made = x @ as_rows(kernel_of(conv).flatten(2), view).T + bias
    torch.testing.assert_close(made, y, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
@pytest.mark.parametrize("dilation", [1, 2])
def test_rows_of_a_convolution_equal_its_outputs(dims, mode, dilation):
    for stride in STRIDES[dims]:
        settings = {"stride": stride, "padding": dilation, "dilation": dilation, "padding_mode": mode}
        check_rows((nn.Conv2d, nn.Conv3d)[dims - 2](4, 6, 3, **settings), dims)


@pytest.mark.parametrize(
    ("conv", "dims"),
    [
        (nn.Conv3d(4, 6, (1, 3, 3), (1, 2, 2), (0, 1, 1)), 3),
        (nn.Conv3d(4, 6, (3, 1, 5), padding=(2, 0, 1), bias=False), 3),
        (nn.Conv3d(4, 6, (3, 3, 1), padding=(1, 2, 0), dilation=(1, 2, 1), padding_mode="replicate"), 3),
        (nn.Conv2d(4, 6, 1, 2), 2),
        (nn.Conv2d(4, 6, (3, 5)), 2),
        (nn.ConvTranspose2d(4, 6, 2, 2), 2),
        (nn.ConvTranspose2d(4, 6, (1, 3), (1, 3), bias=False), 2),
        (nn.ConvTranspose3d(4, 6, 2, 2), 3),
        (nn.ConvTranspose3d(4, 6, (1, 2, 2), (1, 2, 2)), 3),
    ],
    ids=repr,
)
def test_rows_of_uneven_and_transposed_layers_equal_their_outputs(conv, dims):
    check_rows(conv, dims)


@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv3d(4, 6, 3, groups=2),
        nn.Conv2d(4, 6, 3, padding="same"),
        nn.ConvTranspose3d(4, 6, 3, 2, 1),
        nn.ConvTranspose2d(4, 6, 2, 2, padding=1),
        nn.ConvTranspose2d(4, 6, 2, 2, output_padding=1),
        nn.ConvTranspose2d(4, 6, 2, 2, dilation=2),
    ],
    ids=repr,
)
def test_view_layer_without_separate_rows_is_none(conv):
    assert LinearView.of(conv) is None


def test_view_sizes_are_those_of_the_layer():
    conv, up = LinearView.of(nn.Conv3d(4, 6, (1, 3, 3))), LinearView.of(nn.ConvTranspose2d(4, 6, 2, 2))
    assert (conv.columns, conv.rows, conv.bytes) == (36, 6, 8 * 36 * 42)
    assert (up.columns, up.rows, up.bytes) == (4, 24, 8 * 4 * 28)


def test_places_are_distinct_reproducible_and_all_of_them_where_few():
    conv, x = nn.Conv2d(1, 1, 3, padding=1), torch.zeros(2, 1, 5, 4)

    def draw(count, seed):
        places = choose_places(conv, x, x, count, torch.Generator().manual_seed(seed))
        return [tuple(int(v) for v in place) for place in zip(*places, strict=True)]

    everything = list(itertools.product(range(2), range(5), range(4)))
    assert draw(40, 0) == everything and draw(100, 3) == everything
    some = draw(12, 0)
    assert len(set(some)) == 12 and set(some) < set(everything)
    assert some == draw(12, 0) != draw(12, 1)


def some_tiles(view, count=3, rows=40, seed=0):
    """Rows of tiles whose means differ, (x, y) each."""
    columns, outputs = view.columns, view.rows
    mix = random(columns, columns, seed=seed + 50)
    return [
        (
            random(rows + tile, columns, seed=seed + tile) @ mix + 3 * random(columns, seed=seed + 10 + tile),
            random(rows + tile, outputs, seed=seed + 20 + tile) + 2 * random(outputs, seed=seed + 30 + tile),
        )
        for tile in range(count)
    ]


def centred(tiles, per_tile):
    """All rows of all tiles, less the mean of their tile or of all tiles."""
    both = []
    for values in zip(*tiles, strict=True):
        together = torch.cat(values)
        both.append(torch.cat([v - v.mean(0) for v in values]) if per_tile else together - together.mean(0))
    return both


def filled(kind, view, tiles, per_tile):
    moments = kind(view, per_tile=per_tile)
    for x, y in tiles:
        moments.add(x, y)
    return moments


@pytest.mark.parametrize("per_tile", [True, False])
@pytest.mark.parametrize("view", [VIEW, UP], ids=["conv", "transposed"])
def test_moments_equal_the_covariance_of_all_rows(view, per_tile):
    tiles = some_tiles(view)
    moments = filled(Moments, view, tiles, per_tile)
    x, y = centred(tiles, per_tile)
    torch.testing.assert_close(moments.xx, x.T @ x / len(x), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(moments.yx, y.T @ x / len(x), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(moments.variance_y, y.square().mean(0), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(moments.mean_x, torch.cat([t[0] for t in tiles]).mean(0))
    torch.testing.assert_close(moments.mean_y, torch.cat([t[1] for t in tiles]).mean(0))


def test_moments_global_centre_does_not_depend_on_the_tiles():
    tiles = some_tiles(VIEW)
    x, y = (torch.cat(values) for values in zip(*tiles, strict=True))
    one, many = (filled(Moments, VIEW, parts, False) for parts in ([(x, y)], tiles))
    for name in ("xx", "yx", "variance_y"):
        torch.testing.assert_close(getattr(one, name), getattr(many, name), rtol=1e-10, atol=1e-10)
    within = filled(Moments, VIEW, tiles, True)
    assert within.xx.trace() < 0.95 * many.xx.trace()  # the tiles' means differ, and that is taken away


@pytest.mark.parametrize("per_tile", [True, False])
def test_channel_moments_are_the_marginals_of_the_moments(per_tile):
    tiles = some_tiles(VIEW)
    if not per_tile:  # the mean stays in: the wide path leaves the bias alone
        mean = torch.cat([x for x, _ in tiles]).mean(0)
        tiles = [(x - mean, y) for x, y in tiles]
    small, whole = filled(ChannelMoments, VIEW, tiles, per_tile), filled(Moments, VIEW, tiles, per_tile)
    blocks = whole.xx.view(INPUTS, TAPS, INPUTS, TAPS)
    torch.testing.assert_close(small.channels, torch.einsum("ikjk->ij", blocks) / TAPS, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(
        small.taps, torch.einsum("ikil->kl", blocks) / small.channels.trace(), rtol=1e-9, atol=1e-9
    )
    assert small.channels.trace() * small.taps.trace() == pytest.approx(float(whole.xx.trace()), rel=1e-9)
    torch.testing.assert_close(small.variance_y, whole.variance_y, rtol=1e-10, atol=1e-10)


def test_channel_moments_transposed_are_the_covariance_of_the_voxels():
    tiles = some_tiles(UP)
    small, whole = filled(ChannelMoments, UP, tiles, True), filled(Moments, UP, tiles, True)
    torch.testing.assert_close(small.channels, whole.xx, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(small.taps, torch.eye(UP.taps, dtype=torch.float64))
    torch.testing.assert_close(small.variance_y, whole.variance_y)


class Case:
    """One layer with data: smooth inputs that a compressed network disturbed, and the dense layer's outputs."""

    def __init__(self, view=VIEW, *, rows=400, ridge=1e-3, noise=0.1, seed=0):
        self.kernel = random(view.outputs, view.inputs, view.taps, seed=seed) / 3
        mix = random(view.columns, view.columns, seed=seed + 1) * torch.logspace(0, -1.5, view.columns)[:, None]
        clean = random(rows, view.columns, seed=seed + 2) @ mix.double()
        self.y = clean @ as_rows(self.kernel, view).T
        self.x = clean + noise * random(rows, view.columns, seed=seed + 3)
        self.moments = filled(Moments, view, [(self.x, self.y)], False)
        self.metric = torch.diag(random(view.outputs, seed=seed + 4).exp())  # of outputs: always diagonal
        self.view, self.ridge = view, ridge
        m = self.moments
        self.problem = make_problem(self.kernel, view, m.xx, m.yx, m.variance_y, self.metric, ridge)

    def error(self, kernel):
        """Relative output error of a kernel, ridge included, from the data alone."""
        x, y = self.x - self.x.mean(0), self.y - self.y.mean(0)
        size = self.ridge * float(x.square().sum(0).mean() / len(x)) + 1e-12

        def squared(rows, weights):
            by_channel = rows.unflatten(1, (self.view.outputs, -1)).transpose(1, 2)
            lost = (by_channel @ self.metric.T).square().sum() / len(rows)
            return float(lost + size * (self.metric @ weights.flatten(1)).square().sum())

        lost = squared(y - x @ as_rows(kernel, self.view).T, self.kernel - kernel)
        return (lost / squared(y, self.kernel)) ** 0.5


RANKS = [(3, 2), (2, 4), (5, 1), (3, None), (None, 2), (6, 3), (4, 5)]


@pytest.mark.parametrize("view", [VIEW, UP], ids=["conv", "transposed"])
@pytest.mark.parametrize("ranks", RANKS, ids=str)
def test_fit_error_is_the_true_output_error_and_below_that_of_the_weights(view, ranks):
    case = Case(view)
    factors = fit_tucker(case.problem, ranks)
    full = [rank or size for rank, size in zip(ranks, (OUTPUTS, INPUTS), strict=True)]
    assert (factors.out.shape[1], factors.in_.shape[1]) == tuple(full)
    kernel = factors.reconstruct()
    assert factors.error == pytest.approx(case.error(kernel), rel=1e-6, abs=1e-7)
    weights_only = case.error(partial_tucker(case.kernel, tuple(full)).reconstruct())
    assert factors.error < weights_only * (0.97 if min(full[0] / OUTPUTS, full[1] / INPUTS) < 0.7 else 1.0001)


@pytest.mark.parametrize("seed", range(8))
def test_fit_is_never_above_the_weights_only_error(seed):
    case = Case(seed=100 * seed, noise=0.3 * (seed % 2))
    for ranks in itertools.product((1, 3, 5), (1, 2, 4)):
        assert fit_tucker(case.problem, ranks).error <= case.error(partial_tucker(case.kernel, ranks).reconstruct())


@pytest.mark.parametrize("view", [VIEW, UP], ids=["conv", "transposed"])
def test_fit_error_falls_with_either_rank(view):
    case = Case(view)
    errors = torch.tensor([[fit_tucker(case.problem, (a, b)).error for b in range(1, 6)] for a in range(1, 7)])
    assert (errors.diff(dim=0) < 1e-4).all() and (errors.diff(dim=1) < 1e-4).all()  # local optima: a small slack
    assert errors[0, 0] > 3 * errors[-1, -1]


@pytest.mark.parametrize("view", [VIEW, UP], ids=["conv", "transposed"])
@pytest.mark.parametrize("ranks", [(OUTPUTS, INPUTS), (None, INPUTS), (OUTPUTS, None), (None, None)], ids=str)
def test_fit_full_rank_reproduces_the_dense_kernel(view, ranks):
    case = Case(view, noise=0.0)  # what reaches the layer is what reached the dense one
    factors = fit_tucker(case.problem, ranks)
    torch.testing.assert_close(factors.reconstruct(), case.kernel, rtol=0, atol=1e-6)
    assert factors.error < 1e-4
    torch.testing.assert_close(solve_dense(case.problem), case.kernel, rtol=0, atol=1e-9)


def test_fit_full_rank_on_disturbed_inputs_is_the_ridge_solution():
    case = Case(noise=0.5)
    factors = fit_tucker(case.problem, (OUTPUTS, INPUTS))
    torch.testing.assert_close(factors.reconstruct(), solve_dense(case.problem), rtol=0, atol=1e-7)
    assert factors.error < case.error(case.kernel)  # better than the dense weights on what reaches the layer


@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("rank", [1, 2, 4])
def test_fit_one_sided_pointwise_reaches_the_closed_form(side, rank):
    case = Case(LinearView(INPUTS, OUTPUTS, 1, transposed=False))
    factors = fit_tucker(case.problem, (rank, None) if side == 0 else (None, rank))
    whole = (factors.out, factors.in_)[1 - side]
    assert torch.equal(whole, torch.eye(len(whole), dtype=torch.float64))
    # Reduced-rank regression: with one tap any factored side allows every matrix of that rank and no other.
    factor = torch.linalg.cholesky(case.problem.xx)
    seen = torch.linalg.solve_triangular(factor, (case.metric @ case.problem.yx).T, upper=False)
    captured = float(torch.linalg.svdvals(seen)[:rank].square().sum())
    assert factors.error == pytest.approx((1 - captured / case.problem.total) ** 0.5, rel=1e-6)


@pytest.mark.parametrize("rank", [1, 3, 5])
def test_fit_output_side_alone_reaches_the_closed_form(rank):
    case = Case()
    factor = torch.linalg.cholesky(case.problem.xx)
    seen = torch.linalg.solve_triangular(factor, (case.metric @ case.problem.yx).T, upper=False)
    captured = float(torch.linalg.svdvals(seen)[:rank].square().sum())
    assert fit_tucker(case.problem, (rank, None)).error == pytest.approx(
        (1 - captured / case.problem.total) ** 0.5, rel=1e-6
    )


@pytest.mark.parametrize("seed", range(4))
def test_fit_more_sweeps_do_not_raise_the_error(seed):
    case = Case(seed=10 * seed)
    errors = [fit_tucker(case.problem, (3, 2), sweeps=sweeps).error for sweeps in (0, 1, 2, 4, 12)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < errors[0]


def test_fit_same_problem_gives_the_same_bytes():
    first, second = (fit_tucker(Case().problem, (3, 2)) for _ in range(2))
    for one, other in ((first.out, second.out), (first.core, second.core), (first.in_, second.in_)):
        assert torch.equal(one, other)


@pytest.mark.parametrize("ridge", [1e-3, 0.0])
@pytest.mark.parametrize("scale", [1.0, 1e3])
def test_fit_fewer_samples_than_columns_stays_finite(ridge, scale):
    case = Case(rows=12, noise=0.0)
    moments = filled(Moments, VIEW, [(scale * case.x, scale * case.y)], False)
    assert torch.linalg.matrix_rank(moments.xx) <= 11 < VIEW.columns
    problem = make_problem(case.kernel, VIEW, moments.xx, moments.yx, moments.variance_y, case.metric, ridge)
    for ranks in ((3, 2), (None, 2), (3, None), (OUTPUTS, INPUTS)):
        factors = fit_tucker(problem, ranks)
        kernel = factors.reconstruct()
        assert kernel.isfinite().all() and 0 <= factors.error <= 1
        seen = (case.x - case.x.mean(0)) @ as_rows(kernel, VIEW).T
        wanted = case.y - case.y.mean(0)
        assert (wanted - seen).norm() < 1.05 * wanted.norm()


def test_fit_constant_input_channel_stays_finite():
    case = Case()
    x = case.x.unflatten(1, (INPUTS, TAPS)).clone()
    x[:, 2] = 1.5
    moments = filled(Moments, VIEW, [(x.flatten(1), case.y)], True)
    problem = make_problem(case.kernel, VIEW, moments.xx, moments.yx, moments.variance_y, case.metric, 1e-3)
    assert fit_tucker(problem, (3, 2)).reconstruct().abs().max() < 10 * case.kernel.abs().max()


def test_fit_dead_output_channel_does_not_ruin_the_others():
    case = Case()
    kernel, y = case.kernel.clone(), case.y.clone()
    kernel[0], y[:, 0] = 1e-7 * kernel[0], 1e-7 * y[:, 0]
    norm = nn.InstanceNorm3d(OUTPUTS, affine=True)

    def relative(view, rows, weights):
        norm.weight = nn.Parameter(torch.ones(view.outputs))
        moments = filled(Moments, view, [(case.x, rows)], True)
        metric = output_metric(moments, norm, 1e-2)
        problem = make_problem(weights, view, moments.xx, moments.yx, moments.variance_y, metric, 1e-3)
        made = (case.x - case.x.mean(0)) @ as_rows(fit_tucker(problem, (3, 2)).reconstruct(), view).T
        wanted = rows - rows.mean(0)
        return ((wanted - made).square().sum(0) / wanted.square().sum(0))[-5:]

    alone = relative(LinearView(INPUTS, 5, TAPS, transposed=False), y[:, 1:], kernel[1:])
    beside = relative(VIEW, y, kernel)
    torch.testing.assert_close(beside, alone, rtol=0.02, atol=0.005)


def test_metric_is_the_norms_weight_over_the_deviation():
    moments = filled(Moments, VIEW, some_tiles(VIEW), True)
    norm = nn.InstanceNorm3d(OUTPUTS, affine=True)
    norm.weight.data = torch.tensor([1.0, -2.0, 0.5, 0.0, 1.0, 3.0])
    found = output_metric(moments, norm, 0.0)
    wanted = torch.tensor([1, 2, 0.5, 0.01, 1, 3]).double() / (moments.variance_y + norm.eps).sqrt()
    torch.testing.assert_close(found, torch.diag(wanted))
    plain = output_metric(filled(Moments, UP, some_tiles(UP), False), None, 0.01)
    assert torch.equal(plain, plain[0, 0] * torch.eye(OUTPUTS, dtype=torch.float64))


def test_separable_metric_has_the_total_variance():
    problem = Case().problem
    channels, taps = separable_metric(problem)
    assert float(channels.trace() * taps.trace()) == pytest.approx(float(problem.xx.trace()), rel=1e-10)


@pytest.mark.parametrize("ranks", [(3, 2), (6, 2), (3, 5), (6, 5)], ids=str)
def test_fit_by_channels_white_data_is_the_partial_tucker(ranks):
    kernel, eye = Case().kernel, [torch.eye(size, dtype=torch.float64) for size in (INPUTS, TAPS, OUTPUTS)]
    found, wanted = fit_by_channels(kernel, *eye, ranks), partial_tucker(kernel, ranks)
    torch.testing.assert_close(found.reconstruct(), wanted.reconstruct(), rtol=0, atol=1e-9)
    assert found.error == pytest.approx(wanted.error, abs=1e-7)


def test_fit_by_channels_whole_side_has_the_identity():
    case = Case()
    channels, taps = separable_metric(case.problem)
    both, out, in_ = (
        fit_by_channels(case.kernel, channels, taps, case.metric, ranks)
        for ranks in ((3, INPUTS), (3, None), (None, None))
    )
    assert torch.equal(out.in_, torch.eye(INPUTS, dtype=torch.float64)) and out.out.shape == (OUTPUTS, 3)
    torch.testing.assert_close(out.reconstruct(), both.reconstruct(), rtol=0, atol=1e-9)
    torch.testing.assert_close(in_.reconstruct(), case.kernel, rtol=0, atol=1e-9)


@pytest.mark.parametrize("ranks", [(3, 2), (4, 3), (2, 4)], ids=str)
def test_fit_by_channels_beats_the_weights_on_separable_data(ranks):
    case = Case()
    channels, taps = separable_metric(case.problem)

    def lost(kernel):
        difference = torch.einsum("po,oik->pik", case.metric, case.kernel - kernel)
        return float(torch.einsum("oik,ij,kl,ojl->", difference, channels, taps, difference))

    found = fit_by_channels(case.kernel, channels, taps, case.metric, ranks)
    assert lost(found.reconstruct()) < lost(partial_tucker(case.kernel, ranks).reconstruct())
    assert found.error == pytest.approx((lost(found.reconstruct()) / lost(0 * case.kernel)) ** 0.5, rel=1e-3)


@pytest.mark.parametrize("rank", [1, 3, 5])
def test_project_kernel_is_the_least_squares_projection(rank):
    kernel, factor = random(OUTPUTS, INPUTS, TAPS, seed=1), random(INPUTS, rank, seed=2)
    side = random(INPUTS, INPUTS, seed=3)
    channels = side @ side.T
    # Many rows whose sample covariance is exactly channels x identity: a triangular root, up to rotation.
    rows = torch.linalg.cholesky(torch.kron(channels, torch.eye(TAPS, dtype=torch.float64))).T
    z = torch.einsum("nik,ib->nbk", rows.unflatten(1, (INPUTS, TAPS)), factor).flatten(1)
    wanted = torch.linalg.lstsq(z, rows @ kernel.flatten(1).T).solution.T
    found = project_kernel(kernel, channels, factor)
    torch.testing.assert_close(found, wanted.unflatten(1, (rank, TAPS)), rtol=1e-7, atol=1e-9)
